"""Many runs, one table: the results of the README, each made by one command.

    python study.py adt --data glyphs            ADT, its rivals and plain fine-tuning, three seeds
    python study.py adt-ablations                what each part of ADT is worth, one seed
    python study.py add --data fashion           the ADD student beside its teacher, three seeds
    python study.py add-table1                   Table 1 of the ADD paper, in small

Each run lives in a folder of its own under runs/, what was measured of it in a file beside that folder. What
is finished is not repeated and what was interrupted goes on, so a study may be stopped at will; two may share
the machine (OMP_NUM_THREADS=1 for each). With --out results they start from what the authors measured.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import data
import evaluate
import models
import survival
import train


@dataclass
class Row:
    """One line of a table. said: what the paper measured for its counterpart."""
    label: str
    settings: list = field(default_factory=list)             # key=value, as after --set
    method: str = "adt"
    steps: int | None = None                                 # default: the method's
    said: str = ""


@dataclass
class Study:
    """A table. A way to sample is (steps, sampler settings); a run's own, unless `at` says others."""
    rows: list
    base: list                                               # the ways in which the base is measured
    at: list | None = None                                   # every run
    also: list = field(default_factory=list)                 # the first seed's runs
    seeds: int = 1


TEN = [(10, {})]
OTHER_PATHS = [(4, {}), (20, {}), (10, {"shift": 3.}), (10, {"fresh": .5}), (10, {"guidance": 2.})]

# beside a row, the paper's own figures: COCO, one student step, FID (less is better) / CLIP score (more is)
# By default, λ = 2.5, the adversary's gradient is 23 times the distillation's, whose kind then hardly counts.
LOUD = "lambda_distill=25"
TABLE_1 = [Row(label, settings, "add", 300, said) for label, settings, said in [
    ("features: ViT (the default run)", [], "DINOv2-S 20.6 / .319"),
    ("features: another architecture", ["features=cnn"], "CLIP-L 23.3 / .308"),
    ("features: never trained", ["features=random"], ""),
    ("condition: none", ["condition=none"], "21.2 / .302"),
    ("condition: text", ["condition=text"], "21.2 / .307"),
    ("condition: image", ["condition=image"], "21.1 / .316"),
    ("condition: both (the default run)", [], "20.6 / .319"),
    ("student from random weights", ["init=random"], "293.6 / .065"),
    ("adversarial loss alone", ["lambda_distill=0"], "20.8 / .315"),
    ("distillation alone", ["lambda_adv=0"], "315.6 / .076"),
    ("both (the default run)", [], "20.6 / .319"),
    ("hinge: of the difference (the default run)", [], ""),
    ("hinge: of each, the paper's", ["relative=false"], "20.6 / .319"),
    ("λ = 25: exponential, squared", [LOUD], "20.6 / .319"),
    ("λ = 25: SDS", [LOUD, "weighting=sds"], "22.3 / .325"),
    ("λ = 25: NFSD", [LOUD, "weighting=nfsd"], "21.8 / .327"),
    ("λ = 25: 2 teacher steps", [LOUD, "teacher_steps=2"], "20.8 / .321"),
    ("λ = 25: 4 teacher steps", [LOUD, "teacher_steps=4"], "20.3 / .317"),
    ("λ = 25: L1", [LOUD, "distance=l1"], "squared is best"),
    ("λ = 25: pseudo-Huber", [LOUD, "distance=huber"], "squared is best")]]

STUDIES = {
    "adt": Study([
        Row("diffusion loss alone, 2,050 steps", method="diffusion", steps=2050),
        Row("similarity of features, image-to-image", ["variant=similarity", "start=image"]),
        Row("an unpaired discriminator", ["variant=projected"]),
        Row("ADT, the default"),
        Row("ADT, the default, three times as long", steps=900)],
        base=[*TEN, *OTHER_PATHS, (50, {}), (50, {"guidance": 2.})], at=TEN, also=OTHER_PATHS, seeds=3),
    "adt-ablations": Study([
        Row("ADT, as it is"),
        Row("no diffusion loss", ["lambda_diff=0"]),
        Row("unpaired discriminator", ["variant=projected"]),
        Row("similarity discriminator", ["variant=similarity"]),
        Row("image-to-image start", ["start=image"]),
        Row("gradient through inputs", ["leak=1"]),
        Row("K = 1", ["train_steps=1"]),
        Row("K = 5", ["train_steps=5"]),
        Row("K = all", ["pick=all"]),
        Row("last K = 2", ["pick=last"]),
        Row("no augmentation", ["augment=0"])],
        base=TEN, at=TEN),
    "add": Study([
        Row("ADD student, the default command", method="add"),
        Row("ADD student, trained for longer", ["lr=5e-5", "terminal=.75"], "add", 4000)],
        base=[*((n, {}) for n in (1, 2, 4, 8, 25, 50)), (25, {"guidance": 2.})], seeds=3),
    "add-table1": Study(TABLE_1, base=[(1, {}), (25, {})]),
}


