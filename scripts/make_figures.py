"""Draws the figures in docs/figures/ and fills the tables of README.md and docs/results.md.

    python -m scripts.make_figures                  what is missing or out of date, at most half an hour
    python -m scripts.make_figures fd_vs_steps      this figure again

Each PNG contains the command that draws it, the commit, and a hash of the source of its function; with
another hash it is out of date. Measurements are read from results/ and repeated only if they are missing.
A table stands between <!-- study NAME: … --> and <!-- end -->; see fill_tables."""

import argparse
import hashlib
import inspect
import json
import re
import signal
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
import torch.nn.functional as F

import data
import discriminator
import losses
import sampler
from evaluate import PRETRAINED, check_sampling_configs, sample
from models.loading import load_backbone, load_model, weights_path
from scripts.panel import PanelEvaluator
from scripts.run_study import REAL_SEED, cached_metrics
from utils.failures import clear_exit, start_program
from utils.plotting import aggregate_seeds, format_steps, image_grid, metrics_table
from utils.report import results_name

ROOT = Path(__file__).parent.parent
FIGURES_DIR, RESULTS_DIR = ROOT / "docs" / "figures", ROOT / "results"
PAGES = ROOT / "README.md", ROOT / "docs" / "results.md"               # with tables
COMMAND = "python -m scripts.make_figures"
COLOURS = {"base": "tab:gray", "adt": "tab:blue", "add": "tab:red"}
LABELS = {"base": "base", "adt": "ADT", "add": "ADD student"}
STEPS = {"base": (1, 2, 4, 10, 25, 50), "adt": (1, 2, 4, 10, 25, 50), "add": (1, 2, 4)}
NUM_IMAGES = 2000                                                      # in each row of a table
FONT_SIZE = 8                                                          # points, the smallest text


# ------------------------------------------------------------------------------------------------ helpers

@cache
def load_pretrained(name, dataset_name):
    """base, adt or add -> the model in weights/ and the settings of its sampler."""
    path = weights_path(PRETRAINED[name], dataset_name)
    model = load_model("tiny", dataset_name, path)
    if name != "add":
        return model, {}
    return model, check_sampling_configs(model.metadata.get("sampling_configs"), path)[0][1]


@cache
def build_evaluator(dataset_name):
    return PanelEvaluator(data.build_dataset(dataset_name), NUM_IMAGES, seed=REAL_SEED)


def git_commit():
    """Short hash of the current commit, "unknown" without git."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def rollout_grad_norm(model, x, num_steps, cond, target, **settings):
    """Gradient norm of the squared error of a rollout from x; settings: of sampler.rollout."""
    x0 = sampler.rollout(model, x, sampler.make_timesteps(model.T, num_steps), cond, **settings)
    grads = torch.autograd.grad((x0 - target).square().mean(), list(model.network.parameters()))
    return torch.stack([grad.norm() for grad in grads]).norm().item()


@torch.no_grad()
def predictions_of_path(model, caption, num_steps, seed):
    """The prediction of x0 after every step of a sampling path, as images (num_steps, 3, H, W)."""
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    x0s = []
    sampler.rollout(model, noise, sampler.make_timesteps(model.T, num_steps), model.encode_prompts([caption]),
                    callback=lambda i, x0: x0s.append(x0))
    return torch.cat([model.decode(x0).clamp(-1, 1) for x0 in x0s])


def make_axes(columns, width=4., height=3.):
    """A matplotlib figure with a row of axes; width and height of each in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def set_log_ticks(axis, ticks):
    """Ticks of a logarithmic axis (axes.xaxis or axes.yaxis) as plain numbers."""
    axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def pretrained_results(name, dataset_name):
    """The file in results/runs/ with the metrics of a model in weights/."""
    return RESULTS_DIR / "runs" / results_name(name if name == "base" else f"pretrained-{name}",
                                               weights_path(PRETRAINED[name], dataset_name), dataset_name)


