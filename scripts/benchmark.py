"""Measures speed and memory:  python -m scripts.benchmark [TABLE ...]   prints the tables, and writes
docs/benchmark.md if all are made.

Machines differ, so what counts are ratios within one run. The floor of a training step is the time of the
network calls that its method needs, each timed alone in the same process; the rest is overhead. What is
compared is called in turns, and medians are reported. Read next: docs/benchmark.md"""

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

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
from utils import checkpoint, training_state
from utils.distributed import clip_grad_norm
from utils.failures import clear_exit
from utils.plotting import format_steps, markdown_table, save_images
from utils.precision import autocast

ROOT = Path(__file__).parent.parent
ROUNDS = 7


def time_interleaved(jobs, rounds=ROUNDS):
    """{name: function} -> {name: median seconds}. Each round calls every function once; the first round does
    not count."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start_time = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start_time)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def make_trainer(method, *cli_args):
    """A Trainer as train.py makes it, without warm-up and without gradient norms of single losses."""
    cli_args = ["--method", method, "--eval-samples", "0", "--steps", "1000", "--set", "warmup_steps_d=0",
                *cli_args]
    training_state.GRAD_NORM_EVERY = 10 ** 9
    return train.setup(train.parse_args(cli_args)[1])[2]


# ------------------------------------------------------------------------------- a step and its network calls

def clone_leaves(inputs):
    """The same tensors as leaves of their own graph."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x,
                    inputs)


class CallRecorder:
    """The network calls of one training step.

    call_counts: {(part, batch size, has a graph): number of calls}; calls: for each key a function that
    repeats the first of them. Recomputation in the backward pass counts as a call without graph."""

    def __init__(self, trainer):
        self.call_counts, self.calls, self.patches = Counter(), {}, ExitStack()
        model, teacher, disc = trainer.model, trainer.teacher, trainer.disc
        parts = [("network", model, "forward_network")]
        if teacher:
            parts += [("teacher", teacher, "forward_network")]
        if hasattr(disc, "logits"):
            parts += [("backbone", disc.backbone, "forward"), ("heads", disc, "logits"),
                      ("global embedding", disc.backbone, "global_embedding")]
        else:
            parts += [("backbone and heads", disc, "forward")]
        if model.is_large:                                             # captions are encoded beforehand
            parts += [("VAE encoder", model, "encode"), ("VAE decoder", model.vae, "decode")]
        else:
            parts += [("text encoder", model, "encode_prompts")]
        for part in parts:
            self.wrap(*part)
        self.wrap_r1_penalty()
        with self.patches:
            trainer.train_step()
        self.call_counts = +self.call_counts                           # drops counts of 0

    def patch(self, owner, attribute, wrapper):
        self.patches.enter_context(patch.object(owner, attribute, wrapper))

    def record(self, key, call, inputs):
        self.call_counts[key] += 1
        if key not in self.calls:
            inputs = clone_leaves(inputs)
            self.calls[key] = lambda: call(*clone_leaves(inputs))

    def wrap(self, name, owner, attribute):
        """Record the calls of owner.attribute."""
        original = getattr(owner, attribute)

        def wrapper(*inputs):
            batch_size = len(inputs[0][0] if name == "heads" else inputs[0])
            if name == "heads":
                self.heads_call = original, inputs[1]
            if torch._C._current_graph_task_id() >= 0:                 # recomputation in a backward pass
                self.record((name, batch_size, False), original, inputs)
                return original(*inputs)
            out = original(*inputs)
            has_graph = any(torch.is_tensor(x) and x.requires_grad for x in tree_leaves(out))
            self.record((name, batch_size, has_graph), original, inputs)
            return out

        self.patch(owner, attribute, wrapper)

    def wrap_r1_penalty(self):
        """R1 differentiates a call of the heads, so the two are recorded as one."""
        original = losses.r1_penalty

        def wrapper(logits, features):
            batch_size = len(features[0])
            heads, disc_cond = self.heads_call                         # made for it just before
            self.call_counts["heads", batch_size, True] -= 1

            def repeat(features, disc_cond):
                return original(heads(features, disc_cond), features)

            self.record(("R1 of heads", batch_size, True), repeat, (features, disc_cond))
            return original(logits, features)

        self.patch(losses, "r1_penalty", wrapper)


def time_call(trainer, call, has_graph):
    """A function that makes the call, and its backward pass if it has a graph."""
    def job():
        with autocast(), torch.set_grad_enabled(has_graph):
            outputs = [x for x in tree_leaves(call()) if torch.is_tensor(x) and x.requires_grad]
        if has_graph:
            trainer.opt_g.zero_grad()
            trainer.opt_d.zero_grad()
            sum(x.float().square().mean() for x in outputs).backward()
    return job


