"""How good is it, and compared to what? Samples, distances, prompt accuracy, tables and pictures.

Never one number alone: the Fréchet distance (distribution) stands beside prompt accuracy (each picture),
precision (fidelity) and recall (diversity), and beside what real pictures score under the same judge and
sample count: no model can be asked to beat the real-vs-real floor. *Excess* is the distance above that floor.

    python evaluate.py --data fashion                                      what is shipped: base, ADT, ADD
    python evaluate.py base runs/adt-glyphs-seed0 --steps 4,10,50
    python evaluate.py --study base add --prompts FILE          people choose: preference.py
Read next: notebooks/"""

import argparse
import json
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import metrics
import models
import parallel
import preference
import sampler
import survival
from denoiser import Denoiser

SHIPPED = {"base": "denoiser", "adt": "adt", "add": "add"}   # name: its file in weights/
JUDGES = {"dino": "FD-DINOv2 (a Dinov2Model's folder or hub id)", "clip": "CLIP score and CMMD (a CLIPModel)",
          "pickscore": "PickScore (a CLIPModel)", "hps": "HPSv2 (a CLIPModel)",
          "aesthetics": "the LAION predictor's state dict, on top of --clip with ViT-L/14"}
BASE_ROWS = [(1, {}), (4, {}), (10, {}), (25, {})]           # (steps, sampler settings) where none are said


# ------------------------------------------------------------------------------------------------ samples

@torch.no_grad()
def draw(model, captions, steps, guidance=1.0, seed=0, shift=1.0, last=1.0, fresh=0.0, visit=None):
    """One picture per caption from fixed noise, a few at a time: yields (b, 3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    # the noise to start from all at once: it does not depend on how many are drawn together
    noise = torch.randn(len(captions), *model.shape, generator=generator).split(model.at_once)
    times = sampler.timeline(model.T, steps, shift, last)
    uncond = model.condition([""])
    for i, x in enumerate(noise):
        cond = model.condition(captions[i * model.at_once:][:len(x)])
        with models.half_precision():
            x0 = sampler.rollout(model, x.to(model.alpha.device), times, cond, uncond, guidance, fresh=fresh,
                                 generator=generator, visit=visit)
            picture = model.decode(x0)
        yield picture.clamp(-1, 1).float().cpu()


def stops(model, steps, settings):
    """The times at which `draw` will stop; ValueError if it cannot be sampled so."""
    return sampler.timeline(model.T, steps, settings.get("shift", 1.), settings.get("last", 1.))


def sample(model, captions, steps, **how):
    """All pictures of `draw` -> (B, 3, H, W)."""
    return torch.cat(list(draw(model, captions, steps, **how)))


# ----------------------------------------------------------------------------------------------- the exam

class Examiner:
    """Real pictures, their captions and the judge, prepared once; then `measure` any model against them."""

    def __init__(self, source, n=2000, seed=1234, split="test", weights=None):
        if n < 200:
            raise ValueError(f"a Fréchet distance over 128 features needs 200 samples or more, not {n}")
        data.check_split(split, source.sizes)
        if source.sizes[split] and 2 * n > source.sizes[split]:
            raise ValueError(f"the {split} split has {source.sizes[split]} pictures: halves that share none "
                             f"leave --samples {source.sizes[split] // 2} at most, not {n}; 200 is the least")
        self.source, self.judge = source, models.judge(source.name, weights)
        heads = [head[-1].out_features for head in self.judge.heads]
        if heads != [len(classes) for classes in source.attributes.values()]:
            raise ValueError(f"the judge of '{source.name}' was trained on another data set of that name")
        both = source.batch(2 * n, torch.Generator().manual_seed(seed), split)
        self.reference, self.asked = both[:n], both[n:]      # disjoint
        self.captions = self.asked.caption                   # to be drawn by the models
        self.features = self.look(self.reference.image)[0]
        self.floor = self.score(self.asked.image)

    def real(self):
        """The pictures that models are measured against -> pictures a few at a time, captions."""
        return self.reference.image.split(250), self.reference.caption

    @torch.no_grad()
    def look(self, images):
        """-> features (N, 128), predicted class per attribute (N, A)."""
        seen = [self.judge(chunk) for chunk in images.split(250)]
        return (torch.cat([f for f, _ in seen]),
                torch.cat([torch.stack([l.argmax(1) for l in logits], 1) for _, logits in seen]))

    def score(self, images):
        """Pictures made for the captions of self.asked, at once or a few at a time -> {figure: value}.
        'accuracy' counts attributes, not whole captions: the share of all named attributes that the judge
        reads off the picture."""
        images = images if torch.is_tensor(images) else torch.cat(list(images))
        features, classes = self.look(images)
        precision, recall = metrics.precision_recall(self.features, features)
        right, named = (classes == self.asked.truth) & self.asked.named, self.asked.named
        per_attribute = {f"accuracy {name}": (right[:, i].sum() / named[:, i].sum()).item()
                         for i, name in enumerate(self.source.attributes)}
        small = [F.avg_pool2d(x, 4).flatten(1) for x in (self.reference.image, images)]
        return {"fd": metrics.frechet(self.features, features),
                "accuracy": (right.sum() / named.sum()).item(), **per_attribute, "precision": precision,
                "recall": recall, "pixel fd": metrics.frechet(*small)}


def measure(examiner, model, steps, guidance=1.0, out=None, **how):
    """What an Examiner or a metrics.Panel says of a model sampled so -> {figure: value}. out: a folder that
    gets the pictures, too."""
    images = draw(model, examiner.captions, steps, guidance=guidance, **how)
    if out:
        images = filed(images, examiner.captions, out)
    figures = {"steps": steps, "guidance": guidance, **examiner.score(images)}
    for name in {"fd", "fd-dinov2"} & figures.keys():
        figures["excess"] = figures[name] - examiner.floor[name]
    return figures


def examine(players, captions, examiner=None, seed=0, out=None):
    """[(name, model, steps, sampler settings)] -> rows for `table` (none without an examiner), the real
    pictures' last, and rows for `picture`, drawn from another noise than the measured ones."""
    rows, shown = [], []
    if examiner and out:                                     # beside them, for other tools to measure against
        deque(filed(*examiner.real(), Path(out, "real pictures")), maxlen=0)  # to the end
    for name, model, steps, settings in players:
        label = f"{name}, {in_steps(steps)}"
        shown.append((label, sample(model, captions, steps, seed=seed + 1, **settings)))
        if examiner:
            seeds = [known for known, _ in rows].count(label)
            folder = Path(out, label.replace("/", "-") + f", seed {seeds + 1}" * bool(seeds)) if out else None
            rows.append((label, measure(examiner, model, steps, out=folder, seed=seed, **settings)))
    if examiner:
        rows.append(("real pictures", {**examiner.floor, "steps": "", "excess": 0.}))
    return rows, shown


