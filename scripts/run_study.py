"""Trains and measures the rows of a table:

    python -m scripts.run_study adt --data glyphs      plain fine-tuning, ADT, its tuned recipe
    python -m scripts.run_study adt-longer             ADT as published, three times as long
    python -m scripts.run_study adt-discriminators     ADT with each discriminator
    python -m scripts.run_study adt-5-steps            ADT with a path of five steps
    python -m scripts.run_study adt-ablations          what each part of ADT is worth; 1 seed
    python -m scripts.run_study adt-shifted            a base of sans-serif letters, tuned on other fonts
    python -m scripts.run_study add --data fashion     the teacher, ADD, its tuned recipe
    python -m scripts.run_study add-ladder             from ADD as published to the tuned recipe
    python -m scripts.run_study add-table1             Table 1 of the ADD paper on small images; 1 seed
    python -m scripts.run_study pace                   seconds of a step of every recipe in runs/

Every run has a folder in OUTPUT_DIR/runs/ and a JSON file beside it with its metrics. What is measured is
not repeated and what was interrupted continues, so a study may be stopped at any time. --output-dir results
--no-train prints the tables from the measurements in results/. Read next: scripts/make_figures.py"""

import argparse
import itertools
import json
import math
import re
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import data
import train
from models.loading import load_model, weights_path
from scripts import pretrain
from scripts.network_calls import time_interleaved
from scripts.panel import PanelEvaluator
from utils import checkpoint, distributed
from utils import config as train_config
from utils.failures import clear_exit, signal_number, start_program
from utils.plotting import aggregate_seeds, format_steps, markdown_table, metrics_table
from utils.report import results_name


@dataclass
class Experiment:
    """One row of a table. paper_value: what the paper measured for the same change."""

    label: str
    overrides: list = field(default_factory=list)                      # KEY=VALUE, as after --set
    method: str = "adt"
    steps: int | None = None                                           # default: the method's
    paper_value: str = ""
    recipe: str = "tuned"


@dataclass
class Study:
    """A table. A sampling config is (number of sampler steps, settings of the sampler)."""

    rows: list
    base_configs: list                                                 # with which the base is measured
    run_configs: list | None = None                                    # of every run; default: the run's own
    seeds: int = 1
    data: str | None = None                                            # trained on and measured with; --data
    base_data: str | None = None                                       # the base is trained on this, first


PACE_ROUNDS = 15
REAL_SEED, NOISE_SEED = 1234, 0                         # those of evaluate.py; scripts/panel.py uses others

TEN_STEPS = [(10, {})]

# paper_value: FID (lower is better) / CLIP score (higher is better) on COCO with one student step.
# With lambda_distill = 2.5 the gradient of the adversarial loss is 50 times that of the distillation loss, so
# the variants of the distillation loss are compared with a higher weight.
HIGH_LAMBDA = "lambda_distill=50"
TABLE_1 = [Experiment(label, overrides, "add", None, paper_value, "paper")
           for label, overrides, paper_value in [
    ("backbone: ViT (paper)", [], "DINOv2-S 20.6 / .319"),
    ("backbone: CNN", ["backbone=cnn"], "CLIP-L 23.3 / .308"),
    ("backbone: random weights", ["backbone=random"], ""),
    ("conditioning: none", ["disc_conditioning=none"], "21.2 / .302"),
    ("conditioning: text", ["disc_conditioning=text"], "21.2 / .307"),
    ("conditioning: image", ["disc_conditioning=image"], "21.1 / .316"),
    ("conditioning: text and image (paper)", [], "20.6 / .319"),
    ("student initialised at random", ["init=random"], "293.6 / .065"),
    ("adversarial loss only", ["lambda_distill=0"], "20.8 / .315"),
    ("distillation loss only", ["lambda_adv=0"], "315.6 / .076"),
    ("adversarial and distillation loss (paper)", [], "20.6 / .319"),
    ("λ = 50: exponential, L2", [HIGH_LAMBDA], "20.6 / .319"),
    ("λ = 50: SDS", [HIGH_LAMBDA, "distill_weighting=sds"], "22.3 / .325"),
    ("λ = 50: NFSD", [HIGH_LAMBDA, "distill_weighting=nfsd"], "21.8 / .327"),
    ("λ = 50: 2 teacher steps", [HIGH_LAMBDA, "teacher_steps=2"], "20.8 / .321"),
    ("λ = 50: 4 teacher steps", [HIGH_LAMBDA, "teacher_steps=4"], "20.3 / .317"),
    ("λ = 50: L1", [HIGH_LAMBDA, "distill_loss=l1"], "L2 is best"),
    ("λ = 50: pseudo-Huber", [HIGH_LAMBDA, "distill_loss=huber"], "L2 is best")]]