def optimizer_job(trainer):
    """A function that does what a step does once the gradients are there: clip, AdamW, EMA."""
    def job():
        clip_grad_norm(trainer.g_params, trainer.config.max_grad_norm)
        trainer.opt_g.step()
        trainer.update_ema()
        if trainer.config.lambda_adv:
            clip_grad_norm(trainer.d_params, trainer.config.max_grad_norm_d)
            trainer.opt_d.step()
    return job


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


def step_overhead():
    """Time of a training step and its floor: the network calls that the method needs, each timed alone.
    Beyond the floor is first the optimiser step (gradient norm, clipping, AdamW and EMA, of both networks),
    which costs the same at every batch size. The small Stable Diffusion models have random weights; a call
    of theirs takes milliseconds, and their paths have ten steps here, from noise."""
    rows = []
    path = ["--set", "num_inference_steps=10", "--set", "rollout_start=noise"]
    with TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        models = [("tiny", []), *tiny_pipelines(Path(folder))]
        for (name, cli_args), method in itertools.product(models, ("diffusion", "adt", "add")):
            trainer = make_trainer(method, *cli_args, *(path if method == "adt" else []))
            trainer.train_step()
            recorder = CallRecorder(trainer)
            jobs = {key: time_call(trainer, call, has_graph=key[2]) for key, call in recorder.calls.items()
                    if recorder.call_counts[key]}
            trainer.disc.requires_grad_(True)
            # the optimiser step comes after the training step, which leaves its gradients behind
            seconds = time_interleaved({**jobs, "step": trainer.train_step,
                                        "optimizer": optimizer_job(trainer)})
            floor = sum(seconds[key] * count for key, count in recorder.call_counts.items())
            parts = ", ".join(f"{count} {part}{'' if has_graph else ' (no gradient)'} of {batch_size}"
                              for (part, batch_size, has_graph), count
                              in sorted(recorder.call_counts.items(), key=str))
            step = seconds["step"]
            rows.append((name, method, f"{step:.3f}", f"{floor:.3f}", f"{step / floor:.2f}",
                         f"{seconds['optimizer'] / floor:.2f}", parts))
    return ["model", "method", "step, s", "floor, s", "step / floor", "optimiser step / floor",
            "network calls and their batch size"], rows


# ----------------------------------------------------------------------------------- memory, gradient norms

def peak_memory():
    """Peak memory of a generator step of ADT in MiB, and gradient norm of a path, by its length.
    A batch as in training; with all graphs kept it is several GiB. Norms: eight images, median of five
    batches, which differ by far more than the columns. K = 1 needs least, because the gradient of its one
    call need not be added to another's while a graph is alive."""
    trainer = make_trainer("adt")
    model, disc = trainer.model, trainer.disc.requires_grad_(False)
    batches = [trainer.dataset.sample_batch(8, torch.Generator().manual_seed(i)) for i in range(5)]
    conds = [(model.encode_prompts(batch.caption), model.encode(batch.image)) for batch in batches]
    batch = trainer.dataset.sample_batch(trainer.config.batch_size, torch.Generator().manual_seed(0))
    variants = {"K = 2, graphs kept (the default)": (2, 0., False), "K = 1, recomputed": (1, 0., True),
                "K = 2, recomputed": (2, 0., True), "K = 5, recomputed": (5, 0., True),
                "K = all, recomputed": (50, 0., True),
                "K = all, through the inputs, recomputed": (50, 1., True),
                "K = all, through the inputs, graphs kept": (50, 1., False)}

    def peak_mib(num_steps, num_grad_steps, input_grad_scale, checkpoint_rollout):
        config = dataclasses.replace(trainer.config, num_inference_steps=num_steps,
                                     num_grad_steps=num_grad_steps, input_grad_scale=input_grad_scale,
                                     checkpoint_rollout=checkpoint_rollout)
        trainer.opt_g.zero_grad()
        with AllocationTracker([*model.parameters(), *disc.parameters()]) as tracker:
            with autocast():
                losses_dict = adt.generator_loss(model, None, disc, batch, config)[0]
            sum(losses_dict.values()).backward()
        return tracker.peak_bytes / 2 ** 20

    def grad_norm(i, num_steps, input_grad_scale):
        x = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(i))
        return make_figures.rollout_grad_norm(model, x, num_steps, *conds[i], grad_steps=range(num_steps),
                                              input_grad_scale=input_grad_scale)

    rows = []
    for num_steps in (5, 10, 25, 50):
        mib = [peak_mib(num_steps, *variant) for variant in variants.values()]
        norms = [statistics.median(grad_norm(i, num_steps, scale) for i in range(5)) for scale in (0., 1.)]
        rows.append((str(num_steps), *(f"{x:.0f}" for x in mib), *(f"{x:.2g}" for x in norms)))
    return ["steps of the path", *variants, "norm, inputs detached", "norm, through the inputs"], rows


