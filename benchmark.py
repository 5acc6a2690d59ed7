"""How fast, how lean? Ratios within one run, for machines differ: `python benchmark.py` prints the tables and
writes figures/benchmark.md.

A step's *floor* is the network calls that its method cannot avoid, timed alone in the same process: what the
step takes beyond it is overhead, ours or PyTorch's. Everything alternates; medians count.
"""

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
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import adt
import data
import evaluate
import figures
import losses
import models
import survival
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


def run_of(method, *more):
    """A run as train.py prepares it."""
    typed = ["--method", method, "--samples", "0", "--steps", "1000", "--set", "warmup_d=0", *more]
    train.MEASURE = 10 ** 9                                  # no terms one by one
    return train.prepare(train.parse(typed)[1])[2]


# ------------------------------------------------------------------------------------ 1: step over floor

def anew(inputs):
    """The same tensors as leaves of their own."""
    return tree_map(lambda one: one.detach().clone().requires_grad_(one.requires_grad)
                    if torch.is_tensor(one) else one, inputs)


class Calls:
    """The network calls of one step: how often which part ran, on how many pictures, with a gradient or
    without; and each kind's first one, to be called again by itself."""

    def __init__(self, run):
        self.counts, self.jobs, self.swaps = Counter(), {}, ExitStack()
        model, critic = run.model, run.critic
        parts = [("network", model, "output"), ("teacher", run.teacher, "output")]
        if hasattr(critic, "score"):
            parts += [("eyes", critic.features, "forward"), ("heads", critic, "score"),
                      ("eyes' summary", critic.features, "summary")]
        else:
            parts += [("eyes and heads", critic, "forward")]
        if model.heavy:                                      # its captions have been read once for all
            parts += [("VAE encoder", model, "encode"), ("VAE decoder", model, "draw"),
                      ("VAE decoder", run.teacher, "draw")]
        else:
            parts += [("text encoder", model, "condition")]
        for part in parts:
            self.watch(*part)
        plain = losses.r1
        def r1(logits, maps):
            n, (score, known) = len(maps[0]), self.heads     # which were called for it
            self.counts["heads", n, True] -= 1
            def again(maps, known):
                return plain(score(maps, known), maps)
            self.note(("R1 of heads", n, True), again, (maps, known))
            return plain(logits, maps)
        self.swap(losses, "r1", r1)
        with self.swaps:
            run.step()
        self.counts = +self.counts                           # what is left of each

    def swap(self, owner, attribute, other):
        self.swaps.enter_context(patch.object(owner, attribute, other))

    def note(self, key, call, inputs):
        self.counts[key] += 1
        if key not in self.jobs:
            inputs = anew(inputs)
            self.jobs[key] = lambda: call(*anew(inputs))

    def watch(self, name, owner, attribute):
        """Count the calls of owner.attribute."""
        plain = getattr(owner, attribute)
        def counted(*inputs):
            batch = len(inputs[0][0] if name == "heads" else inputs[0])
            if name == "heads":
                self.heads = plain, inputs[1]
            if torch._C._current_graph_task_id() >= 0:       # the backward pass computes its graph anew
                self.note((name, batch, False), plain, inputs)
                return plain(*inputs)
            result = plain(*inputs)
            graph = any(torch.is_tensor(one) and one.requires_grad for one in tree_leaves(result))
            self.note((name, batch, graph), plain, inputs)
            return result
        self.swap(owner, attribute, counted)


def alone(run, call, graph):
    """A call by itself, and its backward pass where it has one."""
    def job():
        with models.half_precision(), torch.set_grad_enabled(graph):
            found = [one for one in tree_leaves(call()) if torch.is_tensor(one) and one.requires_grad]
        if graph:
            run.opt_g.zero_grad(), run.opt_d.zero_grad()
            sum(one.float().square().mean() for one in found).backward()
    return job


def update(run):
    """What a step does to the weights when it has their gradients."""
    players = [(run.opt_g, run.weights, run.config.clip)]
    if run.config.lambda_adv:
        players.append((run.opt_d, run.critic_weights, run.config.clip_d))
    def job():
        for optimiser, weights, clip in players:
            run.improve(optimiser, weights, clip, "", {})
        with torch.no_grad():
            torch._foreach_lerp_(run.average, run.weights, .01)
    return job


