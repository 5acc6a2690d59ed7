"""Measures speed and memory:  python -m scripts.benchmark [TABLE ...]   prints the tables, and writes
docs/benchmark.md if all are made.

Machines differ, so what counts are ratios within one run. The limit of a training step is its number of
floating-point operations, divided by the machine's own rate of matrix products with all cores; beside it
stands the time of the network calls that the method needs, each timed alone. What is compared is called in
turns, and medians are reported. Read next: docs/benchmark.md"""

import argparse
import dataclasses
import inspect
import multiprocessing
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import adt
import data
import losses
import train
from evaluate import sample
from models.denoiser import Denoiser
from models.loading import load_model
from models.stable_diffusion import schedule_from_diffusers
from scripts import make_figures
from scripts.memory_of_large_models import AllocationTracker
from scripts.network_calls import CallRecorder, time_call, time_interleaved
from utils import checkpoint, distributed, launch, training_state
from utils.failures import clear_exit, start_program
from utils.plotting import markdown_table, save_images
from utils.precision import PRECISIONS, autocast, compute_dtype, default_precision

ROOT = Path(__file__).parent.parent
GEMM_SIZE = 2048                       # of the square matrices whose product gives the machine's rate
EVAL_BATCHES = 20                      # of 100 images, in each row of the final table
LONG_WINDOW = 100                      # steps of the long run whose median is shown
SHORT_STEPS = ["--set", "batch_size=1", "--set", "num_inference_steps=1"]


def make_trainer(method, *cli_args):
    """A Trainer as train.py makes it, without warm-up and without gradient norms of single losses."""
    cli_args = ["--method", method, "--eval-samples", "0", "--steps", "1000", "--set", "warmup_steps_d=0",
                *cli_args]
    training_state.GRAD_NORM_EVERY = 10 ** 9
    return train.setup(train.parse_args(cli_args)[1])[2]


# ----------------------------------------------------------------------------------------- default commands

def resident_mib():
    """Peak resident memory of this process."""
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def run_worker(rank, environment, cli_args, connection):
    """One process of a Team. Each message from the connection is a job; the answer is its result."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    distributed.init_distributed()
    trainer = make_trainer(*cli_args)
    captions = trainer.dataset.sample_batch(100, torch.Generator().manual_seed(0)).caption
    jobs = {"step": trainer.train_step, "memory": resident_mib,
            "sample": lambda: sample(trainer.model, captions, 4)}
    while True:
        result = jobs[connection.recv()]()
        connection.send(result if isinstance(result, float) else None)


class Team:
    """The processes that train a run on this machine, as train.py starts them."""

    def __init__(self, num_processes, *cli_args):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        environment = {}
        if num_processes > 1:
            environment = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), distributed.LAUNCHED: "1"}
        context = multiprocessing.get_context("spawn")
        self.connections, self.workers = [], []
        for rank in range(num_processes):
            connection, other_end = context.Pipe()
            worker = context.Process(target=run_worker, args=(rank, environment, cli_args, other_end),
                                     daemon=True)
            worker.start()
            self.connections.append(connection)
            self.workers.append(worker)

    def run(self, job):
        """The job in every process at once -> the sum of its results, if it has any."""
        for connection in self.connections:
            connection.send(job)
        return sum(connection.recv() or 0. for connection in self.connections)

    def close(self):
        for worker in self.workers:
            worker.kill()
            worker.join()


class NoModules(nullcontext):
    """In place of FlopCounterMode's tracker of modules, whose hooks fail inside autograd.grad (R1)."""
    parents = ("Global",)


