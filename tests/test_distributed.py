"""Two processes take the step of one with twice the micro-batches: same gradients, weights and log."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from conftest import ROOT
from scripts import tiny_pipelines
from utils import distributed


@pytest.fixture(scope="module")
def large_setup(tmp_path_factory):
    """A folder with three small pipelines, DINOv2 and three captioned images."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("sd15", "sdxl", "sd3"):
        tiny_pipelines.make_pipeline(name, folder)
    tiny_pipelines.make_dino(folder / "dino")
    (folder / "images").mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (40 + i, 60), (80 * i, 10, 200)).save(folder / "images" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"an image {i}"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def large_arguments(folder, name):
    """Arguments of train.py for one of the small pipelines."""
    return ["--model", name, "--pretrained", str(folder / name), "--backbone", str(folder / "dino"),
            "--data", str(folder / "images"), "--resolution", str(tiny_pipelines.RESOLUTION)]


def command_line(num_processes, *arguments):
    """train.py in one process, or in two under torchrun."""
    torchrun = []
    if num_processes == 2:
        port = str(20000 + os.getpid() % 20000)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    return [sys.executable, *torchrun, "train.py", *arguments]


def environment(cache_home):
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache_home)}


def read_run(run_dir):
    """-> checkpoint, rows of the log without their times."""
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return torch.load(run_dir / "checkpoint.pt", weights_only=True), [{**row, "seconds": 0} for row in log]


def train_in(run_dir, num_processes, *arguments):
    """Train on the CPU to the end -> checkpoint, log."""
    output = [] if "--resume" in arguments else ["--output-dir", str(run_dir)]
    command = command_line(num_processes, *arguments, "--eval-samples", "0", *output)
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                            env=environment(run_dir.parent))
    assert result.returncode == 0, result.stderr[-3000:]
    return read_run(run_dir)


def equal_nested(a, b):
    """Bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_nested(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_nested(x, y) for x, y in zip(a, b))
    return a == b


def first_moments(optimizer_state):
    """Adam's first moments as one vector; after one step they are the gradient times 1 - beta1."""
    states = [state for _, state in sorted(optimizer_state["state"].items())]
    return torch.cat([state["exp_avg"].flatten() for state in states])


@pytest.mark.parametrize("name,method,extra", [("tiny", "adt", []), ("sd15", "adt", ["--fsdp"]),
                                               ("sdxl", "add", ["--lora-rank", "4"]),
                                               ("sd3", "add", ["--fsdp"])])
def test_two_processes_take_the_step_of_one(request, tmp_path, name, method, extra):
    arguments = ["--method", method, "--steps", "1", "--set", "warmup_steps_d=0", "--set", "batch_size=1"]
    if name != "tiny":
        arguments += large_arguments(request.getfixturevalue("large_setup"), name)
    if method == "adt":
        arguments += ["--set", "num_inference_steps=2", "--set", "num_grad_steps=2"]
    is_fsdp = "--fsdp" in extra
    single, single_log = train_in(tmp_path / "single", 1, *arguments, *([] if is_fsdp else extra),
                                  "--set", "gradient_accumulation_steps=2")
    pair, pair_log = train_in(tmp_path / "pair", 2, *arguments, *extra)
    tolerance = 2e-2 if is_fsdp else 1e-5  # FSDP casts its weights to bf16 for every call
    for key in ("opt_g", "opt_d"):
        a, b = first_moments(single[key]), first_moments(pair[key])
        assert (a - b).norm() < tolerance * a.norm()
    if not is_fsdp:
        for key in ("params", "ema"):
            differences = [(a - b).abs().flatten() for a, b in zip(single[key], pair[key], strict=True)]
            assert torch.cat(differences).mean() < 1e-7
    for a, b in zip(single_log, pair_log, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("grad_norm/"):  # measured in each process on its own batches
                assert abs(a[key] - b[key]) <= 2e-3 * max(1, abs(a[key])), key


def test_a_sharded_run_resumes(large_setup, tmp_path):
    """Weights, EMA weights and moments are sharded again; a single process may not resume the run."""
    arguments = [*large_arguments(large_setup, "sdxl"), "--method", "diffusion", "--set", "batch_size=1",
                 "--fsdp", "--gradient-checkpointing"]
    run_dir = tmp_path / "resumed"
    expected, expected_log = train_in(tmp_path / "uninterrupted", 2, *arguments, "--steps", "2")
    train_in(run_dir, 2, *arguments, "--steps", "1")
    resumed, log = train_in(run_dir, 2, "--resume", str(run_dir), "--steps", "2")
    assert [row["step"] for row in log] == [0, 1] and resumed["step"] == 2
    assert [row["loss_diffusion"] for row in log] == [row["loss_diffusion"] for row in expected_log]
    assert equal_nested(resumed["params"], expected["params"])
    assert equal_nested(resumed["opt_g"]["state"], expected["opt_g"]["state"])
    result = subprocess.run(command_line(1, "--resume", str(run_dir)), cwd=ROOT, text=True,
                            capture_output=True, env=environment(tmp_path))
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2 train.py --resume" in result.stderr


def test_two_processes_resume_bit_by_bit_after_sigterm(tmp_path):
    """A cluster's scheduler stops torchrun with SIGTERM: both processes finish the same step and save."""
    arguments = ["--method", "add", "--steps", "6", "--set", "batch_size=1"]
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    train_in(uninterrupted, 2, *arguments)
    command = command_line(2, *arguments, "--eval-samples", "0", "--output-dir", str(stopped))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env=environment(tmp_path))
    log_path = stopped / "log.jsonl"
    while not log_path.is_file() or not log_path.read_text():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert 1 <= read_run(stopped)[0]["step"] < 6
    train_in(stopped, 2, "--resume", str(stopped))
    assert equal_nested(read_run(uninterrupted), read_run(stopped))


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_one_sentence(monkeypatch, missing):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"{missing} not: start several processes with torchrun"):
        distributed.init_distributed()


def test_on_a_gpu_machine_local_rank_is_required(monkeypatch):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="LOCAL_RANK not"):
        distributed.init_distributed()


def test_a_lone_process_gives_up_in_time(monkeypatch):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "START_TIMEOUT_S", .3)
    with pytest.raises(ValueError, match="only 1 of 2 processes started"):
        distributed.init_distributed()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="only 0 of 2 processes started"):
        distributed.init_distributed()


def restore_sigint():
    """A shell's background jobs ignore Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_waits_for_the_others_can_be_stopped(number, code):
    start = ("import train; from utils import distributed, failures; failures.interrupt_on_sigterm(); "
             "wait = distributed.wait_for_processes; "
             "distributed.wait_for_processes = lambda *args: (print('waiting', flush=True), wait(*args)); "
             "train.main(['--steps', '1'])")
    process = subprocess.Popen(
        [sys.executable, "-c", start], cwd=ROOT, preexec_fn=restore_sigint, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    assert process.stdout.readline() == "waiting\n"
    time.sleep(.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
