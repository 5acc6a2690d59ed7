"""Distances against closed forms, and the examiner against pictures whose quality is known."""

import json
import shutil

import pytest
import torch

import evaluate
import metrics
import models


def gaussian(n, mean, scale, seed):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64) * scale + mean


def test_frechet_distance_of_gaussians_has_a_closed_form():
    """Diagonal Gaussians: |mu - nu|^2 + sum (s - r)^2."""
    mean, scale = torch.tensor([1., 0, -2, 3]), torch.tensor([1., 2, .5, 3])
    found = metrics.frechet(gaussian(200000, 0., 1., 0), gaussian(200000, mean, scale, 1))
    assert found == pytest.approx(14 + (0 + 1 + .25 + 4), rel=.02)


def test_frechet_distance_is_a_distance():
    a, b = gaussian(500, 0., 1., 0), gaussian(500, .3, 1.4, 1)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-6)
    turn = torch.linalg.qr(gaussian(4, 0., 1., 2))[0]
    assert metrics.frechet(a @ turn, b @ turn) == pytest.approx(metrics.frechet(a, b), rel=1e-6)


def test_precision_and_recall_see_different_failures():
    real = gaussian(600, 0., 1., 0)
    narrow, wild = gaussian(600, 0., .2, 1), gaussian(600, 0., 5., 2)
    assert min(metrics.precision_recall(real, gaussian(600, 0., 1., 3))) > .7
    precision, recall = metrics.precision_recall(real, narrow)
    assert precision > .85 and recall < .3                   # faithful but not diverse
    precision, recall = metrics.precision_recall(real, wild)
    assert precision < .3 and recall > .8                    # diverse but not faithful


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr sqrt(A B), not tr sqrt(A) sqrt(B), which is the same only where the two commute: A = diag(4, 1),
    B = [[2.5, 1.5], [1.5, 2.5]]; the eigenvalues of A B add up to 12.5 and multiply to 16."""
    corners = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]]) * .75 ** .5  # covariance 1 (n - 1 = 3)
    a = corners @ torch.diag(torch.tensor([2., 1.]))
    b = corners @ torch.linalg.cholesky(torch.tensor([[2.5, 1.5], [1.5, 2.5]])).T
    assert metrics.frechet(a, b) == pytest.approx(10 - 2 * 20.5 ** .5, abs=1e-3)
    assert metrics.frechet(a, b + 3) == pytest.approx(18 + 10 - 2 * 20.5 ** .5, abs=1e-3)


def test_precision_and_recall_count_neighbours():
    """Nearest neighbour in the same set, on a line. Real reaches: 1 each. Made: 3.1, 3.1, 1.6, 1.6."""
    real, made = (torch.tensor(v)[:, None] for v in ([0., 1, 10, 11], [1.9, 5, 10.5, 12.1]))
    assert metrics.precision_recall(real, made, k=1) == (.5, 1.)


@pytest.fixture(scope="module")
def examiner(glyphs):
    return evaluate.Examiner(glyphs, 400)


def test_judge_reads_real_pictures(examiner):
    assert examiner.floor["accuracy"] > .97
    assert examiner.floor["precision"] > .5 and examiner.floor["recall"] > .5


def test_examiner_tells_worse_from_better(examiner):
    """The same pictures, spoiled more and more; captions of others; and one picture for all."""
    images = examiner.asked.image
    torch.manual_seed(0)
    distances = [examiner.score((images + s * torch.randn_like(images)).clamp(-1, 1))["fd"]
                 for s in (0, .1, .3, .8)]
    assert distances == sorted(distances) and distances[2] > 1.2 * distances[0]
    strangers = examiner.score(examiner.reference.image)
    assert strangers["accuracy"] < .5 and strangers["fd"] < distances[0]
    collapsed = examiner.score(images[:1].expand_as(images))
    assert collapsed["recall"] < .05 and collapsed["fd"] > distances[2]


def test_sampling_is_deterministic_and_independent_of_chunks(base, monkeypatch):
    captions = ["a red umbrella", "a snowman on blue", "a letter g"]
    one = evaluate.sample(base, captions, 3, seed=4)
    monkeypatch.setattr(base, "at_once", 2)
    torch.testing.assert_close(evaluate.sample(base, captions, 3, seed=4), one, rtol=0, atol=.1)
    assert not torch.allclose(evaluate.sample(base, captions, 3, seed=5), one)
    assert one.shape == (3, 3, 32, 32) and one.abs().max() <= 1


def test_gather_reports_mean_and_spread():
    rows = evaluate.gather([("a", {"fd": 1., "steps": 4}), ("a", {"fd": 3., "steps": 4}),
                            ("b", {"fd": 2., "steps": 4})])
    assert rows == [("a, 2 seeds", {"fd": "2.00 ± 1.4", "steps": 4}), ("b", {"fd": 2., "steps": 4})]


def test_only_seeds_of_one_recipe_share_a_row_and_each_has_a_folder(tmp_path, monkeypatch):
    plan = {"method": "adt", "model": "tiny", "data": "glyphs", "seed": 0, "steps": 1, "set": []}
    runs = {"one": {}, "two": {"seed": 1}, "other": {"features": "elsewhere"}, "long": {"steps": 2}}
    for name, change in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**plan, **change}))
        shutil.copy(models.WEIGHTS / "glyphs" / "denoiser.safetensors", tmp_path / name)
    asked = evaluate.parse([])[1]
    tiny = models.build("tiny", "glyphs")
    models.save(tiny, tmp_path / "odd.safetensors", words=tiny.words, target=tiny.target, data=5)
    with pytest.raises(ValueError, match="does not say which data set"):
        evaluate.locate(str(tmp_path / "odd.safetensors"), asked, None)
    group = {name: evaluate.locate(str(tmp_path / name), asked, None).group for name in runs}
    assert group["one"] == group["two"] and len(set(group.values())) == 3

    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: torch.zeros(1, 3, 4, 4))
    monkeypatch.setattr(evaluate, "measure", lambda *_, out, **__: out.mkdir(parents=True) or {"fd": 1.})
    class Blind:
        floor, real = {"fd": 1.}, lambda self: (iter(()), [])
    evaluate.examine([("a", None, 1, {}), ("a", None, 1, {}), ("b", None, 1, {})], [], Blind(),
                     out=tmp_path / "pictures")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "a, 1 step", "a, 1 step, seed 2", "b, 1 step", "real pictures"]


def test_a_table_has_the_first_rows_columns():
    rows = [("a", {"steps": 1, "guidance": 2., "fd": 1.23456}), ("real", {"fd": .5, "more": 1.})]
    assert evaluate.table(rows) == "| | steps | fd |\n|---|---|---|\n| a | 1 | 1.23 |\n| real |  | 0.500 |"


def test_excess_is_what_lies_above_the_floor(examiner, base):
    found = evaluate.measure(examiner, base, 1)
    assert found["excess"] == found["fd"] - examiner.floor["fd"] > 0 and found["steps"] == 1


def test_a_models_own_shift_holds_unless_another_is_asked_for(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(evaluate, "locate", lambda name, a, dataset: evaluate.Found(
        name, models.build("tiny", "glyphs"), "glyphs", None, [(2, {"shift": 3.})]))
    def sample(model, captions, steps, shift=1., **how):
        seen.append(shift)
        return torch.zeros(8, 3, 4, 4)
    monkeypatch.setattr(evaluate, "sample", sample)
    for more in ([], ["--shift", "2"]):
        evaluate.main(["base", "--prompt", "a red umbrella", "--out", str(tmp_path / "x.png"), *more])
    assert seen == [3., 2.]


def test_few_samples_are_refused(glyphs):
    with pytest.raises(ValueError, match="200 samples"):
        evaluate.Examiner(glyphs, 50)


def test_without_names_everything_shipped_is_drawn_the_way_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "glyphs").mkdir()
    shutil.copy(models.WEIGHTS / "glyphs" / "denoiser.safetensors", tmp_path / "glyphs")
    student = models.build("tiny", "glyphs")
    models.save(student, tmp_path / "glyphs" / "add.safetensors", words=student.words, target=student.target,
                data="glyphs", rows=[(2, {"fresh": 1., "last": .9})])
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    shown = []
    monkeypatch.setattr(evaluate, "picture", lambda rows, *_, **__: shown.extend(label for label, _ in rows))
    evaluate.main(["--prompt", "a red umbrella"])
    assert shown[-1] == "add, 2 steps" and all(label.startswith("base, ") for label in shown[:-1])
    with pytest.raises(SystemExit):
        evaluate.main(["adt", "--prompt", "a red umbrella"])


@pytest.mark.parametrize("arguments,sentence", [
    (["nowhere"], "found nothing there"),
    (["base", "--data", "cats"], "no 'base' is shipped for the data set 'cats'"),
    ([str(models.WEIGHTS / name / "denoiser.safetensors") for name in ("glyphs", "fashion")],
     "different data sets"),
    (["base", "--data", "glyphs", "--prompt", "a zebra"], "'zebra'"),
    (["base", "--data", "glyphs", "--steps", "0", "--samples", "200"], "1 to 1000 steps"),
    (["base", "--data", "fashion", "--split", "held_out"], "held_out"),
    (["base", "--weights", "nowhere"], "a tiny model's file replaces 'base'"),
    (["base", "--samples", "200", "--dino", "nowhere"], "--dino is for real models"),
    (["base", "add", "--data", "fashion", "--steps", "10,50"], "take fewer steps"),
])
def test_bad_requests_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
