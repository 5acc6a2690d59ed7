"""scripts/gpu_report.py with tiny networks on the CPU; what it measures on a GPU is in docs/gpu.md."""

import json

import pytest

from scripts import gpu_report

STEP = {"gib": 12.5, "gib by arithmetic": 12., "seconds": 11.3, "tflop by arithmetic": 200., "pixels": 512,
        "cell, s": 60.}
PRECISION = {f"{name}, t = 999": {"relative error": 1e-3, "std of the error of x0": 4e-3}
             for name in ("tf32", "fp16", "bf16")}


def test_the_page_has_a_table_of_steps_one_of_precisions_and_the_rest():
    page = gpu_report.report_page("Test GPU", {
        "memory adt sd15 batch 4 --precision fp16": STEP, "precision sd15": {**PRECISION, "cell, s": 1.},
        "24 GB": {"fits": True, "cell, s": 2.}, "sharding": {"failed": "TimeoutError: more than 200 s"}})
    assert "| adt, sd15 | --precision fp16 | 512 | 4 | 12.5 | 12.0 | 11.3 | 0.5 |" in page
    assert "| sd15 | t = 999 | 0.001 / 0.004 | 0.001 / 0.004 | 0.001 / 0.004 |" in page
    assert "- 24 GB: fits True\n- sharding: failed (TimeoutError: more than 200 s)" in page
    assert "cell, s" not in page


def test_a_cell_that_fails_or_takes_too_long_does_not_end_the_report(monkeypatch, capsys):
    def endless(_):
        while True:
            pass

    monkeypatch.setattr(gpu_report, "CELL_SECONDS", 1)
    monkeypatch.setattr(gpu_report, "all_cells", lambda: {
        "endless": (endless,), "broken": (lambda _: 1 / 0,), "good": (lambda _, x: {"x": x}, 3)})
    with pytest.raises(SystemExit) as stop:
        gpu_report.main(["--tiny"])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 1
    assert results[0]["endless"]["failed"] == "TimeoutError: more than 1 s"
    assert results[1]["broken"]["failed"].startswith("ZeroDivisionError")
    assert results[2]["good"]["x"] == 3


@pytest.mark.thorough
@pytest.mark.parametrize("cell", ["precision sd15", "calls sd15", "profile add sd15", "recomputation sd3"])
def test_cells_run_with_tiny_networks(cell, cache_home, tmp_path, capsys):
    gpu_report.main(["--tiny", "--only", cell, "--output", str(tmp_path / "gpu.md")])
    result, = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert "failed" not in result and len(result) > 2
    assert ("| sd15 | t = 999 |" if "precision" in cell else f"- {cell}") in (tmp_path / "gpu.md").read_text()
