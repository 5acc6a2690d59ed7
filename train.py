"""The one loop.   python train.py --method adt        (eight minutes on two cores, nothing to download)

Two half-steps alternate: the generator learns while the discriminator watches, then the discriminator learns
while the generator's picture is only data. Everything that differs between methods is in adt.py and add.py;
everything that differs between models lies behind denoiser.py; this file does not know which it runs.
Read next: evaluate.py"""

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import shlex
import signal
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import add
import adt
import data
import discriminator
import evaluate
import models
import parallel
import survival

# name: the module, the settings that make the method, the default length of a run
METHODS = {"adt": (adt, {}, 300), "add": (add, {}, 600), "diffusion": (adt, {"lambda_adv": 0.0}, 500)}
LONG = 2000                                                  # the same for real models: CoMat's (secondary)
SAMPLES = 2000                                               # pictures that a run is examined on
MEASURE = 10                                                 # every so many steps, each loss term's gradient
HABIT = 100                                                  # so many steps in a row are one
CHECKPOINT = 60                                              # seconds between two of the tiny model's


# ---------------------------------------------------------------------------------------------- settings

def read(kind, text):
    """A setting from its text; a ValueError says what was wanted."""
    if kind is str:
        return text
    choices = typing.get_args(kind) or ({"true": True, "false": False} if kind is bool else ())
    if choices:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[text] if kind is bool else text
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not 0 <= number < (10 ** 6 + 1 if kind is int else float("inf")):
        raise ValueError("a whole number from 0 to a million" if kind is int else "a number, 0 or more")
    return number


def settle(method, changes, model="tiny"):
    """Config of the method for a model with `key=value` changes; what is wrong in them is a sentence."""
    module, preset, _ = METHODS[method]
    preset = {**module.PRESETS.get(model, {}), **module.PRESETS.get(method, {}), **preset}
    kinds = typing.get_type_hints(module.Config)
    for change in changes:
        key, found, value = change.partition("=")
        if not found or key not in kinds:
            raise ValueError(f"--set {change}: wanted key=value with a key of {', '.join(kinds)}")
        if key in METHODS[method][1]:
            raise ValueError(f"--set {change}: --method {method} means {key}={METHODS[method][1][key]}")
        try:
            preset = {**preset, key: read(kinds[key], value)}
        except ValueError as wanted:
            raise ValueError(f"--set {change}: {key} is {wanted}") from None
    return module.Config(**preset)


def provenance(config, module, model):
    """{field: [value, 'source: what it is']} for config.json. A preset's values have sources of their own."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    notes = {name: hint.__metadata__[0] for name, hint in hints.items()}
    for name, value in module.PRESETS.get(model, {}).items():
        if getattr(config, name) == value:
            notes[name] = module.SOURCES[model].get(name, "ours") + notes[name][notes[name].index(":"):]
    return {k: [v, notes[k]] for k, v in dataclasses.asdict(config).items()}


# ------------------------------------------------------------------------------------------------- the loop

def gradient_norm(weights, before):
    """Norm of what was added to the gradients since `before`: one loss term's own."""
    pairs = [(w.grad, then) for w, then in zip(weights, before) if w.grad is not None]
    added = (now if then is None else now - then for now, then in pairs)      # one at a time, for memory
    return float(torch.stack([parallel.whole(one.norm()) for one in added]).norm())


