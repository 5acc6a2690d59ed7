"""The table at the end of a run: the base at its best number of steps stands beside what was measured."""

import json

import pytest

import evaluate
from models.loading import WEIGHTS_DIR
from utils import report

METRICS = {"accuracy": .9, "precision": .9, "recall": .9, "fd_excess": 1.}
ROWS = [("before, 10 steps", {"steps": 10, "guidance_scale": 1., "fd": 3., **METRICS}),
        ("after, 10 steps", {"steps": 10, "guidance_scale": 1., "fd": 2., **METRICS}),
        ("real images", {"steps": "", "guidance_scale": "", "fd": 1., **METRICS})]


class Measured:
    """In place of the evaluator: how many images it measures, and which metrics."""

    def __init__(self, num_images=2000):
        self.captions = ["a cat"] * num_images
        self.real_metrics = {"fd": 1., "accuracy": .9, "precision": .9, "recall": .9}


def run_config(data="glyphs", pretrained=None):
    return {"method": "adt", "model": "tiny", "data": data, "pretrained": pretrained, "seed": 0, "steps": 2,
            "overrides": []}


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """-> a function that writes {name of the sampling config: FD} as the results of the base on glyphs, and
    returns the folder of its weights."""
    def write(distances):
        rows = {key: {"steps": int(key.split()[0]), "guidance_scale": 2. if "guidance" in key else 1.,
                      "fd": fd, "of the panel": 1., **METRICS} for key, fd in distances.items()}
        weights = tmp_path / "weights" / "glyphs" / "denoiser.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(b"weights")
        (tmp_path / report.results_name("base", weights, "glyphs")).write_text(json.dumps(rows))
        return tmp_path / "weights"
    monkeypatch.setattr(report, "RESULTS_DIR", tmp_path)
    return write


def test_what_was_recorded_is_known_by_label_and_guidance(stored):
    weights = stored({"10 steps (2000 images)": 3., "50 steps (2000 images)": 1.7,
                      "50 steps, guidance_scale 2 (2000 images)": .1, "4 steps (200 images)": .2})
    recorded = report.recorded_metrics(run_config(), weights, Measured())
    assert {key: metrics["fd"] for key, metrics in recorded.items()} == {
        ("before, 10 steps", 1.): 3., ("before, 50 steps", 1.): 1.7, ("before, 50 steps", 2.): .1}
    assert list(recorded["before, 10 steps", 1.]) == ["steps", "guidance_scale", "fd", "accuracy",
                                                      "precision", "recall", "fd_excess"]


@pytest.mark.parametrize("config,num_images", [
    (run_config(pretrained="runs/x"), 2000), (run_config(data="/images/glyphs"), 2000), (run_config(), 500),
    (run_config(), 200)])
def test_a_base_that_was_not_measured_like_the_run_is_measured(stored, config, num_images):
    """Other weights, other data, another number of images."""
    weights = stored({"25 steps (2000 images)": 1.5, "25 steps (1500 images)": 1.5})
    assert report.recorded_metrics(config, weights, Measured(num_images)) == {}
    assert report.recorded_metrics(config, weights, None) == {}


def test_other_weights_under_the_same_name_are_measured(stored):
    weights = stored({"25 steps (2000 images)": 1.5})
    assert report.recorded_metrics(run_config(), weights, Measured())
    (weights / "glyphs" / "denoiser.safetensors").write_bytes(b"trained on")
    assert report.recorded_metrics(run_config(), weights, Measured()) == {}


