"""The notebooks run from a clean kernel, and are committed as they ran.

    python -m pytest -m notebooks -n 2 --dist load    executes them, shortened

To change one, edit it, execute it from the first cell and save it with its outputs. With SHORT_NOTEBOOKS in
the environment they take fewer training steps and measure fewer images; their outputs are of full length.
"""

import ast
import re

import nbformat
import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def pngs(cell):
    """The images that a cell shows, base64 without line breaks."""
    return ["".join(output.data["image/png"].split()) for output in cell.outputs
            if "image/png" in output.get("data", {})]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["01_the_gap", "02_adt", "03_add", "04_break_it"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    cells = code_cells(nbformat.read(path, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= len(cells) / 2
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < 2 ** 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_states_its_runtime_and_has_solved_exercises(path):
    text = prose(nbformat.read(path, 4))
    assert re.search(r"^Runtime: about \w+ minutes on one CPU core\.", text, re.M)
    exercises, solutions = text.split("## Exercises")[1].split("### Solutions")
    numbers = re.findall(r"^(\d)\. ", exercises, re.M)
    assert numbers == re.findall(r"\*\*Solution (\d)\.\*\*", solutions) and len(numbers) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_of_a_notebook_has_one_statement_a_line(path):
    for cell in code_cells(nbformat.read(path, 4)):
        code = re.sub(r"^%.*$", "", cell.source, flags=re.M)           # %matplotlib
        assert max(len(line) for line in code.splitlines()) <= 110
        lines = [node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
        assert len(lines) == len(set(lines)), f"{path.name}, cell {cell.execution_count}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s#]+)", prose(nbformat.read(path, 4)))
    assert links
    assert not [link for link in links if ":" not in link and not (path.parent / link).exists()]


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_clean_kernel(path, monkeypatch):
    from nbclient import NotebookClient
    monkeypatch.setenv("SHORT_NOTEBOOKS", "1")
    notebook = nbformat.read(path, 4)
    num_figures = [len(pngs(cell)) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
    resources = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    assert [len(pngs(cell)) for cell in code_cells(notebook)] == num_figures
    assert sum(num_figures) >= 3