class Run:
    """What a run owns; `step` is the algorithm."""

    def __init__(self, model, teacher, critic, module, config, source, steps, seed=0, skip=False):
        self.model, self.teacher, self.critic = model, teacher, critic
        self.module, self.config = module, config
        self.source, self.steps, self.done, self.seed = source, steps, 0, seed
        self.light = not model.heavy or model.rank > 0       # what learns is small: measured and kept often
        self.of = [module.__name__, source.name, seed]       # what a checkpoint must be of to go on here
        self.skip, self.skipped, self.saved = skip, 0, 0     # what a NaN does, how many did; last checkpoint
        self.warmup = min(config.warmup_d, steps // 4)
        self.reader, self.coming = ThreadPoolExecutor(1), None
        self.total = config.accumulate * parallel.world()
        self.shards = range(self.total)[parallel.rank() * config.accumulate:][:config.accumulate]
        self.weights = [w for w in model.network.parameters() if w.requires_grad]
        self.average = [w.detach().clone() for w in self.weights]
        self.critic_weights = list(critic.parameters())
        how = dict(weight_decay=0., fused=True)              # one pass over the weights, no copies of them
        self.opt_g = torch.optim.AdamW(self.weights, config.lr, (config.beta1, .999), **how)
        self.opt_d = torch.optim.AdamW(self.critic_weights, config.lr_d, (config.beta1_d, .99), **how)

    def step(self):
        """One step of both players -> figures for the log. Losses are logged with their weights applied."""
        config = self.config
        for group in self.opt_g.param_groups:                # linear decay to zero; the heads' stays
            group["lr"] = config.lr * (1 - self.done / self.steps)
        batches = self.batches()

        # the generator learns, the discriminator watches
        learns = self.done >= self.warmup                    # who knows nothing teaches nothing
        self.critic.requires_grad_(False).eval()             # eval: not even its spectral norms move
        self.opt_g.zero_grad()
        halves = [self.generate(shard, batch, learns) for shard, batch in zip(self.shards, batches)]
        seen = self.mean([figures for figures, _, _ in halves])
        if learns:
            seen |= self.improve(self.opt_g, self.weights, config.clip, "|grad|", seen)
            made = self.done - self.warmup
            decay = min(config.ema, (made + 1) / (made + 10))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, 1 - decay)

        # the discriminator learns, the generator's picture is only data
        if config.lambda_adv:
            self.critic.requires_grad_(True)
            for turn in range(config.steps_d):               # the same pictures, augmented anew
                discriminator.tighten(self.critic)
                self.opt_d.zero_grad()
                heard = self.mean([self.judge(shard, turn, batch, *made)
                                   for shard, batch, (_, *made) in zip(self.shards, batches, halves)])
                seen |= heard | self.improve(self.opt_d, self.critic_weights, config.clip_d, "|grad D|",
                                             heard)
        self.done += 1
        return seen | {"skipped": self.skipped} if self.skip else seen

    def batches(self):
        """The micro-batches of this step; those of the next are read meanwhile."""
        ready = self.coming or self.reader.submit(self.read, self.done)
        last = self.done + 1 >= self.steps
        self.coming = None if last else self.reader.submit(self.read, self.done + 1)
        return [batch.to(self.model.alpha.device, self.model.size) for batch in ready.result()]

    def read(self, step):
        """Pictures and captions from the source: what a step is given depends on its number alone."""
        batches = []
        for shard in self.shards:
            random = torch.Generator().manual_seed(self.dice(shard, "data", step=step))
            batches.append(self.source.batch(self.config.batch, random))
            batches[-1].luck = torch.Generator().manual_seed(self.dice("path", step=step))
        return batches

    def generate(self, shard, batch, learns):
        """The generator's half, one micro-batch: its gradients -> figures, the picture, and what the
        discriminator may know. Now and then each term's own norm: terms may share a graph, and taking them
        one by one walks it more than once. (Not where the copy of all gradients would be gigabytes.)"""
        torch.manual_seed(self.dice(shard, "generator"))
        with models.half_precision(), torch.set_grad_enabled(learns):
            terms, fake, known = self.module.generator_loss(self.model, self.teacher, self.critic, batch,
                                                            self.config)
        seen = {name: term.item() for name, term in terms.items()}
        if learns and self.light and (self.done - self.warmup) % MEASURE == 0:
            last = list(terms)[-1]
            for name, term in terms.items():
                before = [None if w.grad is None else w.grad.clone() for w in self.weights]
                (term / self.total).backward(retain_graph=name != last)
                scale = self.config.accumulate if parallel.sharded(self.weights[0]) else self.total
                seen[f"|grad {name}|"] = scale * gradient_norm(self.weights, before)
        elif learns:
            (sum(terms.values()) / self.total).backward()
        return seen, None if fake is None else fake.detach(), known

    def judge(self, shard, turn, batch, fake, known):
        """The discriminator's half, one micro-batch: its gradients -> figures."""
        torch.manual_seed(self.dice(shard, "discriminator", turn))
        with models.half_precision():
            terms, real, made = self.module.discriminator_loss(self.critic, batch, fake, known, self.config)
        (sum(terms.values()) / self.total).backward()
        return {**{name: term.item() for name, term in terms.items()},
                "D right on real": sum((d > 0).float().mean().item() for d in real) / len(real),
                "D right on fake": sum((d < 0).float().mean().item() for d in made) / len(made)}

    def improve(self, optimiser, weights, clip, name, seen):
        """One step of an optimiser, if all it saw is finite -> its gradient's norm, before it is clipped."""
        parallel.add_up(gradients := [w.grad for w in weights if w.grad is not None])
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(parallel.whole(total))
        if self.finite({**seen, name: norm}):
            if 0 < clip < norm:
                torch.nn.utils.clip_grads_with_norm_(weights, clip, total)
            optimiser.step()
        else:
            self.skipped += 1
        return {name: norm}

    def dice(self, *words, step=None):
        """A random seed from the run's seed, the step and a purpose: whatever is drawn follows from its name,
        so a run goes on where it stopped with nothing to remember, and two processes draw what one would."""
        words = self.seed, self.done if step is None else step, *words
        return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8])

    def mean(self, rows):
        """Figures of every micro-batch -> their mean over all of them, everywhere."""
        values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).sum(0) / self.total
        values = values.to(self.model.alpha.device)
        parallel.add_up([values])
        return dict(zip(rows[0], values.tolist()))

    def finite(self, figures):
        """Whether a step may be taken. A NaN never reaches the weights: it stops the run, or, with
        --on-nan skip, that half of the step."""
        odd = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
        if odd and not self.skip:
            raise ArithmeticError(f"step {self.done}: {odd[0]}")
        return not odd

    def state(self):
        """Everything the next step depends on."""
        return parallel.whole({"weights": [w.detach() for w in self.weights], "average": self.average,
                               "of": self.of, "done": self.done, "skipped": self.skipped,
                               "warmup": self.warmup,        # of a run prolonged since, still the same steps
                               **{name: getattr(self, name).state_dict()
                                  for name in ("critic", "opt_g", "opt_d")}}, home=True)

    def restore(self, state):
        with torch.no_grad():
            for own, saved in zip(self.weights + self.average, state["weights"] + state["average"]):
                own.copy_(parallel.like(saved, own))         # one by one: what is sharded knows no foreach
        self.critic.load_state_dict(state["critic"])
        for name, weights in (("opt_g", self.weights), ("opt_d", self.critic_weights)):
            optimiser, moments = getattr(self, name), {
                i: {key: parallel.like(value, weights[i]) for key, value in saved.items()}
                for i, saved in state[name]["state"].items()}
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        self.done = self.saved = state["done"]
        self.skipped, self.warmup = state["skipped"], state["warmup"]

    @contextmanager
    def averaged(self):
        """The model with its averaged weights, the ones that are kept, shown and measured; then as it was."""
        @torch.no_grad()
        def swap():
            for weight, average in zip(self.weights, self.average):
                kept = weight.clone()
                weight.copy_(average), average.copy_(kept)
            parallel.moved(self.model.network)
        swap()
        try:
            yield self.model
        finally:
            swap()


