"""The examples of FORK.md work, as they are printed there (only shorter)."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "FORK.md").read_text(), re.S))
SHORT = "--steps 2 --set batch=2 --set path_steps=2 --samples 0".split()
LEAVES = {"guess": "runs/guess-glyphs-batch=2-path_steps=2-seed0/denoiser.safetensors",
          "patches": "runs/patches-glyphs-lr_d=2e-4-batch=2-path_steps=2-seed0/denoiser.safetensors",
          "ddpm": "ddpm.png", "discs": "discs/denoiser.safetensors"}


@pytest.mark.parametrize("name", LEAVES)
def test_the_example_works(name, tmp_path):
    code = EXAMPLES[name]
    code = code.replace('"--out", "discs"]', '"--out", "discs", "--steps", "2"]')
    (tmp_path / f"{name}.py").write_text(code)
    def run(*words):
        done = subprocess.run([sys.executable, f"{name}.py", *words], cwd=tmp_path, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    run(*(SHORT if "sys.argv" in code else []))
    assert (tmp_path / LEAVES[name]).stat().st_size > 0
    if name == "guess":                                      # by its own name, for train.py does not know it
        run("--resume", "runs/guess-glyphs-batch=2-path_steps=2-seed0", "--steps", "3", "--samples", "0")
        assert len((tmp_path / LEAVES[name]).with_name("log.jsonl").read_text().splitlines()) == 3


def test_every_example_is_short_and_run():
    assert EXAMPLES.keys() == LEAVES.keys()
    for name, code in EXAMPLES.items():
        body = [line for line in code.split("if __name__")[0].splitlines()
                if line.strip() and not line.startswith(("import", "from"))]
        assert len(body) <= 22, (name, len(body))
        assert all(len(line) <= 110 for line in code.splitlines())
