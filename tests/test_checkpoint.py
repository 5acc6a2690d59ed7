"""Runs that are interrupted, killed, out of disk, or meet a NaN: what they had is kept, and they resume with
the same bits."""

import copy
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, copy_run, train_run
from discriminator import DiscriminatorInputs
from models.named import load_run
from utils import checkpoint, training_state
from utils.messages import is_out_of_memory

RESUME = ["--eval-samples", "0", "--resume"]


def equal_nested(a, b):
    """Bit by bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_nested(a[k], b[k]) for k in a)
    return all(map(equal_nested, a, b)) if isinstance(a, (list, tuple)) else a == b


def checkpoint_and_log(run_dir):
    """The checkpoint, and the log without its clock."""
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return state, [{**row, "seconds": 0} for row in rows]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(number, function): call function(trainer) when that step begins; returns how to undo it."""
    def arrange(number, function):
        train_step = train.Trainer.train_step

        def patched(trainer):
            if trainer.step == number:
                function(trainer)
            return train_step(trainer)

        monkeypatch.setattr(train.Trainer, "train_step", patched)
        return lambda: monkeypatch.setattr(train.Trainer, "train_step", train_step)
    return arrange


def exit_code(run_dir, *arguments):
    """Of a run that does not reach its end."""
    with pytest.raises(SystemExit) as left:
        if "--resume" in arguments:
            train.main(list(arguments))
        else:
            train_run(run_dir, *arguments)
    return left.value.code


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


@pytest.mark.parametrize("method", ["adt", "add", "diffusion"])
def test_resume_is_bit_exact_wherever_a_run_was_stopped(tmp_path, method, at_step, capsys):
    """Stopped in each of its steps by either signal, a run ends with the bits of an uninterrupted one."""
    uninterrupted = train_run(tmp_path / "uninterrupted", "--method", method, "--steps", "3")
    run_dir, start = tmp_path / "parts", ["--method", method, "--steps", "3"]
    for step, number in enumerate([signal.SIGINT, signal.SIGTERM]):
        undo = at_step(step, send(number))
        assert exit_code(run_dir, *start) == 128 + number
        undo()
        start = [*RESUME, str(run_dir)]
        assert f"python train.py --resume {run_dir}" in capsys.readouterr().err
        assert len(checkpoint_and_log(run_dir)[1]) == step + 1
    train.main(start)
    assert equal_nested(checkpoint_and_log(uninterrupted), checkpoint_and_log(run_dir))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_second_ctrl_c_ends_the_process_at_once(monkeypatch, processes):
    """With several processes each receives the first one twice: from the terminal, and from torchrun."""
    exits, clock = [], iter([0., *[.5] * 2, *[3.] * 2] if processes > 1 else [0., .1])
    monkeypatch.setattr(checkpoint.os, "_exit", exits.append)
    monkeypatch.setattr(checkpoint.time, "time", lambda: next(clock))
    monkeypatch.setattr(checkpoint.distributed, "get_world_size", lambda: processes)
    before = signal.getsignal(signal.SIGINT)
    with checkpoint.defer_signals() as stop_requests:
        signal.raise_signal(signal.SIGINT)
        assert len(stop_requests) == 1
        assert not exits
        if processes > 1:
            signal.raise_signal(signal.SIGINT)
            assert not exits
        signal.raise_signal(signal.SIGINT)
        assert exits == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_or_during_the_evaluation_skips_the_table(tmp_path, at_step, monkeypatch,
                                                                            capsys):
    small = ["--steps", "2", "--eval-samples", "200"]
    undo = at_step(1, send(signal.SIGTERM))
    assert exit_code(tmp_path / "last", *small) == 143
    undo()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "final_evaluation", interrupted)
    assert exit_code(tmp_path / "table", *small) == 130
    message = capsys.readouterr().err
    for name in ("last", "table"):
        assert f"continue with: python train.py --resume {tmp_path / name}" in message
        assert checkpoint_and_log(tmp_path / name)[0]["step"] == 2
        assert not (tmp_path / name / "table.md").exists()
    monkeypatch.setattr(train, "setup", interrupted)
    assert exit_code(tmp_path / "early", *small) == 130
    assert not (tmp_path / "early").exists()


def set_infinite_loss(trainer):
    trainer.config.lambda_diff = float("inf")


