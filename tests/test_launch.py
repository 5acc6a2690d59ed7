"""Processes that train.py starts itself: the step of one process, its signals, exit codes and sentences."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_distributed import equal_nested, first_moments, read_run, restore_sigint

import evaluate
import train
from conftest import ROOT, copy_run
from utils import distributed, launch

SHORT = ["--method", "adt", "--set", "batch_size=2", "--set", "warmup_steps_d=0", "--set",
         "num_inference_steps=2", "--set", "num_grad_steps=1", "--eval-samples", "0", "--steps", "5"]


def start(*arguments):
    """train.py as a process of its own."""
    return subprocess.Popen([sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(*arguments):
    """Exit code, stdout, stderr of train.py with these arguments."""
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def wait_for_a_step(process, run_dir):
    log_path = run_dir / "log.jsonl"
    while not log_path.is_file() or not log_path.read_text():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(.02)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_end(pids):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(.05)


def distance(a, b):
    """Relative distance of the last gradients of two runs, from Adam's first moments with beta1 = 0."""
    a, b = (torch.cat([first_moments(run[key]) for key in ("opt_g", "opt_d")]) for run in (a, b))
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """Folder and output of a run in two processes."""
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    code, stdout, stderr = run(*SHORT, "--processes", 2, "--output-dir", run_dir)
    assert code == 0, stderr[-3000:]
    return run_dir, stdout, stderr


@pytest.mark.thorough
def test_two_processes_take_the_steps_of_one_with_half_the_batch_twice(shared_run, tmp_path):
    train.main([*SHORT, "--output-dir", str(tmp_path), "--set", "batch_size=1",
                "--set", "gradient_accumulation_steps=2"])
    (one, one_log), (two, two_log) = read_run(tmp_path), read_run(shared_run[0])
    assert distance(one, two) < 1e-3
    for a, b in zip(one_log, two_log, strict=True):
        assert a["loss_diffusion"] == pytest.approx(b["loss_diffusion"], rel=1e-3)


@pytest.mark.thorough
def test_the_output_of_two_processes_is_printed_once(shared_run):
    run_dir, stdout, stderr = shared_run
    assert stdout.count("run folder:") == 1
    assert f"python evaluate.py base {run_dir}" in stdout
    assert "5/5" in stderr
    assert not {"Traceback", "Warning", "leaked"} & set(re.findall(r"\w+", stderr))


@pytest.mark.thorough
def test_a_stopped_run_resumes_with_any_number_of_processes_that_can_share_its_step(shared_run, tmp_path,
                                                                                    capfd):
    """SIGTERM reaches process 0 alone. Two processes continue bit by bit, one up to rounding, three not."""
    run_dir = tmp_path / "run"
    process = start(*SHORT, "--processes", 2, "--output-dir", run_dir)
    wait_for_a_step(process, run_dir)
    helpers = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.count("everything is saved; continue with: python train.py --resume") == 1
    assert "Traceback" not in stderr
    wait_for_end(helpers)
    assert 1 <= read_run(run_dir)[0]["step"] < 5
    copy_run(run_dir, tmp_path / "one")
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(run_dir), "--processes", "3"])
    assert stop.value.code == 2
    assert "has 2 micro-batch(es), which 3 processes cannot share equally" in capfd.readouterr().err
    train.main(["--resume", str(tmp_path / "one"), "--eval-samples", "0"])
    code, _, stderr = run("--resume", run_dir, "--processes", 2, "--eval-samples", 0)
    assert code == 0, stderr[-3000:]
    expected = read_run(shared_run[0])
    assert equal_nested(expected, read_run(run_dir))
    assert distance(expected[0], read_run(tmp_path / "one")[0]) < 1e-3


# A program that starts a helper as train.py does; the processes meet again and again.
PROGRAM = """
import argparse, os, time
from types import SimpleNamespace
from utils import distributed, failures, launch

def main(argv):
    config = SimpleNamespace(gradient_accumulation_steps=1, batch_size=2)
    args = SimpleNamespace(processes=2, resume=None)
    with failures.clear_exit(argparse.ArgumentParser(), "program"):
        with launch.process_group(args, lambda args: ({"model": "tiny"}, None, config), main, argv):
            os.write(1, b"%d\\n" % os.getpid())
            while True:
                distributed.barrier()
                time.sleep(.01)

if __name__ == "__main__":
    main(None)
"""


