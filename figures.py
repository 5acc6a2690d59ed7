"""Every picture of the README, and its tables, from the shipped weights and the logged studies.

    python evaluate.py --figures         (half an hour the first time; what is in figures/ already is kept)

Remove a picture to have it drawn anew; one whose function has changed is. Each carries the command that makes
it and the commit it was made at.
What was measured lies in results/.
"""

import hashlib
import inspect
import json
import re
import subprocess
import textwrap
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
WAYS = {"base": (1, 2, 4, 10, 25, 50), "adt": (2, 4, 10, 20, 50), "add": (1, 2, 4)}


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


def known(who, dataset):
    """The file in results/ with what was measured of a shipped model."""
    weights = models.find(evaluate.SHIPPED[who], dataset).read_bytes()
    name = "base" if who == "base" else f"shipped-{who}-{hashlib.sha256(weights).hexdigest()[:8]}"
    return RESULTS / f"{name}-{dataset}.json"


def measured(who, dataset, examiner, ways):
    """Figures of a shipped model in so many steps each, from results/ where they are known."""
    model, settings = shipped(who, dataset)
    found = study.measured(known(who, dataset), examiner, [(n, settings) for n in ways], lambda: (model, {}))
    return [figures for _, figures in found]


def beside(rows, columns=5):
    """Rows (label, who, steps) of both data sets, each with its Fréchet distance; the first captions of a
    fixed seed, the same noise in a column."""
    from matplotlib.figure import Figure
    height = .985 * len(rows) + .8
    figure = Figure(figsize=(2 * columns + 1.6, height))
    for half, dataset in zip(figure.subfigures(1, 2, wspace=.02), ("fashion", "glyphs")):
        source = data.build(dataset)
        examiner = evaluate.Examiner(source, 2000)
        captions = source.batch(12, torch.Generator().manual_seed(7)).caption[:columns]
        lines = half.subplots(len(rows), columns)
        for line, (label, who, n) in zip(lines, rows):
            model, settings = shipped(who, dataset)
            fd = measured(who, dataset, examiner, [n])[0]["fd"]
            line[0].set_ylabel(f"{label}\nFD {fd:.2f}", rotation=0, ha="right", va="center", fontsize=8.5)
            for axis, image in zip(line, evaluate.sample(model, captions, n, seed=1, **settings)):
                axis.imshow((image.permute(1, 2, 0) / 2 + .5).clamp(0, 1).numpy(), interpolation="nearest")
                axis.set_xticks([]), axis.set_yticks([]), axis.spines[:].set_visible(False)
        for axis, caption in zip(lines[0], captions):
            axis.set_title(textwrap.fill(caption.removeprefix("a photo of "), 15), fontsize=7.5)
        half.subplots_adjust(.15, .01, .995, 1 - .75 / height, .04, .04)
    return figure


# ------------------------------------------------------------------------------------------- pictures

def glyphs():
    """What the base draws in 4, 10 and 50 steps, with guidance 2."""
    captions = data.build("glyphs").batch(12, torch.Generator().manual_seed(7)).caption
    return evaluate.panel([(f"{n} steps", evaluate.sample(shipped("base", "glyphs")[0], captions, n, seed=1,
                                                          guidance=2.)) for n in (4, 10, 50)], captions)


def strip():
    """Base and ADT, the same noise, both data sets."""
    return beside([(f"{NAMES[who]}\n{n} steps", who, n)
                   for who, n in (("base", 10), ("base", 50), ("adt", 10))])


def students():
    """Teacher and student, the same noise, both data sets."""
    return beside([(f"{'teacher' if who == 'base' else 'student'}\n{evaluate.in_steps(n)}", who, n)
                   for who, n in (("base", 1), ("base", 4), ("base", 50), ("add", 1), ("add", 4))])


