"""Every picture of the README, and its tables, from the shipped weights and the logged studies.

    python evaluate.py --figures         (half an hour the first time; what is in figures/ already is kept)

Remove a picture to have it drawn anew. Each carries the command that makes it and the commit it was made at.
What was measured lies in results/.
"""

import hashlib
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import discriminator
import evaluate
import losses
import models
import sampler
import study

HERE = Path(__file__).parent
HOME, RESULTS = HERE / "figures", HERE / "results"
COMMAND = "python evaluate.py --figures"
COLOURS = {"base": "tab:gray", "adt": "tab:blue", "add": "tab:red"}
NAMES = {"base": "base", "adt": "ADT", "add": "ADD student"}
WAYS = {"base": (1, 2, 4, 10, 25, 50), "adt": (2, 4, 10, 25, 50), "add": (1, 2, 4)}


@cache
def shipped(name, dataset):
    """A shipped model and its sampler settings."""
    model = models.build("tiny", dataset, models.find(evaluate.SHIPPED[name], dataset))
    return model, evaluate.ways(model.facts.get("rows"), name)[0][1] if name == "add" else {}


def commit():
    """Which one this is, where git knows."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def path_gradient(model, x, steps, cond, target, **how):
    """The norm of a squared error's gradient, through a path of so many steps from x; how: as for rollout."""
    x0 = sampler.rollout(model, x, sampler.timeline(model.T, steps), cond, **how)
    slopes = torch.autograd.grad((x0 - target).square().mean(), list(model.network.parameters()))
    return torch.stack([slope.norm() for slope in slopes]).norm().item()


def axes(columns, width=4., height=3.):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


# ------------------------------------------------------------------------------------------- pictures

def glyphs():
    """What the base draws, and how: ten captions, fifty steps."""
    captions = data.build("glyphs").batch(12, torch.Generator().manual_seed(7)).caption
    return evaluate.panel([(f"{n} steps", evaluate.sample(shipped("base", "glyphs")[0], captions, n, seed=1,
                                                          guidance=2.)) for n in (4, 10, 50)], captions)


def strip():
    """Base and ADT, the same noise."""
    captions = data.build("fashion").batch(12, torch.Generator().manual_seed(7)).caption
    return evaluate.panel([(f"{NAMES[who]}, {n} steps",
                            evaluate.sample(shipped(who, "fashion")[0], captions, n, seed=1))
                           for who, n in (("base", 10), ("base", 50), ("adt", 10))], captions)


def students():
    """Teacher and student, the same noise, both data sets."""
    rows, captions = [], []
    for dataset in ("fashion", "glyphs"):
        batch = data.build(dataset).batch(6, torch.Generator().manual_seed(7))
        captions.append(batch.caption)
        for who, n in (("base", 1), ("base", 4), ("base", 50), ("add", 1), ("add", 4)):
            model, settings = shipped(who, dataset)
            rows.append((f"{'teacher' if who == 'base' else 'student'}, {evaluate.in_steps(n)}",
                         evaluate.sample(model, batch.caption, n, seed=1, **settings)))
    beside = [(label, torch.cat([left, right])) for (label, left), (_, right) in zip(rows[:5], rows[5:])]
    return evaluate.panel(beside, sum(captions, []))


def path():
    """The guess at the picture along ten steps: before and after ADT."""
    batch, rows = data.build("glyphs").batch(3, torch.Generator().manual_seed(21)), []
    for j, caption in enumerate(batch.caption):
        for who in ("base", "adt"):
            model, seen = shipped(who, "glyphs")[0], []
            noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(j))
            with torch.no_grad():
                sampler.rollout(model, noise, sampler.timeline(model.T, 10), model.condition([caption]),
                                visit=lambda i, x0: seen.append(model.decode(x0)[0].clamp(-1, 1)))
            rows.append((f"{NAMES[who]}: {caption}", torch.stack(seen)))
    return evaluate.panel(rows, [f"step {i + 1}" for i in range(10)])