def pretrained_metrics(name, dataset_name, evaluator, steps):
    """Metrics of a model in weights/ with these numbers of sampler steps -> a list of dicts."""
    model, settings = load_pretrained(name, dataset_name)
    configs = [(num_steps, settings) for num_steps in steps]
    rows = cached_metrics(pretrained_results(name, dataset_name), evaluator, configs, lambda: (model, {}))
    return [metrics for _, metrics in rows]


def side_by_side(rows, columns=5):
    """rows: [(label, name of the model, number of sampler steps)] -> a figure with fashion on the left and
    glyphs on the right. Each column has one caption and one noise, each row its Fréchet distance."""
    from matplotlib.figure import Figure
    height = .985 * len(rows) + .85
    figure = Figure(figsize=(2.1 * columns + 1.7, height))
    for subfig, dataset_name in zip(figure.subfigures(1, 2, wspace=.02), ("fashion", "glyphs")):
        dataset = data.build_dataset(dataset_name)
        evaluator = build_evaluator(dataset_name)
        captions = dataset.sample_batch(12, torch.Generator().manual_seed(7)).caption[:columns]
        grid = subfig.subplots(len(rows), columns)
        for axes_row, (label, name, num_steps) in zip(grid, rows):
            model, settings = load_pretrained(name, dataset_name)
            fd = pretrained_metrics(name, dataset_name, evaluator, [num_steps])[0]["fd"]
            axes_row[0].set_ylabel(f"{label}\nFD {fd:.2f}", rotation=0, ha="right", va="center",
                                   fontsize=FONT_SIZE)
            images = sample(model, captions, num_steps, seed=1, **settings)
            for axes, image in zip(axes_row, images):
                axes.imshow((image.permute(1, 2, 0) / 2 + .5).clamp(0, 1).numpy(), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
        for axes, caption in zip(grid[0], captions):
            axes.set_title(textwrap.fill(caption.removeprefix("a photo of "), 14), fontsize=FONT_SIZE)
        subfig.subplots_adjust(.15, .01, .995, 1 - .8 / height, .04, .04)
    return figure


# ------------------------------------------------------------------------------------------------ figures

def base_samples():
    """Samples of the base model of glyphs in 4, 10 and 50 steps with guidance scale 2."""
    captions = data.build_dataset("glyphs").sample_batch(10, torch.Generator().manual_seed(7)).caption
    model, _ = load_pretrained("base", "glyphs")
    return image_grid([(format_steps(n), sample(model, captions, n, seed=1, guidance_scale=2.))
                       for n in (4, 10, 50)], captions)


def few_steps():
    """Few sampler steps before and after each method, from the same noise, on both data sets."""
    return side_by_side([(f"{LABELS[name]}\n{format_steps(n)}", name, n) for name, n in (
        ("base", 1), ("add", 1), ("base", 4), ("adt", 4), ("base", 50))])


def base_vs_adt():
    """Samples of the base model and of ADT from the same noise, on both data sets."""
    return side_by_side([(f"{LABELS[name]}\n{format_steps(n)}", name, n)
                         for name, n in (("base", 4), ("adt", 4), ("base", 10), ("adt", 10))])


def teacher_vs_student():
    """Samples of the teacher and of the ADD student from the same noise, on both data sets."""
    return side_by_side([(f"{role}\n{format_steps(n)}", name, n) for role, name, n in (
        ("teacher", "base", 1), ("teacher", "base", 4), ("teacher", "base", 50),
        ("student", "add", 1), ("student", "add", 4))])


def rollout_x0():
    """The prediction of x0 along a path of ten steps, before and after ADT."""
    rows, shown = [], (0, 1, 2, 4, 6, 9)
    for dataset_name in ("fashion", "glyphs"):
        batch = data.build_dataset(dataset_name).sample_batch(2, torch.Generator().manual_seed(21))
        for seed, caption in enumerate(batch.caption):
            for name in ("base", "adt"):
                images = predictions_of_path(load_pretrained(name, dataset_name)[0], caption, 10, seed)
                rows.append((f"{LABELS[name]}: {caption}", images[list(shown)]))
    return image_grid(rows, [f"step {i + 1}" for i in shown])


def grad_norm_vs_steps():
    """Norm of the gradient against the length of the path, with and without ADT's rule. Thin lines: twelve
    batches of eight images; thick lines: their mean."""
    figure, (axes,) = make_axes(1, 5.)
    dataset, (model, _) = data.build_dataset("glyphs"), load_pretrained("base", "glyphs")
    steps = (1, 2, 5, 10, 25, 50)
    for label, input_grad_scale, colour in (("input detached (ADT)", 0., "adt"),
                                            ("plain backpropagation", 1., "add")):
        norms = torch.zeros(12, len(steps))
        for i in range(12):
            batch = dataset.sample_batch(8, torch.Generator().manual_seed(i))
            cond, target = model.encode_prompts(batch.caption), model.encode(batch.image)
            for j, n in enumerate(steps):
                x = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(i))
                norms[i, j] = rollout_grad_norm(model, x, n, cond, target, grad_steps=set(range(n)),
                                                input_grad_scale=input_grad_scale)
        axes.plot(steps, norms.T, lw=.5, alpha=.5, color=COLOURS[colour])
        axes.plot(steps, norms.mean(0), "o-", ms=4, label=label, color=COLOURS[colour])
    axes.set(xlabel="sampler steps of the path", ylabel="gradient norm of the squared error", xscale="log",
             yscale="log")
    set_log_ticks(axes.xaxis, steps)
    set_log_ticks(axes.yaxis, (.1, 1, 10))
    axes.legend(fontsize=FONT_SIZE)
    figure.tight_layout()
    return figure


