"""The repository as a whole: layers, sizes, equation map, tables, figures, weights, links, commands."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import pytest

import data
import evaluate
import train
from conftest import ROOT, copy_run
from scripts import make_equation_map, make_figures
from utils import cli
from utils.plotting import aggregate_seeds, metrics_table

CONCEPTS = {"adt", "add", "discriminator", "sampler", "losses", "data", "train", "evaluate"}
LEVELS = {"utils": 0, "models": 1, "discriminator": 1, "sampler": 1, "losses": 1, "data": 1, "adt": 2,
          "add": 2, "evaluate": 3, "train": 4, "scripts": 5}
HEAVY = {"diffusers", "transformers", "peft", "matplotlib", "PIL", "safetensors"}
PACKAGES = "models", "utils", "scripts"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def source_files(*folders):
    """Python files of the top level ("") and of packages."""
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def module_name(path):
    """ROOT/models/tiny.py -> models.tiny"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path, nodes=None):
    """Names of all modules that a file imports, also inside functions: `from models import tiny` counts as
    models.tiny if that is a file. nodes: look at these instead of the whole file."""
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                yield f"{node.module}.{alias.name}" if submodule.is_file() else node.module


# ------------------------------------------------------------------------------------------------- layers

def test_the_top_level_holds_eight_concepts():
    assert {path.stem for path in ROOT.glob("*.py")} == CONCEPTS


def test_imports_point_only_downwards():
    for path in source_files("", *PACKAGES):
        own = module_name(path)
        for other in imported_modules(path):
            layer = other.split(".")[0]
            assert layer not in ("tests", "conftest"), f"{own} imports {other}"
            if layer in LEVELS:
                assert LEVELS[layer] <= LEVELS[own.split(".")[0]], f"{own} imports {other}"


def test_there_is_no_circle_of_imports():
    """Within a layer a module may use another one, but not in a circle, not even inside a function."""
    graph = {module_name(path): set(imported_modules(path)) for path in source_files("", *PACKAGES)}

    def visit(name, trail):
        assert name not in trail, f"a circle: {' -> '.join([*trail, name])}"
        for other in sorted(graph[name] & graph.keys()):
            visit(other, [*trail, name])

    for name in graph:
        visit(name, [])


def test_models_and_utils_do_not_know_the_methods():
    """No variable, argument, function or module there is called adt or add; the method of a set may be."""
    for path in source_files("models", "utils"):
        previous = ""
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            is_name = token.type == tokenize.NAME and previous != "."
            assert not (is_name and token.string.lower() in ("adt", "add")), f"{path.name}:{token.start[0]}"
            previous = token.string


def test_heavy_libraries_are_imported_where_they_are_needed():
    for path in source_files("", "models", "utils"):
        top_level = ast.parse(path.read_text()).body
        for other in imported_modules(path, top_level):
            assert other.split(".")[0] not in HEAVY, f"{path.name} imports {other} at the top"
    modules = [module_name(path) for path in source_files("", "models", "utils")]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# ------------------------------------------------------------------------------------------- sizes and style

def test_files_lines_and_functions_are_short():
    for name in ("train.py", "evaluate.py", "README.md"):
        num_lines = len((ROOT / name).read_text().splitlines())
        assert num_lines <= 250, f"{name} has {num_lines} lines"
    too_long = []
    for path in source_files("", *PACKAGES, "tests"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 110:
                too_long.append(f"{path.name}:{number} has {len(line)} columns")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                too_long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not too_long, too_long


def test_ruff_has_nothing_to_say():
    pytest.importorskip("ruff")
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


# ----------------------------------------------------------------------------------------- generated content

def test_every_equation_in_the_source_has_a_test():
    places, tests = make_equation_map.tags(), make_equation_map.proofs()
    assert places.keys() == make_equation_map.MEANING.keys()
    assert places.keys() == tests.keys()


def test_the_equation_map_is_current():
    assert make_equation_map.table() in make_equation_map.PAGE.read_text(), (
        "run python -m scripts.make_equation_map")


def test_the_names_of_the_notation_are_those_of_the_code():
    text = (ROOT / "docs" / "notation.md").read_text()
    rows = [re.split(r" *\| *", line) for line in text.splitlines() if line.startswith("| ")][1:]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[3])]
    code = "\n".join(path.read_text() for path in source_files("", "models"))
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]
    assert all(re.search(r"`\w+`", row[3]) and row[2] and row[4] for row in rows)
    assert len(names) >= 30
    assert len(rows) <= 25


def test_the_tables_of_the_pages_are_those_of_the_studies():
    num_tables, studies = 0, make_figures.load_studies()
    for page in make_figures.PAGES:
        text = page.read_text()
        assert make_figures.fill_tables(text) == text, "run python -m scripts.make_figures --tables-only"
        for _, name, filters in make_figures.TABLE_RE.findall(text):
            num_tables += 1
            for suffix in filters.partition(" without ")[0].split("; "):
                assert any(label.endswith(suffix) for label, _ in studies[name]), f"{name}: no row '{suffix}'"
    assert num_tables >= 3


