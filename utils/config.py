"""The settings of a training run: defaults, presets, --set, provenance.

A setting is one line in a dataclass: its type or choices, its provenance (paper; secondary: public code and
summaries; ours), its meaning and its default. TrainConfig and DiscriminatorConfig hold what all methods
share; each method's Config inherits both. The defaults are the papers' methods. A recipe (--recipe, RECIPES
of the method), then the preset of the model, then --set replace them. `python train.py --set help` prints
them.
Read next: utils/cli.py
"""

import dataclasses
import difflib
import json
import textwrap
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple


class Method(NamedTuple):
    """A method of train.py: its module and what belongs to it as a whole."""
    module: Any                        # Config, generator_loss, discriminator_loss
    default_steps: int                 # of the tiny model
    fixed: dict = {}                   # settings that define the method
    large_steps: int = 2000            # of Stable Diffusion; ADT: CoMat's (secondary)
    lora_rank: int = 64                # of Stable Diffusion without --full
    lora_targets: str = "attention"    # of Stable Diffusion without --full: which layers get adapters
    presets: dict = {}                 # {model, "MODEL lora" or "MODEL full": {setting: (value, source)}}
    max_resolution: dict = {}          # {model: training resolution if the checkpoint's own is larger}


# ---------------------------------------------------------------------------------------- shared settings

