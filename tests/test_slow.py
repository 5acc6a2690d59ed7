"""The default commands, whole, and what takes long to show: `python -m pytest -m slow -n 0`,
two hours on two cores.

What they gain is many times what seeds differ by; here one seed must show it."""

import json
from pathlib import Path

import pytest

import train


def figures(out, *arguments):
    train.main([*arguments, "--out", str(out)])
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["glyphs", "fashion"])
def test_adt_takes_two_fifths_off_the_excess(tmp_path, dataset):
    seen = figures(tmp_path / "run", "--method", "adt", "--data", dataset)
    before, after = seen["before, 10 steps"], seen["after, 10 steps"]
    assert after["excess"] < .6 * before["excess"]
    assert after["accuracy"] > before["accuracy"] - .01 and after["recall"] > before["recall"] - .02


@pytest.fixture(scope="module", params=["glyphs", "fashion"])
def student(request, tmp_path_factory):
    """What ADD's default command measures."""
    out = tmp_path_factory.mktemp("add") / "run"
    return request.param, figures(out, "--method", "add", "--data", request.param)


@pytest.mark.slow
def test_adds_single_step_is_ten_times_nearer_than_the_teachers(student):
    _, seen = student
    assert seen["after, 1 step"]["fd"] < .1 * seen["before, 1 step"]["fd"]
    assert seen["after, 1 step"]["recall"] > .6 * seen["before, 25 steps"]["recall"]


@pytest.mark.slow
def test_adds_single_step_has_four_fifths_of_the_teachers_recall(student):
    _, seen = student
    assert seen["after, 1 step"]["recall"] > .8 * seen["before, 25 steps"]["recall"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adt", "add"])
def test_five_thousand_steps_take_no_more_memory_than_one_thousand(tmp_path, method, monkeypatch):
    """Resident size, within 1 %."""
    step, sizes = train.Run.step, []
    def watched(run):
        if run.done % 100 == 0:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return step(run)
    monkeypatch.setattr(train.Run, "step", watched)
    short = ["--set", "path_steps=2", "--set", "train_steps=1"] if method == "adt" else []
    train.main(["--method", method, "--set", "batch=2", "--steps", "5000", "--samples", "0",
                "--out", str(tmp_path / "run"), *short])
    print([f"{size / 256:.0f} MB" for size in sizes[::10]])
    assert max(sizes[10:]) < 1.01 * sizes[10]