def siblings(home):
    """Stable Diffusion's three families with few and random weights, and some pictures, in the folder `home`
    -> (name, what train.py is told)."""
    from tests import pipelines
    batch = data.build("glyphs").batch(16, torch.Generator().manual_seed(0))
    list(evaluate.filed([batch.image], batch.caption, home / "pictures"))
    same = ["--features", str(pipelines.dino(home / "dino")), "--data", str(home / "pictures"),
            "--size", str(pipelines.SIZE)]
    for family in ("sd15", "sdxl", "sd3"):
        yield f"small {family}", ["--model", family, "--weights", str(pipelines.make(family, home)), *same]


def overhead():
    """Each method's step over its floor: the network calls that it cannot avoid, timed by themselves.
    Beyond the floor is first the weights' update (the gradients' norm, clipping, AdamW and the average, of
    both players), which moves the same bytes whatever the batch. A call takes milliseconds in the small
    siblings of the large models, and their paths have ten steps here, from noise."""
    rows, fixed = [], ["--set", "path_steps=10", "--set", "start=text"]
    with TemporaryDirectory() as home, patch.dict(os.environ, XDG_CACHE_HOME=home):
        for (name, typed), method in itertools.product(
                [("tiny", []), *siblings(Path(home))], ("diffusion", "adt", "add")):
            run = run_of(method, *typed, *(fixed if method == "adt" else []))
            run.step()
            calls = Calls(run)
            jobs = {key: alone(run, call, key[2]) for key, call in calls.jobs.items() if calls.counts[key]}
            run.critic.requires_grad_(True)
            seconds = alternate({**jobs, "step": run.step, "update": update(run)})   # its gradients are there
            floor = sum(seconds[key] * times for key, times in calls.counts.items())
            parts = ", ".join(f"{times} {part}{'' if graph else ' (no gradient)'} of {n}"
                              for (part, n, graph), times in sorted(calls.counts.items(), key=str))
            step = seconds["step"]
            rows.append((name, method, f"{step:.3f}", f"{floor:.3f}", f"{step / floor:.2f}",
                         f"{seconds['update'] / floor:.2f}", parts))
    return ["model", "method", "step, s", "floor, s", "ratio", "update / floor", "the calls"], rows


# --------------------------------------------------------------------------------- 2, 3: memory, gradient

class Kept(TorchDispatchMode):
    """Bytes of all tensors that were made and are still alive, now and at most; the backward pass, and what
    it computes again, included; views of `weights` are not."""

    def __init__(self, weights=()):
        super().__init__()
        self.weights = [w.untyped_storage() for w in weights]
        self.alive, self.most, self.known = 0, 0, {id(storage): None for storage in self.weights}

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
    """The most that is alive in a generator step of ADT, MiB, and a path's gradient norm, by its length.
    A batch as in training; with all graphs kept that is several GiB. Norms are of eight pictures and medians
    of five batches, which differ by far more than the columns. K = 1 needs least: the weights' gradient of
    its one call has no other's to be added to while a graph is there."""
    run = run_of("adt")
    model, critic = run.model, run.critic.requires_grad_(False)
    batches = [run.source.batch(8, torch.Generator().manual_seed(i)) for i in range(5)]
    known = [(model.condition(batch.caption), model.encode(batch.image)) for batch in batches]
    usual = run.source.batch(run.config.batch, torch.Generator().manual_seed(0))
    ways = {"K = 2, graphs kept (the default)": (2, 0., False), "K = 1, recomputed": (1, 0., True),
            "K = 2": (2, 0., True), "K = 5": (5, 0., True), "K = all": (50, 0., True),
            "through the inputs, all, recomputed": (50, 1., True), "graphs kept": (50, 1., False)}
    def most(n, k, leak, again):
        config = dataclasses.replace(run.config, path_steps=n, train_steps=k, leak=leak, checkpoint=again)
        run.opt_g.zero_grad()
        with Kept([*model.parameters(), *critic.parameters()]) as kept:
            with models.half_precision():
                terms, _, _ = adt.generator_loss(model, None, critic, usual, config)
            sum(terms.values()).backward()
        return kept.most / 2 ** 20
    def norm(i, n, leak):
        x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(i))
        return figures.path_gradient(model, x, n, *known[i], leak=leak, train=range(n))
    rows = [(str(n), *(f"{most(n, *way):.0f}" for way in ways.values()),
             *(f"{statistics.median(norm(i, n, leak) for i in range(5)):.2g}" for leak in (0., 1.)))
            for n in (5, 10, 25, 50)]
    return ["steps of the path", *ways, "norm, detached", "norm, through the inputs"], rows


