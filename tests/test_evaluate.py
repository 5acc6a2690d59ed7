"""Metrics against closed forms, the evaluator against images of known quality, and evaluate.py's command."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import make_image_folder

import data
import evaluate
import train
from models import loading, named
from models.loading import load_model
from utils import metrics, plotting
from utils.checkpoint import save_weights

ROOT = Path(evaluate.__file__).parent


# ----------------------------------------------------------------------------------------------- distances

def gaussian(n, mean, scale, seed):
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * scale + mean


def test_frechet_distance_of_gaussians_has_a_closed_form():
    """Diagonal Gaussians: |mu - nu|^2 + sum (s - r)^2."""
    mean, scale = torch.tensor([1., 0, -2, 3]), torch.tensor([1., 2, .5, 3])
    fd = metrics.frechet_distance(gaussian(200000, 0., 1., 0), gaussian(200000, mean, scale, 1))
    assert fd == pytest.approx(14 + (0 + 1 + .25 + 4), rel=.02)


def test_frechet_distance_is_a_distance():
    a, b = gaussian(500, 0., 1., 0), gaussian(500, .3, 1.4, 1)
    fd = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(b, a) == pytest.approx(fd, rel=1e-6)
    rotation = torch.linalg.qr(gaussian(4, 0., 1., 2))[0]
    assert metrics.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(fd, rel=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr sqrt(A B), not tr sqrt(A) sqrt(B), which is the same only where the two commute: A = diag(4, 1),
    B = [[2.5, 1.5], [1.5, 2.5]]; the eigenvalues of A B have the sum 12.5 and the product 16."""
    corners = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]]) * .75 ** .5  # covariance 1 (n - 1 = 3)
    a = corners @ torch.diag(torch.tensor([2., 1.]))
    b = corners @ torch.linalg.cholesky(torch.tensor([[2.5, 1.5], [1.5, 2.5]])).T
    assert metrics.frechet_distance(a, b) == pytest.approx(10 - 2 * 20.5 ** .5, abs=1e-3)
    assert metrics.frechet_distance(a, b + 3) == pytest.approx(18 + 10 - 2 * 20.5 ** .5, abs=1e-3)


def test_precision_and_recall_see_different_failures():
    real = gaussian(600, 0., 1., 0)
    narrow, wide = gaussian(600, 0., .2, 1), gaussian(600, 0., 5., 2)
    assert min(metrics.precision_recall(real, gaussian(600, 0., 1., 3))) > .7
    precision, recall = metrics.precision_recall(real, narrow)
    assert precision > .85 and recall < .3                   # faithful but not diverse
    precision, recall = metrics.precision_recall(real, wide)
    assert precision < .3 and recall > .8                    # diverse but not faithful


def test_precision_and_recall_count_neighbours():
    """Points on a line, nearest neighbour in the same set. Radii: real 1 each; fake 3.1, 3.1, 1.6, 1.6."""
    real, fake = (torch.tensor(v)[:, None] for v in ([0., 1, 10, 11], [1.9, 5, 10.5, 12.1]))
    assert metrics.precision_recall(real, fake, k=1) == (.5, 1.)


# ----------------------------------------------------------------------------------------------- evaluator

@pytest.fixture(scope="module")
def evaluator(glyphs):
    return evaluate.Evaluator(glyphs, 400)


def test_classifier_is_right_about_real_images(evaluator):
    assert evaluator.real_metrics["accuracy"] > .97
    assert evaluator.real_metrics["precision"] > .5 and evaluator.real_metrics["recall"] > .5


def test_evaluator_ranks_images_by_quality(evaluator):
    """The same images with more and more noise; images of other captions; and one image for all captions."""
    images = evaluator.eval_batch.image
    torch.manual_seed(0)
    distances = [evaluator.compute_metrics((images + s * torch.randn_like(images)).clamp(-1, 1))["fd"]
                 for s in (0, .1, .3, .8)]
    assert distances == sorted(distances) and distances[2] > 1.2 * distances[0]
    mismatched = evaluator.compute_metrics(evaluator.reference_batch.image)
    assert mismatched["accuracy"] < .5 and mismatched["fd"] < distances[0]
    collapsed = evaluator.compute_metrics(images[:1].expand_as(images))
    assert collapsed["recall"] < .05 and collapsed["fd"] > distances[2]


