"""The one loop.   python train.py --method adt        (ten minutes on two cores, nothing to download)

Two half-steps alternate: the generator learns while the discriminator watches, then the discriminator learns
while the generator's picture is only data. Everything that differs between methods is in adt.py and add.py;
everything that differs between models is in models.py; this file does not know which it runs.
Read next: evaluate.py
"""

import argparse
import dataclasses
import hashlib
import json
import math
import pickle
import time
import typing
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

import add
import adt
import data
import discriminator
import evaluate
import models
import sampler

# name: the module, the settings that make the method, the default length of a run
METHODS = {"adt": (adt, {}, 500), "add": (add, {}, 450), "diffusion": (adt, {"lambda_adv": 0.0}, 500)}
SAMPLES = 2000                                               # pictures that a run is examined on
MEASURE = 10                                                 # every so many steps, each loss term's gradient


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
    if not 0 <= number < float("inf"):
        raise ValueError("a whole number, 0 or more" if kind is int else "a number, 0 or more")
    return number


def settle(method, changes):
    """Config of the method with `key=value` changes; an unknown key or a wrong value is a sentence."""
    module, preset, _ = METHODS[method]
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


def provenance(config):
    """{field: [value, 'source: what it is']} for config.json."""
    notes = typing.get_type_hints(type(config), include_extras=True)
    return {k: [v, notes[k].__metadata__[0]] for k, v in dataclasses.asdict(config).items()}


# ------------------------------------------------------------------------------------------------- the loop

def gradient_norm(parameters, before=None):
    """Norm of all gradients, less what was there `before` (so that each loss term gets its own figure)."""
    now = [p.grad for p in parameters if p.grad is not None]
    return float(torch.stack([(g - b if before else g).norm() for g, b in zip(now, before or now)]).norm())


