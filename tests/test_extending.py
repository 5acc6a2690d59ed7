"""The examples of docs/extending.md run as they are printed; command-line arguments make them short."""

import os
import re
import runpy
import subprocess
import sys

import pytest

import data
import train
from conftest import ROOT

EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(),
                           re.S))
TRAIN_ARGS = ["--output-dir", "run", "--steps", "2", "--set", "batch_size=2", "--set",
              "num_inference_steps=2", "--eval-samples", "0"]
ARGS = {"single_step": TRAIN_ARGS, "patches": TRAIN_ARGS, "ddpm": [], "discs": ["--steps", "2"]}
RESULTS = {"single_step": "run/denoiser.safetensors", "patches": "run/denoiser.safetensors",
           "ddpm": "ddpm.png", "discs": "discs/denoiser.safetensors"}


def run_program(name, args, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, f"{name}.py", *args], cwd=folder, capture_output=True, text=True,
                            env=env)
    assert result.returncode == 0, result.stderr[-3000:]


def run_here(name, args, folder, monkeypatch):
    """The same in this process, whose modules are imported already."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))         # what the example changes, is undone
    monkeypatch.setattr(data, "build_dataset", data.build_dataset)
    runpy.run_path(f"{name}.py", run_name="__main__")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ARGS)
def test_the_example_works(name, tmp_path, drawing, monkeypatch):
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    if name == "single_step":                    # resumed by its own name, which train.py does not know
        run_here(name, ARGS[name], tmp_path, monkeypatch)
        run_program(name, ["--resume", "run", "--steps", "3", "--eval-samples", "0"], tmp_path)
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3
    else:
        run_here(name, ARGS[name], tmp_path, monkeypatch)
    assert (tmp_path / RESULTS[name]).stat().st_size > 0


def test_every_example_is_short_and_is_run():
    assert EXAMPLES.keys() == ARGS.keys()
    for name, code in EXAMPLES.items():
        body = [line for line in code.split("if __name__")[0].splitlines()
                if line.strip() and not line.startswith(("import", "from"))]
        assert len(body) <= 25, (name, len(body))
        assert all(len(line) <= 110 for line in code.splitlines()), name