@dataclass(kw_only=True)
class TrainConfig:
    """Batches, optimisers (AdamW), EMA; _d: of the discriminator, without weight decay."""

    batch_size: Annotated[int, "ours: images per micro-batch"] = 16
    gradient_accumulation_steps: Annotated[int, "ours: micro-batches per step and process"] = 1
    lr: Annotated[float, "ours: learning rate of the generator"] = 1e-4
    lr_schedule: Annotated[Literal["linear", "cosine", "constant"],
                           "ours: course of lr; linear and cosine fall to 0 at the end"] = "linear"
    lr_warmup_steps: Annotated[int, "ours: first updates in which lr rises linearly"] = 0
    lr_d: Annotated[float, "ours: learning rate of the discriminator, constant"] = 1e-3
    beta1: Annotated[float, "ours: AdamW, generator; momentum makes adversarial training oscillate"] = 0.0
    beta1_d: Annotated[float, "secondary: AdamW, discriminator; no momentum"] = 0.0
    beta2: Annotated[float, "ours: AdamW, generator; decay of the mean of squared gradients"] = 0.999
    beta2_d: Annotated[float, "secondary: AdamW, discriminator; the same"] = 0.99
    weight_decay: Annotated[float, "ours: AdamW, generator"] = 0.0
    max_grad_norm: Annotated[float, "ours: gradient clipping, generator; 0 = off"] = 1.0
    max_grad_norm_d: Annotated[float, "secondary: gradient clipping, discriminator; 0 = off"] = 1.0
    optimizer: Annotated[Literal["adamw", "adamw8bit"],
                         "ours: adamw8bit stores the moments in 8 bits (bitsandbytes)"] = "adamw"
    n_critic: Annotated[int, "ours: discriminator steps per generator step"] = 1
    ema_decay: Annotated[float, "ours: decay of the average of the weights, which a run saves; at most "
                         "(k + 1) / (k + 10) after k updates: .92 after 100, .99 after 890"] = 0.99
    init: Annotated[Literal["pretrained", "random"], "paper: the generator's initial weights"] = "pretrained"


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Frozen backbone and what the discriminator sees."""

    backbone: Annotated[Literal["vit", "cnn", "vit+cnn", "random"],
                        "paper: frozen features; vit is DINOv2 for large models; vit+cnn is ours"] = "vit"
    whiten_features: Annotated[bool, "ours: equal variance of the features in all directions"] = False
    augment_strength: Annotated[float, "ours: strength of the differentiable augmentation, 0 to 1"] = 0.1
    instance_noise: Annotated[float, "ours: std of noise on the discriminator's images"] = 0.0
    warmup_steps_d: Annotated[int, "ours: first steps train D only; a quarter of the run at most"] = 20


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
    decays = "ema_decay", "beta1", "beta1_d", "beta2", "beta2_d"
    require_fraction(config, *decays, "augment_strength")
    for name in decays:
        if getattr(config, name) == 1:
            raise ValueError(f"{name} is below 1: an average with decay 1 never changes")


def check_sharded(config):
    """ValueError for what --fsdp cannot do with any method."""
    if config.optimizer != "adamw":
        raise ValueError("--fsdp wants optimizer=adamw: the moments of bitsandbytes cannot be sharded")


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


def preset_of(method, model_name="tiny", is_lora=False, recipe="paper"):
    """Where a method (Method) on a model differs from the Config's defaults: the recipe, then the model's
    preset -> {setting: (value, source)}."""
    tuning = "lora" if is_lora else "full"
    recipes = getattr(method.module, "RECIPES", {})
    recipe_settings = {name: (value, "ours") for name, value in recipes.get(recipe, {}).items()}
    return {**recipe_settings, **method.presets.get(model_name, {}),
            **method.presets.get(f"{model_name} {tuning}", {}),
            **{name: (value, "ours") for name, value in method.fixed.items()}}


def preset_values(method, model_name, is_lora, world_size, recipe):
    """{setting: value} of recipe and preset. Its batch is divided among the processes."""
    values = {name: value for name, (value, _) in preset_of(method, model_name, is_lora, recipe).items()}
    return divide_batch(values, world_size)


def divide_batch(values, world_size):
    """The settings of a preset for one of world_size processes: all of them together take about as many
    images a step as the preset says. First gradient_accumulation_steps become fewer, then batch_size; both
    are rounded, to 1 at least, and `batch_note` says what the rounding has changed."""
    if "batch_size" not in values:                                     # the defaults are for each process
        return values
    num_micro_batches = values.get("gradient_accumulation_steps", 1)
    divided = {"gradient_accumulation_steps": max(1, int(num_micro_batches / world_size + .5))}
    if world_size > num_micro_batches:
        share = values["batch_size"] * num_micro_batches / world_size
        divided["batch_size"] = max(1, int(share + .5))
    return {**values, **divided}


def batch_note(method, config, model_name, is_lora, world_size):
    """One sentence if a step takes another number of images than the preset says, else None."""
    values = {name: value for name, (value, _) in preset_of(method, model_name, is_lora).items()}
    wanted = values.get("batch_size", 0) * values.get("gradient_accumulation_steps", 1)
    per_micro_step = config.batch_size * world_size
    found = per_micro_step * config.gradient_accumulation_steps
    if wanted in (0, found):
        return None
    images = "image" if found == 1 else "images"
    note = f"a step takes {found} {images}, the preset {wanted}, for which its lr and lr_d are meant"
    if wanted % per_micro_step == 0:
        note += f"; --set gradient_accumulation_steps={wanted // per_micro_step} takes as many"
    return note


def build_config(method, overrides, model_name="tiny", is_lora=False, world_size=1, recipe="paper"):
    """The method's Config: defaults, recipe, preset, ["key=value", ...]. ValueError with one sentence."""
    config_cls = method.module.Config
    values = preset_values(method, model_name, is_lora, world_size, recipe)
    kinds = typing.get_type_hints(config_cls)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or key not in kinds:
            similar = difflib.get_close_matches(key, kinds, n=1)
            hint = f"; did you mean {similar[0]}?" if similar and key not in kinds else ""
            raise ValueError(f"--set {override}: wanted KEY=VALUE with a KEY of {', '.join(kinds)}{hint}; "
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


def provenance(method, config, model_name="tiny", is_lora=False, world_size=1, recipe="paper"):
    """-> {setting: [value, "source: meaning"]} for config.json. A value of recipe or preset has its source
    from there; a value that is neither theirs nor the default is the `user`'s."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    preset = preset_of(method, model_name, is_lora, recipe)
    values = preset_values(method, model_name, is_lora, world_size, recipe)
    notes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        source, meaning = hints[field.name].__metadata__[0].split(":", 1)
        if value != values.get(field.name, field.default):
            source = "user"
        elif field.name in preset:
            source = preset[field.name][1]
        notes[field.name] = [value, f"{source}:{meaning}"]
    return notes


def settings_help(method, model_name="tiny", is_lora=False, recipe="paper"):
    """All settings of a method for a model and a recipe, grouped by the class that declares them, as a table
    in text."""
    config = build_config(method, [], model_name, is_lora, recipe=recipe)
    notes = provenance(method, config, model_name, is_lora, recipe=recipe)
    lines = ["Settings, their values, where these come from, and what they mean. Change one with --set "
             "NAME=VALUE.", "paper: the paper states it; secondary: public code, summaries or related work; "
             "ours: neither.", "", help_row("name", "value", "source", "meaning")]
    listed = set()                              # a setting is listed where its default is declared last
    for cls in type(config).__mro__[:-1]:
        lines.append(f"\n{cls.__module__}.{cls.__name__}: {cls.__doc__.splitlines()[0]}")
        hints = typing.get_type_hints(cls)
        for name in cls.__annotations__:
            if name in listed:
                continue
            listed.add(name)
            choices = typing.get_args(hints[name])
            source, meaning = notes[name][1].split(": ", 1)
            if choices:
                meaning += f" (one of {', '.join(choices)})"
            value = as_overrides({name: notes[name][0]})[0].partition("=")[2]
            lines.append(help_row(name, value, source, meaning))
    return "\n".join(lines)


def help_row(name, value, source, meaning):
    """Four columns; the meaning is wrapped, and a long value has a line for itself."""
    indent = " " * 57
    start = f"  {name:<29}{value:<15}{source:<11}"
    if len(start) > len(indent):
        start = f"  {name:<29}{value}\n{'':<46}{source:<11}"
    wrapped = textwrap.wrap(meaning, 110 - len(indent))
    return start + f"\n{indent}".join(wrapped)
