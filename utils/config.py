"""Settings, the command line of train.py, and config.json.

A setting is one line in a dataclass: its type or choices, its provenance (paper; secondary: public code and
summaries; ours), its meaning and its default. TrainConfig and DiscriminatorConfig hold what all methods
share; each method's Config inherits both. `python train.py --set help` prints them.
Read next: utils/checkpoint.py
"""

import argparse
import dataclasses
import json
import re
import shlex
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from utils import checkpoint, distributed

EVAL_SAMPLES = 2000                    # images per row of the final table
LARGE_MODEL_STEPS = 2000               # default length for Stable Diffusion: CoMat's (secondary)


# ---------------------------------------------------------------------------------------- shared settings

@dataclass(kw_only=True)
class TrainConfig:
    """Batches, optimisers (AdamW) and EMA; suffix _d: of the discriminator."""

    batch_size: Annotated[int, "ours: images per micro-batch"] = 32
    gradient_accumulation_steps: Annotated[int, "ours: micro-batches per step and process"] = 1
    lr: Annotated[float, "ours: learning rate of the generator, decays linearly to 0"] = 1e-4
    lr_d: Annotated[float, "ours: learning rate of the discriminator, constant"] = 5e-3
    beta1: Annotated[float, "ours: AdamW, generator; momentum makes adversarial training oscillate"] = 0.0
    beta1_d: Annotated[float, "secondary: AdamW, discriminator; no momentum"] = 0.0
    max_grad_norm: Annotated[float, "ours: gradient clipping, generator; 0 = off"] = 1.0
    max_grad_norm_d: Annotated[float, "secondary: gradient clipping, discriminator; 0 = off"] = 1.0
    n_critic: Annotated[int, "ours: discriminator steps per generator step"] = 1
    ema_decay: Annotated[float, "ours: decay of the averaged generator, which is the result"] = 0.99
    init: Annotated[Literal["pretrained", "random"], "paper: the generator's initial weights"] = "pretrained"


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Frozen backbone and what the discriminator sees."""

    backbone: Annotated[Literal["vit", "cnn", "random"],
                        "paper: frozen features; vit is DINOv2 for large models"] = "vit"
    whiten_features: Annotated[bool, "ours: equal variance of the features in all directions"] = True
    augment_strength: Annotated[float, "ours: differentiable augmentation, 0 to 1"] = 0.1
    instance_noise: Annotated[float, "ours: std of noise on the discriminator's images"] = 0.05


def require_positive(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is a whole number, 1 or more")


def require_fraction(config, *names):
    for name in names:
        if getattr(config, name) > 1:
            raise ValueError(f"{name} is a fraction, 0 to 1")


def check_shared(config):
    """ValueError for values of the shared settings that no run can have."""
    require_positive(config, "batch_size", "gradient_accumulation_steps", "n_critic")
    require_fraction(config, "ema_decay", "beta1", "beta1_d", "augment_strength")
    for name in ("ema_decay", "beta1", "beta1_d"):
        if getattr(config, name) == 1:
            raise ValueError(f"{name} is below 1: an average with decay 1 never changes")


# ------------------------------------------------------------------------------------- reading settings

def parse_value(kind, text):
    """A setting's value from its text; ValueError says what is wanted."""
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    choices = typing.get_args(kind)
    if choices:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if kind is int and not 0 <= number <= 10 ** 6:
        raise ValueError("a whole number from 0 to a million")
    if kind is float and not 0 <= number < float("inf"):
        raise ValueError("a number, 0 or more")
    return number


def preset_of(method, model_name):
    """The settings in which a method (train.Method) and a model differ from the Config's defaults."""
    return {**method.module.PRESETS.get(model_name, {}), **method.preset, **method.fixed}


def build_config(method, overrides, model_name="tiny"):
    """The method's Config: defaults, presets, then ["key=value", ...]. ValueError with one sentence."""
    config_cls, values = method.module.Config, preset_of(method, model_name)
    kinds = typing.get_type_hints(config_cls)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or key not in kinds:
            raise ValueError(f"--set {override}: wanted KEY=VALUE with a KEY of {', '.join(kinds)}; "
                             "--set help explains them")
        if key in method.fixed:
            raise ValueError(f"--set {override}: this method means {key}={method.fixed[key]}")
        try:
            values[key] = parse_value(kinds[key], text)
        except ValueError as wanted:
            raise ValueError(f"--set {override}: {key} is {wanted}") from None
    return config_cls(**values)