FIVE_STEPS, WHITEN = "num_inference_steps=5", "whiten_features=true"
TWO_BACKBONES = "backbone=vit+cnn"
BACKWARD_SIMULATION = ["pure_noise_prob=.5", "backward_simulation_prob=.5"]

STUDIES = {
    "adt": Study([
        Experiment("diffusion loss only, 1,000 training steps", method="diffusion", steps=1000,
                   recipe="paper"),
        Experiment("ADT", recipe="paper"),
        Experiment("ADT, tuned"),
        Experiment("ADT, tuned, 900 training steps", steps=900)],
        base_configs=[*TEN_STEPS, (50, {})], run_configs=TEN_STEPS, seeds=3),
    "adt-longer": Study([
        Experiment("ADT", recipe="paper"),
        Experiment("ADT, 900 training steps", steps=900, recipe="paper")],
        base_configs=[*TEN_STEPS, (50, {})], run_configs=TEN_STEPS, seeds=3),
    "adt-discriminators": Study([
        Experiment("ordered (default)", recipe="paper"),
        *(Experiment(kind, [f"discriminator={kind}"], recipe="paper")
          for kind in ("similarity", "reference", "difference", "relativistic", "projected"))],
        base_configs=[*TEN_STEPS, (50, {})], run_configs=TEN_STEPS, seeds=3),
    "adt-5-steps": Study([
        Experiment("ADT, path of 5 steps", [FIVE_STEPS], recipe="paper"),
        Experiment("ADT, tuned, path of 5 steps", [FIVE_STEPS])],
        base_configs=[(5, {}), *TEN_STEPS, (50, {})], run_configs=[(5, {})], seeds=3),
    "adt-ablations": Study([
        Experiment("ADT", recipe="paper"),
        *(Experiment(label, [override], recipe="paper") for label, override in [
            ("no diffusion loss", "lambda_diff=0"),
            ("gradient through the network's inputs", "input_grad_scale=1"),
            ("K = 1", "num_grad_steps=1"),
            ("K = 5", "num_grad_steps=5"),
            ("K = all", "grad_step_selection=all"),
            ("last K = 2", "grad_step_selection=last"),
            ("no augmentation", "augment_strength=0"),
            ("augmentation of full strength", "augment_strength=1")])],
        base_configs=TEN_STEPS, run_configs=TEN_STEPS),
    "adt-shifted": Study([
        Experiment("diffusion loss only, 1,000 training steps", method="diffusion", steps=1000,
                   recipe="paper"),
        Experiment("ADT", recipe="paper"),
        Experiment("ADT, tuned"),
        Experiment("ADT, 900 training steps", steps=900, recipe="paper"),
        Experiment("diffusion loss only, 3,000 training steps", method="diffusion", steps=3000,
                   recipe="paper")],
        base_configs=[*TEN_STEPS, (50, {})], run_configs=TEN_STEPS, seeds=3,
        data="glyphs:serif,roman", base_data="glyphs:sans,typewriter"),
    "add": Study([
        Experiment("ADD", method="add", recipe="paper"),
        Experiment("ADD, tuned", method="add"),
        Experiment("ADD, 2,000 training steps", method="add", steps=2000, recipe="paper"),
        Experiment("ADD, tuned, 2,000 training steps", method="add", steps=2000)],
        base_configs=[*((n, {}) for n in (1, 2, 4, 8, 25, 50)), (25, {"guidance_scale": 2.})], seeds=3),
    "add-ladder": Study([
        Experiment("ADD", method="add", recipe="paper"),
        Experiment("ADD, 1,200 training steps", method="add", steps=1200, recipe="paper"),
        Experiment("+ backward simulation", BACKWARD_SIMULATION, "add", recipe="paper"),
        Experiment("+ backward simulation, whitened features", [*BACKWARD_SIMULATION, WHITEN], "add",
                   recipe="paper"),
        Experiment("+ backward simulation, whitened features, relativistic = tuned", method="add"),
        Experiment("tuned, features of ViT and CNN", [TWO_BACKBONES], "add"),
        Experiment("tuned, features of ViT and CNN, 2,000 training steps", [TWO_BACKBONES], "add", 2000)],
        base_configs=[(1, {}), (25, {})], seeds=3),
    "add-table1": Study(TABLE_1, base_configs=[(1, {}), (25, {})]),
}