def test_the_report_shows_the_best_row_and_keeps_it_out_of_the_result(stored, tmp_path, capsys):
    weights = stored({"1 step (2000 images)": 9., "25 steps (2000 images)": 1.5,
                      "50 steps (2000 images)": 1.7, "25 steps, guidance_scale 2 (2000 images)": .1})
    recorded = report.recorded_metrics(run_config(), weights, Measured())
    report.save_report(tmp_path, ROWS, [], [], Measured(), recorded)
    table = (tmp_path / "table.md").read_text()
    lines = table.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == [
        "before, 10 steps", "before, 25 steps", "after, 10 steps", "real images"]
    assert lines[0].count("|") == 7                          # the labels and five columns
    assert lines[-1].startswith("2,000 images in each row; ")
    assert lines[-1].endswith(" From results/runs/: before, 25 steps. Before training fd is lowest in 25 "
                              "steps.")
    printed = capsys.readouterr().out
    assert table in printed
    assert "after training are closer to real images than in 10 steps before" in printed
    assert list(json.loads((tmp_path / "result.json").read_text())) == [label for label, _ in ROWS]


def test_a_row_of_the_run_is_not_repeated(stored):
    weights = stored({"10 steps (2000 images)": 1.5})
    recorded = report.recorded_metrics(run_config(), weights, Measured())
    rows = [("before, 10 steps", recorded["before, 10 steps", 1.]), *ROWS[1:]]
    table = report.table_with_recorded(rows, recorded, 2000)
    assert table.count("| before, 10 steps") == 1
    assert "From results/runs/: before, 10 steps. " in table


@pytest.mark.parametrize("data,steps", [("glyphs", (1, 4, 10, 25, 50)), ("fashion", (1, 4, 10, 25, 50))])
def test_the_results_hold_what_the_default_runs_compare_with(data, steps):
    """So they do not measure the pretrained model: its weights, as they are now, were measured."""
    recorded = report.recorded_metrics(run_config(data), WEIGHTS_DIR, Measured())
    assert {(f"before, {n} steps" if n > 1 else "before, 1 step", 1.) for n in steps} <= recorded.keys()
    assert recorded["before, 50 steps", 1.]["fd_excess"] < 2.


def test_a_recorded_row_is_not_measured(base, monkeypatch):
    """Its images are sampled for the grid, but not measured. With another guidance scale it is."""
    measured = []
    monkeypatch.setattr(evaluate, "evaluate_model", lambda evaluator, model, num_steps, *_, **settings: (
        measured.append((num_steps, settings["guidance_scale"])) or {"fd": 2.}))
    models = [("before", base, 2, {"guidance_scale": 1.}), ("before", base, 1, {"guidance_scale": 1.}),
              ("before", base, 2, {"guidance_scale": 3.})]
    recorded = {("before, 2 steps", 1.): {"fd": 1.}}
    rows, image_rows = evaluate.evaluate_models(models, ["a heart"], Measured(), recorded=recorded)
    assert [metrics["fd"] for _, metrics in rows] == [1., 2., 2., 1.]
    assert measured == [(1, 1.), (2, 3.)]
    assert [images.shape for _, images in image_rows] == 3 * [(1, 3, 32, 32)]


def test_the_summary_compares_equal_numbers_of_steps():
    """A student in four steps beside its teacher in four, and in its best number of steps."""
    distances = {"before, 1 step": 30., "before, 4 steps": 5., "before, 25 steps": 1.5, "after, 1 step": 4.,
                 "after, 4 steps": 3., "real images": 1.}
    rows = [(label, {"fd": fd}) for label, fd in distances.items()]
    assert report.summary_sentence(rows, 2000) == (
        "Images sampled in 4 steps after training are closer to real images than in 4 steps before: Frechet "
        "distance 3.00, was 5.00 (25 steps before: 1.50; other real images: 1.00).")
    few = report.summary_sentence(rows, 200).splitlines()
    assert len(few) == 2 and few[1].startswith("200 images are few")
    rows[4] = "after, 4 steps", {"fd": 6.}
    rows[3] = "after, 1 step", {"fd": 31.}
    assert "not closer to real images than in 4 steps before" in report.summary_sentence(rows, 2000)


def test_a_student_of_other_steps_is_compared_with_the_best_before():
    rows = [("before, 25 steps", {"fd": 1.5}), ("after, 8 steps", {"fd": 1.2}), ("real images", {"fd": 1.})]
    expected = "8 steps after training are closer to real images than in 25 steps before"
    assert expected in report.summary_sentence(rows, 2000)