def advice(log):
    """What to try where the last steps show a habit; ArithmeticError where none of them could be taken."""
    if len(log) < HABIT:
        return None
    if all(None in row.values() for row in log):
        raise ArithmeticError(f"step {log[-1]['step']}: not one of the last {HABIT} steps was finite")
    real, fake = ([row.get(f"D right on {what}", .5) or 0. for row in log] for what in ("real", "fake"))
    if min(fake) > .99 and max(real) > .01:                  # (of a pair of real ones it may be in two minds)
        return (f"the discriminator has seen through every picture for {HABIT} steps: it has nothing left "
                "to teach. A smaller lr_d or steps_d, more augment or (ADD) gamma may help")
    if max(real) < .01 or max(fake) < .01:
        return (f"the discriminator has said the same of all pictures for {HABIT} steps: it has learned "
                "nothing. A larger lr_d or warmup_d, or a smaller (ADD) gamma may help")
    return None


def loop(run, out, facts, grid, asked, log):
    """Steps until done, or until a signal has asked to stop: log every step, now and then a picture from
    fixed noise and a checkpoint. Process 0 writes; the others draw and save along with it, for they may hold
    a share of the weights."""
    every, seconds = (500, 900) if run.model.heavy else (50, CHECKPOINT)
    writes, began = parallel.rank() == 0, time.time()
    last, before = began, log.rows[-1]["seconds"] if log.rows else 0.
    bar = tqdm(range(run.done, run.steps), initial=run.done, total=run.steps, desc=out.name, mininterval=1,
               disable=not writes)
    if run.done == run.steps:                                # it had finished; its result may be lost
        survival.save(run, out, facts, log)
    for step in bar:
        seen = run.step()
        row = {"step": step, **{k: float(f"{v:.5g}") if math.isfinite(v) else None for k, v in seen.items()},
               "seconds": round(before + time.time() - began, 2)}
        log.add(row, keep=HABIT)
        bar.set_postfix({k: f"{seen[k]:.3g}" for k in ("diff", "adv", "D", "skipped") if k in seen},
                        refresh=False)
        if (step + 1) % HABIT == 0 and (warning := advice(log.rows)) and writes:
            bar.write(f"step {step + 1}: {warning}")
        if (step + 1) % every == 0 or step + 1 == run.steps:
            with run.averaged() as model:
                drawn = grid(model)
            if writes:
                evaluate.picture([(f"step {step + 1}", drawn)], out / f"samples_{step + 1:06d}.png")
                evaluate.curves(survival.rows_of(log.path, most=500), out / "curves.png")
                gc.collect()                                 # a figure is full of circles
        if parallel.agree(bool(asked) or time.time() - last > seconds or step + 1 == run.steps):
            survival.save(run, out, facts, log)
            last = time.time()
            if parallel.agree(bool(asked)):
                break