def test_a_nan_stops_the_run_and_names_step_term_and_checkpoint(tmp_path, adt_run, at_step, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    good = checkpoint_and_log(run_dir)[0]
    at_step(3, set_infinite_loss)
    assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "5") == 1
    message = capsys.readouterr().err
    assert "step 3: loss_diffusion is inf" in message
    assert "checkpoint of step 2 is good" in message
    assert "--on-nan" in message
    assert equal_nested(checkpoint_and_log(run_dir)[0], good)


def test_a_nan_can_be_skipped_and_is_counted(tmp_path, at_step):
    """Only the update of the half in which it occurred is left out."""
    params = []

    def set_nan(trainer):
        params.append([param.clone() for param in trainer.g_params])
        set_infinite_loss(trainer)

    def undo_nan(trainer):
        params.append([param.clone() for param in trainer.g_params])
        trainer.config.lambda_diff = 1.

    at_step(1, set_nan)
    at_step(2, undo_nan)
    run_dir = train_run(tmp_path / "run", "--steps", "3", "--on-nan", "skip")
    state, log = checkpoint_and_log(run_dir)
    assert equal_nested(*params)
    assert not equal_nested(params[1], state["params"])
    assert [row["skipped_steps"] for row in log] == [0, 1, 1]
    assert state["num_skipped"] == 1
    assert log[1]["loss_diffusion"] is log[1]["grad_norm"] is None
    assert log[1]["grad_norm_d"] > 0
    assert all(param.isfinite().all() for param in state["params"])


class InfiniteLossFiniteGradient(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * float("inf"))
    backward = staticmethod(lambda ctx, grad: grad)


def test_on_nan_is_a_setting_of_the_run_and_looks_at_losses_too(tmp_path, at_step):
    params = []

    def spike_loss(trainer):
        method = trainer.method

        class Method:
            discriminator_loss = staticmethod(method.discriminator_loss)

            @staticmethod
            def generator_loss(*args):
                losses, inputs = method.generator_loss(*args)
                return {**losses, "diffusion": InfiniteLossFiniteGradient.apply(losses["diffusion"])}, inputs

        trainer.method = Method
        params[:] = [param.clone() for param in trainer.g_params]

    undo = at_step(0, send(signal.SIGINT))
    assert exit_code(tmp_path / "run", "--steps", "2", "--on-nan", "skip") == 130
    undo()
    at_step(1, spike_loss)
    train.main([*RESUME, str(tmp_path / "run")])
    state, log = checkpoint_and_log(tmp_path / "run")
    assert equal_nested(params, state["params"])
    assert [row["skipped_steps"] for row in log] == [0, 1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_of_the_discriminator_stops_the_run_too(tmp_path, at_step, capsys, where):
    def set_nan(trainer):
        if where == "gradient":
            trainer.d_params[0].register_hook(lambda grad: grad * float("nan"))
            return
        method = trainer.method

        class Method:
            generator_loss = staticmethod(method.generator_loss)

            @staticmethod
            def discriminator_loss(*args):
                losses, *logits = method.discriminator_loss(*args)
                return {"d": losses["d"] * float("nan")}, *logits

        trainer.method = Method

    at_step(1, set_nan)
    arguments = ["--steps", "3", "--set", "gradient_accumulation_steps=2"]
    assert exit_code(tmp_path / "run", *arguments) == 1
    message = capsys.readouterr().err
    assert f"step 1: {'loss_d' if where == 'loss' else 'grad_norm_d'} is nan" in message
    assert "nothing was saved before: start again with --overwrite" in message


@pytest.mark.parametrize("rate", ["lr", "lr_d"])
def test_weights_that_became_infinite_are_not_saved(tmp_path, capsys, rate):
    assert exit_code(tmp_path / "run", "--steps", "1", "--set", f"{rate}=1e39") == 1
    message = capsys.readouterr().err
    assert "a weight is NaN or infinite" in message
    assert "--pretrained" not in message                     # nothing was saved to start from
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                                   MemoryError()])
@pytest.mark.parametrize("when", ["setup", "training"])
def test_out_of_memory_is_a_sentence(tmp_path, adt_run, at_step, monkeypatch, capsys, error, when):
    def fail(*_):
        raise error

    if when == "setup":
        monkeypatch.setattr(train, "setup", fail)
    run_dir = tmp_path / "run"
    if when == "training":
        copy_run(adt_run, run_dir)
        at_step(2, fail)
    arguments = ["--steps", "2"] if when == "setup" else [*RESUME, str(run_dir), "--steps", "3"]
    assert exit_code(run_dir, *arguments) == 1
    message = capsys.readouterr().err
    assert "out of memory" in message
    assert "gradient_accumulation_steps" in message
    if when == "training":
        assert f"the checkpoint of step 2 is good: python train.py --resume {run_dir}" in message
        assert "a new run needs less with a smaller batch_size" in message
        assert f"(--pretrained {run_dir})" in message        # --resume keeps its batch_size