def table(rows):
    """[(name, figures)] -> Markdown, one line each. Columns are the figures of the first row."""
    columns = [k for k in rows[0][1] if k != "guidance"]
    return markdown(["", *columns], [(name, *(figures.get(column, "") for column in columns))
                                     for name, figures in rows])


def markdown(columns, rows):
    """Names of columns, rows of cells -> a Markdown table."""
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(digits(c) if isinstance(c, float) else str(c) for c in row)
                              + " |" for row in rows])


def digits(x, n=3):
    """A number with so many digits that count: 1.60, 0.0732, 37.5, 1234."""
    return f"{x:#.{n}g}".rstrip(".") if round(abs(float(x))) < 10 ** n else f"{x:.0f}"


def in_steps(n):
    """'1 step', '2 steps'."""
    return f"{n} step{'s' * (n > 1)}"


# ----------------------------------------------------------------------------------------------- pictures

def panel(rows, captions=None):
    """[(label, images (B, 3, H, W))] -> a figure, one row each, captions above the columns."""
    import textwrap
    from matplotlib.figure import Figure
    columns = len(rows[0][1])
    figure = Figure(figsize=(columns * .95, len(rows) * .95 + .6))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, ((label, images), line) in enumerate(zip(rows, axes)):
        for j, (image, axis) in enumerate(zip(images, line)):
            axis.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if captions and i == 0:
                axis.set_title("\n".join(textwrap.wrap(captions[j], 16)), fontsize=6.5, parse_math=False)
        line[0].set_ylabel("\n".join(textwrap.wrap(label, 16)), fontsize=6.5, parse_math=False)
    figure.tight_layout(pad=.3)
    return figure