# --------------------------------------------------------------------------------------- before and after

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--method", default="adt", help=", ".join(METHODS))
    parser.add_argument("--model", default="tiny", help=", ".join(["tiny", *models.FAMILIES]))
    parser.add_argument("--data", help="glyphs (default), fashion, or a folder of captioned images")
    parser.add_argument("--weights", help="start from this file or folder (default: the shipped base); for "
                        "real models a diffusers folder or hub id (default: the family's public one)")
    parser.add_argument("--features", help="folder or hub id of the discriminator's frozen network "
                        "(default: the shipped one; for real models facebook/dinov2-small)")
    parser.add_argument("--size", type=int, help="pixels, both sides (default: what the model was made for)")
    parser.add_argument("--lean", action="store_true",
                        help="real models: recompute every block in the backward pass, for memory")
    parser.add_argument("--shard", action="store_true", help="torchrun: weights spread over all processes")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="real models: train adapters")
    parser.add_argument("--steps", type=int, help="length of the whole run, also on resume (default: "
                        + ", ".join(f"{name} {steps}" for name, (*_, steps) in METHODS.items())
                        + f"; real models {LONG})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="run folder (default: runs/METHOD-DATA-SETTINGS-SEED)")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR; its own settings hold")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    parser.add_argument("--on-nan", choices=["stop", "skip"],
                        help="what a loss or gradient that is no number does: stop the run (default), "
                        "or skip that player's step and count it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a Config field")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pictures per row of the table; 0: none")
    return parser, parser.parse_args(argv)


def again(out, world):
    """The command that goes on with a run."""
    start = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
    return f"{start} train.py --resume {shlex.quote(str(out))}"


