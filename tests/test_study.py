"""Studies: each row trained once, measured once, and told apart."""

import json
import shutil

import pytest
import study
import train

ROWS = [study.Row("as it is", method="add", said="20.6 / .319"),
        study.Row("from nothing", ["init=random"], method="add", said="293.6 / .065"),
        study.Row("as it is, again", method="add", said="20.6 / .319")]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(study.STUDIES, "add", study.Study(ROWS, [(2, {})], also=[(3, {})]))
    monkeypatch.setitem(train.METHODS, "add", (train.add, {"batch": 2}, 2))


def test_a_study_trains_each_row_once_and_sets_the_paper_beside_it(tmp_path, small, monkeypatch, capsys):
    order = ["add", "--seeds", "2", "--samples", "200", "--out", str(tmp_path)]
    study.main(order)
    table = (tmp_path / "add-glyphs.md").read_text()
    assert "as it is, 1 step, 2 seeds" in table and "293.6 / .065" in table and "±" in table
    assert table in capsys.readouterr().out
    runs = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert len(runs) == 4                                    # two settings, two seeds; 'again' is no new run
    for run in runs:
        ways = json.loads((tmp_path / f"{run}.json").read_text())
        assert len(ways) == (4 if "seed0" in run else 3)     # 1, 2 and 4 steps; the first seed's also at 3
    monkeypatch.setattr(train, "main", lambda go: pytest.fail(f"trained again: {go}"))
    study.main([*order, "--seeds", "3", "--so-far"])         # the third seed has not been run
    assert (tmp_path / "add-glyphs.md").read_text() == table
    for run in runs:
        shutil.rmtree(tmp_path / run)
    study.main(order)                                        # nothing is left to do: figures outlive runs
    assert (tmp_path / "add-glyphs.md").read_text() == table


def test_an_interrupted_row_goes_on(tmp_path, small):
    study.trained(ROWS[0], "glyphs", 0, 1, tmp_path / "run")
    study.trained(ROWS[0], "glyphs", 0, 2, tmp_path / "run")     # as if stopped after one step of two
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1]


def test_every_row_of_every_study_is_a_run_that_could_start():
    for plan in study.STUDIES.values():
        for row in plan.rows:
            train.settle(row.method, row.settings)
            assert row.label and (row.steps is None or row.steps > 0)
        assert len({row.label for row in plan.rows}) == len(plan.rows)


def test_bad_orders_are_a_sentence(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base-glyphs.json").write_text('{"25 steps (200 pict')
    for order in (["add", "--data", str(tmp_path / "nowhere")], ["add", "--samples", "3"],
                  ["adt", "--seeds", "0"], ["add", "--samples", "200", "--so-far"]):
        with pytest.raises(SystemExit) as stop:
            study.main([*order, "--out", str(tmp_path / "runs")])
        assert stop.value.code == 2 and "study.py: " in capsys.readouterr().err