def test_every_study_has_its_table_in_results():
    for name, rows in make_figures.load_studies().items():
        table = metrics_table(aggregate_seeds([tuple(row) for row in rows]), all_columns=True)
        assert (ROOT / "results" / f"{name}.md").read_text() == table + "\n", name


def test_every_figure_is_up_to_date():
    stale = [name for name, plot_fn in make_figures.FIGURES.items()
             if not make_figures.is_up_to_date(plot_fn, make_figures.FIGURES_DIR / f"{name}.png")]
    assert not stale, f"python -m scripts.make_figures draws {', '.join(stale)} again"
    assert {path.stem for path in make_figures.FIGURES_DIR.glob("*.png")} == make_figures.FIGURES.keys()


@pytest.mark.parametrize("dataset_name", ["glyphs", "fashion"])
def test_weights_fit_their_budget_and_have_been_measured(dataset_name):
    paths = (ROOT / "weights" / dataset_name).glob("*.safetensors")
    sizes = {path.stem: path.stat().st_size for path in paths}
    results = [sizes.pop(name) for name in ("adt", "add")]             # as large as the base
    assert sizes.keys() == {"denoiser", "backbone", "cnn", "eval_classifier"}
    assert sum(sizes.values()) <= 12e6 and max(results) <= 9e6
    for name in ("base", "adt", "add"):
        path = make_figures.pretrained_results(name, dataset_name)
        assert path.is_file(), f"no {path.name}: python -m scripts.make_figures fd_vs_steps measures it"
        assert all(key.endswith("(2000 images)") for key in json.loads(path.read_text()))


def test_links_of_the_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            target = link.partition("#")[0]
            if target and ":" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken, broken


# ------------------------------------------------------------------------------------------------- commands

COMMAND_RE = re.compile(r"(?:python|torchrun [^#]*?) (-m scripts\.\w+|\w+\.py)")
PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "data.py": data}
DEFAULT_DATA = "glyphs", data.DEFAULT_HUB_DATASET


def commands():
    """Every line of a page's sh blocks that runs a program of ours."""
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if COMMAND_RE.match(line)]


def split_command(command):
    """-> what starts the program, the program, its arguments."""
    match = COMMAND_RE.match(command)
    return command[:match.start(1)].split(), match[1], shlex.split(command[match.end(1):])


def short_arguments(program, arguments):
    """Arguments to append, so that the command takes seconds; of an option that occurs twice the last one
    counts. A run of train.py gets a new folder."""
    if program == "evaluate.py":
        return ["--eval-samples", "200", "--steps", "1", "--output", "new.png"]
    if program != "train.py" or "help" in arguments:
        return []
    short = ["--steps", "2", "--eval-samples", "0", "--set", "batch_size=2"]
    if "--resume" in arguments:
        return short[:4]
    if "add" not in arguments:
        short += ["--set", "num_inference_steps=1", "--set", "num_grad_steps=1"]
    return [*short, "--output-dir", "new-run", "--overwrite"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, adt_run):
    """A copy of what a user has, with the run that the pages' later commands name."""
    copy = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for folder in (*PACKAGES, "weights", "results", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.state", "__pycache__"))
    shutil.copy(ROOT / "README.md", copy)
    copy_run(adt_run, copy / "runs" / "adt-glyphs-seed0")
    return copy


def test_the_readme_has_commands():
    assert {split_command(command)[1] for command in commands()} >= {"train.py", "evaluate.py", "data.py"}


def test_the_run_folders_that_the_pages_name_are_those_of_their_commands():
    """A command that reads a run comes after the one whose default folder it is."""
    made = set()
    for _, program, arguments in map(split_command, commands()):
        named = {argument for argument in arguments if argument.startswith("runs/")}
        if program == "train.py" and not named and "help" not in arguments:
            args = train.parse_args(arguments)[1]
            made.add(str(cli.resolve_run_config(args, train.METHODS, train.MODELS, DEFAULT_DATA)[1]))
        assert named <= made
    assert made


@pytest.mark.parametrize("command", commands())
def test_command_of_the_pages_runs(clone, monkeypatch, command):
    """train.py with two processes, to the table at its end, and evaluate.py once as programs in the copy;
    the others in this process."""
    start, program, arguments = split_command(command)
    short = short_arguments(program, arguments)
    if start[0] == "python" and program in PROGRAMS and "--prompt" not in arguments:
        monkeypatch.chdir(clone)
        PROGRAMS[program].main([*arguments, *short])
        return
    if start[0] == "torchrun":
        start[:1] = ["python", "-m", "torch.distributed.run"]
        short += ["--eval-samples", "200"]
    result = subprocess.run([sys.executable, *start[1:], *program.split(), *arguments, *short], cwd=clone,
                            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, f"{command} {shlex.join(short)}\n{result.stderr[-2000:]}"
    assert program != "train.py" or (clone / "new-run" / "table.md").is_file()