@pytest.mark.parametrize("text", [
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
    "unable to mmap 1000 bytes from file <x>: Cannot allocate memory (12)",
    "unable to allocate shared memory(shm) for file </x>: Cannot allocate memory (12)", "std::bad_alloc",
    "could not create a memory object", "MPS backend out of memory"])
def test_a_lack_of_memory_is_recognised_by_its_text(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_lack_of_memory_while_saving_is_not_blamed_on_the_disk(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    assert exit_code(tmp_path / "run", "--steps", "1") == 1
    message = capsys.readouterr().err
    assert "out of memory; a new run needs less" in message
    assert "cannot write" not in message


def test_other_runtime_errors_keep_their_traceback(at_step, tmp_path):
    def fail(trainer):
        raise RuntimeError("shape mismatch")

    at_step(0, fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train_run(tmp_path / "run", "--steps", "1")


def test_an_extended_run_does_not_warm_up_again(tmp_path):
    run_dir = train_run(tmp_path / "run", "--steps", "4", "--set", "warmup_steps_d=60")
    train.main([*RESUME, str(run_dir), "--steps", "8"])
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    assert ["grad_norm" in json.loads(line) for line in lines] == [False] + 7 * [True]


def test_skipping_every_step_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_state, "DIAGNOSE_WINDOW", 2)
    monkeypatch.setattr(train, "DIAGNOSE_WINDOW", 2)
    arguments = ["--steps", "9", "--on-nan", "skip", "--set", "lambda_diff=1e36"]
    assert exit_code(tmp_path / "run", *arguments) == 1
    assert "none of the last 2 steps was finite" in capsys.readouterr().err


@pytest.mark.parametrize("real,fake,word", [(1., 1., "carries no signal"), (.5, 1., "carries no signal"),
                                            (0., 1., "learned nothing"), (1., 0., "learned nothing"),
                                            (.6, .7, None), (1., .7, None)])
def test_a_useless_discriminator_is_reported(real, fake, word):
    window = training_state.DIAGNOSE_WINDOW
    log = [{"step": i, "acc_d_real": real, "acc_d_fake": fake} for i in range(window)]
    warning = training_state.diagnose_discriminator(log)
    assert (word in warning) if word else warning is None
    if word:
        page, anchor = warning.rsplit("see ", 1)[1].split("#")
        lines = (ROOT / page).read_text().splitlines()
        headings = [line.lstrip("# ").lower().replace(" ", "-") for line in lines if line.startswith("#")]
        assert anchor in headings or f'id="{anchor}"' in "".join(lines)
    assert training_state.diagnose_discriminator(log[1:]) is None
    healthy = {"acc_d_real": .5, "acc_d_fake": .5}
    assert training_state.diagnose_discriminator([*log[:-1], healthy]) is None
    assert training_state.diagnose_discriminator([{"step": 0, "loss_diffusion": 1.}] * window) is None


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, adt_run, capsys):
    """The disk is full in the middle of a checkpoint (here: no file may be larger than 4 MB)."""
    import resource
    run_dir = copy_run(adt_run, tmp_path / "run")
    good = (run_dir / "checkpoint.pt").read_bytes(), (run_dir / "denoiser.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 22, limits[1]))
    try:
        assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "4") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    message = capsys.readouterr().err
    assert "cannot write the checkpoint of step 4" in message
    assert "checkpoint of step 2 is good" in message
    assert good == ((run_dir / "checkpoint.pt").read_bytes(), (run_dir / "denoiser.safetensors").read_bytes())
    assert not list(run_dir.glob("*.part"))
    train.main([*RESUME, str(run_dir), "--steps", "4"])
    assert checkpoint_and_log(run_dir)[0]["step"] == 4


def write_log(path, lines):
    """One line for each character: a digit is the row of that step, the others are damaged rows."""
    rows = {"{": '{"step": 2, "di', "x": "3", "[": "[" * 99999, " ": '{"seconds": 1}',
            **{str(i): json.dumps({"step": i, "seconds": 1.}) for i in range(4)}}
    path.write_text("\n".join(rows[c] for c in lines))


@pytest.mark.parametrize("lines", ["012{", "0123", "01x2", "0 2", "0122", "2", "", "01[", "013"])
def test_a_damaged_log_is_no_obstacle(tmp_path, lines, capsys):
    """Rows belong to steps, not to lines: none occurs twice, and lost ones are reported."""
    path = tmp_path / "log.jsonl"
    write_log(path, lines)
    log = checkpoint.JsonlLog(path, 3)
    log.append({"step": 3, "seconds": 2.}, 9)
    log.file.close()
    kept = sorted({int(c) for c in lines.split("x")[0].split(" ")[0] if c in "012"})
    steps = [*kept, 3]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps
    assert [row["step"] for row in log.rows] == steps
    assert ("lost" in capsys.readouterr().out) == (len(kept) < 3)


def test_a_run_with_a_damaged_log_is_resumed(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    write_log(run_dir / "log.jsonl", "0{")
    train.main([*RESUME, str(run_dir), "--steps", "3"])
    assert [row["step"] for row in checkpoint_and_log(run_dir)[1]] == [0, 2]
    assert "log.jsonl: 1 of its 2 rows are lost" in capsys.readouterr().out


def test_a_row_that_a_full_disk_dropped_is_written_with_the_next_checkpoint(tmp_path):
    log = checkpoint.JsonlLog(tmp_path / "log.jsonl", 0)
    log.append({"step": 0, "seconds": 0.}, 9)
    file = log.file
    log.file = type("FullDisk", (), {"write": lambda self, text: file.write(text[:5])})()
    log.append({"step": 1, "seconds": 1.}, 9)
    log.file = file
    log.flush()
    log.append({"step": 2, "seconds": 2.}, 9)
    assert [row["step"] for row in checkpoint.read_log(log.path)] == [0, 1, 2]


def test_a_long_log_is_subsampled_for_the_curves(tmp_path):
    path = tmp_path / "log.jsonl"
    for steps in (100, 5000, 20000):
        rows = ({"step": i, "seconds": 1., "loss_diffusion": .1} for i in range(steps))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = checkpoint.read_log(path, max_rows=500)
        assert len(rows) == steps if steps == 100 else 250 <= len(rows) <= 600
        assert rows[0]["step"] == 0
        assert rows[-1]["step"] > .99 * steps - 1
    assert len(checkpoint.read_log(path)) == 20000


@pytest.fixture(scope="module")
def resumed(adt_run):
    """A Trainer that has resumed the run, and the state that it loaded."""
    trainer = train.setup(train.parse_args([*RESUME, str(adt_run), "--steps", "3"])[1])[2]
    trainer.resume(adt_run)
    return trainer, torch.load(adt_run / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("corrupt", [
    lambda s: s["opt_g"]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda s: s["opt_d"]["state"][0].update(exp_avg_sq=torch.zeros(3)),
    lambda s: s["opt_g"]["state"].update({9999: s["opt_g"]["state"][0]}),
    lambda s: s["opt_g"]["state"][0].update(step="x"),
    lambda s: s.update(step="x"), lambda s: s.update(step=-3), lambda s: s.update(step=1.5),
    lambda s: s.update(step=None), lambda s: s.update(num_skipped="x"),
    lambda s: s.update(run_id=["add", 0]), lambda s: s.pop("data"),
    lambda s: s.update(warmup_steps_d="x"), lambda s: s.pop("warmup_steps_d"),
    lambda s: s["ema"][0].fill_(float("nan")), lambda s: s["params"][0].fill_(float("inf")),
    lambda s: s["disc"]["heads.0.conv_out.bias"].fill_(float("nan")),
    lambda s: s["opt_g"]["state"][0]["exp_avg"].fill_(float("nan")),
    lambda s: s["opt_d"]["state"][0]["exp_avg_sq"].fill_(float("inf"))])
def test_a_checkpoint_is_validated_before_use(adt_run, resumed, corrupt, monkeypatch):
    trainer, good = resumed
    state = copy.deepcopy(good)
    corrupt(state)
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged or belongs to another run"):
        trainer.resume(adt_run)
    monkeypatch.setattr(torch, "load", lambda *_, **__: good)
    trainer.resume(adt_run)
    assert trainer.step == 2


def test_a_damaged_checkpoint_is_one_sentence(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    state["ema"][0].fill_(float("nan"))
    torch.save(state, run_dir / "checkpoint.pt")
    assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "3") == 2
    assert "damaged or belongs to another run" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--method add", "--seed 3", "--data fashion", "--set lr=1", "--overwrite",
                                   "--lora-rank 4", "--fsdp"])
def test_a_resumed_run_keeps_its_settings(tmp_path, adt_run, typed, capsys):
    assert exit_code(adt_run, *RESUME, str(adt_run), *typed.split()) == 2
    assert f"leave out {typed.split()[0]}" in capsys.readouterr().err


def test_an_add_run_is_not_resumed_as_adt(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    run_config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**run_config, "method": "add", "config": {}}))
    assert exit_code(run_dir, *RESUME, str(run_dir), "--method", "adt") == 2
    assert "leave out --method" in capsys.readouterr().err