def count_flops(trainer):
    """Floating-point operations of a training step: matrix products and convolutions, forward and
    backward."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        trainer.train_step()
    return counter.get_total_flops()


def gemm_job(precision):
    """A function that multiplies two square matrices with all cores."""
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=compute_dtype(precision))

    def job():
        torch.set_num_threads(launch.usable_cores())
        a @ b
        torch.set_num_threads(1)
    return job


def default_commands(args):
    """Time and memory of the default commands.
    Start-up is not included. s / step: with the number of processes that the command chooses here.
    Utilisation: operations of a step (matrix products and convolutions, counted) / seconds / rate of the
    matrix product, all measured in this run. Memory: peak of all processes together."""
    rows = []
    for precision in [name for name in PRECISIONS if name in ("fp32", default_precision())]:
        for method, entry in train.METHODS.items():
            cli_args = [method, "--precision", precision]
            num_processes = min(launch.MAX_AUTO_PROCESSES, launch.usable_cores())
            trainer = make_trainer(*cli_args)
            flops = count_flops(trainer)
            team = Team(num_processes, *cli_args)
            seconds = time_interleaved({"step": lambda team=team: team.run("step"),
                                        "GEMM": gemm_job(precision),
                                        "sample": lambda team=team: team.run("sample")}, args.rounds)
            rate = 2 * GEMM_SIZE ** 3 / seconds["GEMM"]
            num_calls = sum(num_steps for label, num_steps, _ in trainer.config.eval_sampling_configs()
                            if label == "after")                       # the others are in results/
            table = num_calls * EVAL_BATCHES / num_processes * seconds["sample"] / 4
            mib = team.run("memory")
            team.close()
            training = seconds["step"] * entry.default_steps
            rows.append((method, precision, num_processes, entry.default_steps, f"{seconds['step']:.2f}",
                         f"{training / 60:.1f}", f"{table / 60:.1f}", f"{mib:.0f}", f"{flops / 1e9:.0f}",
                         f"{rate / 1e9:.0f}", f"{flops / seconds['step'] / rate:.0%}"))
    return ["method", "precision", "processes", "steps", "s / step", "training, min", "final table, min",
            "peak memory, MiB", "GFLOP / step", "matrix product, GFLOP/s", "utilisation"], rows


# ------------------------------------------------------------------------------- a step and its network calls

def tiny_pipelines(folder):
    """Write Stable Diffusion's three families, small and with random weights, and some images into the folder
    -> [(name, arguments for train.py)]."""
    from scripts import tiny_pipelines as pipelines
    batch = data.build_dataset("glyphs").sample_batch(16, torch.Generator().manual_seed(0))
    for _ in save_images([batch.image], batch.caption, folder / "images"):
        pass
    shared = ["--backbone", str(pipelines.make_dino(folder / "dino")), "--data", str(folder / "images"),
              "--resolution", str(pipelines.RESOLUTION)]
    return [(f"small {family}", ["--model", family, "--pretrained",
                                 str(pipelines.make_pipeline(family, folder)), *shared])
            for family in ("sd15", "sdxl", "sd3")]


def step_overhead(args):
    """A training step beside the network calls that the method needs, each timed alone, in one process.
    The small Stable Diffusion models have random weights; a call of theirs takes
    milliseconds, and their paths have ten steps here, from noise."""
    rows = []
    short = {"diffusion": [], "adt": ["--set", "num_inference_steps=10", "--set", "rollout_start=noise"],
             "add": ["--set", "gradient_accumulation_steps=1"]}
    with TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        models = [("tiny", []), *tiny_pipelines(Path(folder))]
        for name, cli_args in models:
            cells = []
            for method in ("diffusion", "adt", "add"):
                trainer = make_trainer(method, *cli_args, *short[method])
                trainer.train_step()
                step, calls = step_and_calls(trainer, args.rounds)
                cells.append(f"{step:.3f} / {calls:.3f} = {step / calls:.2f}")
            rows.append((name, *cells))
    return ["model", "diffusion: step / calls, s", "ADT", "ADD"], rows


def step_and_calls(trainer, rounds):
    """Seconds of a training step, and of its network calls, each timed alone."""
    recorder = CallRecorder(trainer)
    jobs = {key: time_call(trainer, call, has_graph=key[2]) for key, call in recorder.calls.items()
            if recorder.call_counts[key]}
    trainer.disc.requires_grad_(True)
    seconds = time_interleaved({**jobs, "step": trainer.train_step}, rounds)
    return seconds["step"], sum(seconds[key] * count for key, count in recorder.call_counts.items())


# ------------------------------------------------------------------------------------------ memory and time

def peak_memory(args):
    """Peak memory of a generator step of ADT in MiB, by the length of its path.
    Tensors beyond the weights, for a batch as in training; K of the steps keep their graph."""
    trainer = make_trainer("adt")
    model, disc = trainer.model, trainer.disc.requires_grad_(False)
    batch = trainer.dataset.sample_batch(trainer.config.batch_size, torch.Generator().manual_seed(0))
    variants = {"K = 2, graphs kept (the default)": (2, 0., False), "K = 2, recomputed": (2, 0., True),
                "K = 5, recomputed": (5, 0., True), "K = all, recomputed": (50, 0., True),
                "K = all, through the inputs, graphs kept": (50, 1., False)}

    def peak_mib(num_steps, num_grad_steps, input_grad_scale, checkpoint_rollout):
        config = dataclasses.replace(trainer.config, num_inference_steps=num_steps, rollout_start="noise",
                                     num_grad_steps=num_grad_steps, input_grad_scale=input_grad_scale,
                                     checkpoint_rollout=checkpoint_rollout)
        trainer.opt_g.zero_grad()
        with AllocationTracker([*model.parameters(), *disc.parameters()]) as tracker:
            with autocast():
                losses_dict = adt.generator_loss(model, None, disc, batch, config)[0]
            sum(losses_dict.values()).backward()
        return tracker.peak_bytes / 2 ** 20

    rows = [(str(num_steps), *(f"{peak_mib(num_steps, *variant):.0f}" for variant in variants.values()))
            for num_steps in (5, 10, 25, 50)]
    return ["steps of the path", *variants], rows


def long_run(args):
    """Time and memory in the course of a long run.
    Steps of one image, a path of one step: time of a step (median of the last 100), and peak of the resident
    memory until then."""
    num_steps, rows = args.long_steps, []
    window = min(LONG_WINDOW, num_steps)
    for method, cli_args in (("adt", SHORT_STEPS), ("add", SHORT_STEPS[:2])):
        trainer = make_trainer(method, *cli_args, "--steps", str(num_steps))
        seconds, cells = [], []
        for step in range(1, num_steps + 1):
            start_time = time.perf_counter()
            trainer.train_step()
            seconds.append(time.perf_counter() - start_time)
            if step in (window, num_steps // 2, num_steps):
                milliseconds = 1000 * statistics.median(seconds[-window:])
                cells.append(f"{milliseconds:.0f} ms, {resident_mib():.0f} MiB")
        rows.append((method, *cells))
    return ["method", f"step {window}", f"step {num_steps // 2}", f"step {num_steps}"], rows


def around_the_step(args):
    """Around the training step."""
    def process(*args):
        return lambda: subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, check=True)

    dataset, model = data.build_dataset("glyphs"), load_model("tiny", "glyphs")
    captions = dataset.sample_batch(100, torch.Generator().manual_seed(0)).caption
    with TemporaryDirectory() as folder:
        prompt = ["evaluate.py", "--prompt", "an umbrella", "--output", str(Path(folder, "samples.png"))]
        seconds = time_interleaved({"import": process("-c", "import torch"),
                                    "help": process("train.py", "--help"), "prompt": process(*prompt),
                                    "batch": lambda: dataset.sample_batch(32),
                                    "sample": lambda: sample(model, captions, 10)}, args.rounds)
    ours, example = diffusers_steps(2 * args.rounds)
    return ["what", "value"], [
        ("`import torch`", f"{seconds['import']:.1f} s"),
        ("`python train.py --help`", f"{seconds['help']:.1f} s"),
        ('`python evaluate.py --prompt "an umbrella"`', f"{seconds['prompt']:.1f} s"),
        ("images sampled in 10 steps, one process", f"{100 / seconds['sample']:.0f} a second"),
        ("batches of 32 glyphs that a thread prepares", f"{1 / seconds['batch']:.0f} a second"),
        ("`losses.diffusion_loss` beside the loop of diffusers' text-to-image example, small network",
         f"{ours:.3f} s / {example:.3f} s = {ours / example:.2f}")]


# --------------------------------------------------------------------------------------- beside diffusers

def diffusers_steps(rounds):
    """Seconds of a training step of ours, and of the loop of diffusers' text-to-image example: the same
    network, batch, loss and optimiser. The network is a small Stable Diffusion 1.5 with random weights."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(32, 4, 4, block_out_channels=(64, 128), layers_per_block=1,
                                cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    model = Denoiser(*schedule_from_diffusers(scheduler))
    model.network = unet
    model.forward_network = lambda x, t_input, cond: unet(x, t_input, cond["text"]).sample
    x0, text = torch.randn(4, 4, 16, 16), torch.randn(4, 16, 64)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-5)

    def optimizer_step(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()

    def diffusers_step():
        noise, t = torch.randn_like(x0), torch.randint(1000, (4,))
        x_t = scheduler.add_noise(x0, noise, t)
        optimizer_step(F.mse_loss(unet(x_t, t, text, return_dict=False)[0].float(), noise.float()))

    def our_step():
        t, noise = torch.randint(1000, (4,)), torch.randn_like(x0)
        optimizer_step(losses.diffusion_loss(model, x0, t, noise, {"text": text}))

    seconds = time_interleaved({"diffusers": diffusers_step, "ours": our_step}, rounds)
    return seconds["ours"], seconds["diffusers"]


# ---------------------------------------------------------------------------------------- the command line

TABLES = {"commands": default_commands, "step": step_overhead, "memory": peak_memory, "long": long_run,
          "start": around_the_step}


def machine_name():
    """The processor's own name."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", path.read_text(), re.M) if path.is_file() else []
    return (names or [platform.processor() or platform.machine()])[0]


def caption(table_fn):
    """The heading of a table: the docstring of its function, the first sentence in bold."""
    text = " ".join(inspect.getdoc(table_fn).split())
    return re.sub(r"^(.*?[.])( |$)", r"**\1**\2", text, count=1).strip()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="of each comparison; the median counts "
                        "(default: 7)")
    parser.add_argument("--long-steps", type=int, default=5000, help="of the table 'long' (default: 5000)")
    parser.add_argument("--output", help="file to write (default: docs/benchmark.md if all tables are made)")
    args = parser.parse_args(argv)
    output = Path(args.output or ROOT / "docs" / "benchmark.md")
    with clear_exit(parser, "benchmark.py"):
        for name in args.tables:
            if name not in TABLES:
                raise ValueError(f"no table '{name}': wanted {', '.join(TABLES)}")
        if args.rounds < 1 or args.long_steps < 1:
            raise ValueError("--rounds and --long-steps: wanted 1 or more")
        if not output.absolute().parent.is_dir() or output.is_dir():
            raise ValueError(f"--output {output}: wanted a file in a folder that exists")
        sections = ["# Benchmark",
                    f"`python -m scripts.benchmark` · {machine_name()}, {launch.usable_cores()} cores, "
                    f"{default_precision()} · torch {torch.__version__} · commit {make_figures.git_commit()} "
                    f"· medians of {args.rounds} round(s)"]
        for name in args.tables or TABLES:
            columns, rows = TABLES[name](args)
            sections += [caption(TABLES[name]), markdown_table(columns, rows)]
            print(*sections[-2:], "", sep="\n\n", flush=True)
        if args.output or not args.tables:
            checkpoint.atomic_write_text(output, "\n\n".join(sections) + "\n")
            print(f"wrote {output}")


if __name__ == "__main__":
    start_program()
    main()
