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

import survival
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


@pytest.mark.parametrize("processes", [1, 2])
def test_the_second_ctrl_c_does_not_wait(monkeypatch, processes):
    """Of several processes each hears the first twice: from the terminal, and from torchrun."""
    left, clock = [], iter([0., *[.5] * 2, *[3.] * 2] if processes > 1 else [0., .1])
    monkeypatch.setattr(survival.os, "_exit", left.append)
    monkeypatch.setattr(survival.time, "time", lambda: next(clock))
    monkeypatch.setattr(survival.parallel, "world", lambda: processes)
    before = signal.getsignal(signal.SIGINT)
    with survival.patience() as asked:
        signal.raise_signal(signal.SIGINT)
        assert len(asked) == 1 and not left
        if processes > 1:
            signal.raise_signal(signal.SIGINT)
            assert not left
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_or_during_the_table_leaves_the_table_out(tmp_path, during, monkeypatch,
                                                                            capsys):
    small = ["--steps", "2", "--samples", "200"]
    undo = during(1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert leaves(tmp_path / "last", *small) == 0
    undo()
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train.evaluate, "examine", interrupted)
    assert leaves(tmp_path / "table", *small) == 0
    said = capsys.readouterr().err
    for name in ("last", "table"):
        assert f"go on with: python train.py --resume {tmp_path / name}" in said
        assert what_is_left(tmp_path / name)[0]["done"] == 2 and not (tmp_path / name / "table.md").exists()
    monkeypatch.setattr(train, "prepare", interrupted)
    assert leaves(tmp_path / "early", *small) == 130 and not (tmp_path / "early").exists()


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


def test_skip_is_remembered_and_sees_a_loss_whose_gradient_is_fine(tmp_path, during):
    """An infinite loss may have a finite gradient; and --on-nan is one of the run's own settings."""
    class Shouting(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * float("inf"))
        backward = staticmethod(lambda ctx, slope: slope)
    def shout(run):
        loss = run.module.generator_loss
        class Module:
            discriminator_loss = staticmethod(run.module.discriminator_loss)
            def generator_loss(*given):
                terms, *others = loss(*given)
                return {**terms, "diff": Shouting.apply(terms["diff"])}, *others
        run.module, before[:] = Module, [w.clone() for w in run.weights]
    before = []
    undo = during(0, lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert leaves(tmp_path / "run", "--steps", "2", "--on-nan", "skip") == 0
    undo(), during(1, shout)
    train.main(["--resume", str(tmp_path / "run"), "--samples", "0"])
    state, log = what_is_left(tmp_path / "run")
    assert same(before, state["weights"]) and [row["skipped"] for row in log] == [0, 1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_of_the_discriminator_stops_the_run_too(tmp_path, during, capsys, what):
    def poison(run):
        if what == "loss":
            judge = run.judge
            run.judge = lambda *given: {**judge(*given), "D": float("nan")}
        else:
            run.critic_weights[0].register_hook(lambda slope: slope * float("nan"))
    during(1, poison)
    assert leaves(tmp_path / "run", "--steps", "3", "--set", "accumulate=2") == 1
    said = capsys.readouterr().err
    assert f"step 1: {'D' if what == 'loss' else '|grad D|'} is nan" in said
    assert "nothing was saved before: begin anew with --overwrite" in said


@pytest.mark.parametrize("rate", ["lr", "lr_d"])
def test_weights_that_a_step_made_infinite_are_not_saved(tmp_path, capsys, rate):
    assert leaves(tmp_path / "run", "--steps", "1", "--set", f"{rate}=1e39") == 1
    said = capsys.readouterr().err
    assert "the weights are no numbers" in said and "--weights" not in said      # none to go on from
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_prolonged_run_does_not_warm_up_again(tmp_path):
    out = go(tmp_path / "run", "--steps", "4", "--set", "warmup_d=60")
    train.main(["--resume", str(out), "--steps", "8", "--samples", "0"])
    learned = ["|grad|" in json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert learned == [False] + 7 * [True]                   # of four steps a quarter, not of eight


def test_skipping_has_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "HABIT", 2)
    assert leaves(tmp_path / "run", "--steps", "9", "--on-nan", "skip", "--set", "lambda_diff=1e36") == 1
    assert "not one of the last 2 steps was finite" in capsys.readouterr().err


@pytest.mark.parametrize("real,fake,word", [(1., 1., "nothing left to teach"),
                                            (.5, 1., "nothing left to teach"),
                                            (0., 1., "learned nothing"), (1., 0., "learned nothing"),
                                            (.6, .7, None), (1., .7, None)])
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


@pytest.mark.parametrize("left", ["012{", "0123", "01x2", "0 2", "0122", "2", "", "01[", "013"])
def test_a_log_that_was_damaged_is_no_obstacle(tmp_path, left, capsys):
    """Rows belong to steps, not to lines: none comes twice, and what is lost is said."""
    out = go(tmp_path / "run", "--steps", "3")
    rows = {"{": '{"step": 2, "di', "x": "3", "[": "[" * 99999, " ": '{"seconds": 1}',
            **{str(i): json.dumps({"step": i, "seconds": 1.}) for i in range(4)}}
    (out / "log.jsonl").write_text("\n".join(rows[c] for c in left))
    capsys.readouterr()
    train.main(["--resume", str(out), "--steps", "4", "--samples", "0"])
    known = sorted({int(c) for c in left.split("x")[0].split(" ")[0] if c in "012"})
    assert [row["step"] for row in what_is_left(out)[1]] == [*known, 3]
    assert ("lost" in capsys.readouterr().out) == (len(known) < 3)


def test_a_row_that_the_disk_refused_is_written_before_the_next_checkpoint(tmp_path):
    log = survival.Log(tmp_path / "log.jsonl", 0)
    log.add({"step": 0, "seconds": 0.}, 9)
    real, log.file = log.file, type("Full", (), {"write": lambda self, text: real.write(text[:5])})()
    log.add({"step": 1, "seconds": 1.}, 9)
    log.file = real
    log.settle(), log.add({"step": 2, "seconds": 2.}, 9)
    assert [row["step"] for row in survival.rows_of(log.path)] == [0, 1, 2]


def test_a_long_log_is_read_thinly(tmp_path):
    """What curves.png is drawn from stays as small as it is, however long the run."""
    path = tmp_path / "log.jsonl"
    for steps in (100, 5000, 20000):
        rows = ({"step": i, "seconds": 1., "diff": .1} for i in range(steps))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = survival.rows_of(path, most=500)
        assert len(rows) == steps if steps == 100 else 250 <= len(rows) <= 600
        assert rows[0]["step"] == 0 and rows[-1]["step"] > .99 * steps - 1
    assert len(survival.rows_of(path)) == 20000


def forge(out, change):
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, out / "checkpoint.pt")


@pytest.mark.parametrize("change", [
    lambda s: s["opt_g"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda s: s["opt_d"]["state"][0].update(exp_avg_sq=torch.zeros(3)),
    lambda s: s["opt_g"]["state"].update({9999: s["opt_g"]["state"][0]}),
    lambda s: s["opt_g"]["state"][0].update(step="x"),
    lambda s: s.update(done="x"), lambda s: s.update(done=-3), lambda s: s.update(done=1.5),
    lambda s: s.update(done=None), lambda s: s.update(skipped="x"),
    lambda s: s.update(of=["add", "glyphs", 0]),
    lambda s: s.update(warmup="x"), lambda s: s.pop("warmup"),
    lambda s: s["average"][0].fill_(float("nan")), lambda s: s["weights"][0].fill_(float("inf")),
    lambda s: s["critic"]["heads.0.leave.bias"].fill_(float("nan")),
    lambda s: s["opt_g"]["state"][0]["exp_avg"].fill_(float("nan")),
    lambda s: s["opt_d"]["state"][0]["exp_avg_sq"].fill_(float("inf"))])
def test_a_checkpoint_is_checked_before_it_is_believed(tmp_path, change, capsys):
    out = go(tmp_path / "run", "--steps", "2")
    forge(out, change)
    assert leaves(out, "--resume", str(out), "--steps", "3", "--samples", "0") == 2
    assert "damaged or another run's" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--method add", "--seed 3", "--data fashion", "--set lr=1", "--overwrite",
                                   "--lora 4"])