def fd_vs_steps():
    """Fréchet distance against sampler steps: three models, two data sets. Wide line: other real images."""
    figure, panels = make_axes(2)
    for axes, dataset_name in zip(panels, ("fashion", "glyphs")):
        evaluator = build_evaluator(dataset_name)
        for name, steps in STEPS.items():
            fds = [metrics["fd"] for metrics in pretrained_metrics(name, dataset_name, evaluator, steps)]
            axes.plot(steps, fds, "o-", ms=4, color=COLOURS[name], label=LABELS[name])
        real_fd = evaluator.real_metrics["fd"]
        axes.axhline(real_fd, color="k", lw=4, alpha=.2)
        axes.text(1, real_fd * .9, "other real images", va="top", fontsize=FONT_SIZE, color=".4")
        axes.set(title=dataset_name, xlabel="sampler steps", ylabel="Fréchet distance, 2,000 images",
                 xscale="log", yscale="log", ylim=(.45, 60))
        set_log_ticks(axes.xaxis, STEPS["base"])
        set_log_ticks(axes.yaxis, (1, 2, 5, 10, 20, 50))
    panels[0].legend(fontsize=FONT_SIZE)
    figure.tight_layout()
    return figure


def fd_vs_minutes():
    """Two Fréchet distances against minutes of training: mean and range of the seeds, for all lengths in the
    studies. At zero minutes: the base model with the same sampler steps. Wide line: other real images."""
    from matplotlib.figure import Figure
    figure, studies = Figure(figsize=(8.8, 6.2)), load_studies()
    panels = figure.subplots(2, 2, sharex="col")
    series = [("adt", "diffusion loss only", "10 steps", COLOURS["base"]),
              ("adt", "ADT", "10 steps", COLOURS["adt"]), ("adt", "ADT, tuned", "10 steps", "tab:cyan"),
              ("add", "ADD", "1 step", COLOURS["add"]), ("add", "ADD, tuned", "1 step", "tab:orange")]
    longer = {"adt": "adt-longer", "add": "add-ladder"}
    metrics_shown = [("fd", "eval classifier"), ("fd_efficientnet", "EfficientNet")]
    for axes_row, (metric, title) in zip(panels, metrics_shown):
        for axes, dataset_name in zip(axes_row, ("fashion", "glyphs")):
            for method, label, config, colour in series:
                rows = studies.get(f"{method}-{dataset_name}", [])
                known = {row_label for row_label, _ in rows}
                rows = [row for row in studies.get(f"{longer[method]}-{dataset_name}", [])
                        if row[0] not in known] + rows
                values = {}
                for row_label, metrics in rows:
                    row_label = re.sub(r", [\d,]+ training steps", "", row_label)
                    if row_label in (f"base, {config}", f"{label}, {config}"):
                        values.setdefault(metrics["minutes"] or 0., []).append(metrics[metric])
                minutes = sorted(values)
                means = [sum(values[m]) / len(values[m]) for m in minutes]
                below = [mean - min(values[m]) for mean, m in zip(means, minutes)]
                above = [max(values[m]) - mean for mean, m in zip(means, minutes)]
                axes.errorbar(minutes, means, [below, above], marker="o", ms=4, lw=1, ls=":", capsize=2,
                              color=colour, label=f"{label}, {config}")
                for _, metrics in rows[-1:]:                           # real images
                    axes.axhline(metrics[metric], color="k", lw=4, alpha=.1)
            axes.set(yscale="log", ylabel=f"Fréchet distance, {title}")
    for axes, dataset_name in zip(panels[0], ("fashion", "glyphs")):
        axes.set_title(dataset_name)
    for axes in panels[1]:
        axes.set_xlabel("training time on one core, minutes")
    for axes_row, ticks in zip(panels, ((1, 2, 5, 10, 20, 50), (10, 20, 50, 100, 200, 500, 1000))):
        for axes in axes_row:
            set_log_ticks(axes.yaxis, ticks)
    panels[0, 0].legend(fontsize=FONT_SIZE)
    figure.tight_layout()
    return figure


