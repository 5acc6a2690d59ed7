"""The notebooks run from a clean kernel, and are committed as they ran.
`python -m pytest -m notebooks -n 0` runs them, eight minutes on two cores."""

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_it_ran(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds and len(kinds) >= len(cells) / 2
    prose = "".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    assert "## Exercises" in prose and "### Solutions" in prose
    assert path.stat().st_size < 2 ** 20


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_clean_kernel(path):
    from nbclient import NotebookClient
    book = nbformat.read(path, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": path.parent}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()
    committed, again = ([sum("image/png" in output.get("data", {}) for output in cell.outputs)
                         for cell in cells if cell.cell_type == "code"]
                        for cells in (code_cells(path), book.cells))
    assert committed == again and sum(again) >= 3


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["01_the_gap", "02_adt", "03_add", "04_break_it"]
