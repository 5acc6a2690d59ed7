"""scripts/run_study.py: every row is trained and measured once, and the tables of results/ follow from it."""

import json
import shutil

import pytest

import data
import train
from conftest import ROOT
from scripts import make_figures, run_study
from utils import config

ROWS = [run_study.Experiment("default", method="add", paper_value="20.6 / .319"),
        run_study.Experiment("random init", ["init=random"], method="add", paper_value="293.6 / .065"),
        run_study.Experiment("default again", method="add", paper_value="20.6 / .319")]


class QuickEvaluator:
    """In place of sampling and metrics: a number that depends on the model and on how it would be sampled."""

    def __init__(self, dataset, num_images, seed):
        self.captions = [""] * num_images
        self.real_metrics = {"fd": 1.}

    def measure(self, model, num_steps, seed, settings):
        fd = sum(param.sum().item() for param in model.network.parameters()) + num_steps + len(settings)
        return {**self.real_metrics, "fd": fd, "steps": num_steps, "fd_excess": fd}


@pytest.fixture
def small_study(monkeypatch, glyphs):
    """The study "add" with runs of two steps, measured at 1 and 2 sampler steps."""
    monkeypatch.setattr(data, "build_dataset", lambda *args: glyphs)
    monkeypatch.setattr(run_study, "PanelEvaluator", QuickEvaluator)
    study = run_study.Study(ROWS, base_configs=[(2, {})])
    monkeypatch.setitem(run_study.STUDIES, "add", study)
    method = train.METHODS["add"]._replace(fixed={"batch_size": 2, "student_steps": 2}, default_steps=2)
    monkeypatch.setitem(train.METHODS, "add", method)


@pytest.mark.thorough
def test_a_study_trains_each_row_once_and_shows_the_value_of_the_paper(tmp_path, small_study, monkeypatch,
                                                                       capsys):
    args = ["add", "--seeds", "2", "--eval-samples", "200", "--output-dir", str(tmp_path)]
    run_study.main(args)
    table = (tmp_path / "add-glyphs.md").read_text()
    assert "default, 1 step, 2 seeds" in table and "293.6 / .065" in table and "±" in table
    assert table in capsys.readouterr().out
    runs = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(runs) == 4                        # two settings, two seeds; "default again" is the same run
    for run_dir in runs:
        metrics = json.loads(run_dir.with_name(f"{run_dir.name}.json").read_text())
        assert len(metrics) == 2

    monkeypatch.setattr(train, "main", lambda args: pytest.fail(f"trained again: {args}"))
    run_study.main([*args, "--seeds", "3", "--no-train"])              # there are no runs of the third seed
    assert (tmp_path / "add-glyphs.md").read_text() == table
    run_study.main(["pace", "--output-dir", str(tmp_path)])            # from here on, minutes follow from it
    pace = json.loads((tmp_path / "runs" / "pace-glyphs.json").read_text())
    assert pace.keys() == {"add-tuned-glyphs", "add-tuned-glyphs-init=random"}
    run_study.main([*args, "--no-train"])
    rows = dict(json.loads((tmp_path / "study-add-glyphs.json").read_text()))
    assert rows["random init, 1 step"]["minutes"] == run_study.round_metric(
        2 * pace["add-tuned-glyphs-init=random"] / 60)
    (tmp_path / "runs" / "pace-glyphs.json").unlink()
    for run_dir in runs:
        shutil.rmtree(run_dir)
    run_study.main(args)                         # metrics outlive the folders of the runs
    assert (tmp_path / "add-glyphs.md").read_text() == table


def test_a_study_says_how_many_images_were_measured_and_pages_show_no_other_number(tmp_path, small_study,
                                                                                   monkeypatch):
    run_study.main(["add", "--seeds", "1", "--eval-samples", "200", "--max-rows", "1", "--output-dir",
                    str(tmp_path)])
    header = (tmp_path / "add-glyphs.md").read_text().splitlines()[0]
    assert "num_images" in header
    rows = json.loads((tmp_path / "study-add-glyphs.json").read_text())
    assert {metrics["num_images"] for _, metrics in rows} == {200}
    monkeypatch.setattr(make_figures, "RESULTS_DIR", tmp_path)
    with pytest.raises(ValueError, match="was measured with 200 images in a row, wanted 2000"):
        make_figures.load_studies()


def test_max_rows_limits_what_is_trained(tmp_path, small_study):
    run_study.main(["add", "--seeds", "1", "--eval-samples", "200", "--max-rows", "1", "--output-dir",
                    str(tmp_path)])
    table = (tmp_path / "add-glyphs.md").read_text()
    assert "default, 1 step" in table and "random init" not in table
    assert len([path for path in (tmp_path / "runs").iterdir() if path.is_dir()]) == 1


def test_an_interrupted_run_continues(tmp_path, small_study):
    run_dir = tmp_path / "run"
    run_study.train_or_load(ROWS[0], "glyphs", 0, 1, run_dir)
    run_study.train_or_load(ROWS[0], "glyphs", 0, 2, run_dir)          # as if stopped after one of two steps
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1]


def test_a_damaged_file_of_metrics_is_an_error_and_a_missing_config_is_left_out(tmp_path):
    class Evaluator:
        captions = [""] * 200

    path = tmp_path / "run.json"
    path.write_text(json.dumps({"10 steps, timestep_shift 3 (200 images)": {"fd": 1.}}))
    configs = [(4, {}), (10, {"timestep_shift": 3.})]
    rows = list(run_study.cached_metrics(path, Evaluator, configs, None))
    assert rows == [("10 steps, timestep_shift 3", {"fd": 1.})]
    path.write_text('{"10 steps (200 im')
    with pytest.raises(ValueError, match="damaged"):
        list(run_study.cached_metrics(path, Evaluator, configs, None))


def test_every_row_of_every_study_is_a_run_that_could_start():
    for study in run_study.STUDIES.values():
        for row in study.rows:
            config.build_config(train.METHODS[row.method], row.overrides, recipe=row.recipe)
            assert row.label and (row.steps is None or row.steps > 0)
        assert len({row.label for row in study.rows}) == len(study.rows)


def test_the_runs_of_every_study_are_measured_in_results():
    """Otherwise --output-dir results --no-train would print an incomplete table."""
    for name, study in run_study.STUDIES.items():
        for dataset_name in ("glyphs", "fashion"):
            if not (ROOT / "results" / f"study-{name}-{dataset_name}.json").is_file():
                continue
            for row in study.rows:
                steps = row.steps or train.METHODS[row.method].default_steps
                file_name = run_study.file_name_of(study, dataset_name)
                path = ROOT / "results" / "runs" / f"{run_study.run_name(row, file_name, steps, 0)}.json"
                assert path.is_file(), f"no {path.name}"


def test_bad_arguments_are_one_sentence(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base-glyphs.json").write_text('{"25 steps (200 im')
    for args in (["add", "--data", str(tmp_path / "nowhere")], ["add", "--eval-samples", "3"],
                 ["adt", "--seeds", "0"], ["adt", "--max-rows", "0"],
                 ["add", "--eval-samples", "200", "--no-train"]):
        with pytest.raises(SystemExit) as stop:
            run_study.main([*args, "--output-dir", str(tmp_path)])
        assert stop.value.code == 2 and "run_study.py: " in capsys.readouterr().err