# ------------------------------------------------------------------------------------------ around the step

def data_throughput():
    """Batches of 32 per second: what a data set gives, what the default runs use.
    They are prepared in a thread of their own during the training step."""
    rows, step_seconds = [], {}
    for method in ("adt", "add"):
        step_seconds |= time_interleaved({method: make_trainer(method).train_step}, 3)
    for dataset_name in ("glyphs", "fashion"):
        dataset = data.build_dataset(dataset_name)
        seconds = time_interleaved({"batch": lambda dataset=dataset: dataset.sample_batch(32)})["batch"]
        for method, step in step_seconds.items():
            rows.append((dataset_name, method, f"{1 / seconds:.0f}", f"{1 / step:.2f}",
                         f"{step / seconds:.0f}"))
    return ["data", "method", "given, batches/s", "used, batches/s", "given / used"], rows


def sampling_speed():
    """Images per second, and their Fréchet distance (FD).
    FD of the base model and of the ADD student in weights/, 2,000 images each."""
    model, metrics = load_model("tiny", "glyphs"), {}
    captions = data.build_dataset("glyphs").sample_batch(100, torch.Generator().manual_seed(0)).caption
    for dataset_name, name in itertools.product(("glyphs", "fashion"), ("base", "add")):
        path = make_figures.results_path(name, dataset_name)
        metrics[f"FD, {dataset_name}, {make_figures.LABELS[name]}"] = json.loads(path.read_text())
    jobs = {n: lambda n=n: sample(model, captions, n) for n in (1, 2, 4, 10, 25, 50)}
    all_seconds, rows = time_interleaved(jobs, 3), []
    for n, seconds in all_seconds.items():
        cached = [by_config.get(f"{format_steps(n)} (2000 images)") for by_config in metrics.values()]
        rows.append((str(n), f"{100 / seconds:.0f}", f"{all_seconds[50] / seconds:.1f}",
                     *(f"{entry['fd']:.2f}" if entry else "" for entry in cached)))
    return ["sampler steps", "images/s", "speed / speed of 50 steps", *metrics], rows


def startup_time():
    """Seconds until a program runs."""
    def process(*args):
        return lambda: subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, check=True)

    imports = "import models.loading, losses, sampler"
    seconds = time_interleaved({"`import torch`": process("-c", "import torch"),
                                f"`{imports}`": process("-c", imports),
                                "`python train.py --help`": process("train.py", "--help")}, 5)
    return ["start", "s"], [(name, f"{value:.2f}") for name, value in seconds.items()]


# ------------------------------------------------------------------------------------------ time and quality

def load_recipes():
    """{(data, method, *settings, steps): for each seed its FD, after 10 sampler steps (ADT) or after 1 and 4
    (ADD)} of every run in results/runs/."""
    steps_of, recipes = {"adt": ["10 steps"], "add": ["1 step", "4 steps"]}, {}
    for path in sorted(make_figures.RESULTS_DIR.glob("runs/ad[dt]-*steps-seed*.json")):
        method, dataset_name, rest = path.stem.split("-", 2)           # a value may hold a "-": lr=5e-5
        *settings, steps, _ = re.split(r"-(?=\w+=|\d+steps|seed)", rest)
        metrics = json.loads(path.read_text())
        recipe = (dataset_name, method, *settings, int(steps.removesuffix("steps")))
        fds = [metrics[f"{steps} (2000 images)"]["fd"] for steps in steps_of[method]]
        recipes.setdefault(recipe, []).append(fds)
    return recipes


def recipe_title(recipe):
    return f"{' '.join(recipe[2:-1]) or 'default'}, {recipe[-1]}"


def dominators(recipe, others, scores):
    """Those of `others`, of the same data and method, that are no worse in minutes and in every FD."""
    return [other for other in others if other[:2] == recipe[:2] and other != recipe
            and all(a <= b for a, b in zip(scores[other], scores[recipe]))]