def gradient():
    """The gradient's norm against the length of the path: cut, and through everything."""
    figure, (axis,) = axes(1, 5.)
    batch = data.build("glyphs").batch(8, torch.Generator().manual_seed(0))
    model, lengths = shipped("base", "glyphs")[0], (1, 2, 5, 10, 25, 50)
    cond, target = model.condition(batch.caption), model.encode(batch.image)
    for label, leak, style in (("input detached (ADT)", 0., "o-"), ("through everything", 1., "s-")):
        norms = []
        for n in lengths:
            x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
            norms.append(path_gradient(model, x, n, cond, target, train=set(range(n)), leak=leak))
        axis.plot(lengths, norms, style, ms=4, label=label, color=COLOURS["add" if leak else "adt"])
    axis.set(xlabel="steps of the path", ylabel="gradient norm", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def steps():
    """FD against sampler steps, three models, two data sets; a wide line is what real pictures score."""
    figure, both = axes(2)
    for axis, dataset in zip(both, ("fashion", "glyphs")):
        examiner = evaluate.Examiner(data.build(dataset), 2000)
        for who, ways in WAYS.items():
            model, settings = shipped(who, dataset)
            weights = models.find(evaluate.SHIPPED[who], dataset).read_bytes()
            known = "base" if who == "base" else f"shipped-{who}-{hashlib.sha256(weights).hexdigest()[:8]}"
            found = dict(study.measured(RESULTS / f"{known}-{dataset}.json", examiner,
                                        [(n, settings) for n in ways], lambda: (model, {})))
            axis.plot([f["steps"] for f in found.values()], [f["fd"] for f in found.values()], "o-", ms=4,
                      color=COLOURS[who], label=NAMES[who])
        axis.axhline(examiner.floor["fd"], color="k", lw=4, alpha=.2)
        axis.set(title=dataset, xlabel="sampler steps", ylabel="FD", xscale="log", yscale="log")
    both[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def minutes():
    """FD against minutes of training, all runs of the studies."""
    (figure, both), found = axes(2), studies()
    for axis, dataset in zip(both, ("fashion", "glyphs")):
        for name, (marker, colour, wanted) in {"adt": ("o", "tab:blue", ", 10 steps"),
                                               "add": ("s", "tab:red", ", 1 step")}.items():
            rows = found.get(f"{name}-{dataset}", [])
            labels = [label for label, f in rows if f.get("minutes") and label.endswith(wanted)]
            for label in dict.fromkeys(labels):
                points = [(f["minutes"], f["fd"]) for other, f in rows if other == label]
                axis.plot(*zip(*points), marker, ms=4, alpha=.7, label=label,
                          color="tab:gray" if label.startswith("diffusion") else colour)
        axis.set(title=dataset, xlabel="minutes of one core", ylabel="FD", xlim=(0, None), ylim=(0, None))
        axis.legend(fontsize=5)
    figure.tight_layout()
    return figure


def attention():
    """Where a critic finds real pictures and four-step pictures of the base wanting: its verdict per token.
    It has learned for 300 steps from fixed pictures. Blue is real, red is fake."""
    torch.manual_seed(0)
    source, (model, _) = data.build("fashion"), shipped("base", "fashion")
    batch = source.batch(1024, torch.Generator().manual_seed(3))
    fakes, cond = evaluate.sample(model, batch.caption, 4, seed=3), model.condition(batch.caption)["pooled"]
    eyes = discriminator.Features(models.features("tiny", "fashion"))
    eyes.level(batch.image[:256].split(64))
    critic = discriminator.Projected(eyes, cond.shape[1])
    optimiser = torch.optim.AdamW(critic.parameters(), 5e-3, betas=(0., .99), weight_decay=0.)
    for _ in range(300):
        rows = torch.randint(16, 1024, (32,))
        discriminator.tighten(critic)
        real, made = (critic(None, images[rows], cond[rows]) for images in (batch.image, fakes))
        optimiser.zero_grad()
        (losses.hinge_real(real) + losses.hinge_fake(made)).backward()
        optimiser.step()
    shown = torch.cat([batch.image[:12], fakes[:12]])
    with torch.no_grad():
        verdicts = critic(None, shown, cond[:12].repeat(2, 1))                # one (24, N) per head
    verdict = sum(F.interpolate(d.view(24, 1, int(d.shape[1] ** .5), -1), 32) for d in verdicts)
    verdict = (verdict / verdict.abs().quantile(.95)).clamp(-1, 1)
    heat = 1 - 2 * torch.cat([verdict.clamp(min=0), verdict.abs(), -verdict.clamp(max=0)], 1)
    rows = [("real", shown[:12]), ("its verdict", heat[:12]),
            ("base, 4 steps", shown[12:]), ("its verdict", heat[12:])]
    return evaluate.panel(rows, batch.caption[:12])


# --------------------------------------------------------------------------------------------- tables

def studies():
    """{study-DATA: [(label, figures)]} of all studies in results/."""
    return {path.stem.removeprefix("study-"): json.loads(path.read_text())
            for path in sorted(RESULTS.glob("study-*.json"))}


COLUMNS = "in the paper", "fd", "excess", "accuracy", "precision", "recall", "minutes"
MARK = re.compile(r"(<!-- study (\S+): (.*?) -->\n).*?(?=<!-- end -->)", re.S)


def filled(readme):
    """The README's text with its tables made from results/. Above each stands its study, and what the lines
    end with that it shows."""
    found = studies()
    def table(match):
        if match[2] not in found:
            return match[0]
        endings = *match[3].split("; "), "real pictures"
        rows = [(label, {key: figures[key] for key in COLUMNS if key in figures})
                for label, figures in found[match[2]] if label.endswith(endings)]
        return f"{match[1]}{evaluate.table(evaluate.gather(rows))}\n"
    return MARK.sub(table, readme)


DRAWN = (glyphs, strip, students, path, gradient, steps, minutes, attention)


def main():
    HOME.mkdir(exist_ok=True), RESULTS.mkdir(exist_ok=True)
    (HOME / "tables.md").write_text("".join(
        f"## `python study.py {name.rpartition('-')[0]} --data {name.rpartition('-')[2]}`\n\n"
        f"{evaluate.table(evaluate.gather(rows))}\n\n" for name, rows in studies().items()))
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text()))
    for draw in DRAWN:
        target = HOME / f"{draw.__name__}.png"
        if not target.exists():
            draw().savefig(target, dpi=160, metadata={"Description": f"{COMMAND} (commit {commit()})"})
        print(f"{target.relative_to(HERE)}: {draw.__doc__.splitlines()[0]}")