def path():
    """The guess at the picture along ten steps: before and after ADT."""
    rows, shown = [], (0, 1, 2, 4, 6, 9)
    for dataset in ("fashion", "glyphs"):
        batch = data.build(dataset).batch(2, torch.Generator().manual_seed(21))
        for j, caption in enumerate(batch.caption):
            for who in ("base", "adt"):
                model, seen = shipped(who, dataset)[0], []
                noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(j))
                with torch.no_grad():
                    sampler.rollout(model, noise, sampler.timeline(model.T, 10), model.condition([caption]),
                                    visit=lambda i, x0: seen.append(model.decode(x0)[0].clamp(-1, 1)))
                rows.append((f"{NAMES[who]}: {caption}", torch.stack(seen)[list(shown)]))
    return evaluate.panel(rows, [f"step {i + 1}" for i in shown])


def gradient():
    """The gradient's norm against the length of the path: cut, and through everything. Twelve batches of
    eight pictures, a thin line each; the thick one is their mean."""
    figure, (axis,) = axes(1, 5.)
    source, model, lengths = data.build("glyphs"), shipped("base", "glyphs")[0], (1, 2, 5, 10, 25, 50)
    for label, leak, colour in (("input detached (ADT)", 0., "adt"), ("through everything", 1., "add")):
        norms = torch.zeros(12, len(lengths))
        for i in range(12):
            batch = source.batch(8, torch.Generator().manual_seed(i))
            cond, target = model.condition(batch.caption), model.encode(batch.image)
            for j, n in enumerate(lengths):
                x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(i))
                norms[i, j] = path_gradient(model, x, n, cond, target, train=set(range(n)), leak=leak)
        axis.plot(lengths, norms.T, lw=.5, alpha=.5, color=COLOURS[colour])
        axis.plot(lengths, norms.mean(0), "o-", ms=4, label=label, color=COLOURS[colour])
    axis.set(xlabel="steps of the path", ylabel="gradient norm", xscale="log", yscale="log", xticks=lengths,
             xticklabels=lengths, yticks=(.1, 1, 10), yticklabels=(.1, 1, 10))
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def steps():
    """FD against sampler steps, three models, two data sets; a wide line is what real pictures score."""
    figure, both = axes(2)
    for axis, dataset in zip(both, ("fashion", "glyphs")):
        examiner = evaluate.Examiner(data.build(dataset), 2000)
        for who, ways in WAYS.items():
            fds = [found["fd"] for found in measured(who, dataset, examiner, ways)]
            axis.plot(ways, fds, "o-", ms=4, color=COLOURS[who], label=NAMES[who])
        axis.axhline(examiner.floor["fd"], color="k", lw=4, alpha=.2)
        axis.text(1, examiner.floor["fd"] * .9, "other real pictures", va="top", fontsize=8, color=".4")
        axis.set(title=dataset, xlabel="sampler steps", ylabel="Fréchet distance", xscale="log",
                 yscale="log", ylim=(.45, 60))
        axis.set_xticks(WAYS["base"], labels=WAYS["base"])
        axis.set_yticks((1, 2, 5, 10, 20, 50), labels=(1, 2, 5, 10, 20, 50))
        axis.minorticks_off()
    both[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def minutes():
    """FD against minutes of training, all lengths of the studies: mean and spread of the seeds. At zero
    minutes the base, as many steps as the method's own; the wide line is what real pictures score."""
    (figure, both), found = axes(2), studies()
    for axis, dataset in zip(both, ("fashion", "glyphs")):
        for name, word, way in (("adt", "diffusion loss alone", ", 10 steps"),
                                ("adt", "ADT, the default", ", 10 steps"),
                                ("add", "ADD", ", 1 step")):
            rows, points = found.get(f"{name}-{dataset}", []), {}
            for label, f in rows:
                if label.startswith((word, "base")) and label.endswith(way):
                    points.setdefault(f.get("minutes") or 0., []).append(f["fd"])
            if len(points) < 2:
                continue
            x, fds = zip(*((m, torch.tensor(points[m])) for m in sorted(points)))
            gap = [[float(fd.mean() - fd.min()) for fd in fds], [float(fd.max() - fd.mean()) for fd in fds]]
            colour = "tab:gray" if word[0] == "d" else COLOURS[name]
            axis.errorbar(x, [float(fd.mean()) for fd in fds], gap, marker="o", ms=4, lw=1, ls=":", capsize=2,
                          color=colour, label=f"{word.partition(',')[0]}{way}")
        floor = [f["fd"] for label, f in found.get(f"add-{dataset}", []) if label == "real pictures"]
        axis.axhline(floor[0], color="k", lw=4, alpha=.2) if floor else None
        ticks = (.7, 1, 2, 3, 5, 10, 20, 50)
        axis.set(title=dataset, xlabel="minutes of one core", ylabel="Fréchet distance", yscale="log")
        axis.set_yticks(ticks, labels=ticks)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.tight_layout()
    return figure


def attention():
    """Where a critic finds real pictures and four-step pictures of the base wanting: the verdicts of its
    finest head on the picture; above, the mean of all heads' on the real and on the made one. It has learned
    for 300 steps from fixed pictures."""
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
    overall = sum(d.mean(1) for d in verdicts) / len(verdicts)
    fine = verdicts[0]                                       # the stem's head has most places
    side = int(fine.shape[1] ** .5)
    fine = F.interpolate(fine.view(24, 1, side, side), 32, mode="bilinear")
    fine = (fine / fine.abs().quantile(.98)).clamp(-1, 1)
    heat = 1 - 2 * torch.cat([fine.clamp(min=0), fine.abs(), -fine.clamp(max=0)], 1)
    over = .35 * shown + .65 * heat
    rows = [("real", shown[:12]), ("blue: real, red: made", over[:12]),
            ("base, 4 steps", shown[12:]), ("blue: real, red: made", over[12:])]
    return evaluate.panel(rows, [f"{caption.removeprefix('a photo of ')}: {real:+.1f}, {made:+.1f}" for
                                 caption, real, made in zip(batch.caption, overall[:12], overall[12:])])


# --------------------------------------------------------------------------------------------- tables

def studies():
    """{study-DATA: [(label, figures)]} of all studies in results/."""
    return {path.stem.removeprefix("study-"): json.loads(path.read_text())
            for path in sorted(RESULTS.glob("study-*.json"))}


COLUMNS = "in the paper", "fd", "excess", "accuracy", "precision", "recall", "minutes"
MARK = re.compile(r"(<!-- study (\S+): (.*?) -->\n).*?(?=<!-- end -->)", re.S)


def filled(readme):
    """The README's text with its tables made from results/. Above each stands its study, what the lines end
    with that it shows, and a column that it leaves out."""
    found = studies()
    def table(match):
        if match[2] not in found:
            return match[0]
        shown, _, without = match[3].partition(" without ")
        endings = *shown.split("; "), "real pictures"
        rows = [(label, {key: figures[key] for key in COLUMNS if key in figures and key != without})
                for label, figures in found[match[2]] if label.endswith(endings)]
        return f"{match[1]}{evaluate.table(evaluate.gather(rows))}\n"
    return MARK.sub(table, readme)


DRAWN = (glyphs, strip, students, path, gradient, steps, minutes, attention)


def fingerprint(draw):
    """Of the function that draws a picture: another function, another picture."""
    return hashlib.sha256(inspect.getsource(draw).encode()).hexdigest()[:8]


def fresh(draw, path):
    """Whether a picture is there, and by the function as it is now."""
    from PIL import Image
    return path.is_file() and fingerprint(draw) in Image.open(path).info.get("Description", "")


def main():
    HOME.mkdir(exist_ok=True), RESULTS.mkdir(exist_ok=True)
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text()))
    for draw in DRAWN:
        target = HOME / f"{draw.__name__}.png"
        if not fresh(draw, target):
            draw().savefig(target, dpi=160, metadata={
                "Description": f"{COMMAND} (commit {commit()}, drawn by {fingerprint(draw)})"})
        print(f"{target.relative_to(HERE)}: {draw.__doc__.splitlines()[0]}")