@pytest.fixture
def program(tmp_path):
    """A running PROGRAM and the numbers of its two processes, first that of process 0."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, path], text=True, stdout=subprocess.PIPE,
                               preexec_fn=restore_sigint,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    numbers = {int(process.stdout.readline()) for _ in range(2)}
    yield process, numbers - {process.pid}
    process.kill()
    process.communicate()


def test_a_helper_that_is_killed_ends_the_run_with_one_sentence(program):
    process, helpers = program
    os.kill(*helpers, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.count("process 1 was killed by signal 9") == 1
    assert "Traceback" not in stderr


@pytest.mark.thorough
@pytest.mark.parametrize("number,code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_helper_ends_with_process_0(program, number, code):
    """Also if that is killed and can tell nobody."""
    process, helpers = program
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code
    wait_for_end(helpers)


@pytest.mark.parametrize("arguments,sentence", [
    (["--processes", "3"], "a batch of 2 images cannot be divided into 3 equal parts"),
    (["--processes", "0"], "--processes 0: wanted 1 or more"),
    (["--processes", "2", "--model", "sd15"], "torchrun --nproc-per-node 2 train.py"),
    (["--processes", "2", "--output-dir", str(ROOT / "docs")], "is not a run of train.py")])
def test_bad_input_is_one_sentence(arguments, sentence, capfd):
    with pytest.raises(SystemExit) as stop:
        train.main([*SHORT, *arguments])
    assert stop.value.code == 2
    assert capfd.readouterr().err.count(sentence) == 1
    assert "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized()


def test_torchrun_starts_its_own_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    group = launch.process_group(SimpleNamespace(processes=2), None, None, None)
    with pytest.raises(ValueError, match="--processes is for runs without torchrun"), group:
        pass


@pytest.mark.parametrize("cores,limit,batch_size,expected", [
    (8, None, 32, 2), (1, None, 32, 1), (8, "1", 32, 1), (8, "6", 32, 2), (8, None, 1, 1), (8, "", 2, 2)])
def test_a_command_line_takes_two_cores_where_there_are_two(monkeypatch, cores, limit, batch_size, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    args = train.parse_args(["--set", f"batch_size={batch_size}"])[1]
    configured = train.configure(args)
    assert launch.choose_processes(args, *configured, is_automatic=True) == expected
    assert launch.choose_processes(args, *configured, is_automatic=False) == 1


@pytest.mark.parametrize("accumulation,processes,parts",
                         [(1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (3, 2, 2)])
def test_every_process_has_equally_many_micro_batches(accumulation, processes, parts):
    assert launch.batch_parts(accumulation, processes) == parts
    assert accumulation * parts % processes == 0


@pytest.mark.parametrize("limit,processes,expected", [(None, 1, 1), ("1", 1, 1), ("4", 1, 4), ("4", 2, 2),
                                                      ("1", 2, 1)])
def test_the_tiny_model_has_one_thread_unless_more_are_asked_for(monkeypatch, limit, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    num_threads = []
    monkeypatch.setattr(torch, "set_num_threads", num_threads.append)
    launch.set_threads(is_large=True)
    assert num_threads == []
    launch.set_threads()
    assert num_threads == [expected]


@pytest.mark.parametrize("stochasticity", [0., 1.])
def test_processes_that_share_the_sampling_give_the_images_of_one(base, monkeypatch, stochasticity):
    """Five batches among two processes: each computes its own, and the other's are zeros before the sum."""
    monkeypatch.setattr(type(base), "sample_batch_size", 2)
    settings = dict(captions=9 * ["an umbrella"], num_steps=2, stochasticity=stochasticity)
    expected = evaluate.sample(base, **settings)
    shares, calls = [], []
    network = base.network.forward
    monkeypatch.setattr(base.network, "forward", lambda *inputs: calls.append(1) or network(*inputs))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda tensors: None)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(evaluate.sample(base, **settings))
    assert torch.equal(shares[0] + shares[1], expected)
    assert not (shares[0].flatten(1).any(1) & shares[1].flatten(1).any(1)).any()
    assert len(calls) == 2 * 5                                         # two steps of five batches