def plan_of(arguments):
    """What to run and where -> plan, out. A resumed run keeps its own settings, but for a new --steps."""
    if arguments.resume:
        out = Path(arguments.resume)
        if not (out / "checkpoint.pt").is_file():
            raise FileNotFoundError(f"--resume {out}: wanted a run folder with checkpoint.pt, found none")
        plan, usual = survival.read_plan(out / "config.json"), parse([])[1]
        for key in {"out", "overwrite", *survival.PLAN} - {"steps", "on_nan", "world"}:
            if getattr(arguments, key) not in (getattr(usual, key), plan.get(key)):
                raise ValueError(f"--resume keeps a run's own settings: leave out --{key}")
        if plan["world"] != parallel.world():
            raise ValueError(f"{out} is a run of {plan['world']} process(es), not {parallel.world()}: "
                             f"{again(out, plan['world'])}")
        plan["on_nan"] = arguments.on_nan or plan["on_nan"]
    else:
        if not arguments.data and arguments.model in models.FAMILIES:
            raise ValueError(f"--model {arguments.model} wants --data, a folder of captioned images")
        if not 0 <= arguments.seed < 2 ** 63 or not 0 <= arguments.samples <= 10 ** 6:
            raise ValueError("--seed is from 0 to 2^63 - 1, --samples from 0 to a million")
        plan = {**vars(arguments), "data": arguments.data or "glyphs", "world": parallel.world(),
                "on_nan": arguments.on_nan or "stop"}
        plan = {key: plan[key] for key in survival.PLAN if key != "steps"}
        words = [plan["method"], *{plan["model"]} - {"tiny"}, Path(plan["data"]).name, *plan["set"],
                 f"seed{plan['seed']}"]
        out = Path(arguments.out or f"runs/{'-'.join(words)}")
        survival.check_free(out, plan, arguments.overwrite)
    if plan["method"] not in METHODS:
        raise ValueError(f"unknown method '{plan['method']}': wanted {', '.join(METHODS)}")
    usual = LONG if plan["model"] in models.FAMILIES else METHODS[plan["method"]][2]
    plan["steps"] = plan.get("steps", usual) if arguments.steps is None else arguments.steps
    if plan["steps"] < 1:
        raise ValueError(f"--steps {plan['steps']}: a run has at least one step")
    return plan, out


def prepare(arguments):
    """Everything that can go wrong goes wrong here, as ValueError or OSError, before anything is written."""
    plan, out = plan_of(arguments)
    kept = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}"    # defaults may have changed
            for key, value in plan.pop("config", {}).items() if key not in METHODS[plan["method"]][1]]
    config = settle(plan["method"], kept + plan["set"], plan["model"])
    plan["rows"] = [row[1:] for row in config.rows() if row[0] == "after"]
    if plan["shard"] and getattr(config, "own", 0):
        raise ValueError("--shard wants own=0: all processes must call the network equally often")
    if plan["shard"] and parallel.world() == 1:
        raise ValueError("--shard spreads the weights over several processes: start them with torchrun")
    source = data.build(plan["data"], plan["size"] or models.pixels(plan["model"]))
    model = models.build(plan["model"], source.name, plan["weights"], plan["size"])
    if model.heavy and {getattr(config, name, 1) for name in ("last", "fresh")} != {1}:
        raise ValueError("last and fresh are 1 for real models: diffusers draws with their students, and its "
                         "schedulers know no others")
    config.path(model.T)
    for _, steps, settings in config.rows():
        evaluate.stops(model, steps, settings)
    with torch.no_grad():                                    # whatever the data can say must be understood
        model.prime(["", getattr(config, "negative", ""), *source.phrases])
        text_width = model.condition([""])["pooled"].shape[1]
    if source.closed:
        model.close()
    torch.manual_seed(plan["seed"])
    eyes = models.features(plan["model"], source.name, config.features, plan["features"], plan["weights"])
    eyes = discriminator.Features(eyes).to(parallel.device())
    if config.whiten and config.lambda_adv and not arguments.resume:          # a checkpoint brings it along
        real = source.batch(32 if model.heavy else 256, torch.Generator().manual_seed(0))
        real = real.to(parallel.device(), model.size).image
        hazy = real + config.instance_noise * torch.randn_like(real) if config.instance_noise else real
        eyes.level(hazy.split(8))
    critic = config.critic(eyes, text_width)
    if plan["lora"]:
        model.adapt(plan["lora"])
    plan["lora"] = model.rank                                # it may have come with adapters
    if plan["lora"] and parallel.device().type == "cuda" and not plan["shard"]:
        model.halve()
    base = model.twin()                                      # on the processor while nobody asks it
    if config.init == "random":
        model.forget()
    if plan["lean"]:
        model.save_memory()
    model.to(parallel.device())
    if config.has_teacher:
        base.to(parallel.device())
    if plan["shard"]:
        for network in {model.network, base.network} if config.has_teacher else {model.network}:
            parallel.shard(network)
    run = Run(model, base, critic.to(parallel.device()), METHODS[plan["method"]][0], config, source,
              plan["steps"], plan["seed"], plan["on_nan"] == "skip")
    if arguments.resume:
        survival.resume(run, out)
    n, most = arguments.samples, (source.sizes["test"] or 10 ** 9) // 2
    if n > most and n == SAMPLES:
        n = most if most >= 200 else 0                       # a small folder: fewer samples, or no table
    examiner = evaluate.Examiner(source, n, weights=plan["weights"]) if n and not model.heavy else None
    return plan, out, run, examiner


