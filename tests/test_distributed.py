"""Two processes take the step of one with twice the micro-batches: same gradients, weights and log."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from conftest import ROOT
from scripts import tiny_pipelines
from utils import distributed

# Imports everything once, then forks the processes of each run. A line on stdin is JSON: the environment of
# each process, the arguments of train.py, the path of their stderr. The answer is a list of exit codes.
# Steps with a discriminator fail if a half leaves gradients in what it does not train.
SERVER = """
import json, os, sys, traceback
import peft
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import Dinov2Model
import train
from pathlib import Path
from utils import plotting

sys.path.insert(0, "tests")
from tiny_families import checked_train_step

train_step = train.Trainer.train_step
def step(trainer):
    return checked_train_step(trainer) if trainer.config.lambda_adv else train_step(trainer)
train.Trainer.train_step = step
plotting.plot_training_curves = lambda log, path: Path(path).touch()  # they take longer than the steps
plotting.save_image_grid = lambda rows, path, *_, **__: Path(path).touch()

def run(environment, arguments, stderr):
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    try:
        train.main(arguments)
        return 0
    except SystemExit as stop:
        return stop.code
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    environments, *job = json.loads(line)
    children = []
    for environment in environments:
        children.append(os.fork())
        if children[-1] == 0:
            code = run(environment, *job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that runs train.py in one or more processes, as torchrun would start them."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(server, num_processes, arguments, folder):
    """Run train.py in these processes -> their exit codes, their stderr."""
    environments = [{"XDG_CACHE_HOME": str(folder)} for _ in range(num_processes)]
    if num_processes > 1:
        address = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}
        for rank, environment in enumerate(environments):
            environment.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    stderr = folder / "stderr.txt"
    stderr.write_text("")
    server.stdin.write(json.dumps([environments, list(map(str, arguments)), str(stderr)]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline()), stderr.read_text()


def train_in(server, run_dir, num_processes, *arguments):
    """Train on the CPU to the end -> checkpoint, log."""
    output = [] if "--resume" in arguments else ["--output-dir", run_dir]
    codes, stderr = run_processes(server, num_processes, [*arguments, "--eval-samples", "0", *output],
                                  run_dir.parent)
    assert codes == [0] * num_processes, stderr[-3000:]
    return read_run(run_dir)


def read_run(run_dir):
    """-> checkpoint, rows of the log without their times."""
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return torch.load(run_dir / "checkpoint.pt", weights_only=True), [{**row, "seconds": 0} for row in log]


def large_arguments(folder, name):
    """Arguments of train.py for one of the small pipelines."""
    return ["--model", name, "--pretrained", str(folder / name), "--backbone", str(folder / "dino"),
            "--data", str(folder / "images"), "--resolution", str(tiny_pipelines.RESOLUTION)]


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


@pytest.mark.parametrize("name,method,extra", [
    ("tiny", "adt", []),
    pytest.param("sd15", "adt", ["--fsdp"], marks=pytest.mark.thorough),
    pytest.param("sdxl", "add", ["--lora-rank", "4"], marks=pytest.mark.thorough),
    pytest.param("sd3", "add", ["--fsdp"], marks=pytest.mark.thorough)])
def test_two_processes_take_the_step_of_one(request, server, tmp_path, name, method, extra):
    is_fsdp = "--fsdp" in extra
    # two images that join the path at different steps: with recomputed blocks they share calls
    batch_size = 2 if is_fsdp and method == "adt" else 1
    arguments = ["--method", method, "--steps", "1", "--set", "warmup_steps_d=0", "--set",
                 f"batch_size={batch_size}"]
    if name != "tiny":
        arguments += large_arguments(request.getfixturevalue("pretrained"), name)
    if method == "adt":
        arguments += ["--set", "num_inference_steps=2", "--set", "num_grad_steps=2"]
    if batch_size == 2:
        arguments += ["--gradient-checkpointing"]
    if is_fsdp:
        arguments += ["--full"]
    single, single_log = train_in(server, tmp_path / "single", 1, *arguments, *([] if is_fsdp else extra),
                                  "--set", "gradient_accumulation_steps=2")
    pair, pair_log = train_in(server, tmp_path / "pair", 2, *arguments, *extra,
                              "--set", "gradient_accumulation_steps=1")
    tolerance = 5e-2 if is_fsdp else 1e-5  # FSDP gathers weights in bf16, and their gradients are bf16 too
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
            log_tolerance = 2e-2 if is_fsdp else 2e-3  # one of 150 logits may change its sign
            if not key.startswith("grad_norm/"):  # measured in each process on its own batches
                assert abs(a[key] - b[key]) <= log_tolerance * max(1, abs(a[key])), key


@pytest.mark.thorough
def test_a_sharded_run_resumes(pretrained, server, tmp_path):
    """Weights, EMA weights and moments are sharded again; a single process may not resume the run."""
    arguments = [*large_arguments(pretrained, "sd3"), "--method", "diffusion", "--set", "batch_size=1",
                 "--set", "num_inference_steps=2", "--set", "gradient_accumulation_steps=1", "--full",
                 "--fsdp", "--gradient-checkpointing"]
    run_dir = tmp_path / "resumed"
    expected, expected_log = train_in(server, tmp_path / "uninterrupted", 2, *arguments, "--steps", "2")
    train_in(server, run_dir, 2, *arguments, "--steps", "1")
    resumed, log = train_in(server, run_dir, 2, "--resume", str(run_dir), "--steps", "2")
    assert [row["step"] for row in log] == [0, 1] and resumed["step"] == 2
    assert [row["loss_diffusion"] for row in log] == [row["loss_diffusion"] for row in expected_log]
    assert equal_nested(resumed["params"], expected["params"])
    assert equal_nested(resumed["opt_g"]["state"], expected["opt_g"]["state"])
    codes, stderr = run_processes(server, 1, ["--resume", run_dir], tmp_path)
    assert codes == [2]
    assert "torchrun --nproc-per-node 2 train.py --resume" in stderr


@pytest.mark.thorough
def test_two_processes_resume_bit_by_bit_after_sigterm(server, tmp_path):
    """A cluster's scheduler stops torchrun with SIGTERM: both processes finish the same step and save."""
    arguments = ["--method", "add", "--steps", "6", "--set", "batch_size=1"]
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    train_in(server, uninterrupted, 2, *arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), "train.py", *arguments, "--eval-samples", "0", "--output-dir", str(stopped)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log_path = stopped / "log.jsonl"
    while not log_path.is_file() or not log_path.read_text():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert 1 <= read_run(stopped)[0]["step"] < 6
    train_in(server, stopped, 2, "--resume", str(stopped))
    assert equal_nested(read_run(uninterrupted), read_run(stopped))


def test_small_gradients_share_an_all_reduce_and_are_summed_one_by_one(monkeypatch):
    """The other process has the same tensors here, so each sum is twice the tensor, bit by bit."""
    calls = []

    def all_reduce(tensor):
        calls.append(tensor.nbytes)
        tensor.mul_(2)

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 4000)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    shapes = [(3,), (10, 20), (), (600,), (1, 1), (2000,), (5, 5), (7,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[1] = torch.randn(20, 10).T                                 # not contiguous
    tensors.append(torch.randn(9, dtype=torch.float64))
    expected = [2 * tensor for tensor in tensors]
    distributed.all_reduce_sum_(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected))
    assert [tensor.shape for tensor in tensors[:-1]] == [torch.Size(shape) for shape in shapes]
    assert calls == [4 * (3 + 200 + 1 + 600 + 1), 8000, 4 * (25 + 7), 72]


@pytest.fixture
def environment(monkeypatch):
    """The variables of process 0 of two, and a function that changes them: names and values."""
    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    change(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return change


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_one_sentence(environment, monkeypatch, missing):
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"{missing} not: start several processes with torchrun"):
        distributed.init_distributed()


@pytest.mark.parametrize("name,value,wanted", [
    ("WORLD_SIZE", "0", "1 or more"), ("WORLD_SIZE", "two", "1 or more"), ("WORLD_SIZE", "", "1 or more"),
    ("RANK", "x", "0 to 1"), ("RANK", "-1", "0 to 1"), ("RANK", "2", "0 to 1"), ("RANK", "0.5", "0 to 1"),
    ("MASTER_PORT", "abc", "1 to 65535"), ("MASTER_PORT", "0", "1 to 65535"),
    ("MASTER_PORT", "99999", "1 to 65535")])
def test_an_impossible_environment_is_one_sentence(environment, name, value, wanted):
    environment(**{name: value})
    with pytest.raises(ValueError) as error:
        distributed.init_distributed()
    assert str(error.value) == (f"{name}={value}: wanted a whole number, {wanted}: start the processes with "
                                "torchrun, which sets it")


def test_on_a_gpu_machine_local_rank_is_required(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for value in ("2", "-1", "x"):
        environment(LOCAL_RANK=value)
        with pytest.raises(ValueError, match=f"LOCAL_RANK={value}: wanted a whole number, 0 to 1: start one"):
            distributed.init_distributed()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="LOCAL_RANK not"):
        distributed.init_distributed()


def test_a_lone_process_gives_up_in_time(environment, monkeypatch):
    monkeypatch.setattr(distributed, "START_TIMEOUT_S", .3)
    with pytest.raises(ValueError, match="only 1 of 2 processes started"):
        distributed.init_distributed()
    environment(RANK=1, MASTER_PORT=1)
    with pytest.raises(ValueError, match="only 0 of 2 processes started"):
        distributed.init_distributed()


def test_process_0_refuses_a_port_that_is_in_use(environment):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        environment(MASTER_PORT=port)
        with pytest.raises(ValueError, match=rf"RANK=0 cannot open MASTER_PORT={port} \(.*only one of them"):
            distributed.init_distributed()


@pytest.fixture
def connections(environment, monkeypatch):
    """What the attempts of process 1 to reach process 0 give, one after the other: a store or an error."""
    results = []

    def connect(*_, **__):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    environment(RANK=1)
    monkeypatch.setattr(distributed, "is_listening", lambda *_: True)
    monkeypatch.setattr(torch.distributed, "TCPStore", connect)
    return results


def test_a_process_that_another_program_refuses_tries_again(connections):
    """Perhaps process 0 of an earlier run, which ends."""
    store = torch.distributed.HashStore()
    torch.distributed.PrefixStore("run0", store).add("num_ready", 1)
    connections += [RuntimeError("Connection reset by peer"), RuntimeError("Ping failed"), store]
    distributed.wait_for_processes(1, 2, lambda: None)
    assert connections == []


def test_a_process_that_another_program_never_answers_gives_up_in_time(connections, monkeypatch):
    """torch waits for an answer in C++, whatever its timeout."""
    answer = threading.Event()

    def connect(*_, **__):
        assert answer.wait(5), "the program waits along"
        raise RuntimeError

    monkeypatch.setattr(torch.distributed, "TCPStore", connect)
    monkeypatch.setattr(distributed, "START_TIMEOUT_S", .3)
    with pytest.raises(ValueError, match="only 0 of 2 processes started .* no other program uses"):
        distributed.wait_for_processes(1, 2, lambda: None)
    answer.set()


def test_two_processes_of_one_rank_are_refused(connections, monkeypatch):
    """They would count as two that are ready. torchrun may start its processes again in the same store."""
    store = torch.distributed.HashStore()
    connections += [store, store, store]
    monkeypatch.setattr(distributed, "START_TIMEOUT_S", .3)
    with pytest.raises(ValueError, match="only 1 of 2 processes started"):
        distributed.wait_for_processes(1, 2, lambda: None)
    with pytest.raises(ValueError, match="RANK=1: another process has it, too"):
        distributed.wait_for_processes(1, 2, lambda: None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    distributed.wait_for_processes(1, 2, lambda: None)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_process_that_has_left_its_group_is_not_ended_by_a_failure_in_it(monkeypatch, leaves):
    """In a notebook, or in a test, the process goes on; watching the group for longer would end it later."""
    exits, port = [], free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "WATCH_INTERVAL_S", .01)
    monkeypatch.setattr(distributed, "GRACE_S", .5)
    monkeypatch.setattr(distributed.os, "_exit", exits.append)
    distributed.init_distributed()
    try:
        distributed.default_store().set("failed", "1")
        time.sleep(.2)                                                 # it knows, and waits for GRACE_S
    finally:
        if leaves:
            distributed.leave_group()
    time.sleep(.8)
    distributed.leave_group()
    assert exits == ([] if leaves else [1])


def restore_sigint():
    """A shell's background jobs ignore Ctrl-C, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_the_others_can_be_stopped(environment, number, code, rank):
    """Process 0 listens; process 1 waits for an answer of another program."""
    start = """
import argparse
from utils import distributed, failures
wait = distributed.wait_for_processes
def announced_wait(*args):
    print("waiting", flush=True)
    wait(*args)
distributed.wait_for_processes = announced_wait
failures.interrupt_on_sigterm()
with failures.clear_exit(argparse.ArgumentParser(), "program"):
    distributed.init_distributed()
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment(RANK=rank, MASTER_PORT=listener.getsockname()[1] if rank else free_port())
        process = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, preexec_fn=restore_sigint,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "waiting\n"
            if rank:
                listener.accept()                                      # is_listening
                listener.accept()                                      # torch
            time.sleep(.2)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in stderr


@pytest.mark.parametrize("error,sentence", [("RuntimeError('a fault')", "RuntimeError: a fault"),
                                            ("failures.RunFailed('no space', 2, True)", "program: no space")])
def test_a_process_that_fails_ends_the_others(error, sentence):
    """Rank 0 hangs, as in a collective operation; rank 1 has a thread that would keep it alive."""
    start = f"""
import argparse, os, threading, time
from utils import distributed, failures
distributed.WATCH_INTERVAL_S, distributed.GRACE_S = .1, .3
with failures.clear_exit(argparse.ArgumentParser(), "program"):
    distributed.init_distributed()
    distributed.barrier()
    if os.environ["RANK"] == "0":
        time.sleep(600)
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise {error}
"""
    port = str(20000 + (os.getpid() + 7) % 20000)
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                                  env={**env, "RANK": str(rank)}) for rank in (0, 1)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1
    assert processes[1].returncode == (1 if "fault" in error else 2)
    assert "process 0 stops: process 1 has failed" in errors[0]
    assert sentence in errors[1]
