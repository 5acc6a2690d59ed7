"""How fast, how lean? Ratios within one run, for machines differ: `python benchmark.py` prints the tables and
writes figures/benchmark.md.

A step's *floor* is the network calls that its method cannot avoid, timed alone in the same process: what the
step takes beyond it is overhead, ours or PyTorch's. Everything alternates; medians count.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import figures
import losses
import models
import sampler
import train

HERE = Path(__file__).parent
ROUNDS = 7


def alternate(jobs, rounds=ROUNDS):
    """{name: function} -> {name: median seconds}; one call of each per round, the first is not counted."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def run_of(method):
    """A run as train.py prepares it."""
    typed = ["--method", method, "--samples", "0", "--steps", "1000", "--set", "warmup_d=0"]
    train.MEASURE = 10 ** 9                                  # no terms one by one
    return train.prepare(train.parse(typed)[1])[2]


# ------------------------------------------------------------------------------------ 1: step over floor

class Calls:
    """The calls of a step, counted: how often which part ran, with gradient or without."""

    def __init__(self, run):
        self.counts, self.kept = Counter(), []
        eyes = run.critic.features
        for name, owner, attribute in (("network", run.model, "output"), ("teacher", run.teacher, "output"),
                                       ("eyes", eyes, "forward"), ("heads", run.critic, "score")):
            self.watch(name, owner, attribute)
        self.watch("R1 of heads", losses, "r1")

    def watch(self, name, owner, attribute):
        plain = getattr(owner, attribute)
        def counted(*inputs):
            result = plain(*inputs)
            seen = inputs[0] if name == "R1 of heads" else result
            tensor = seen[0] if isinstance(seen, list) else seen
            self.counts[name, len(tensor), tensor.requires_grad] += 1
            if name == "R1 of heads":                        # it looks through heads that were called for it
                self.counts["heads", len(tensor), True] -= 1
            return result
        self.kept.append((owner, attribute, vars(owner).get(attribute)))
        setattr(owner, attribute, counted)

    def stop(self):
        for owner, attribute, own in self.kept:              # of an object, the class's own is behind it
            setattr(owner, attribute, own) if own else delattr(owner, attribute)
        return +self.counts                                  # what is left of each


def alone(run, name, n, graph):
    """The same call by itself, and its backward pass where it has one."""
    model, batch = run.model, run.source.batch(n)
    x, t = torch.randn(n, *model.shape), torch.randint(model.T, (n,))
    with torch.no_grad():
        cond = model.condition(batch.caption)
        maps = run.critic.features(batch.image)
    known = torch.randn(n, run.critic.project[0].in_features) if len(run.critic.project) else None
    def job():
        with models.half_precision(), torch.set_grad_enabled(graph):
            if name in ("network", "teacher"):
                y = (run.model if name == "network" else run.teacher).predict(x, t, cond)
            elif name == "eyes":
                seen = run.critic.features(batch.image.clone().requires_grad_(graph))
                y = torch.cat([f.flatten() for f in seen])
            elif name == "heads":
                y = torch.cat(run.critic.score(maps, known), 1)
            else:
                seen = [f.clone().requires_grad_() for f in maps]
                y = losses.r1(run.critic.score(seen, known), seen)
        if graph:
            run.opt_g.zero_grad(), run.opt_d.zero_grad()
            y.float().square().mean().backward()
    return job


def overhead():
    """Each method's step over its floor."""
    rows = []
    for method in ("diffusion", "adt", "add"):
        run = run_of(method)
        run.step()
        calls = Calls(run)
        run.step()
        counts = calls.stop()
        jobs = {key: alone(run, *key) for key in counts}
        jobs["step"] = run.step
        run.critic.requires_grad_(True)
        seconds = alternate(jobs)
        floor = sum(seconds[key] * times for key, times in counts.items())
        parts = ", ".join(f"{times} {name}{'' if graph else ' (no gradient)'} of {n}"
                          for (name, n, graph), times in sorted(counts.items(), key=str))
        step = seconds["step"]
        rows.append((method, f"{step:.2f}", f"{floor:.2f}", f"{step / floor:.2f}", parts))
    return ["method", "step, s", "floor, s", "ratio", "the calls"], rows


# --------------------------------------------------------------------------------- 2, 3: memory, gradient