def logit_map():
    """Logits of a discriminator at each location, for real images and four-step samples of the base model.
    Overlay: the head with the finest map; numbers: mean over all heads on the real image and on the sample.
    The discriminator was trained for 300 steps on fixed images."""
    torch.manual_seed(0)
    dataset, (model, _) = data.build_dataset("fashion"), load_pretrained("base", "fashion")
    batch = dataset.sample_batch(1024, torch.Generator().manual_seed(3))
    fakes = sample(model, batch.caption, 4, seed=3)
    cond = model.encode_prompts(batch.caption)["pooled"]
    backbone = discriminator.build_backbone(load_backbone("tiny", "fashion"), batch.image[:256])
    disc = discriminator.ProjectedDiscriminator(backbone, cond.shape[1])
    optimizer = torch.optim.AdamW(disc.parameters(), 5e-3, betas=(0., .99), weight_decay=0.)
    for _ in range(300):
        rows = torch.randint(16, 1024, (32,))
        discriminator.update_spectral_norm(disc)
        logits_real = disc(None, batch.image[rows], cond[rows])
        logits_fake = disc(None, fakes[rows], cond[rows])
        optimizer.zero_grad()
        (losses.hinge_real(logits_real) + losses.hinge_fake(logits_fake)).backward()
        optimizer.step()
    shown = torch.cat([batch.image[:10], fakes[:10]])
    with torch.no_grad():
        logits = disc(None, shown, cond[:10].repeat(2, 1))             # one (20, N) per head
    mean_logits = sum(d.mean(1) for d in logits) / len(logits)
    fine_logits = logits[0]                                            # of the first layer
    side = int(fine_logits.shape[1] ** .5)
    fine_logits = F.interpolate(fine_logits.view(20, 1, side, side), 32, mode="bilinear")
    fine_logits = (fine_logits / fine_logits.abs().quantile(.98)).clamp(-1, 1)
    heatmap = 1 - 2 * torch.cat([fine_logits.clamp(min=0), fine_logits.abs(), -fine_logits.clamp(max=0)], 1)
    overlay = .35 * shown + .65 * heatmap
    rows = [("real", shown[:10]), ("logits, blue: > 0, red: < 0", overlay[:10]),
            ("base, 4 steps", shown[10:]), ("logits, blue: > 0, red: < 0", overlay[10:])]
    return image_grid(rows, [f"{caption.removeprefix('a photo of ')}: {real:+.1f}, {fake:+.1f}" for
                             caption, real, fake in zip(batch.caption, mean_logits[:10], mean_logits[10:])])