def picture(rows, path, captions=None, note=""):
    """The same as a PNG; `note` goes in the file."""
    with survival.whole(path) as partial:
        panel(rows, captions).savefig(partial, format="png", dpi=160, metadata={"Description": note})


def curves(log, path):
    """log.jsonl's rows -> one small plot per quantity, and its mean over a twentieth of the run around."""
    from matplotlib.figure import Figure
    keys = dict.fromkeys(k for row in log for k in row if row[k] is not None and k not in ("step", "seconds"))
    figure = Figure(figsize=(12, 2.3 * -(-len(keys) // 4)))
    for i, key in enumerate(keys, 1):
        points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
        step, value = torch.tensor(points, dtype=torch.float64).T
        near = len(step) // 40
        mean = F.avg_pool1d(value[None], 2 * near + 1, 1, near, count_include_pad=False)[0]
        axis = figure.add_subplot(-(-len(keys) // 4), 4, i)
        axis.plot(step, value, "C0", lw=.5, alpha=.4), axis.plot(step, mean, "C0")
        axis.set_title(key, fontsize=8), axis.tick_params(labelsize=6)
    figure.tight_layout()
    with survival.whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


# ------------------------------------------------------------------------------------------ the command line

class Found(NamedTuple):
    """A model that the command line names."""
    group: str                                               # runs that differ by seed alone share one
    model: Denoiser
    data: str
    judge: str | None                                        # the folder of its judge, if not the shipped
    rows: list                                               # [(steps, sampler settings)] it was made for


def locate(name, a, dataset):
    """A shipped model's name, a run folder or a weights file -> what was found there."""
    path = Path(name)
    if name == "base" and a.model != "tiny":
        model = models.build(a.model, dataset, a.weights, a.size)
        return Found(name, model, dataset, None, [(10, {"guidance": 5.}), (50, {"guidance": 5.})])
    if name in SHIPPED:
        path = models.find(SHIPPED[name], Path(dataset).name)
        if not path.is_file():
            raise FileNotFoundError(f"no '{name}' is shipped for the data set '{dataset}'")
        model = models.build("tiny", dataset, path, a.size)
        return Found(name, model, dataset, None, ways(model.facts.get("rows"), path))
    if not path.exists():
        raise FileNotFoundError(f"{name}: wanted {', '.join(SHIPPED)}, a run folder or a weights file, "
                                "found nothing there")
    plan = survival.read_plan(path / "config.json") if (path / "config.json").is_file() else {}
    model = models.build(plan.get("model", "tiny"), dataset, name, a.size)
    dataset = a.data or plan.get("data") or model.facts.get("data")
    if not isinstance(dataset, str):
        raise ValueError(f"{name} does not say which data set it belongs to: add --data")
    group = " ".join([plan["method"], *plan["set"], f"({plan['steps']} steps)",
                      *(f"{key}={plan[key]}" for key in "model weights features size lora world".split()
                        if plan[key] not in ("tiny", None, 0, 1))]) if plan else str(path)
    rows = ways(model.facts.get("rows") or plan.get("rows"), path)
    return Found(group, model, dataset, None if model.heavy else plan.get("weights"), rows)


def ways(rows, path):
    """[(steps, sampler settings)] as a file names them, checked; BASE_ROWS where it names none."""
    try:
        for steps, settings in rows or []:
            if not isinstance(steps, int) or settings.keys() - {"guidance", "shift", "last", "fresh"} or any(
                    not isinstance(value, (int, float)) for value in settings.values()):
                raise TypeError
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} names no ways to sample that this program knows") from None
    return rows or BASE_ROWS


def gather(rows):
    """[(name, figures)] with repeated names -> one row each, 'mean ± std' where there were more."""
    groups = {}
    for name, figures in rows:
        groups.setdefault(name, []).append(figures)
    gathered = []
    for name, many in groups.items():
        figures = dict(many[0])
        for key, value in figures.items():
            if isinstance(value, float) and len({m[key] for m in many}) > 1:
                values = torch.tensor([m[key] for m in many])
                figures[key] = f"{digits(values.mean())} ± {digits(values.std(), 2)}"
        gathered.append((name if len(many) == 1 else f"{name}, {len(many)} seeds", figures))
    return gathered


def filed(pictures, captions, out):
    """Pictures (b, 3, H, W), a few at a time, pass through; on their way each is written to a folder that any
    tool reads, and train.py too: numbered PNGs and metadata.jsonl."""
    from PIL import Image
    out.mkdir(parents=True, exist_ok=True)
    told = enumerate(captions)
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as table:
        for images in pictures:
            for image, (i, text) in zip(images, told):
                pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(name := out / f"{i:06d}.png")
                table.write(json.dumps({"file_name": name.name, "text": text}, ensure_ascii=False) + "\n")
            yield images


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="*", help=f"{', '.join(SHIPPED)} (shipped; default: all that are), "
                                                  "run folders, weights files")
    parser.add_argument("--data", help="glyphs, fashion or a folder (default: what the run was trained on)")
    parser.add_argument("--model", default="tiny", help=f"whose base: tiny, {', '.join(models.FAMILIES)}")
    parser.add_argument("--weights", help="of a real model's base: a diffusers folder or hub id")
    parser.add_argument("--size", type=int, help="pixels, both sides, of real models")
    for judge, what in JUDGES.items():
        parser.add_argument(f"--{judge}", metavar="WHERE", help=f"measure real models with {what}")
    parser.add_argument("--images", metavar="DIR", help="also keep the pictures that are measured, "
                                                       "a folder for each line of the table")
    parser.add_argument("--steps", help="sampler steps, e.g. 1,2,4,10,50 (default: those of each model)")
    parser.add_argument("--guidance", type=float, help="default: as the model was trained to be used")
    parser.add_argument("--shift", type=float, help="> 1 spends more steps at the noisy end (default: as the "
                                                     "model was trained, mostly 1)")
    parser.add_argument("--fresh", type=float, help="share of new noise in each step, 0 to 1 (default: as "
                                                    "the model was trained: 1 for a student, else 0)")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--split", default="test", help="whose captions: test, held_out (glyphs), train")
    parser.add_argument("--prompt", help="draw this caption eight times instead of measuring")
    parser.add_argument("--study", nargs=2, metavar="MODEL", help="write a page on which people choose "
                        "between the pictures of two models (--steps: one number for each)")
    parser.add_argument("--prompts", default="prompts.txt", metavar="FILE", help="its captions, one per line")
    parser.add_argument("--study-results", nargs="+", metavar="FILE", help="count the votes such pages saved")
    parser.add_argument("--figures", action="store_true", help="draw every picture that figures/ lacks")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", default="samples.png", help="the picture to write")
    return parser, parser.parse_args(argv)


def find(a, names):
    """Models by name, all of one data set -> a Found of each. The shipped ones follow the others'
    data set, or --data, or are of glyphs."""
    located = {name: locate(name, a, a.data) for name in names if name not in SHIPPED}
    dataset = next((one.data for one in located.values()), a.data or "glyphs")
    names = names or [name for name in SHIPPED
                      if name == "base" or models.find(SHIPPED[name], Path(dataset).name).is_file()]
    found = [located.get(name) or locate(name, a, dataset) for name in dict.fromkeys(names)]
    if len({Path(one.data).name for one in found}) > 1:
        raise ValueError("these models belong to different data sets; measure them one data set at a time")
    return found


def check(a):
    """What can be said of the command line before any model is loaded -> the chosen sampler settings."""
    if a.steps and not all(part.isdecimal() for part in a.steps.split(",")):
        raise ValueError(f"--steps {a.steps}: wanted whole numbers with commas, like 4,10,50")
    if not (0 <= (a.fresh or 0) <= 1 and 0 <= (a.guidance or 0) < float("inf")):
        raise ValueError("--fresh is a share between 0 and 1, --guidance a number, 0 or more")
    if not (0 <= a.seed < 2 ** 63 - 1 and a.samples <= 10 ** 6):
        raise ValueError("--seed is from 0 to 2^63 - 2, --samples a million at most")
    if a.weights and a.model == "tiny":
        raise ValueError("--weights is for --model sd15, sdxl, sd3; a tiny model's file replaces 'base'")
    if not Path(a.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {a.out}: there is no such folder")
    if Path(a.out).suffix not in ((".png", ".html") if a.study else (".png",)) or Path(a.out).is_dir():
        raise ValueError(f"--out {a.out}: wanted the name of a PNG")
    if a.images and (not Path(a.images).absolute().parent.is_dir() or Path(a.images).is_file()
                     or Path(a.images).is_dir() and any(Path(a.images).iterdir())):
        raise ValueError(f"--images {a.images}: wanted a new or empty folder")
    return {k: v for k, v in vars(a).items() if k in ("shift", "fresh", "guidance") and v is not None}


def players_of(a):
    """What the command line asks for, checked -> [(label, model, steps, sampler settings)], examiner or None,
    captions of the picture."""
    chosen, found = check(a), find(a, a.models)
    players = []
    for one in found:
        asked = [(int(n), one.rows[0][1]) for n in a.steps.split(",")] if a.steps else one.rows
        asked = [(steps, {**settings, **chosen}) for steps, settings in asked]
        able = []
        for way in asked:                                    # a student cannot take its teacher's fifty steps
            with suppress(ValueError):
                stops(one.model, *way)
                able.append((one.group, one.model, *way))
        if not able:
            stops(one.model, *asked[0])                      # says what is wrong
        players += able
    first = found[0]
    judges = {name: getattr(a, name) for name in JUDGES if getattr(a, name)}
    if judges and not first.model.heavy:
        raise ValueError(f"--{[*judges][0]} is for real models: the tiny one has a judge of its own")
    captions, examiner = [a.prompt] * 8, None
    if a.prompt is None:
        source = data.build(first.data, first.model.size)
        captions = source.batch(16, torch.Generator().manual_seed(7), a.split).caption
    if a.prompt is None and not first.model.heavy:
        examiner = Examiner(source, a.samples, split=a.split, weights=first.judge)
    elif a.prompt is None and judges:
        examiner = metrics.Panel(source, a.samples, judges, parallel.device())
    asked = ["", *captions, *(examiner.captions if examiner else [])]
    for one in found:                                        # all that will be asked; the encoders may go
        one.model.requires_grad_(False).to(parallel.device()).prime(asked)
        one.model.close()
        if one.model.heavy and parallel.device().type == "cuda":
            one.model.halve()
    return players, examiner, captions


def ask(a):
    """--study: the page on which people choose between two models -> where it was written."""
    chosen, captions = check(a), preference.prompts(a.prompts)
    known = dict(zip(dict.fromkeys(a.study), find(a, a.study)))        # they may be one, in other steps
    found = [known[name] for name in a.study]
    steps = [int(n) for n in a.steps.split(",")] if a.steps else [one.rows[0][0] for one in found]
    if len(steps) != 2:
        raise ValueError(f"--steps {a.steps}: --study wants two numbers, one for each model")
    names, pictures = [], []
    for n, one in zip(steps, found):
        settings = {**one.rows[0][1], **chosen}
        stops(one.model, n, settings)
        one.model.to(parallel.device()).prime(captions)
        names.append(f"{one.group}, {in_steps(n)}")
        pictures.append(sample(one.model, captions, n, seed=a.seed, **settings))
    out = Path(a.out).with_suffix(".html")
    survival.write(out, preference.page(names, captions, pictures))
    return out


def main(argv=None):
    parser, a = parse(argv)
    if a.figures:
        import figures
        return figures.main()
    try:
        if a.study_results:
            found = preference.votes(a.study_results)
            print(markdown(*preference.table(preference.results(found))))
            print(f"\n{len(found)} votes; a tie is half a win for both.")
            return
        if a.study:
            print(f"wrote {ask(a)}: open it in a browser, save the votes, then evaluate.py --study-results")
            return
        players, examiner, captions = players_of(a)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    try:
        rows, shown = examine(players, captions, examiner, a.seed, a.images)
        if examiner:
            print(table(gather(rows)))
        typed = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        picture(list(dict(shown).items()), a.out, captions if a.prompt is None else None, note=typed)
        print(f"wrote {a.out}")
    except OSError as error:
        parser.exit(2, f"evaluate.py: {error}\n")


if __name__ == "__main__":
    main()