def test_a_resumed_run_sees_the_data_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """The path of the data is stored absolutely; other images or captions are refused unless allowed."""
    from test_data import make_image_folder

    from scripts import pretrain
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    images = make_image_folder(tmp_path / "a" / "pics", n=40)
    Image.new("RGB", (40, 60), "red").save(images / "0.png", "bmp")
    make_image_folder(tmp_path / "b" / "pics", n=30)
    pretrain.main(["--data", str(images), "--steps", "1", "--output-dir", str(tmp_path / "weights")])
    monkeypatch.chdir(tmp_path / "a")
    run_dir = train_run(tmp_path / "run", "--data", "pics", "--pretrained", str(tmp_path / "weights"),
                        "--steps", "1")
    monkeypatch.chdir(tmp_path / "b")
    train.main([*RESUME, str(run_dir), "--steps", "2"])
    assert json.loads((run_dir / "config.json").read_text())["data"] == str(images)
    Image.new("RGB", (40, 60), "blue").save(images / "0.png", "bmp")   # repainted in a file of the same size
    assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "3") == 2
    assert "--allow-data-change" in capsys.readouterr().err
    Image.new("RGB", (40, 60), "red").save(images / "0.png", "bmp")
    next(images.glob("*.png")).unlink()
    if (images / "metadata.jsonl").exists():
        lines = (images / "metadata.jsonl").read_text().splitlines()
        lines = [line for line in lines if (images / json.loads(line)["file_name"]).exists()]
        (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "3") == 2
    assert "--allow-data-change" in capsys.readouterr().err
    train.main([*RESUME, str(run_dir), "--steps", "3", "--allow-data-change"])
    assert checkpoint_and_log(run_dir)[0]["step"] == 3


