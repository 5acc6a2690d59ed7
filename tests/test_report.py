"""The table at the end of a run: the base at its best number of steps stands beside what was measured."""

import json

import pytest

from conftest import ROOT
from utils import report

METRICS = {"accuracy": .9, "precision": .9, "recall": .9, "fd_excess": 1.}
ROWS = [("before, 10 steps", {"steps": 10, "fd": 3., **METRICS}),
        ("after, 10 steps", {"steps": 10, "fd": 2., **METRICS}),
        ("real images", {"steps": "", "fd": 1., **METRICS})]


def run_config(data="glyphs", pretrained=None):
    return {"method": "adt", "model": "tiny", "data": data, "pretrained": pretrained, "seed": 0, "steps": 2,
            "overrides": []}


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """-> a function that writes {name of the sampling config: FD} as the results of the base on glyphs."""
    def write(distances):
        rows = {key: {"steps": int(key.split()[0]), "fd": fd, **METRICS} for key, fd in distances.items()}
        (tmp_path / "base-glyphs.json").write_text(json.dumps(rows))
    monkeypatch.setattr(report, "RESULTS_DIR", tmp_path)
    return write


def test_the_best_number_of_steps_is_that_of_the_lowest_distance_without_guidance(stored):
    stored({"10 steps (2000 images)": 3., "25 steps (2000 images)": 1.5, "50 steps (2000 images)": 1.7,
            "50 steps, guidance_scale 2 (2000 images)": .1, "4 steps (200 images)": .2})
    label, metrics, source = report.best_base_row(run_config(), 2000)
    assert (label, metrics["fd"], source) == ("before, 25 steps", 1.5, "results/runs/base-glyphs.json")


@pytest.mark.parametrize("config,num_images", [
    (run_config(pretrained="runs/x"), 2000), (run_config(data="fashion"), 2000),
    (run_config(data="/images/glyphs"), 2000), (run_config(), 500), (run_config(), 200)])
def test_a_base_that_was_not_measured_like_the_run_has_no_row(stored, config, num_images):
    """Other weights, other data, another number of images."""
    stored({"25 steps (2000 images)": 1.5, "25 steps (1500 images)": 1.5})
    assert report.best_base_row(config, num_images) is None


def test_the_report_shows_the_row_and_its_source_and_keeps_it_out_of_the_result(stored, tmp_path, capsys):
    stored({"25 steps (2000 images)": 1.5})
    (tmp_path / "config.json").write_text(json.dumps(run_config()))
    report.save_report(tmp_path, ROWS, [], [], 2000)
    table = (tmp_path / "table.md").read_text()
    lines = table.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == [
        "before, 10 steps", "before, 25 steps", "after, 10 steps", "real images"]
    assert lines[0].count("|") == 7                          # the labels and five columns
    assert lines[-1].startswith("2,000 images in each row; ")
    assert lines[-1].endswith(" Before, 25 steps: the best number of steps, from "
                              "results/runs/base-glyphs.json.")
    printed = capsys.readouterr().out
    assert table in printed
    assert "after training are closer to real images than in 10 steps before" in printed
    assert list(json.loads((tmp_path / "result.json").read_text())) == [label for label, _ in ROWS]


def test_a_row_that_the_run_measured_itself_is_not_repeated(stored):
    stored({"10 steps (2000 images)": 1.5})
    table = report.table_with_best_base(ROWS, report.best_base_row(run_config(), 2000), 2000)
    assert table.count("before, 10 steps") == 1
    assert "base-glyphs.json" not in table


@pytest.mark.parametrize("data", ["glyphs", "fashion"])
def test_the_results_hold_a_best_row_for_both_data_sets(data):
    label, metrics, source = report.best_base_row(run_config(data), 2000)
    assert metrics["steps"] >= 10
    assert metrics["fd_excess"] < 2.
    assert (ROOT / source).is_file()


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