def test_batches_are_measured_like_one_tensor(evaluator):
    assert evaluator.compute_metrics(evaluator.eval_batch.image.split(70)) == evaluator.real_metrics


def test_accuracy_counts_the_attributes_that_the_captions_mention(evaluator, monkeypatch):
    """A wrong class of an attribute that its caption does not mention costs nothing."""
    truth, mentioned = evaluator.eval_batch.attributes, evaluator.eval_batch.mentioned
    wrong = torch.where(mentioned, truth, truth + 1)
    wrong[0] = truth[0] + 1                                  # one image is wrong in all attributes
    monkeypatch.setattr(evaluator, "extract_features", lambda images: (evaluator.features, wrong))
    found = evaluator.compute_metrics(evaluator.eval_batch.image)
    assert found["accuracy"] == pytest.approx(1 - (mentioned[0].sum() / mentioned.sum()).item())
    name = next(iter(evaluator.dataset.attributes))
    assert found[f"accuracy {name}"] == pytest.approx(1 - 1 / mentioned[:, 0].sum().item())


def test_fd_excess_is_the_distance_above_that_of_real_images(evaluator, base):
    found = evaluate.evaluate_model(evaluator, base, 1)
    assert found["fd_excess"] == found["fd"] - evaluator.real_metrics["fd"] > 0
    assert found["steps"] == 1 and found["guidance_scale"] == 1.


def test_few_samples_are_refused(glyphs):
    with pytest.raises(ValueError, match="needs 200"):
        evaluate.Evaluator(glyphs, 50)


def test_sampling_is_deterministic_and_independent_of_the_batch_size(base, monkeypatch):
    captions = ["a red umbrella", "a snowman on blue", "a letter g"]
    images = evaluate.sample(base, captions, 3, seed=4)
    monkeypatch.setattr(base, "sample_batch_size", 2)
    torch.testing.assert_close(evaluate.sample(base, captions, 3, seed=4), images, rtol=0, atol=.1)
    assert not torch.allclose(evaluate.sample(base, captions, 3, seed=5), images)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1


# ------------------------------------------------------------------------------------------ tables, figures

def test_aggregate_seeds_reports_mean_and_std():
    rows = plotting.aggregate_seeds([("a", {"fd": 1., "steps": 4}), ("a", {"fd": 3., "steps": 4}),
                                     ("b", {"fd": 2., "steps": 4})])
    assert rows == [("a, 2 seeds", {"fd": "2.00 ± 1.4", "steps": 4}), ("b", {"fd": 2., "steps": 4})]


def test_a_table_has_the_columns_of_its_first_row():
    rows = [("a", {"steps": 1, "fd": 1.23456, "minutes": 2.}), ("real", {"fd": .5, "more": 1.})]
    assert plotting.metrics_table(rows, all_columns=True) == (
        "| | steps | fd | minutes |\n|---|---|---|---|\n| a | 1 | 1.23 | 2.00 |\n| real |  | 0.500 |  |")


def test_the_default_table_has_six_columns_and_its_number_of_images(evaluator):
    rows = [("a, 1 step", {"steps": 1, "guidance_scale": 1., **evaluator.real_metrics, "fd_excess": 1.5})]
    lines = plotting.metrics_table(rows, num_images=2000).splitlines()
    assert lines[0] == "| | fd | fd_excess | accuracy | precision | recall |"
    assert lines[-1].startswith("2,000 images in each row; lower is better for fd, fd_excess")
    header = plotting.metrics_table(rows, all_columns=True).splitlines()[0]
    assert "accuracy shape" in header and "fd_pixel" in header and "steps" in header