def test_a_resumed_run_finds_its_data_in_another_place(tmp_path, capsys):
    """The same data is taken from any place; other data there only with --allow-data-change."""
    from test_data import make_image_folder

    from scripts import pretrain
    old, new, other = tmp_path / "old", tmp_path / "new", make_image_folder(tmp_path / "other", n=2)
    make_image_folder(old)
    pretrain.main(["--data", str(old), "--steps", "1", "--output-dir", str(tmp_path / "weights")])
    run_dir = train_run(tmp_path / "run", "--data", str(old), "--pretrained", str(tmp_path / "weights"),
                        "--method", "diffusion", "--steps", "1")
    old.rename(new)
    resume = [*RESUME, str(run_dir), "--steps"]
    capsys.readouterr()
    for more in ([], ["--allow-data-change"]):
        assert exit_code(run_dir, *resume, "2", *more) == 2
        message = capsys.readouterr().err
        assert "no data set" in message and "add --data with its new place" in message
    assert exit_code(run_dir, *resume, "2", "--data", str(other)) == 2
    assert "trained on other images or captions than 'other' has now" in capsys.readouterr().err
    train.main([*resume, "2", "--data", str(new)])
    assert json.loads((run_dir / "config.json").read_text())["data"] == str(new)
    train.main([*resume, "3"])
    train.main([*resume, "4", "--data", str(other), "--allow-data-change"])
    assert checkpoint_and_log(run_dir)[0]["step"] == 4


