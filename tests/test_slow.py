"""The default commands at full length, and long runs at constant memory: `python -m pytest -m slow -n 0`, two
hours on two cores. The gains are several times the differences between seeds, so one seed is enough here."""

import json
from pathlib import Path

import pytest

import train


def train_and_measure(run_dir, *arguments):
    train.main([*arguments, "--output-dir", str(run_dir)])
    return json.loads((run_dir / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["glyphs", "fashion"])
def test_adt_removes_two_fifths_of_the_excess_distance(tmp_path, dataset):
    result = train_and_measure(tmp_path / "run", "--method", "adt", "--data", dataset)
    before, after = result["before, 10 steps"], result["after, 10 steps"]
    assert after["fd_excess"] < .6 * before["fd_excess"]
    assert after["accuracy"] > before["accuracy"] - .01
    assert after["recall"] > before["recall"] - .02


@pytest.fixture(scope="module", params=["glyphs", "fashion"])
def student(request, tmp_path_factory):
    """What ADD's default command measures."""
    run_dir = tmp_path_factory.mktemp("add") / "run"
    return train_and_measure(run_dir, "--method", "add", "--data", request.param)


@pytest.mark.slow
def test_one_student_step_is_ten_times_closer_than_one_teacher_step(student):
    assert student["after, 1 step"]["fd"] < .1 * student["before, 1 step"]["fd"]


@pytest.mark.slow
def test_one_student_step_has_four_fifths_of_the_teachers_recall(student):
    assert student["after, 1 step"]["recall"] > .8 * student["before, 25 steps"]["recall"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adt", "add"])
def test_five_thousand_steps_take_no_more_memory_than_one_thousand(tmp_path, method, monkeypatch):
    """Resident size, within 1 %."""
    train_step, sizes = train.Trainer.train_step, []

    def measured_step(trainer):
        if trainer.step % 100 == 0:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return train_step(trainer)

    monkeypatch.setattr(train.Trainer, "train_step", measured_step)
    short = ["--set", "num_inference_steps=2", "--set", "num_grad_steps=1"] if method == "adt" else []
    train.main(["--method", method, "--set", "batch_size=2", "--steps", "5000", "--eval-samples", "0",
                "--output-dir", str(tmp_path / "run"), *short])
    print([f"{size / 256:.0f} MB" for size in sizes[::10]])
    assert max(sizes[10:]) < 1.01 * sizes[10]