FIGURES = {function.__name__: function for function in (
    few_steps, base_samples, base_vs_adt, teacher_vs_student, rollout_x0, grad_norm_vs_steps, fd_vs_steps,
    fd_vs_minutes, logit_map)}


def source_hash(plot_fn):
    """Hash of the source of a figure's function."""
    return hashlib.sha256(inspect.getsource(plot_fn).encode()).hexdigest()[:8]


def is_up_to_date(plot_fn, path):
    """Whether the PNG exists and was drawn by the function as it is."""
    from PIL import Image
    return path.is_file() and source_hash(plot_fn) in Image.open(path).info.get("Description", "")


# ------------------------------------------------------------------------------------------------- tables

COLUMNS = ("paper", "fd", "accuracy", "precision", "recall", "fd_efficientnet", "sw_patch", "auc",
           "caption_variance", "minutes")
TABLE_RE = re.compile(r"(<!-- study (\S+): (.*?) -->\n).*?(?=<!-- end -->)", re.S)


def load_studies():
    """-> {STUDY-DATA: [(label, metrics)]} of all studies in results/. ValueError if one has other numbers of
    images than the pages say."""
    studies = {}
    for path in sorted(RESULTS_DIR.glob("study-*.json")):
        rows = json.loads(path.read_text())
        found = {metrics.get("num_images", NUM_IMAGES) for _, metrics in rows}
        if found != {NUM_IMAGES}:
            numbers = ", ".join(str(number) for number in sorted(found))
            raise ValueError(f"{path} was measured with {numbers} images in a row, wanted {NUM_IMAGES}: "
                             "measure it again without --eval-samples")
        studies[path.stem.removeprefix("study-")] = rows
    return studies


def fill_tables(text):
    """The text of a page with its tables made from results/. In <!-- study adt-glyphs: A; B without C -->,
    A and B are what the labels of the rows to show end with, and C is a column to leave out."""
    studies = load_studies()

    def fill(match):
        header, name, filters = match.groups()
        if name not in studies:
            return match[0]
        suffixes, _, hidden_column = filters.partition(" without ")
        suffixes = (*suffixes.split("; "), "real images")
        rows = [(label, {key: metrics[key] for key in COLUMNS if key in metrics and key != hidden_column})
                for label, metrics in studies[name] if label.endswith(suffixes)]
        return f"{header}{metrics_table(aggregate_seeds(rows))}\n"

    return TABLE_RE.sub(fill, text)


# --------------------------------------------------------------------------------------- the command line

def main(argv=None):
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"draw these: {', '.join(FIGURES)} "
                        "(default: those that are missing or out of date)")
    parser.add_argument("--tables-only", action="store_true", help="fill the tables and draw nothing")
    args = parser.parse_args(argv)
    with clear_exit(parser, "make_figures.py"):
        for name in args.figures:
            if name not in FIGURES:
                raise ValueError(f"no figure '{name}': wanted {', '.join(FIGURES)}")
        for page in PAGES:
            if page.is_file():
                page.write_text(fill_tables(page.read_text()))
        FIGURES_DIR.mkdir(parents=True, exist_ok=True)
        figures = {} if args.tables_only else FIGURES
        for name, plot_fn in figures.items():
            path = FIGURES_DIR / f"{name}.png"
            is_requested = name in args.figures or not args.figures and not is_up_to_date(plot_fn, path)
            if is_requested:
                description = f"{COMMAND} (commit {git_commit()}, source {source_hash(plot_fn)})"
                plot_fn().savefig(path, dpi=160, metadata={"Description": description})
                print(f"{path.relative_to(ROOT)}: {plot_fn.__doc__.splitlines()[0]}")


if __name__ == "__main__":
    start_program()
    main()
