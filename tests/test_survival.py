"""A run dies in many ways: interrupted, killed, out of disk, out of numbers. What it had, it keeps, and it
goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import go

import train


def same(a, b):
    """Bit by bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def what_is_left(out):
    """Its checkpoint, and its log without the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.load(out / "checkpoint.pt", weights_only=True), [{**row, "seconds": 0} for row in rows]


@pytest.fixture
def during(monkeypatch):
    """Have something happen inside the step of that number."""
    def arrange(number, happen):
        step = train.Run.step
        def eventful(run):
            if run.done == number:
                happen(run)
            return step(run)
        monkeypatch.setattr(train.Run, "step", eventful)
        return lambda: monkeypatch.setattr(train.Run, "step", step)
    return arrange


def leaves(out, *arguments):
    """The exit code of a run that does not come to its end."""
    with pytest.raises(SystemExit) as left:
        go(out, *arguments) if "--resume" not in arguments else train.main(list(arguments))
    return left.value.code


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
def test_resume_is_bit_exact_wherever_it_was_stopped(tmp_path, method, during, capsys):
    """Asked to stop in each of its steps, by one signal or the other, the run ends with the bits of one that
    was left alone: weights, average, optimisers, discriminator, log."""
    whole, parts = go(tmp_path / "whole", "--method", method, "--steps", "4"), tmp_path / "parts"
    start = ["--method", method, "--steps", "4"]
    for k, number in enumerate([signal.SIGINT, signal.SIGTERM, signal.SIGINT]):
        undo = during(k, lambda run: os.kill(os.getpid(), number))
        assert leaves(parts, *start) == 0
        undo()
        start = ["--resume", str(parts), "--samples", "0"]
        assert f"python train.py --resume {parts}" in capsys.readouterr().err
        assert len(what_is_left(parts)[1]) == k + 1
    train.main(start)
    assert same(what_is_left(whole), what_is_left(parts))


def test_the_second_ctrl_c_does_not_wait(monkeypatch):
    left, clock = [], iter([0., .5, .5, 3., 3.])
    monkeypatch.setattr(train.os, "_exit", left.append)
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    before = signal.getsignal(signal.SIGINT)
    with train.patience() as asked:
        signal.raise_signal(signal.SIGINT)
        assert len(asked) == 1 and not left
        signal.raise_signal(signal.SIGINT)                   # at once: the same one, by way of torchrun
        assert not left
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_nan_stops_the_run_and_names_step_term_and_checkpoint(tmp_path, during, capsys):
    out = go(tmp_path / "run", "--steps", "2")
    good = what_is_left(out)[0]
    during(3, lambda run: setattr(run.config, "lambda_diff", float("inf")))
    assert leaves(out, "--resume", str(out), "--steps", "5", "--samples", "0") == 1
    said = capsys.readouterr().err
    assert "step 3: diff is inf" in said and "checkpoint of step 2 is good" in said and "--on-nan" in said
    assert same(what_is_left(out)[0], good)


def test_a_nan_may_be_skipped_and_is_counted(tmp_path, during):
    """Only the half in which it came is left out, and the run goes on with finite weights."""
    seen = []
    def poison(run):
        seen.append([w.clone() for w in run.weights])
        run.config.lambda_diff = float("inf")
    def heal(run):
        seen.append([w.clone() for w in run.weights])
        run.config.lambda_diff = 1.
    during(1, poison), during(2, heal)
    out = go(tmp_path / "run", "--steps", "3", "--on-nan", "skip")
    state, log = what_is_left(out)
    assert same(*seen) and not same(seen[1], state["weights"])
    assert [row["skipped"] for row in log] == [0, 1, 1] and state["skipped"] == 1
    assert log[1]["diff"] is log[1]["|grad|"] is None and log[1]["|grad D|"] > 0
    assert all(w.isfinite().all() for w in state["weights"])


def test_skipping_has_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "HABIT", 2)
    assert leaves(tmp_path / "run", "--steps", "9", "--on-nan", "skip", "--set", "lambda_diff=1e36") == 1
    assert "not one of the last 2 steps was finite" in capsys.readouterr().err


@pytest.mark.parametrize("real,fake,word", [(1., 1., "nothing left to teach"), (0., 1., "learned nothing"),
                                            (1., 0., "learned nothing"), (.6, .7, None), (1., .7, None)])
def test_a_discriminator_that_collapsed_is_a_warning(real, fake, word):
    log = [{"step": i, "D right on real": real, "D right on fake": fake} for i in range(train.HABIT)]
    assert (word in train.advice(log)) if word else train.advice(log) is None
    assert train.advice(log[1:]) is None                     # not yet a habit
    assert train.advice([*log[:-1], {"D right on real": .5, "D right on fake": .5}]) is None
    assert train.advice([{"step": 0, "diff": 1.}] * train.HABIT) is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    """The disk fills up in the middle of a checkpoint (here: no file may be larger than 4 MB)."""
    import resource
    out = go(tmp_path / "run", "--steps", "2")
    good = (out / "checkpoint.pt").read_bytes(), (out / "denoiser.safetensors").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    deaf = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 22, before[1]))
    try:
        assert leaves(out, "--resume", str(out), "--steps", "4", "--samples", "0") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, deaf)
    said = capsys.readouterr().err
    assert "cannot write the checkpoint of step 4" in said and "checkpoint of step 2 is good" in said
    assert good == ((out / "checkpoint.pt").read_bytes(), (out / "denoiser.safetensors").read_bytes())
    assert not list(out.glob("*.part"))
    train.main(["--resume", str(out), "--steps", "4", "--samples", "0"])
    assert what_is_left(out)[0]["done"] == 4


def test_a_log_that_was_cut_off_is_no_obstacle(tmp_path):
    out = go(tmp_path / "run", "--steps", "2")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 2, "di')
    train.main(["--resume", str(out), "--steps", "3", "--samples", "0"])
    assert [row["step"] for row in what_is_left(out)[1]] == [0, 1, 2]


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """kill -9 at random moments, while a checkpoint is written after every step: what lies there always
    loads, no more than the last step is lost, and the end is that of a run that was left alone."""
    typed = ["--method", "adt", "--set", "batch=2", "--set", "path_steps=2", "--set", "train_steps=1",
             "--set", "warmup_d=0", "--samples", "0", "--steps", "150"]
    home = {**os.environ, "OMP_NUM_THREADS": "1"}
    def life(*arguments):
        code = f"import train; train.CHECKPOINT = 0; train.main({list(arguments)!r})"
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=home,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole, parts, moment = tmp_path / "whole", tmp_path / "parts", random.Random(0)
    log = parts / "log.jsonl"
    def rows():
        return log.read_text().count("\n") if log.is_file() else 0
    kills, reached = 0, 0
    while kills < 50:
        resumable = (parts / "checkpoint.pt").is_file()
        one = life(*(["--resume", str(parts), "--samples", "0"] if resumable
                     else [*typed, "--out", str(parts), "--overwrite"]))
        while rows() <= reached and one.poll() is None:
            time.sleep(.01)
        time.sleep(moment.uniform(0, 1.))
        assert one.poll() in (None, 0)
        if one.poll() == 0:
            break
        one.send_signal(signal.SIGKILL), one.wait()
        kills += 1
        if (parts / "checkpoint.pt").is_file():
            state = torch.load(parts / "checkpoint.pt", weights_only=True)
            assert rows() - 2 <= state["done"] and state["done"] >= reached - 1
            reached = state["done"]
    assert kills == 50, kills
    assert life("--resume", str(parts), "--samples", "0").wait() == 0
    assert life(*typed, "--out", str(whole)).wait() == 0
    assert same(what_is_left(whole), what_is_left(parts))