def texts(figure):
    """Every visible text of a figure -> [(text, bounding box in pixels)]."""
    from matplotlib.text import Text
    figure.draw_without_rendering()
    return [(text, text.get_window_extent()) for text in figure.findobj(Text)
            if text.get_visible() and text.get_text() and text.get_window_extent().width > 0]


def overlapping(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_texts_of_a_grid_are_readable_and_do_not_overlap():
    """Long captions, small rows with long labels, and more images than fit side by side."""
    captions = ["a large serif blue letter g on a yellow ground", "a red umbrella"] * 8
    long_label = "adt num_grad_steps=1 rollout_start=image (300 steps) backbone=/a/long/way/to/a/folder"
    long_label += ", 10 steps"
    rows = [(label, torch.zeros(16, 3, 32, 32)) for label in ("base, 1 step", long_label, "base, 4 steps")]
    found = texts(plotting.image_grid(rows, captions))
    assert len(found) == 2 * 3 + 16                          # two blocks of eight columns
    assert min(text.get_fontsize() for text, _ in found) >= 8
    assert not overlapping([box for _, box in found])
    assert all(box.x0 >= 0 and box.y0 >= 0 for _, box in found)
    assert any(text.get_text().endswith("10 steps") for text, _ in found)     # a long label keeps its end


def test_a_grid_shows_the_images_in_their_places(tmp_path, drawing):
    from PIL import Image
    images = torch.ones(2, 3, 8, 8)
    images[0] = -1.                                          # black, then white
    plotting.save_image_grid([("one", images), ("two", -images)], tmp_path / "grid.png", note="the command")
    with Image.open(tmp_path / "grid.png") as png:
        assert png.info["Description"] == "the command"
        grey = torch.from_numpy(np.array(png.convert("L")))
    cell = int(plotting.CELL * 160)
    centers = grey[-cell * 2 + cell // 2::cell][:2, -cell * 2 + cell // 2::cell][:, :2]
    assert centers.tolist() == [[0, 255], [255, 0]]


def test_training_curves_are_labelled_and_shade_what_is_healthy(tmp_path, drawing, monkeypatch):
    from matplotlib.figure import Figure
    figures = []
    savefig = Figure.savefig

    def record(figure, path, **kwargs):
        figures.append(figure)
        savefig(figure, path, **kwargs)
    monkeypatch.setattr(Figure, "savefig", record)
    log = [{"step": i, "loss_adv": 1000. + i, "acc_d_real": .7, "grad_norm": None if i else .3, "seconds": 1.}
           for i in range(100000, 100050)]
    plotting.plot_training_curves(log, tmp_path / "curves.png")
    loss, accuracy = figures[0].axes
    assert loss.get_title() == "loss_adv" and accuracy.get_title() == "acc_d_real"
    for axes in (loss, accuracy):
        assert axes.get_xlabel() == "training step" and axes.get_ylabel()
    assert len(accuracy.patches) == 1 and not loss.patches
    assert accuracy.patches[0].get_y() == .5 and accuracy.patches[0].get_height() == pytest.approx(.3)
    found = texts(figures[0])
    assert min(text.get_fontsize() for text, _ in found) >= 8
    assert not overlapping([box for _, box in found])


def test_progress_is_shown_if_sampling_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def slow_batches():
        for _ in range(3):
            time.sleep(.6)
            yield torch.zeros(500, 1)
    assert sum(len(images) for images in plotting.show_progress(slow_batches(), 2000, "sampling")) == 1500
    assert "sampling 1,000/2,000" in capsys.readouterr().err
    list(plotting.show_progress([torch.zeros(5, 1)], 5, "sampling"))
    assert "5/5" not in capsys.readouterr().err


def test_saved_images_pass_through_and_are_written(tmp_path):
    from PIL import Image
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    passed = list(plotting.save_images(images.split(2), ["one", "two", "drei ä"], tmp_path / "saved"))
    torch.testing.assert_close(torch.cat(passed), images)
    lines = (tmp_path / "saved" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["one", "two", "drei ä"]
    values = []
    for line in lines:
        with Image.open(tmp_path / "saved" / json.loads(line)["file_name"]) as png:
            values.append(png.getpixel((0, 0))[0])
    assert values == [0, 128, 255]


# -------------------------------------------------------------------------------------------- the command

def test_runs_that_differ_in_the_seed_share_a_row(tmp_path):
    config = {"method": "adt", "model": "tiny", "data": "glyphs", "seed": 0, "steps": 1, "overrides": []}
    runs = {"one": {}, "two": {"seed": 1}, "other": {"backbone": "elsewhere"}, "long": {"steps": 2}}
    for name, change in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
        shutil.copy(loading.weights_path("denoiser", "glyphs"), tmp_path / name)
    group = {name: named.load_run(str(tmp_path / name)).group for name in runs}
    assert group["one"] == group["two"] and len(set(group.values())) == 3


def test_a_weights_file_must_name_its_data_set(tmp_path):
    tiny = load_model("tiny", "glyphs")
    save_weights(tiny, tmp_path / "odd.safetensors", vocab=tiny.vocab, prediction_type=tiny.prediction_type,
                 data=5)
    with pytest.raises(ValueError, match="does not name the data set"):
        named.load_run(str(tmp_path / "odd.safetensors"))


def test_each_seed_has_a_folder_of_images(tmp_path, monkeypatch):
    class NoEvaluator:
        real_metrics = {"fd": 1.}

        def reference_images(self):
            return iter(()), []

    def evaluate_model(evaluator, model, num_steps, image_dir, **settings):
        image_dir.mkdir(parents=True)
        return {"fd": 1.}
    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: torch.zeros(1, 3, 4, 4))
    monkeypatch.setattr(evaluate, "evaluate_model", evaluate_model)
    tiny = SimpleNamespace(is_large=False)
    models = [("a", tiny, 1, {}), ("a", tiny, 1, {}), ("b", tiny, 1, {})]
    rows, _ = evaluate.evaluate_models(models, [], NoEvaluator(), image_dir=tmp_path / "images")
    assert [label for label, _ in rows] == ["a, 1 step", "a, 1 step", "b, 1 step", "real images"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "a, 1 step", "a, 1 step, seed 2", "b, 1 step", "real images"]


@pytest.fixture
def student(tmp_path):
    """The weights file of a two-step student (it has not learned to be one)."""
    tiny = load_model("tiny", "glyphs")
    path = tmp_path / "student.safetensors"
    save_weights(tiny, path, vocab=tiny.vocab, prediction_type=tiny.prediction_type, data="glyphs",
                 sampling_configs=[(2, {"stochasticity": 1., "t_max": .9, "timestep_shift": 3.})])
    return path


def sampled_settings(monkeypatch, *argv):
    """[(num_steps, settings)] with which the command samples."""
    calls = []

    def sample(model, captions, num_steps, seed, **settings):
        calls.append((num_steps, settings))
        return torch.zeros(len(captions), 3, 4, 4)
    monkeypatch.setattr(evaluate, "sample", sample)
    evaluate.main([*map(str, argv), "--prompt", "a red umbrella"])
    return calls


def test_the_settings_of_a_model_hold_unless_the_command_line_changes_them(student, tmp_path, monkeypatch):
    output = ["--output", tmp_path / "x.png"]
    settings = {"stochasticity": 1., "t_max": .9, "timestep_shift": 3.}
    assert sampled_settings(monkeypatch, student, *output) == [(2, settings)]
    assert sampled_settings(monkeypatch, student, *output, "--timestep-shift", "2", "--stochasticity", ".5",
                            "--steps", "1") == [(1, {"stochasticity": .5, "t_max": .9, "timestep_shift": 2.})]


def test_a_prompt_alone_samples_the_defaults_that_take_seconds(tmp_path, monkeypatch):
    """Of 1, 4, 10 and 25 steps not the last, unless it is asked for, or the model has no shorter path."""
    output = ["--output", tmp_path / "x.png"]
    monkeypatch.setattr(evaluate, "check_sampling_configs", lambda *_: [(n, {}) for n in (1, 4, 10, 25)])
    assert [steps for steps, _ in sampled_settings(monkeypatch, "base", *output)] == [1, 4, 10]
    assert sampled_settings(monkeypatch, "base", *output, "--steps", "25") == [(25, {})]
    monkeypatch.setattr(evaluate, "check_sampling_configs", lambda *_: [(50, {})])
    assert sampled_settings(monkeypatch, "base", *output) == [(50, {})]


def test_guidance_on_a_student_is_warned_of(student, tmp_path, monkeypatch, capsys):
    output = ["--output", tmp_path / "x.png"]
    sampled_settings(monkeypatch, student, *output)
    sampled_settings(monkeypatch, "base", *output, "--guidance-scale", "3", "--steps", "4")
    assert "guidance" not in capsys.readouterr().err
    for more in ([], ["--stochasticity", ".9"]):
        sampled_settings(monkeypatch, student, *output, "--guidance-scale", "3", *more)
        warning = capsys.readouterr().err
        assert "guidance mostly makes" in warning and len(warning.splitlines()) == 1


def test_steps_that_a_student_cannot_take_are_named(student, tmp_path, monkeypatch, capsys):
    """t_max = 0.9 must lie above the second timestep."""
    calls = sampled_settings(monkeypatch, student, "--steps", "1,2,50", "--output", tmp_path / "x.png",
                             "--timestep-shift", "1")
    assert [num_steps for num_steps, _ in calls] == [1, 2]
    assert "left out in 50 steps" in capsys.readouterr().err


def test_without_names_every_pretrained_model_is_sampled_as_it_was_made_for(student, tmp_path, monkeypatch):
    (tmp_path / "glyphs").mkdir()
    shutil.copy(loading.weights_path("denoiser", "glyphs"), tmp_path / "glyphs")
    shutil.copy(student, tmp_path / "glyphs" / "add.safetensors")
    monkeypatch.setattr(loading, "WEIGHTS_DIR", tmp_path)
    labels = []
    monkeypatch.setattr(plotting, "save_image_grid",
                        lambda rows, *_, **__: labels.extend(label for label, _ in rows))
    evaluate.main(["--prompt", "a red umbrella"])
    assert labels[-1] == "add, 2 steps"
    steps = [n for n, _ in evaluate.DEFAULT_SAMPLING_CONFIGS if n <= evaluate.PROMPT_MAX_STEPS]
    assert labels[:-1] == [f"base, {plotting.format_steps(n)}" for n in steps]
    with pytest.raises(SystemExit):
        evaluate.main(["adt", "--prompt", "a red umbrella"])


def test_the_command_prints_a_table_and_says_what_it_wrote(tmp_path, drawing, capsys):
    argv = ["base", "--data", "glyphs", "--steps", "1", "--eval-samples", "200",
            "--output", str(tmp_path / "grid.png")]
    evaluate.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | fd | fd_excess | accuracy | precision | recall |"
    assert lines[-1].startswith(f"wrote {tmp_path / 'grid.png'}")
    evaluate.main([*argv, "--all-columns", "--save-images", str(tmp_path / "images")])
    header = capsys.readouterr().out.splitlines()[0]
    assert {"steps", "guidance_scale", "fd_pixel", "accuracy shape"} < set(re.split(r" *\| *", header))
    assert len(list((tmp_path / "images" / "base, 1 step").glob("*.png"))) == 200
    assert len(list((tmp_path / "images" / "real images").glob("*.png"))) == 200


def test_a_folder_named_like_a_built_in_data_set_has_none_of_its_networks(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    make_image_folder(tmp_path / "a" / "fashion")
    for program in (train, evaluate):
        with pytest.raises(SystemExit) as stop:
            program.main(["--data", str(tmp_path / "a" / "fashion")])
        assert stop.value.code == 2
        assert "folder-fashion" in capsys.readouterr().err
    assert data.build_dataset(str(tmp_path / "a" / "fashion")).name == "folder-fashion"
    runs = []
    for name in ("a", "b"):
        run_config = {"method": "adt", "model": "tiny", "data": str(tmp_path / name / "fashion"), "seed": 0,
                      "steps": 1, "overrides": []}
        runs.append(tmp_path / f"run-{name}")
        runs[-1].mkdir()
        (runs[-1] / "config.json").write_text(json.dumps(run_config))
        shutil.copy(loading.weights_path("denoiser", "fashion"), runs[-1])
    for names in (runs, [runs[0], loading.weights_path("denoiser", "fashion")]):
        with pytest.raises(ValueError, match="different data sets"):
            named.load_named_models(list(map(str, names)), evaluate.PRETRAINED)


def test_images_of_a_model_with_a_long_label_are_saved(base, tmp_path, monkeypatch):
    """A run's label holds its path or all of its settings."""
    folders = []
    monkeypatch.setattr(evaluate, "evaluate_model",
                        lambda evaluator, model, num_steps, folder, **_: folders.append(folder) or {})
    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: torch.zeros(1, 3, 4, 4))
    monkeypatch.setattr(plotting, "save_images", lambda *_: [])
    evaluator = SimpleNamespace(reference_images=lambda: ([], []), real_metrics={})
    models = [("图" * 100 + end, base, 1, {}) for end in ("a", "b", "b")]
    evaluate.evaluate_models(models, ["a cat"], evaluator, image_dir=tmp_path)
    assert len(set(folders)) == 3
    for folder in folders:
        folder.mkdir()


def test_help_can_be_printed_in_any_encoding():
    done = subprocess.run([sys.executable, "evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "Fr\\xe9chet" in done.stdout and not done.stderr


@pytest.mark.parametrize("function", ["prepare", "evaluate_models"])
def test_ctrl_c_ends_without_a_traceback(function, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, function, interrupted)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["base", "--prompt", "a red umbrella", "--output", str(tmp_path / "x.png")])
    assert stop.value.code == 130 and "stopped" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_without_memory_the_advice_is_one_that_can_be_followed(monkeypatch, capsys):
    def fail(*_):
        raise MemoryError
    monkeypatch.setattr(evaluate, "prepare", fail)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["base"])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "out of memory; fewer --eval-samples" in message
    assert "batch_size" not in message


@pytest.mark.parametrize("arguments,sentence", [
    (["nowhere"], "found nothing of that name"),
    (["base", "--data", "cats"], "no pretrained 'base' for the data set 'cats'"),
    ([str(loading.weights_path("denoiser", name)) for name in ("glyphs", "fashion")], "different data sets"),
    (["base", "--data", "glyphs", "--prompt", "a zebra"], "'zebra'"),
    (["base", "--data", "glyphs", "--steps", "0,4", "--eval-samples", "200"], "in 1 step or more"),
    (["base", "--data", "glyphs", "--steps", "1001", "--eval-samples", "200"], "1 to 1000 steps"),
    (["base", "--data", "glyphs", "--steps", "4;10"], "separated by commas"),
    (["base", "--data", "fashion", "--split", "held_out"], "held_out"),
    (["base", "--pretrained", "nowhere"], "--pretrained is for large models"),
    (["base", "--eval-samples", "200", "--dinov2", "nowhere"], "--dinov2 is for large models"),
    (["base", "--aesthetic-predictor", "nowhere"], "--aesthetic-predictor is for large models"),
    (["add", "--data", "fashion", "--steps", "50"], "take fewer steps"),
    (["base", "--resolution", "0"], "--resolution 0: wanted a number of pixels"),
    (["base", "--output", "grid.jpg"], "ending in .png"),
    (["base", "--guidance-scale", "nan"], "--guidance-scale"),
    (["base", "--stochasticity", "2"], "from 0 to 1"),
    (["base", "--save-images", str(ROOT)], "a new or an empty folder"),
])
def test_bad_requests_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and len(error.strip().splitlines()) == 1


def test_measuring_and_plotting_do_not_import_models():
    code = ("import sys, utils.metrics, utils.plotting\n"
            "print([name for name in sys.modules if name.split('.')[0] in "
            "('models', 'evaluate', 'adt', 'add', 'train', 'matplotlib', 'transformers', 'PIL')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