def dice(*words):
    """A random seed from the run's seed, the step and a purpose: whatever is drawn in a step follows from its
    number, so that a run goes on where it stopped with nothing to remember."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8])


class Run:
    """What a run owns; `step` is the algorithm."""

    def __init__(self, model, teacher, critic, module, config, source, steps, seed=0):
        self.model, self.teacher, self.critic = model, teacher, critic
        self.module, self.config = module, config
        self.source, self.steps, self.done, self.seed = source, steps, 0, seed
        self.warmup = min(config.warmup_d, steps // 4)
        self.average = deepcopy(model.network).requires_grad_(False)
        self.weights = list(model.network.parameters())
        self.critic_weights = list(critic.parameters())
        self.opt_g = torch.optim.AdamW(self.weights, config.lr, betas=(config.beta1, .999), weight_decay=0.)
        self.opt_d = torch.optim.AdamW(self.critic_weights, config.lr_d, betas=(config.beta1_d, .99),
                                       weight_decay=0.)

    def step(self):
        """One step of both players -> figures for the log. Losses are logged with their weights applied."""
        config, seen = self.config, {}
        batch = self.source.batch(config.batch,
                                  torch.Generator().manual_seed(dice(self.seed, self.done, "data")))
        torch.manual_seed(dice(self.seed, self.done, "noise"))
        for optimiser, lr in ((self.opt_g, config.lr), (self.opt_d, config.lr_d)):
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - self.done / self.steps)               # linear decay to zero

        # the generator learns, the discriminator watches
        learns = self.done >= self.warmup                    # who knows nothing teaches nothing
        self.critic.requires_grad_(False).eval()             # eval: not even its spectral norms move
        with models.half_precision(), torch.set_grad_enabled(learns):
            terms, fake, known = self.module.generator_loss(self.model, self.teacher, self.critic, batch,
                                                            config)
        seen |= {name: term.item() for name, term in terms.items()}
        self.finite(seen)
        if learns:
            seen |= self.improve(terms)

        # the discriminator learns, the generator's picture is only data
        if fake is not None:
            self.critic.requires_grad_(True).train()
            for _ in range(config.steps_d):                  # the same pictures, augmented anew
                seen |= self.sharpen(batch, fake, known)
        self.done += 1
        return seen

    def improve(self, terms):
        """One step of the generator and of its average -> its gradient's norm, and now and then each term's:
        terms may share a graph, and taking them one by one walks it more than once."""
        self.opt_g.zero_grad()
        before, last, seen = None, list(terms)[-1], {}
        if (self.done - self.warmup) % MEASURE == 0:
            for name, term in terms.items():
                term.backward(retain_graph=name != last)
                seen[f"|grad {name}|"] = gradient_norm(self.weights, before)
                before = [p.grad.clone() for p in self.weights if p.grad is not None]
        else:
            sum(terms.values()).backward()
        seen["|grad|"] = float(torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip or float("inf")))
        self.finite(seen)
        self.opt_g.step()
        made = self.done - self.warmup
        decay = min(self.config.ema, (made + 1) / (made + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.weights, 1 - decay)
        return seen

    def sharpen(self, batch, fake, known):
        """One step of the discriminator -> its losses, its gradient's norm, how often it was right."""
        with models.half_precision():
            terms, real, made = self.module.discriminator_loss(self.critic, batch, fake, known, self.config)
        self.opt_d.zero_grad()
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.critic_weights, self.config.clip_d or float("inf"))
        seen = {**{name: term.item() for name, term in terms.items()}, "|grad D|": float(norm)}
        self.finite(seen)
        self.opt_d.step()
        return {**seen, "D right on real": (real > 0).float().mean().item(),
                "D right on fake": (made < 0).float().mean().item()}

    def finite(self, figures):
        """Stop before a NaN reaches the weights."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ArithmeticError(f"step {self.done}: {name} is {value}; the last checkpoint is good: "
                                      "go on from it with --weights and a smaller lr, lr_d or lambda_adv")

    def parts(self):
        return {"network": self.model.network, "average": self.average, "critic": self.critic,
                "opt_g": self.opt_g, "opt_d": self.opt_d}

    def state(self):
        """Everything the next step depends on."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return {**state, "done": self.done}

    def restore(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.done = state["done"]

    def result(self):
        """The denoiser with the averaged weights: what is kept, shown and measured."""
        model = deepcopy(self.model)
        model.network.load_state_dict(self.average.state_dict())
        return model.eval()


def write(path, text):
    """All or nothing: a reader never meets half a file."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save(run, out, facts):
    """One checkpoint with everything, and the result in the form `--weights` takes."""
    partial = out / "checkpoint.part"
    torch.save(run.state(), partial)
    partial.replace(out / "checkpoint.pt")
    models.save(run.result(), out / "denoiser.safetensors", steps=run.done, **facts)


def loop(run, out, facts, grid, every=50):
    """Steps until done: log every step, a picture from fixed noise every `every`,
    a checkpoint once a minute."""
    log_path = out / "log.jsonl"
    lines = log_path.read_text().splitlines() if log_path.exists() else []
    log = [json.loads(line) for line in lines[:run.done]]    # what came after the checkpoint happens again
    write(log_path, "".join(json.dumps(row) + "\n" for row in log))
    began = last = time.time()
    before = log[-1]["seconds"] if log else 0.
    bar = tqdm(range(run.done, run.steps), initial=run.done, total=run.steps, desc=out.name, mininterval=1)
    with open(log_path, "a", buffering=1) as file:
        for step in bar:
            seen = run.step()
            log.append({"step": step, **{k: float(f"{v:.5g}") for k, v in seen.items()},
                        "seconds": round(before + time.time() - began, 2)})
            file.write(json.dumps(log[-1]) + "\n")
            bar.set_postfix({k: f"{seen[k]:.3g}" for k in ("diff", "adv", "D") if k in seen}, refresh=False)
            if (step + 1) % every == 0 or step + 1 == run.steps:
                evaluate.picture([(f"step {step + 1}", grid(run.result()))],
                                 out / f"samples_{step + 1:06d}.png")
                evaluate.curves(log, out / "curves.png")
            if time.time() - last > 60 or step + 1 == run.steps:
                save(run, out, facts)
                last = time.time()


# --------------------------------------------------------------------------------------- before and after

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--method", default="adt", help=", ".join(METHODS))
    parser.add_argument("--model", default="tiny", help="tiny")
    parser.add_argument("--data", default="glyphs", help="glyphs, fashion, or a folder of captioned images")
    parser.add_argument("--weights", help="start from this file or folder (default: the shipped base)")
    parser.add_argument("--steps", type=int,
                        help="length of the whole run, also on resume (default: "
                        + ", ".join(f"{name} {steps}" for name, (*_, steps) in METHODS.items()) + ")")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="run folder (default: runs/METHOD-DATA-SETTINGS-SEED)")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR; its own settings hold")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="any field of the Config")
    parser.add_argument("--samples", type=int, default=SAMPLES,
                        help="pictures per row of the final table; 0: no table")
    return parser, parser.parse_args(argv)


def plan_of(arguments):
    """What to run and where -> plan, out. A resumed run keeps its own settings, but for a new --steps."""
    if arguments.resume:
        out = Path(arguments.resume)
        if not (out / "checkpoint.pt").is_file():
            raise FileNotFoundError(f"--resume {out}: wanted a run folder with checkpoint.pt, found none")
        if arguments.set or arguments.out or arguments.overwrite:
            raise ValueError("--resume keeps a run's own settings: leave out --set, --out and --overwrite")
        plan = evaluate.read_plan(out / "config.json")
    else:
        plan = {key: getattr(arguments, key) for key in ("method", "model", "data", "weights", "seed", "set")}
        words = [plan["method"], Path(plan["data"]).name, *plan["set"], f"seed{plan['seed']}"]
        out = Path(arguments.out or f"runs/{'-'.join(words)}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / "config.json").is_file():
                raise ValueError(f"--out {out} holds something else than a run: choose another folder")
            if not arguments.overwrite:
                raise ValueError(f"{out} already holds a run: --resume {out} continues it, "
                                 "--overwrite replaces it, --out names another folder")
    if plan["method"] not in METHODS:
        raise ValueError(f"unknown method '{plan['method']}': wanted {', '.join(METHODS)}")
    plan.setdefault("steps", METHODS[plan["method"]][2])
    if arguments.steps is not None:
        plan["steps"] = arguments.steps
    if plan["steps"] < 1:
        raise ValueError(f"--steps {plan['steps']}: a run has at least one step")
    return plan, out


def prepare(arguments):
    """Everything that can go wrong goes wrong here, as ValueError or OSError, before anything is written."""
    plan, out = plan_of(arguments)
    config = settle(plan["method"], plan["set"])
    source = data.build(plan["data"])
    model = models.build(plan["model"], source.name, plan["weights"])
    config.path(model.T)
    for _, steps, settings in config.rows():
        sampler.timeline(model.T, steps, last=settings.get("last", 1.))
    with torch.no_grad():                                    # whatever the data can say must be understood
        said = [*source.phrases, getattr(config, "negative", "")]
        text_width = model.condition(said)["pooled"].shape[1]
    torch.manual_seed(plan["seed"])
    features = discriminator.Features(models.features(source.name, plan["weights"], config.features))
    base = deepcopy(model).eval().requires_grad_(False)
    if config.init == "random":
        model.forget()
    run = Run(model, base, config.critic(features, text_width), METHODS[plan["method"]][0], config, source,
              plan["steps"], plan["seed"])
    if arguments.resume:
        try:
            run.restore(torch.load(out / "checkpoint.pt", weights_only=True))
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{out}/checkpoint.pt is damaged or another run's ({str(error)[:80]})") from None
        if run.done > run.steps:
            raise ValueError(f"{out} is at step {run.done} already: --steps {run.steps} lies behind it")
    n, most = arguments.samples, (source.sizes["test"] or 10 ** 9) // 2
    if n > most and n == SAMPLES:
        n = most if most >= 200 else 0                       # a small folder: fewer samples, or no table
    examiner = evaluate.Examiner(source, n, weights=plan["weights"]) if n else None
    return plan, out, run, examiner


def report(run, examiner, out, captions):
    """The before/after table and picture."""
    players = {"before": run.teacher, "after": run.result()}
    rows, shown = evaluate.examine([(who, players[who], steps, settings)
                                    for who, steps, settings in run.config.rows()], captions, examiner)
    write(out / "result.json", json.dumps(dict(rows), indent=1))
    text = evaluate.table(rows)
    write(out / "table.md", text + "\n")
    evaluate.picture(shown, out / "before_after.png", captions)
    print(f"\n{text}\n\nwrote {out}/before_after.png, table.md, curves.png, denoiser.safetensors")


def start(out, plan, run, resumed):
    """Make the run folder: config.json, and nothing left of a run that is being replaced."""
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        for old in [*out.glob("*.png"), *out.glob("*.jsonl"), *out.glob("*.json"), *out.glob("*.md"),
                    out / "checkpoint.pt", out / "denoiser.safetensors"]:
            old.unlink(missing_ok=True)
    write(out / "config.json", json.dumps({**plan, "config": provenance(run.config)}, indent=1))
    print("\n".join(f"{k:>14} {v[0]!s:<12} {v[1]}" for k, v in provenance(run.config).items()))


def main(argv=None):
    parser, arguments = parse(argv)
    try:
        plan, out, run, examiner = prepare(arguments)
        start(out, plan, run, bool(arguments.resume))
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: {error}\n")
    captions = run.source.batch(16, torch.Generator().manual_seed(7)).caption
    rows = [row[1:] for row in run.config.rows() if row[0] == "after"]
    facts = {"words": run.model.words, "target": run.model.target, "data": run.source.name, "rows": rows,
             **{key: plan[key] for key in ("method", "set", "seed")}}
    steps, settings = rows[0]
    try:
        loop(run, out, facts, lambda model: evaluate.sample(model, captions, steps, seed=1, **settings))
    except KeyboardInterrupt:
        save(run, out, facts)
        parser.exit(130, f"\nstopped after step {run.done}; go on with: python train.py --resume {out}\n")
    except ArithmeticError as error:
        parser.exit(1, f"\ntrain.py: {error}\n")
    if examiner:
        report(run, examiner, out, captions)


if __name__ == "__main__":
    main()