# ------------------------------------------------------------------------------------- training and measuring

BASE_STEPS = 8000                                       # of the base in a study with base_data


def train_base(study, base_dir):
    """Train, continue or reuse the base of a study with base_data -> base_dir. SystemExit if stopped."""
    weights = base_dir / "denoiser.safetensors"
    if not (weights.is_file() and checkpoint.load_weights(weights)[1]["steps"] == BASE_STEPS):
        pretrain.main(["--data", study.base_data, "--network", "denoiser", "--steps", str(BASE_STEPS),
                       "--output-dir", str(base_dir)])
    return base_dir


def recipe_arguments(experiment, data_name, run_dir):
    """What tells train.py the recipe, the data and the folder of a run."""
    cli_args = ["--method", experiment.method, "--recipe", experiment.recipe, "--data", data_name,
                "--output-dir", str(run_dir)]
    for override in experiment.overrides:
        cli_args += ["--set", override]
    return cli_args


def train_or_load(experiment, data_name, seed, steps, run_dir, base_dir=None):
    """Start, continue or reuse the run in run_dir -> model, {"minutes": its training time, on a CPU}.
    base_dir: of a base that is not in weights/."""
    weights = run_dir / "denoiser.safetensors"
    if not (weights.is_file() and checkpoint.load_weights(weights)[1]["steps"] == steps):
        cli_args = ["--steps", str(steps), "--eval-samples", "0"]
        if (run_dir / "checkpoint.pt").is_file():
            cli_args += ["--resume", str(run_dir)]
        else:
            cli_args += [*recipe_arguments(experiment, data_name, run_dir), "--seed", str(seed),
                         "--overwrite"]
            if base_dir:
                cli_args += ["--pretrained", str(base_dir)]
        train.main(cli_args)
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    times = [row["seconds"] for row in log]
    step_times = [after - before for before, after in zip([0., *times], times)]
    median_step = statistics.median(step_times)                        # so that pauses do not count
    minutes = {"minutes": median_step * steps / 60} if distributed.get_device().type == "cpu" else {}
    return load_model("tiny", data_name, run_dir), minutes


def config_label(num_steps, settings):
    """'10 steps, timestep_shift 3'. A student has one way of sampling, which is not spelt out."""
    parts = [format_steps(num_steps)]
    if "t_max" not in settings:
        parts += [f"{name} {value:g}" for name, value in settings.items()]
    return ", ".join(parts)


def read_metrics(path):
    """{label of a sampling config: metrics} of a run or of a base. ValueError if the file is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: delete it, and the run is measured again") from None


def cached_metrics(path, evaluator, configs, load_fn):
    """Measure a model with every sampling config -> yields (label of the config, metrics). What the JSON file
    `path` holds is not measured again. load_fn: called once, if something is missing -> model, further
    metrics; None: skip what is missing."""
    cached = read_metrics(path) if path.is_file() else {}
    model = None
    for num_steps, settings in configs:
        label = config_label(num_steps, settings)
        key = f"{label} ({len(evaluator.captions)} images)"
        if key not in cached and load_fn is None:
            continue
        if key not in cached:
            if model is None:
                model, further_metrics = load_fn()
                model.to(distributed.get_device())
            cached[key] = {**evaluator.measure(model, num_steps, NOISE_SEED, settings), **further_metrics}
            checkpoint.atomic_write_text(path, json.dumps(cached, indent=1) + "\n")
        yield label, cached[key]


def recipe_name(experiment, dataset_name):
    """What the names of all runs of an experiment begin with."""
    recipe = ["tuned"] if experiment.recipe == "tuned" else []
    return "-".join([experiment.method, *recipe, dataset_name, *experiment.overrides])


def file_name_of(study, dataset_name):
    """The data set's name in the names of a study's runs."""
    return study.data.replace(":", "-") if study.data else dataset_name


def run_name(experiment, dataset_name, steps, seed):
    """Name of a run's folder and of its file of metrics."""
    return f"{recipe_name(experiment, dataset_name)}-{steps}steps-seed{seed}"