def test_a_resumed_run_keeps_its_settings(tmp_path, typed, capsys):
    out = go(tmp_path / "run", "--steps", "1")
    assert leaves(out, "--resume", str(out), *typed.split()) == 2
    assert f"leave out {typed.split()[0]}" in capsys.readouterr().err


def test_a_run_of_two_processes_is_not_continued_by_one(tmp_path, capsys):
    out = go(tmp_path / "run", "--steps", "1")
    plan = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**plan, "world": 2}))
    assert leaves(out, "--resume", str(out)) == 2
    assert f"torchrun --nproc-per-node 2 train.py --resume {out}" in capsys.readouterr().err


def test_overwrite_replaces_runs_and_nothing_else(tmp_path, monkeypatch):
    """What is no run stays; a run that could not even begin leaves a folder that --overwrite still knows."""
    strange = tmp_path / "model"
    strange.mkdir()
    (strange / "config.json").write_text('{"hidden_size": 4}')
    (strange / "model.safetensors").write_text("x")
    assert leaves(strange, "--overwrite") == 2 and len(list(strange.iterdir())) == 2
    out = go(tmp_path / "run", "--steps", "1")
    (out / "photo.png").write_text("mine")
    def full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(survival, "write", full)
    assert leaves(out, "--overwrite") == 2
    monkeypatch.undo()
    go(out, "--steps", "1", "--overwrite")
    assert (out / "photo.png").read_text() == "mine"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "pipeline"
    for content in ("old", "new"):
        with survival.whole(target) as partial:
            partial.mkdir(), (partial / "file").write_text(content)
    assert (target / "file").read_text() == "new"
    with pytest.raises(OSError), survival.whole(target) as partial:
        partial.mkdir(), (partial / "file").write_text("half")
        raise OSError("no space left on device")
    assert (target / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


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