class Kept(TorchDispatchMode):
    """Bytes of all tensors that were made and are still alive, now and at most; the backward pass, and what
    it computes again, included."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        made = function(*arguments, **(settings or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:            # PyTorch keeps one object per storage
                    self.known[id(storage)] = weakref.ref(storage, self.forget(id(storage), storage.nbytes()))
                    self.alive += storage.nbytes()
                    self.most = max(self.most, self.alive)
        return made

    def forget(self, key, size):
        def gone(_):
            self.alive -= size
            del self.known[key]
        return gone


def memory():
    """The most that is alive in a path and its backward pass, and the gradient's norm, against its length."""
    model = models.build("tiny", "glyphs")
    batch = data.build("glyphs").batch(8, torch.Generator().manual_seed(0))
    cond, target = model.condition(batch.caption), model.encode(batch.image)
    rows = []
    for n in (5, 10, 25, 50):
        cells = [str(n)]
        for k, leak, again in ((1, 0., True), (2, 0., True), (5, 0., True), (n, 0., True), (n, 1., False)):
            x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
            with Kept() as kept:
                size = figures.path_gradient(model, x, n, cond, target, leak=leak, checkpoint=again,
                                             train=sampler.pick_steps(n, k))
            cells.append(f"{kept.most / 2 ** 20:.0f}" + (f" / {size:.2g}" if k == n else ""))
        rows.append(tuple(cells))
    return ["steps of the path", "K = 1, MiB", "K = 2", "K = 5", "K = all / gradient norm",
            "through everything, no recomputation / gradient norm"], rows


# ------------------------------------------------------------------------------ 4, 5, 6: around the step

def supply():
    """Batches per second: what a source gives, what the default runs take."""
    rows, steps = [], {}
    for method in ("adt", "add"):
        steps |= alternate({method: run_of(method).step}, 3)
    for dataset in ("glyphs", "fashion"):
        source = data.build(dataset)
        seconds = alternate({"batch": lambda: source.batch(32)})["batch"]
        for method, step in steps.items():
            rows.append((dataset, method, f"{1 / seconds:.0f}", f"{1 / step:.2f}", f"{step / seconds:.0f}"))
    return ["data", "method", "given, batches/s", "taken", "headroom"], rows


def sampling():
    """Pictures per second."""
    model, rows = models.build("tiny", "glyphs"), []
    captions = data.build("glyphs").batch(100, torch.Generator().manual_seed(0)).caption
    jobs = {n: lambda n=n: evaluate.sample(model, captions, n) for n in (1, 2, 4, 10, 50)}
    seconds = alternate(jobs, 3)
    for n, taken in seconds.items():
        rows.append((str(n), f"{100 / taken:.0f}", f"{seconds[50] / taken:.1f}"))
    return ["sampler steps", "pictures/s", "times as fast as fifty"], rows


def starting():
    """Seconds until something happens."""
    def process(*words):
        return lambda: subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, check=True)
    seconds = alternate({"`import torch`": process("-c", "import torch"),
                         "`import models, losses, sampler`": process("-c", "import models, losses, sampler"),
                         "`python train.py --help`": process("train.py", "--help")}, 5)
    return ["start", "s"], [(name, f"{taken:.2f}") for name, taken in seconds.items()]


# ------------------------------------------------------------------------------------------- 9: a peer

def peer():
    """A training step of Stable Diffusion 1.5's small sibling (real classes, random weights) beside a peer.
    The peer is the loop that the text-to-image example of diffusers describes: the same network, batch, loss
    and optimiser."""
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    import stable
    from denoiser import Denoiser
    torch.manual_seed(0)
    unet = UNet2DConditionModel(32, 4, 4, block_out_channels=(64, 128), layers_per_block=1,
                                cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    model = Denoiser(*stable.schedule(scheduler))
    model.network = unet
    model.output = lambda x, time, cond: unet(x, time, cond["text"]).sample
    x0, text = torch.randn(4, 4, 16, 16), torch.randn(4, 16, 64)
    optimiser = torch.optim.AdamW(unet.parameters(), 1e-5)
    def finish(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.)
        optimiser.step()
        optimiser.zero_grad()
    def theirs():
        noise, t = torch.randn_like(x0), torch.randint(1000, (4,))
        noisy = scheduler.add_noise(x0, noise, t)
        finish(F.mse_loss(unet(noisy, t, text, return_dict=False)[0].float(), noise.float()))
    def ours():
        t, noise = torch.randint(1000, (4,)), torch.randn_like(x0)
        finish(losses.diffusion_loss(model, x0, t, noise, {"text": text}))
    seconds = alternate({"theirs": theirs, "ours": ours}, 15)
    return ["a diffusion step", "s", "ratio"], [
        ("as diffusers' example takes it", f"{seconds['theirs']:.3f}", ""),
        ("losses.diffusion_loss", f"{seconds['ours']:.3f}", f"{seconds['ours'] / seconds['theirs']:.2f}")]


TABLES = {"step": overhead, "memory": memory, "data": supply, "sampling": sampling, "start": starting,
          "peer": peer}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", default=str(HERE / "figures" / "benchmark.md"))
    a = parser.parse_args(argv)
    if unknown := set(a.tables) - set(TABLES):
        parser.exit(2, f"benchmark.py: no table '{unknown.pop()}': wanted {', '.join(TABLES)}\n")
    text = [f"`python benchmark.py` · {platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads · torch {torch.__version__} · commit {figures.commit()}"]
    for name in a.tables or TABLES:
        columns, rows = TABLES[name]()
        text.append(f"**{TABLES[name].__doc__.splitlines()[0]}**\n\n{evaluate.markdown(columns, rows)}")
        print(text[-1], "\n", flush=True)
    train.write(Path(a.out), "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