def own_configs(experiment):
    """The sampling configs that the experiment's method measures after training."""
    config = train_config.build_config(train.METHODS[experiment.method], experiment.overrides,
                                       recipe=experiment.recipe)
    return [(num_steps, settings) for when, num_steps, settings in config.eval_sampling_configs()
            if when == "after"]


def collect_results(args, study, dataset, evaluator):
    """Train and measure what is missing -> [(label, metrics)], the rows of the table before seeds are
    averaged."""
    runs_dir, data_name = Path(args.output_dir, "runs"), (study.data or args.data)
    file_name = file_name_of(study, dataset.name)
    base_dir = None
    if study.base_data:
        base_dir = runs_dir / f"base-{study.base_data.replace(':', '-')}"
        if not args.no_train:
            train_base(study, base_dir)
    base_load_fn = None if args.no_train else lambda: (load_model("tiny", dataset.name, base_dir), {})
    base_weights = weights_path("denoiser", dataset.name, base_dir)
    base_results = runs_dir / results_name("base", base_weights, file_name)
    if base_dir and base_weights.parent != base_dir:                   # --no-train, and its weights are gone
        base_results = max(runs_dir.glob(f"base-*-{file_name}.json"), default=base_results)
    rows = [(f"base, {label}", "", {**metrics, "minutes": ""}) for label, metrics in
            cached_metrics(base_results, evaluator, study.base_configs, base_load_fn)]
    run_rows = []
    for seed, experiment in itertools.product(range(args.seeds or study.seeds), study.rows[:args.max_rows]):
        steps = args.steps or experiment.steps or train.METHODS[experiment.method].default_steps
        name = run_name(experiment, file_name, steps, seed)
        configs = study.run_configs or own_configs(experiment)
        load_fn = partial(train_or_load, experiment, data_name, seed, steps, runs_dir / name, base_dir)
        if args.no_train:
            load_fn = None
        for label, metrics in cached_metrics(runs_dir / f"{name}.json", evaluator, configs, load_fn):
            run_rows.append((experiment, label, metrics, name))
    minutes_per_step = fastest_minutes_per_step(runs_dir) | read_pace(runs_dir, file_name)
    for experiment, label, metrics, name in run_rows:
        recipe, steps = split_run_name(name)
        minutes = minutes_per_step[recipe] * steps if recipe in minutes_per_step else ""
        rows.append((f"{experiment.label}, {label}", experiment.paper_value, {**metrics, "minutes": minutes}))
    real_metrics = {**evaluator.real_metrics, "steps": "", "fd_excess": 0., "minutes": ""}
    rows.append(("real images", "", real_metrics))
    if any(experiment.paper_value for experiment in study.rows):
        rows = [(label, value, {"paper": value, **metrics}) for label, value, metrics in rows]
    return [(label, {**{name: round_metric(value) for name, value in metrics.items()},
                     "num_images": len(evaluator.captions)}) for label, _, metrics in rows]


def split_run_name(name):
    """run_name -> its recipe_name and its number of steps."""
    recipe, steps = re.fullmatch(r"(.*)-(\d+)steps-seed\d+", name).groups()
    return recipe, int(steps)


def fastest_minutes_per_step(runs_dir):
    """{recipe: minutes of a step in its quickest run, of any length, seed or study}, since runs may have
    shared the machine."""
    fastest = {}
    for path in runs_dir.glob("*steps-seed*.json"):
        recipe, steps = split_run_name(path.stem)
        metrics = next(iter(read_metrics(path).values()))
        if "minutes" in metrics:
            fastest[recipe] = min(fastest.get(recipe, math.inf), metrics["minutes"] / steps)
    return fastest


