"""The default commands, whole: `python -m pytest -m slow`, forty minutes on two cores.

What they gain is many times what seeds differ by; here one seed must show it."""

import json

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


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["glyphs", "fashion"])
def test_adds_single_step_is_ten_times_nearer_than_the_teachers(tmp_path, dataset):
    seen = figures(tmp_path / "run", "--method", "add", "--data", dataset)
    assert seen["after, 1 step"]["fd"] < .1 * seen["before, 1 step"]["fd"]
    assert seen["after, 1 step"]["recall"] > .8 * seen["before, 25 steps"]["recall"]
