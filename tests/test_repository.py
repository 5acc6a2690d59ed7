"""The repository keeps its own promises: layers, sizes, equations, commands."""

import ast
import re
import shutil
import subprocess
import sys

import equations
import figures
import pytest
from conftest import ROOT

LAYERS = [{"denoiser", "networks", "parallel", "metrics", "preference"}, {"survival"}, {"stable"},
          {"models", "sampler", "losses", "discriminator", "data"}, {"adt", "add"},
          {"evaluate", "train", "pretrain"}, {"study"}, {"figures"}]
BESIDE = {"pretrain", "study", "figures", "preference"}      # what training and measuring can do without
CORE = [name for layer in LAYERS for name in sorted(layer - BESIDE)]


def imports(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_point_only_downwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    allowed = {("train", "evaluate"), ("evaluate", "figures")}               # the second hands on an option
    for name in level:
        for other in set(imports(name)) & level.keys():
            assert level[other] < level[name] or (name, other) in allowed, f"{name}.py imports {other}.py"


def test_core_stays_small():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 3750, lines
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number} has {len(line)} columns"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is too long"


def test_importing_the_core_needs_no_heavy_library():
    code = ("import sys, models, sampler, losses, discriminator, data, adt; "
            "print([m for m in ('diffusers', 'transformers', 'peft', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_equation_in_the_source_has_a_proof():
    where, proved = equations.tags(), equations.proofs()
    assert len(where) >= 8 and where.keys() == proved.keys()
    assert where.keys() <= equations.MEANING.keys()


def test_the_equation_map_of_the_readme_is_current():
    assert equations.table() in (ROOT / "README.md").read_text(), "run python tests/equations.py"


def test_the_tables_of_the_readme_are_those_of_the_studies():
    readme = (ROOT / "README.md").read_text()
    assert figures.filled(readme) == readme, "run python evaluate.py --figures"
    assert len(figures.MARK.findall(readme)) >= 3


def test_weights_fit_their_budget():
    for dataset in ("glyphs", "fashion"):
        size = {f.stem: f.stat().st_size for f in (ROOT / "weights" / dataset).glob("*.safetensors")}
        trained = [size.pop(name, 0) for name in ("adt", "add")]              # results, as large as the base
        assert len(size) >= 3 and sum(size.values()) <= 12e6 and max(trained) <= 9e6


# -------------------------------------------------------------------------------------- the README's commands

SHRINK = {"adt.py": [('pictures per micro-batch"] = 32', 'pictures per micro-batch"] = 2'),
                     ('that training runs"] = 10', 'that training runs"] = 2')],
          "train.py": [("SAMPLES = 2000", "SAMPLES = 200"), (", 500)", ", 2)"), (", 600)", ", 2)"),
                       ("{}, 300)", "{}, 2)")],
          "add.py": [("(1, 4, 25)", "(1, 2, 3)")],
          "evaluate.py": [("default=2000", "default=200"), ("(10, {}), (25, {})", "(2, {})")],
          "study.py": [("steps=2050", "steps=2"), ('"add", 300', '"add", 2'), ("seeds=3", "seeds=1"),
                       ("plan.rows):", "plan.rows[::7]):"),
                       ('"add", 4000', '"add", 2'), ("steps=900", "steps=2"), ("(20, {}), ", ""),
                       ('(50, {}), (50, {"guidance": 2.})', "(2, {})"), ("8, 25, 50)", "8)"),
                       ('(25, {"guidance": 2.})', "(2, {})"), ("(25, {})", "(3, {})")],
          "pretrain.py": [(r"Recipe\(\d+, \d+,", "Recipe(1, 2,")]}


def commands():
    """Every line of the README's sh blocks that runs one of our scripts."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines()
            if re.search(r"(python|torchrun .*) \w+\.py", line)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a user has, its budgets shrunk; runs of earlier commands are there for later ones."""
    copy = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        for old, new in SHRINK.get(path.name, []):
            old = old if path.name == "pretrain.py" else re.escape(old)
            assert re.search(old, text), f"{path.name}: no {old} to shrink"
            text = re.sub(old, new, text)
        (copy / path.name).write_text(text)
    shutil.copytree(ROOT / "weights", copy / "weights", ignore=shutil.ignore_patterns("*.state", "*.jsonl"))
    (copy / "figures").mkdir()
    return copy


def test_the_readme_has_commands():
    assert {"train.py", "evaluate.py", "data.py"} <= {re.search(r"\w+\.py", c)[0] for c in commands()}


@pytest.mark.parametrize("command", commands())
def test_readme_command_runs(clone, command):
    """Every command of the README as it stands, on shrunken budgets."""
    command = command.split("  #")[0].replace("torchrun ", "python -m torch.distributed.run ")
    command = command.replace("python ", f"{sys.executable} ")
    command = re.sub(r"(train\.py.*?) --steps \d+", r"\1 --steps 3", command)
    command = re.sub(r"(evaluate\.py.*?) --steps [\d,]+", r"\1 --steps 2,3", command)
    done = subprocess.run(["bash", "-ec", command], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_every_picture_is_of_the_function_that_draws_it_now():
    stale = [draw.__name__ for draw in figures.DRAWN
             if not figures.fresh(draw, figures.HOME / f"{draw.__name__}.png")]
    assert not stale, f"python evaluate.py --figures draws {', '.join(stale)} anew"
