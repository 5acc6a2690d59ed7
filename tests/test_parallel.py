"""Two processes are one with twice the micro-batches: the same gradients, the same weights, the same log."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_latent import command, world  # noqa: F401
from test_survival import same, what_is_left


def command_line(processes, *arguments):
    """The command in one process, or in two under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(20000 + os.getpid() % 20000)] if processes == 2 else []
    return [sys.executable, *torchrun, "train.py", *arguments]


def go(out, processes, *arguments):
    """Run it on the CPU -> its checkpoint, its log."""
    home = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out.parent)}
    where = [] if "--resume" in arguments else ["--out", str(out)]
    done = subprocess.run(command_line(processes, *arguments, *where), cwd=ROOT,
                          text=True, capture_output=True, env=home)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.load(out / "checkpoint.pt", weights_only=True), log


@pytest.mark.parametrize("name,method,extra", [("tiny", "adt", []), ("sd15", "adt", ["--shard"]),
                                               ("sdxl", "add", ["--lora", "4"]), ("sd3", "add", ["--shard"])])
def test_two_processes_take_the_step_of_one(request, tmp_path, name, method, extra):
    typed = ["--samples", "0"] if name == "tiny" else command(request.getfixturevalue("world"), name)
    short = ["--set", "path_steps=2", "--set", "train_steps=2"] if method == "adt" else []
    typed += ["--method", method, "--steps", "1", "--set", "warmup_d=0", "--set", "batch=1", *short]
    alone = [word for word in extra if word != "--shard"]
    one, first = go(tmp_path / "one", 1, *typed, *alone, "--set", "accumulate=2")
    pair, second = go(tmp_path / "pair", 2, *typed, *extra)
    most = 2e-2 if "--shard" in extra else 1e-5              # sharded weights are cast to bf16 for every call
    for key in ("opt_g", "opt_d"):                           # the gradients, as the optimisers remember them
        a, b = (torch.cat([m["exp_avg"].flatten() for _, m in sorted(run[key]["state"].items())])
                for run in (one, pair))
        assert (a - b).norm() < most * a.norm()
    for key in ("weights", "average"):
        gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(one[key], pair[key], strict=True)])
        assert gaps.mean() < 1e-7 or "--shard" in extra
    own = {"seconds", "|grad adv|", "|grad diff|", "|grad distill|"}          # measured in each process
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - own:
            assert abs(a[key] - b[key]) <= 2e-3 * max(1, abs(a[key])), key


def test_a_sharded_run_goes_on(world, tmp_path):  # noqa: F811
    """Weights, average and moments are spread again over the processes; one alone may not take the run."""
    typed = [*command(world, "sdxl"), "--method", "diffusion", "--set", "batch=1", "--shard", "--lean"]
    whole, log = go(tmp_path / "whole", 2, *typed, "--steps", "2")
    go(tmp_path / "parts", 2, *typed, "--steps", "1")
    parts, after = go(tmp_path / "parts", 2, "--resume", str(tmp_path / "parts"), "--steps", "2",
                      "--samples", "0")
    assert [row["step"] for row in after] == [0, 1] and parts["done"] == 2
    assert [row["diff"] for row in after] == [row["diff"] for row in log]
    assert same(parts["weights"], whole["weights"]) and same(parts["opt_g"]["state"], whole["opt_g"]["state"])
    alone = subprocess.run(command_line(1, "--resume", str(tmp_path / "parts")), cwd=ROOT, text=True,
                           capture_output=True)
    assert alone.returncode == 2 and "torchrun --nproc-per-node 2 train.py --resume" in alone.stderr


def test_two_processes_go_on_bit_by_bit(tmp_path):
    """The scheduler stops torchrun with SIGTERM: both finish the same step, save, and later go on as if
    nothing had happened."""
    typed = ["--method", "add", "--samples", "0", "--steps", "6", "--set", "batch=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(whole, 2, *typed)
    pair = subprocess.Popen(command_line(2, *typed, "--out", str(parts)), cwd=ROOT, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (parts / "log.jsonl").is_file() or not (parts / "log.jsonl").read_text():
        assert pair.poll() is None, pair.stderr.read()[-3000:]
        time.sleep(.02)
    pair.send_signal(signal.SIGTERM)
    pair.communicate()
    stopped = torch.load(parts / "checkpoint.pt", weights_only=True)["done"]
    assert 1 <= stopped < 6
    go(parts, 2, "--resume", str(parts), "--samples", "0")
    assert same(what_is_left(whole), what_is_left(parts))