def as_overrides(settings):
    """{setting: value} of a config.json -> ["key=value", ...]."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in
            settings.items()]


def provenance(method, config, model_name):
    """-> {setting: [value, "source: meaning"]} for config.json. Values of a model's preset have the source
    that PRESET_SOURCES gives, `ours` if it gives none; other values than the default are the `user`'s."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    preset = preset_of(method, model_name)
    preset_sources = method.module.PRESET_SOURCES.get(model_name, {})
    notes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        source, meaning = hints[field.name].__metadata__[0].split(":", 1)
        if field.name in preset and value == preset[field.name]:
            source = preset_sources.get(field.name, "ours")
        elif value != field.default:
            source = "user"
        notes[field.name] = [value, f"{source}:{meaning}"]
    return notes


def settings_help(method, model_name):
    """All settings of a method for a model, grouped by the class that declares them, as text."""
    lines = ["Settings, their values, and where these come from (paper, secondary, ours). "
             "Change one with --set NAME=VALUE."]
    config = build_config(method, [], model_name)
    notes = provenance(method, config, model_name)
    for cls in type(config).__mro__[:-1]:
        lines.append(f"\n{cls.__module__}.{cls.__name__}: {cls.__doc__.splitlines()[0]}")
        hints = typing.get_type_hints(cls)
        for name in cls.__annotations__:
            choices = typing.get_args(hints[name])
            suffix = f" ({', '.join(choices)})" if choices else ""
            lines.append(f"  {name:<28} {notes[name][0]!s:<12} {notes[name][1]}{suffix}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the command line

def make_parser(description, methods, models):
    """The command line of train.py. An option that is not given is None, so that a resumed run can tell.
    methods: {name: with default_steps}; models: names."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    lengths = ", ".join(f"{name} {method.default_steps}" for name, method in methods.items())
    parser.add_argument("--method", help=f"{', '.join(methods)} (default: the first)")
    parser.add_argument("--model", help=f"{', '.join(models)} (default: tiny)")
    parser.add_argument("--data", help="glyphs (default), fashion, or a folder of captioned images")
    parser.add_argument("--pretrained", metavar="PATH", help="initial weights: a file or a run folder; for "
                        "Stable Diffusion a diffusers folder or hub id (default: the shipped or public ones)")
    parser.add_argument("--backbone", metavar="PATH", help="folder or hub id of the discriminator's frozen "
                        "network (default: the shipped one; Stable Diffusion: facebook/dinov2-small)")
    parser.add_argument("--resolution", type=int, help="pixels, both sides (default: the model's own)")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None,
                        help="Stable Diffusion: recompute every block in the backward pass to save memory")
    parser.add_argument("--fsdp", action="store_true", default=None,
                        help="with torchrun: shard the weights over all processes (FSDP2)")
    parser.add_argument("--lora-rank", type=int, metavar="RANK", help="Stable Diffusion: train LoRA adapters")
    parser.add_argument("--steps", type=int, help="length of the whole run, also when resumed (default: "
                        f"{lengths}; Stable Diffusion {LARGE_MODEL_STEPS})")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--output-dir", help="run folder (default: runs/METHOD-DATA-SETTINGS-SEED)")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR with its own settings")
    parser.add_argument("--allow-data-change", action="store_true", default=None,
                        help="with --resume: accept a data set that differs from the one at the start")
    parser.add_argument("--overwrite", action="store_true", default=None,
                        help="replace a run that is already in the run folder")
    parser.add_argument("--on-nan", choices=["stop", "skip"], help="at a loss or gradient that is not "
                        "finite: stop the run (default), or skip the update and count it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a setting; --set help lists all of them")
    parser.add_argument("--eval-samples", type=int,
                        help=f"images per row of the final table; 0: no table (default: {EVAL_SAMPLES})")
    return parser


def num_eval_samples(wanted, test_size):
    """How many images the final table measures: --eval-samples, or by default what a small data set has, and
    0 if that is too little for a Frechet distance. test_size: images in the test split, None: endless."""
    if wanted is not None:
        return wanted
    max_samples = test_size // 2 if test_size else EVAL_SAMPLES
    num_samples = min(EVAL_SAMPLES, max_samples)
    return num_samples if num_samples >= 200 else 0


def resume_command(run_dir, world_size):
    launcher = f"torchrun --nproc-per-node {world_size}" if world_size > 1 else "python"
    return f"{launcher} train.py --resume {shlex.quote(str(run_dir))}"


def default_run_dir(run_config):
    """runs/METHOD-MODEL-DATA-SETTINGS-SEED with what a file name can hold."""
    parts = [run_config["method"], *{run_config["model"]} - {"tiny"}, Path(run_config["data"]).resolve().name,
             *run_config["overrides"], f"seed{run_config['seed']}"]
    name = "-".join(re.sub(r"[^\w.=+-]+", "_", part)[:60] for part in parts)
    return Path("runs") / name[:200]


def resolve_run_config(args, methods, models):
    """What to run and where -> run_config (the fields of checkpoint.RUN_CONFIG_TYPES), run_dir. A resumed run
    keeps its own settings except --steps and --on-nan. ValueError or FileNotFoundError with one sentence."""
    if args.resume:
        run_config, run_dir = resumed_run_config(args)
    else:
        run_config = new_run_config(args, methods, models)
        if not 0 <= run_config["seed"] < 2 ** 63:
            raise ValueError(f"--seed {run_config['seed']}: wanted 0 to 2^63 - 1")
        run_dir = Path(args.output_dir) if args.output_dir else default_run_dir(run_config)
    if args.eval_samples is not None and not 0 <= args.eval_samples <= 10 ** 6:
        raise ValueError(f"--eval-samples {args.eval_samples}: wanted 0 to a million")
    if run_config["method"] not in methods:
        raise ValueError(f"unknown method '{run_config['method']}': wanted {', '.join(methods)}")
    if args.steps is not None:
        run_config["steps"] = args.steps
    elif "steps" not in run_config:
        is_large = run_config["model"] != "tiny"
        run_config["steps"] = LARGE_MODEL_STEPS if is_large else methods[run_config["method"]].default_steps
    if run_config["steps"] < 1:
        raise ValueError(f"--steps {run_config['steps']}: a run has at least one step")
    return run_config, run_dir


def new_run_config(args, methods, models):
    if args.model not in (None, *models):
        raise ValueError(f"unknown model '{args.model}': wanted {', '.join(models)}")
    is_tiny = args.model in (None, "tiny")
    if not is_tiny and not args.data:
        raise ValueError(f"--model {args.model} wants --data, a folder of captioned images")
    if is_tiny and (args.lora_rank or args.gradient_checkpointing):
        option = "--lora-rank" if args.lora_rank else "--gradient-checkpointing"
        raise ValueError(f"{option} is for Stable Diffusion: the tiny model is trained as a whole")
    if args.resolution is not None and args.resolution < 1:
        raise ValueError(f"--resolution {args.resolution}: wanted a number of pixels")
    if args.lora_rank is not None and args.lora_rank < 1:
        raise ValueError(f"--lora-rank {args.lora_rank}: wanted 1 or more")
    run_config = {
        "method": args.method or next(iter(methods)), "model": args.model or "tiny",
        "data": args.data or "glyphs",
        "pretrained": args.pretrained, "backbone": args.backbone, "resolution": args.resolution,
        "lora_rank": args.lora_rank or 0, "gradient_checkpointing": bool(args.gradient_checkpointing),
        "fsdp": bool(args.fsdp), "on_nan": args.on_nan or "stop", "world_size": distributed.get_world_size(),
        "seed": args.seed or 0, "overrides": args.overrides}
    for key in ("data", "pretrained", "backbone"):                     # a resume may come from another folder
        if run_config[key] and Path(run_config[key]).exists():
            run_config[key] = str(Path(run_config[key]).resolve())
    return run_config


def resumed_run_config(args):
    run_dir = Path(args.resume)
    if not (run_dir / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"--resume {run_dir}: wanted a run folder with checkpoint.pt, found none")
    run_config = checkpoint.load_run_config(run_dir / "config.json")
    for key in ["output_dir", "overwrite", *checkpoint.RUN_CONFIG_TYPES]:
        if key in ("steps", "on_nan", "world_size"):
            continue
        if getattr(args, key) not in (None, [], run_config.get(key)):
            option = "set" if key == "overrides" else key.replace("_", "-")
            raise ValueError(f"--resume keeps a run's own settings: leave out --{option}")
    if run_config["world_size"] != distributed.get_world_size():
        raise ValueError(f"{run_dir} is a run of {run_config['world_size']} process(es), not "
                         f"{distributed.get_world_size()}: "
                         f"{resume_command(run_dir, run_config['world_size'])}")
    run_config["on_nan"] = args.on_nan or run_config["on_nan"]
    return run_config, run_dir