def time_to_quality():
    """FD of every recipe in results/, minutes of its steps on this machine, what is both faster and better.
    FD of 2,000 images after ten sampler steps (ADT), or one / four (ADD): mean ± standard deviation over the
    seeds. ≈: better by no more than the largest such deviation, so perhaps by chance. (The minutes of
    docs/results.md are those of the logs, of the quickest run with one thread.)"""
    recipes, scores, stds = load_recipes(), {}, {}
    trainers = {(method, *settings): make_trainer(method, *(arg for s in settings for arg in ("--set", s)))
                for method, *settings in dict.fromkeys(recipe[1:-1] for recipe in recipes)}
    pace = time_interleaved({key: trainer.train_step for key, trainer in trainers.items()}, 3)
    for recipe, seeds in recipes.items():
        fds = list(zip(*seeds))
        scores[recipe] = [pace[recipe[1:-1]] * recipe[-1] / 60, *map(statistics.mean, fds)]
        if len(seeds) > 1:
            stds[recipe] = [*map(statistics.stdev, fds)]
    pareto_front = [recipe for recipe in scores if not dominators(recipe, scores, scores)]

    def compare(recipe, other):
        max_stds = map(max, zip(*(std for key, std in stds.items() if key[:2] == recipe[:2])))
        significant = any(b - a > max_std for a, b, max_std
                          in zip(scores[other][1:], scores[recipe][1:], max_stds))
        return recipe_title(other) if significant else f"≈ {recipe_title(other)}"

    rows = []
    for recipe in sorted(scores, key=lambda recipe: (recipe[:2], scores[recipe])):
        minutes, *means = scores[recipe]
        fds = [f"{mean:.2f} ± {stds[recipe][i]:.2f}" if recipe in stds else f"{mean:.2f}"
               for i, mean in enumerate(means)]
        better = "; ".join(compare(recipe, other) for other in dominators(recipe, pareto_front, scores))
        rows.append((*recipe[:2], recipe_title(recipe), str(len(recipes[recipe])), f"{minutes:.1f}",
                     " / ".join(fds), better or "none: on the Pareto front"))
    return ["data", "method", "settings, steps", "seeds", "minutes", "FD", "faster and better"], rows


# --------------------------------------------------------------------------------------- beside diffusers

def vs_diffusers():
    """A training step beside the loop of diffusers' text-to-image example: the same network, batch, loss and
    optimiser. The network is a small Stable Diffusion 1.5 with random weights."""
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

    seconds = time_interleaved({"diffusers": diffusers_step, "ours": our_step}, 15)
    return ["a training step", "s", "ratio"], [
        ("diffusers' example", f"{seconds['diffusers']:.3f}", ""),
        ("losses.diffusion_loss", f"{seconds['ours']:.3f}", f"{seconds['ours'] / seconds['diffusers']:.2f}")]


# ---------------------------------------------------------------------------------------- the command line

TABLES = {"step": step_overhead, "memory": peak_memory, "data": data_throughput, "sampling": sampling_speed,
          "start": startup_time, "quality": time_to_quality, "diffusers": vs_diffusers}


def caption(table_fn):
    """The heading of a table: the docstring of its function, the first sentence in bold."""
    text = " ".join(inspect.getdoc(table_fn).split())
    return re.sub(r"^(.*?[.])( |$)", r"**\1**\2", text, count=1).strip()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--output", help="file to write (default: docs/benchmark.md if all tables are made)")
    args = parser.parse_args(argv)
    output = Path(args.output or ROOT / "docs" / "benchmark.md")
    with clear_exit(parser, "benchmark.py"):
        for name in args.tables:
            if name not in TABLES:
                raise ValueError(f"no table '{name}': wanted {', '.join(TABLES)}")
        if not output.absolute().parent.is_dir() or output.is_dir():
            raise ValueError(f"--output {output}: wanted a file in a folder that exists")
        sections = ["# Benchmark",
                    f"`python -m scripts.benchmark` · {platform.processor() or platform.machine()}, "
                    f"{torch.get_num_threads()} threads · torch {torch.__version__} · commit "
                    f"{make_figures.git_commit()}"]
        for name in args.tables or TABLES:
            columns, rows = TABLES[name]()
            sections += [caption(TABLES[name]), markdown_table(columns, rows)]
            print(*sections[-2:], "", sep="\n\n", flush=True)
        if args.output or not args.tables:
            checkpoint.atomic_write_text(output, "\n\n".join(sections) + "\n")
            print(f"wrote {output}")


if __name__ == "__main__":
    main()