def report(run, examiner, out, captions):
    """The before/after table and picture."""
    with run.averaged() as model:
        players = {"before": run.teacher.to(parallel.device()), "after": model}
        rows, shown = evaluate.examine([(who, players[who], steps, settings)
                                        for who, steps, settings in run.config.rows()], captions, examiner)
    if parallel.rank() > 0:
        return
    if rows:
        text = evaluate.table(rows)
        survival.write(out / "result.json", json.dumps(dict(rows), indent=1))
        survival.write(out / "table.md", text + "\n")
        print(f"\n{text}\n")
    elif examiner is None and not run.model.heavy:
        print("no table: it wants 400 pictures or more")
    evaluate.picture(shown, out / "before_after.png", captions)
    print("wrote", ", ".join(str(p) for p in sorted(out.iterdir()) if not p.name.startswith("samples")))


def main(argv=None):
    parser, arguments = parse(argv)
    def leave(code, text):
        parser.exit(code, text * (parallel.rank() == 0))
    try:
        parallel.start()
        plan, out, run, examiner = prepare(arguments)
        sources = provenance(run.config, run.module, plan["model"])
        survival.settle_in(out, plan, sources, bool(arguments.resume))
        log = survival.Log(out / "log.jsonl", run.done)
    except (ValueError, OSError) as error:
        leave(2, f"train.py: {error}\n")
    except KeyboardInterrupt:
        leave(130, "\nstopped before the first step\n")
    if parallel.rank() == 0:
        print("\n".join(f"{k:>14} {v[0]!s:<12} {v[1]}" for k, v in sources.items()))
    captions = run.source.batch(4 if run.model.heavy else 16, torch.Generator().manual_seed(7)).caption
    facts = {"data": run.source.name, **{key: plan[key] for key in ("rows", "method", "set", "seed")}}
    (steps, settings), go_on = plan["rows"][0], again(out, plan["world"])
    def kept():
        return (f"the checkpoint of step {run.saved} is good: {go_on}" if run.saved else
                "nothing was saved before: begin anew with --overwrite")
    try:
        with survival.patience() as asked:
            loop(run, out, facts, lambda model: evaluate.sample(model, captions, steps, seed=1, **settings),
                 asked, log)
    except ArithmeticError as error:
        known = f" (--weights {out})" if run.saved and run.light else ""      # its result is written as often
        leave(1, f"\ntrain.py: {error}; {kept()}; with --on-nan skip as well, such steps are left out; "
                 f"a smaller lr, lr_d or lambda_adv{known} may help\n")
    except (ValueError, OSError) as error:                   # the data, or the disk; perhaps here alone
        if parallel.world() == 1:
            with suppress(OSError, ArithmeticError):
                survival.save(run, out, facts, log)
        parser.exit(2, f"\ntrain.py: {error}; {kept()}\n")
    if run.done < run.steps:
        leave(0, f"\nstopped after step {run.done}, all is saved; go on with: {go_on}\n")
    try:
        if asked:
            raise KeyboardInterrupt
        if arguments.samples:
            report(run, examiner, out, captions)
    except KeyboardInterrupt:
        leave(0, f"\nstopped before the table, all {run.done} steps are saved; go on with: {go_on}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)                # outside the loop, like Ctrl-C
    main()