# ------------------------------------------------------------------------------ 4, 5, 6: around the step

def supply():
    """Batches per second: what a source gives, what the default runs take.
    They are read in a thread of their own, while a step is taken."""
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
    """Pictures per second, and how near they are to real ones.
    FD of the base and of the student that weights/ ships, 2,000 pictures each."""
    model, rows, found = models.build("tiny", "glyphs"), [], {}
    captions = data.build("glyphs").batch(100, torch.Generator().manual_seed(0)).caption
    for dataset, who in itertools.product(("glyphs", "fashion"), ("base", "add")):
        found[f"FD, {dataset}, {figures.NAMES[who]}"] = json.loads(figures.known(who, dataset).read_text())
    jobs = {n: lambda n=n: evaluate.sample(model, captions, n) for n in (1, 2, 4, 10, 25, 50)}
    seconds = alternate(jobs, 3)
    for n, taken in seconds.items():
        known = [one.get(f"{evaluate.in_steps(n)} (2000 pictures)") for one in found.values()]
        rows.append((str(n), f"{100 / taken:.0f}", f"{seconds[50] / taken:.1f}",
                     *(f"{one['fd']:.2f}" if one else "" for one in known)))
    return ["sampler steps", "pictures/s", "times as fast as fifty", *found], rows


def starting():
    """Seconds until something happens."""
    def process(*words):
        return lambda: subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, check=True)
    seconds = alternate({"`import torch`": process("-c", "import torch"),
                         "`import models, losses, sampler`": process("-c", "import models, losses, sampler"),
                         "`python train.py --help`": process("train.py", "--help")}, 5)
    return ["start", "s"], [(name, f"{taken:.2f}") for name, taken in seconds.items()]


# --------------------------------------------------------------------------------- 7: time to quality

def recipes():
    """(data, method, *settings, steps) of every run in results/ -> per seed its FD after ten steps (ADT), or
    after one and four (ADD)."""
    ways, seeds = {"adt": ["10 steps"], "add": ["1 step", "4 steps"]}, {}
    for path in sorted(figures.RESULTS.glob("ad[dt]-*steps-seed*.json")):
        method, source, rest = path.stem.split("-", 2)       # a setting may hold a "-": lr=5e-5
        *settings, steps, _ = re.split(r"-(?=\w+=|\d+steps|seed)", rest)
        found, recipe = json.loads(path.read_text()), (source, method, *settings, int(steps[:-len("steps")]))
        seeds.setdefault(recipe, []).append([found[f"{way} (2000 pictures)"]["fd"] for way in ways[method]])
    return seeds


def quality():
    """FD of every recipe in results/, minutes of its steps in this run, which are both quicker and better.
    FD of 2,000 pictures after ten steps (ADT), or one / four (ADD), mean ± standard deviation over the seeds
    there are. ≈ marks who is better by no more than the largest such deviation: perhaps by chance. (The
    README's minutes are logged ones, of the quickest run, with one thread.)"""
    seeds, score, scatter = recipes(), {}, {}
    runs = {(method, *settings): run_of(method, *(word for one in settings for word in ("--set", one)))
            for method, *settings in dict.fromkeys(recipe[1:-1] for recipe in seeds)}
    pace = alternate({of: run.step for of, run in runs.items()}, 3)
    for recipe, rows in seeds.items():
        fds = list(zip(*rows))
        score[recipe] = [pace[recipe[1:-1]] * recipe[-1] / 60, *map(statistics.mean, fds)]
        if len(rows) > 1:
            scatter[recipe] = [*map(statistics.stdev, fds)]
    def ahead(recipe, others):
        return [other for other in others if other[:2] == recipe[:2] and other != recipe
                and all(a <= b for a, b in zip(score[other], score[recipe]))]
    def title(recipe):
        return f"{' '.join(recipe[2:-1]) or 'default'}, {recipe[-1]}"
    def beside(recipe, other):
        most = map(max, zip(*(known for of, known in scatter.items() if of[:2] == recipe[:2])))
        sure = any(b - a > chance for a, b, chance in zip(score[other][1:], score[recipe][1:], most))
        return title(other) if sure else f"≈ {title(other)}"
    front, lines = [recipe for recipe in score if not ahead(recipe, score)], []
    for recipe in sorted(score, key=lambda recipe: (recipe[:2], score[recipe])):
        minutes, *means = score[recipe]
        fds = [f"{mean:.2f} ± {scatter[recipe][i]:.2f}" if recipe in scatter else f"{mean:.2f}"
               for i, mean in enumerate(means)]
        lines.append((*recipe[:2], title(recipe), str(len(seeds[recipe])), f"{minutes:.1f}", " / ".join(fds),
                      "; ".join(beside(recipe, other) for other in ahead(recipe, front))
                      or "none: on the front"))
    return ["data", "method", "recipe, steps", "seeds", "minutes", "FD", "quicker and better"], lines