@pytest.mark.parametrize("key,name", [("pretrained", "owner/name"), ("backbone", "owner/name"),
                                      ("vae", "owner/name"), ("data", "owner/name#image,text")])
def test_a_folder_is_not_taken_for_a_repository_of_the_hub(tmp_path, adt_run, monkeypatch, capsys, key, name):
    """The run began where no folder had the name of the repository, and goes on where one has."""
    run_dir = copy_run(adt_run, tmp_path / "run")
    run_config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**run_config, key: name}))
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load_run_config(run_dir / "config.json")[key] == name
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "3") == 2
    assert f"{key} owner/name, which was on the hub when the run began" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rename it"):                 # in evaluate.py
        load_run(str(run_dir))


def test_a_checkpoint_of_an_older_version_names_its_data_in_its_id(tmp_path, adt_run):
    run_dir = copy_run(adt_run, tmp_path / "run")
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["run_id"] == ["adt", 0]
    torch.save({**state, "run_id": ["adt", "glyphs", 0]}, run_dir / "checkpoint.pt")
    train.main([*RESUME, str(run_dir), "--steps", "3"])
    assert checkpoint_and_log(run_dir)[0]["step"] == 3


def test_a_run_of_two_processes_is_not_resumed_by_one(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    run_config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**run_config, "world_size": 2}))
    assert exit_code(run_dir, *RESUME, str(run_dir)) == 2
    assert f"torchrun --nproc-per-node 2 train.py --resume {run_dir}" in capsys.readouterr().err


def test_two_processes_cannot_train_in_one_folder(tmp_path, adt_run, capsys):
    run_dir = copy_run(adt_run, tmp_path / "run")
    before = (run_dir / "log.jsonl").read_bytes()
    with checkpoint.lock_run_dir(run_dir):
        assert exit_code(run_dir, *RESUME, str(run_dir), "--steps", "3") == 2
    assert "another process is training" in capsys.readouterr().err
    assert (run_dir / "log.jsonl").read_bytes() == before
    train.main([*RESUME, str(run_dir), "--steps", "3"])


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_another_process_finishes_meanwhile_is_kept(tmp_path, adt_run, monkeypatch, capsys,
                                                               is_resumed):
    """It is not there yet, or not as far, when this process starts; it is complete when this one is ready."""
    finished = copy_run(adt_run, tmp_path / "finished")
    train.main([*RESUME, str(finished), "--steps", "3"])
    before = checkpoint_and_log(finished)
    run_dir, setup = tmp_path / "run", train.setup
    if is_resumed:
        copy_run(adt_run, run_dir)

    def slow_setup(args):
        result = setup(args)
        shutil.copytree(finished, run_dir, dirs_exist_ok=True)
        return result

    def no_step(trainer):
        raise AssertionError(f"step {trainer.step} is trained again")

    monkeypatch.setattr(train, "setup", slow_setup)
    monkeypatch.setattr(train.Trainer, "train_step", no_step)
    if is_resumed:
        train.main([*RESUME, str(run_dir), "--steps", "3"])
    else:
        with pytest.raises(SystemExit) as stop:
            train_run(run_dir, "--steps", "3")
        assert stop.value.code == 2 and "already holds a run" in capsys.readouterr().err
    state, log = checkpoint_and_log(run_dir)
    assert equal_nested((before[0]["params"], before[1]), (state["params"], log))


def test_overwrite_replaces_runs_and_nothing_else(tmp_path, adt_run, monkeypatch):
    """Other folders stay; a run that could not start leaves a folder that --overwrite still recognises."""
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text('{"hidden_size": 4}')
    (other / "model.safetensors").write_text("x")
    assert exit_code(other, "--overwrite") == 2
    assert len(list(other.iterdir())) == 2
    run_dir = copy_run(adt_run, tmp_path / "run")
    (run_dir / "photo.png").write_text("mine")

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "atomic_write_text", disk_full)
    assert exit_code(run_dir, "--overwrite") == 2
    monkeypatch.undo()
    train_run(run_dir, "--steps", "1", "--overwrite")
    assert (run_dir / "photo.png").read_text() == "mine"