def trained(row, dataset, seed, steps, out):
    """The row's finished run in the folder `out`, training what is left of it -> model, {"minutes": m}."""
    weights = out / "denoiser.safetensors"
    if not (weights.is_file() and models.load(weights)[1]["steps"] == steps):
        go = ["--steps", str(steps), "--samples", "0"]
        if (out / "checkpoint.pt").is_file():
            go += ["--resume", str(out)]
        else:
            go += ["--method", row.method, "--data", dataset, "--seed", str(seed), "--out", str(out),
                   "--overwrite"]
            for setting in row.settings:
                go += ["--set", setting]
        train.main(go)
    clock = [json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()]
    usual = statistics.median(b - a for a, b in zip([0., *clock], clock))     # pauses do not count
    return models.build("tiny", dataset, out), {"minutes": usual * steps / 60}


def name(steps, settings):
    """'10 steps, shift 3': a way to sample, in words; a student has but one."""
    words = [evaluate.in_steps(steps)]
    return ", ".join(words + [f"{k} {v:g}" for k, v in settings.items() if "last" not in settings])


def measured(cache, examiner, ways, opened):
    """(way in words, figures) of a model, each measured once in the life of the file `cache`.
    opened: function -> model, more figures; called only if there is something to measure. None: what is not
    known yet is left out."""
    try:
        known, model = dict(json.loads(cache.read_text())) if cache.is_file() else {}, None
    except (ValueError, TypeError):
        raise ValueError(f"{cache} is damaged: remove it, and its run is measured again") from None
    for steps, settings in ways:
        way = name(steps, settings)
        key = f"{way} ({len(examiner.captions)} pictures)"
        if key not in known:
            if opened is None:
                continue
            model, beside = (model, beside) if model else opened()
            known[key] = {**evaluate.measure(examiner, model, steps, **settings), **beside}
            survival.write(cache, json.dumps(known, indent=1) + "\n")
        yield way, known[key]


def rows_of(a, plan, folder, source, examiner, base):
    """The study's rows, in the order of its table: (label, figures), what is missing trained and measured."""
    lines, runs, pace = [], [], {}
    known = folder / f"base-{source.name}.json"
    for way, figures in measured(known, examiner, plan.base, None if a.so_far else lambda: (base, {})):
        lines.append((f"base, {way}", "", {**figures, "minutes": ""}))
    for seed, row in itertools.product(range(a.seeds or plan.seeds), plan.rows):
        steps = a.steps or row.steps or train.METHODS[row.method][2]
        out = folder / "-".join([row.method, source.name, *row.settings, f"{steps}steps", f"seed{seed}"])
        own = [how for who, *how in train.settle(row.method, row.settings).rows() if who == "after"]
        ways = [*(plan.at or own), *(plan.also if seed == 0 else [])]
        make = None if a.so_far else lambda: trained(row, a.data, seed, steps, out)
        for way, figures in measured(out.with_name(f"{out.name}.json"), examiner, ways, make):
            recipe = row.method, *row.settings
            runs.append((row, way, figures, recipe, steps))
            pace[recipe] = min(pace.get(recipe, 1e9), figures["minutes"] / steps)
    for row, way, figures, recipe, steps in runs:            # of runs that shared the machine, the quickest
        lines.append((f"{row.label}, {way}", row.said, {**figures, "minutes": pace[recipe] * steps}))
    lines.append(("real pictures", "", {**examiner.floor, "steps": "", "excess": 0., "minutes": ""}))
    if any(row.said for row in plan.rows):
        lines = [(label, said, {"in the paper": said, **figures}) for label, said, figures in lines]
    return [(label, {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()})
            for label, _, figures in lines]                  # what counts, whatever the number of threads


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--data", default="glyphs", help="glyphs, fashion, or a folder of captioned images")
    parser.add_argument("--seeds", type=int, help="runs per row (default: the study's, 1 or 3)")
    parser.add_argument("--steps", type=int, help="length of every run (default: each row's own)")
    parser.add_argument("--samples", type=int, default=train.SAMPLES, help="pictures per figure")
    parser.add_argument("--so-far", action="store_true", help="only what has been measured; train nothing")
    parser.add_argument("--out", default="runs", help="where runs and measurements are kept; "
                        "results: continue the authors' own")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, a = parse(argv)
    plan, folder = STUDIES[a.study], Path(a.out)
    try:
        if min(1 if number is None else number for number in (a.seeds, a.steps, a.samples)) < 1:
            raise ValueError("--seeds, --steps and --samples are 1 or more")
        source = data.build(a.data)
        examiner = evaluate.Examiner(source, a.samples)
        base = models.build("tiny", source.name)
        folder.mkdir(parents=True, exist_ok=True)
        lines = rows_of(a, plan, folder, source, examiner, base)
    except (ValueError, OSError) as error:
        parser.exit(2, f"study.py: {error}\n")
    text = evaluate.table(evaluate.gather(lines))
    survival.write(folder / f"study-{a.study}-{source.name}.json", json.dumps(lines, indent=0))
    survival.write(folder / f"{a.study}-{source.name}.md", text + "\n")
    print(f"\n{text}\n\nwrote {folder}/{a.study}-{source.name}.md")


if __name__ == "__main__":
    main()