# ------------------------------------------------------------------------------------------- 9: a peer

def peer():
    """A training step of Stable Diffusion 1.5's small sibling (real classes, random weights) beside a peer.
    The peer is the loop that the text-to-image example of diffusers describes: the same network, batch, loss
    and optimiser."""
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


# ------------------------------------------------------------------- 8: the large models, by arithmetic

class Flash(torch.autograd.Function):
    """Attention as GPUs take it: it keeps what it was given and its answer, not the square of the length."""
    work = 0

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, answer := torch.empty_like(q))
        Flash.work += 4 * q.numel() * k.shape[2]
        return answer

    @staticmethod
    def backward(ctx, slope):
        q, k, v, _ = ctx.saved_tensors
        Flash.work += 10 * q.numel() * k.shape[2]            # its scores once more, and four products
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def autocast():
    """What CUDA's autocast does, on the meta device, which has none: products in bf16, norms in fp32."""
    def cast(function, kind):
        def to(value):
            return value.to(kind) if torch.is_tensor(value) and value.is_floating_point() else value
        return lambda *given, **how: function(*map(to, given), **{key: to(one) for key, one in how.items()})
    kinds = {"conv2d": torch.bfloat16, "linear": torch.bfloat16, "group_norm": torch.float32,
             "layer_norm": torch.float32}
    flash = cast(lambda q, k, v, *_, **__: Flash.apply(q, k, v), torch.bfloat16)
    with patch.multiple(F, scaled_dot_product_attention=flash,
                        **{name: cast(getattr(F, name), kind) for name, kind in kinds.items()}):
        yield