def write_folder(tmp_path, content):
    tmp_path.mkdir()
    (tmp_path / "file").write_text(content)


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path):
    target = tmp_path / "pipeline"
    for content in ("old", "new"):
        with checkpoint.atomic_write(target) as part:
            write_folder(part, content)
    assert (target / "file").read_text() == "new"
    with pytest.raises(OSError), checkpoint.atomic_write(target) as part:  # noqa: PT012
        write_folder(part, "half")
        raise OSError("no space left on device")
    assert (target / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_permissions_can_be_written_to(tmp_path, monkeypatch):
    """FAT, NTFS and CIFS refuse chmod."""
    def refuse(path, mode):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with checkpoint.atomic_write(tmp_path / "file") as tmp:
        tmp.touch(0o600)
    assert (tmp_path / "file").is_file()


def test_the_group_that_a_folder_passes_on_stays(tmp_path):
    with checkpoint.atomic_write(tmp_path / "folder") as tmp:
        tmp.mkdir()
        tmp.chmod(0o2700)
    assert (tmp_path / "folder").stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_that_the_umask_grants(tmp_path, umask):
    """safetensors creates its files with mode 0600."""
    old = os.umask(umask)
    try:
        checkpoint.save_weights(torch.nn.Linear(2, 2), tmp_path / "x.safetensors", steps=1)
        with checkpoint.atomic_write(tmp_path / "folder") as part:
            write_folder(part, "x")
            (part / "file").chmod(0o600)
    finally:
        os.umask(old)
    for name in ("x.safetensors", "folder/file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_files_are_written_where_folders_cannot_be_synced_and_flushing_needs_a_writable_handle(tmp_path,
                                                                                              monkeypatch):
    """Windows: os.open of a folder fails, os.fsync of a read-only handle fails."""
    plain_open, plain_fsync, flags_of = os.open, os.fsync, {}

    def windows_open(path, flags, *rest):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        handle = plain_open(path, flags, *rest)
        flags_of[handle] = flags
        return handle

    def windows_fsync(handle):
        if flags_of.get(handle, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY) == 0:
            raise OSError(9, "Bad file descriptor")
        plain_fsync(handle)

    monkeypatch.setattr(checkpoint.os, "open", windows_open)
    monkeypatch.setattr(checkpoint.os, "fsync", windows_fsync)
    run_dir = train_run(tmp_path / "run", "--steps", "1")
    assert checkpoint_and_log(run_dir)[0]["step"] == 1


def test_the_cache_folder_needs_no_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(checkpoint.Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert checkpoint.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoint.cache_dir().is_absolute()


def test_discriminator_inputs_keep_their_order():
    assert DiscriminatorInputs._fields == ("real", "fake", "cond")


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """kill -9 at random moments while every step writes a checkpoint: what is on the disk always loads, at
    most the last step is lost, and the end equals that of an uninterrupted run."""
    arguments = ["--method", "adt", "--set", "batch_size=2", "--set", "num_inference_steps=2", "--set",
                 "num_grad_steps=1", "--set", "warmup_steps_d=0", "--eval-samples", "0", "--steps", "150",
                 "--save-every", "1e-9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*arguments):
        code = f"import train; train.main({list(arguments)!r})"
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    uninterrupted, run_dir, rng = tmp_path / "uninterrupted", tmp_path / "parts", random.Random(0)
    log = run_dir / "log.jsonl"

    def num_rows():
        return log.read_text().count("\n") if log.is_file() else 0

    kills, reached = 0, 0
    while kills < 50:
        is_resumable = (run_dir / "checkpoint.pt").is_file()
        process = start(*([*RESUME, str(run_dir)] if is_resumable
                          else [*arguments, "--output-dir", str(run_dir), "--overwrite"]))
        while num_rows() <= reached and process.poll() is None:
            time.sleep(.01)
        time.sleep(rng.uniform(0, 1.))
        assert process.poll() in (None, 0)
        if process.poll() == 0:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (run_dir / "checkpoint.pt").is_file():
            state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
            assert num_rows() - 2 <= state["step"]
            assert state["step"] >= reached - 1
            reached = state["step"]
    assert kills == 50, kills
    assert start(*RESUME, str(run_dir)).wait() == 0
    assert start(*arguments, "--output-dir", str(uninterrupted)).wait() == 0
    assert equal_nested(checkpoint_and_log(uninterrupted), checkpoint_and_log(run_dir))