def measure_pace(runs_dir, data_name, rounds=PACE_ROUNDS):
    """Seconds of a training step of every recipe that has been trained on this data, taken in turns by one
    process -> {recipe: seconds}, also written to runs_dir/pace-DATA.json. Runs of different days and machines
    get comparable times so."""
    file_name, steps = data.build_dataset(data_name).name.replace(":", "-"), {}
    with TemporaryDirectory() as folder:
        for experiment in [row for study in STUDIES.values() for row in study.rows]:
            recipe = recipe_name(experiment, file_name)
            if recipe in steps or not any(runs_dir.glob(f"{recipe}-*steps-seed*.json")):
                continue
            cli_args = [*recipe_arguments(experiment, data_name, Path(folder, recipe)), "--steps", "1000",
                        "--eval-samples", "0", "--set", "warmup_steps_d=0"]
            steps[recipe] = train.setup(train.parse_args(cli_args)[1])[2].train_step
        seconds = time_interleaved(steps, rounds)
    pace = {recipe: round_metric(median) for recipe, median in seconds.items()}
    checkpoint.atomic_write_text(runs_dir / f"pace-{file_name}.json", json.dumps(pace, indent=1) + "\n")
    return pace


def read_pace(runs_dir, file_name):
    """What measure_pace has written -> {recipe: minutes of a step}; {} if it has not."""
    path = runs_dir / f"pace-{file_name}.json"
    return {recipe: s / 60 for recipe, s in read_metrics(path).items()} if path.is_file() else {}


def round_metric(value):
    """Five digits, which do not depend on the number of threads."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------ the command line

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.run_study", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "pace"])
    parser.add_argument("--data", default="glyphs", help="glyphs, fashion, or a folder of captioned images")
    parser.add_argument("--seeds", type=int, help="runs per row (default: the study's, 1 or 3)")
    parser.add_argument("--steps", type=int, help="length of every run (default: each row's own)")
    parser.add_argument("--max-rows", type=int, help="train only so many rows of the table (default: all)")
    parser.add_argument("--eval-samples", type=int, default=2000, help="images per measurement")
    parser.add_argument("--no-train", action="store_true", help="print what has been measured, train nothing")
    parser.add_argument("--output-dir", default="runs/studies", help="folder of runs, metrics and tables; "
                        "results: the ones of this repository")
    return parser, parser.parse_args(argv)


def check_args(args, output_dir):
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--output-dir {output_dir}: wanted a folder, {existing} is a file")
    for name in ("seeds", "steps", "max_rows", "eval_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: wanted 1 or more")


def main(argv=None):
    parser, args = parse_args(argv)
    output_dir = Path(args.output_dir)
    command = shlex.join(["python", "-m", "scripts.run_study", *(sys.argv[1:] if argv is None else argv)])
    with clear_exit(parser, "run_study.py"):
        check_args(args, output_dir)
        if args.study == "pace":
            pace = measure_pace(output_dir / "runs", args.data)
            print(markdown_table(["recipe", "s / step"], pace.items()))
            return
        study = STUDIES[args.study]
        dataset = data.build_dataset(study.data or args.data)
        for path in (output_dir / "runs").glob("*.json"):
            read_metrics(path)                                         # a damaged file is reported at once
        evaluator = PanelEvaluator(dataset, args.eval_samples, seed=REAL_SEED)
        (output_dir / "runs").mkdir(parents=True, exist_ok=True)
        try:
            rows = collect_results(args, study, dataset, evaluator)
        except KeyboardInterrupt as stop:
            parser.exit(128 + signal_number(stop), "\nrun_study.py: stopped, metrics are saved; continue "
                        f"with: {command}\n")
        except SystemExit as stop:                                     # of train.py: stopped, or failed
            parser.exit(stop.code, f"run_study.py: the study continues with: {command}\n")
        table = metrics_table(aggregate_seeds(rows), all_columns=True)
        name = f"{args.study}-{dataset.name}"
        checkpoint.atomic_write_text(output_dir / f"study-{name}.json", json.dumps(rows, indent=0))
        checkpoint.atomic_write_text(output_dir / f"{name}.md", table + "\n")
    print(f"\n{table}\n\nwrote {output_dir / name}.md")


if __name__ == "__main__":
    start_program()
    main()