def giants(family):
    """A family's network, VAE and eyes, all in full size and without values (meta device), and each one's
    call for one picture. The configurations are those of the public models."""
    import diffusers
    import stable
    pixels = stable.FAMILIES[family][3]
    x, t, four = torch.randn, torch.ones(1), (128, 256, 512, 512)
    if family == "sd15":
        network = diffusers.UNet2DConditionModel(64, cross_attention_dim=768)
        call = lambda: network(x(1, 4, 64, 64), t, x(1, 77, 768)).sample
    elif family == "sdxl":
        network = diffusers.UNet2DConditionModel(
            128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
        extra = {"text_embeds": x(1, 1280), "time_ids": x(1, 6)}
        call = lambda: network(x(1, 4, 128, 128), t, x(1, 77, 2048), added_cond_kwargs=extra).sample
    else:
        network = diffusers.SD3Transformer2DModel(
            128, 2, 16, 24, num_attention_heads=24, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=192)
        call = lambda: network(x(1, 16, 128, 128), x(1, 333, 4096), x(1, 2048), t).sample
    vae = diffusers.AutoencoderKL(block_out_channels=four, down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                                  latent_channels=network.config.in_channels).requires_grad_(False)
    eyes = stable.dino("random").requires_grad_(False)
    z = x(1, network.config.in_channels, pixels // 8, pixels // 8)
    photograph = x(1, 3, pixels, pixels)
    calls = {"network": call, "encode": lambda: vae.encoder(photograph),
             "decode": lambda: vae.decode(z.requires_grad_()).sample,
             "eyes": lambda: eyes(photograph.requires_grad_())[0][-1]}
    return network, vae, eyes, calls


def weigh(call, weights):
    """-> the most GiB that a call and its backward pass keep, TFLOP of the call, of its backward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    def whole(y):
        if y.requires_grad:
            y.sum().backward()
    with Kept(weights) as kept:
        whole(call())
    Flash.work = 0
    with FlopCounterMode(display=False) as counter:          # apart: it keeps what it counts
        y = call()
        forward = counter.get_total_flops() + Flash.work
        whole(y)
    both = counter.get_total_flops() + Flash.work
    return kept.most / 2 ** 30, forward / 1e12, (both - forward) / 1e12


def step_of(method, config, size):
    """GiB of graphs as a function of the batch, and TFLOP of one picture's step. size: {call: weigh's}."""
    (graph, f, b), (_, encode, _), (draw, decode, back), (look, see, mind) = (
        size[name] for name in ("network", "encode", "decode", "eyes"))
    back += decode                                           # one picture at a time, drawn again
    if method == "diffusion":
        return (lambda n: n * graph), encode + f + b
    if method == "add":                                      # the teacher answers, and its answer is decoded
        return (lambda n: n * graph + draw + n * look), (
            f + b + config.teacher_steps * f + encode + 2 * decode + back + 4 * see + mind)
    steps, pair = (config.path_steps + 1) / 2, 1 + (config.guidance != 1)     # a start anywhere on the path
    path = pair * (steps * f + config.train_steps * (f + b))                  # K calls are computed again
    return (lambda n: n * graph + max(draw + n * look, n * pair * graph)), (
        f + b + path + encode + 2 * decode + back + 6 * see + mind)


def large():
    """Large models, by arithmetic, not measured: GiB, and seconds at 400 TFLOP/s, for batches of 1 / 4.
    The networks are full size, on PyTorch's meta device; a lower bound of the seconds."""
    import stable
    rows = []
    with torch.device("meta"), autocast():
        for family, learns in itertools.product(stable.FAMILIES, ("LoRA 64", "all")):
            network, vae, eyes, calls = giants(family)
            others = [*vae.parameters(), *eyes.parameters()]
            model = SimpleNamespace(rank=0, network=network, vae=vae, last=None)
            count = sum(w.numel() for w in network.parameters())
            network.requires_grad_(False)
            stable.Latent.halve(model)                       # of what learns, too: its bf16 copy is counted
            if learns == "all":
                network.requires_grad_(True)
            else:
                stable.Latent.adapt(model, 64)
            adapters = sum(w.numel() for w in network.parameters()) - count
            for w in network.parameters():                   # what a gradient takes is counted by the weight
                w.requires_grad and w.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
            weights, sizes = [*network.parameters(), *others], []
            for lean in (False, True):
                if lean:
                    network.train(), vae.train()
                    stable.Latent.save_memory(model)
                sizes.append({name: weigh(call, weights) for name, call in calls.items()})
            for method in train.METHODS:
                held = 22 * count if learns == "all" else 2 * count + 22 * adapters
                held += 4 * sum(w.numel() for w in others) + 4 * count * (method == "add" and learns == "all")
                config = train.settle(method, [], family)
                cells = [family, method, learns, f"{held / 2 ** 30:.1f}"]
                for size in sizes:
                    graphs, work = step_of(method, config, size)
                    cells += [" / ".join(f"{held / 2 ** 30 + graphs(n):.0f}" for n in (1, 4)),
                              " / ".join(f"{n * work / 400:.2g}" for n in (1, 4))]
                rows.append(tuple(cells))
    return ["model", "method", "what learns", "weights and what they need, GiB", "with graphs, GiB", "s",
            "`--lean`, GiB", "s"], rows


TABLES = {"step": overhead, "memory": memory, "data": supply, "sampling": sampling, "start": starting,
          "quality": quality, "peer": peer, "large": large}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", help="where to write them (default: figures/benchmark.md if all are made)")
    a = parser.parse_args(argv)
    if unknown := set(a.tables) - set(TABLES):
        parser.exit(2, f"benchmark.py: no table '{unknown.pop()}': wanted {', '.join(TABLES)}\n")
    out = Path(a.out or HERE / "figures" / "benchmark.md")
    if not out.absolute().parent.is_dir() or out.is_dir():
        parser.exit(2, f"benchmark.py: --out {out}: wanted a file in a folder that is there\n")
    text = [f"`python benchmark.py` · {platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads · torch {torch.__version__} · commit {figures.commit()}"]
    for name in a.tables or TABLES:
        columns, rows = TABLES[name]()
        title, _, more = inspect.getdoc(TABLES[name]).partition("\n")
        text += [f"**{title}** {more}".strip(), evaluate.markdown(columns, rows)]
        print(*text[-2:], "", sep="\n\n", flush=True)
    if a.out or not a.tables:
        survival.write(out, "\n\n".join(text) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
