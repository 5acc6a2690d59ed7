"""Tables, image grids, training curves, and images on disk.

    rows of a table    [(label, {metric: value})]
    rows of a grid     [(label, images (B, 3, H, W) in [-1, 1])]

Read next: evaluate.py"""

import json
import math
import sys
import textwrap
from itertools import islice, product
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import atomic_write

# ------------------------------------------------------------------------------------------------- numbers

def format_number(x, digits=3):
    """A number with so many significant digits: 1.60, 0.0732, 37.5, 1234."""
    if round(abs(float(x))) < 10 ** digits:
        return f"{x:#.{digits}g}".rstrip(".")
    return f"{x:.0f}"


def format_steps(n):
    """'1 step', '2 steps'."""
    return f"{n} step" if n == 1 else f"{n} steps"


# -------------------------------------------------------------------------------------------------- tables

FIRST_COLUMNS = ("steps", "guidance_scale", "paper", "fd", "fd_dinov2", "fd_excess", "accuracy", "precision",
                 "recall")


def markdown_table(columns, rows):
    """Names of columns and rows of cells -> a Markdown table."""
    header = f"| {' | '.join(columns)} |".replace("|  |", "| |")
    lines = [header, "|---" * len(columns) + "|"]
    for row in rows:
        cells = [format_number(cell) if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_detail(metric):
    """Whether only a table with all columns has this metric: it is in the label, or part of another one."""
    return metric in ("steps", "guidance_scale", "fd_pixel") or metric.startswith("accuracy ")


def metrics_table(rows, all_columns=False, num_images=None):
    """[(label, {metric: value})] -> Markdown, one line each; the columns are the metrics of the first row.
    num_images: images behind each row; a line under the table states it."""
    columns = [name for name in rows[0][1] if all_columns or not is_detail(name)]
    columns.sort(key=lambda name: FIRST_COLUMNS.index(name) if name in FIRST_COLUMNS else len(FIRST_COLUMNS))
    cells = [(label, *(metrics.get(name, "") for name in columns)) for label, metrics in rows]
    table = markdown_table(["", *columns], cells)
    if num_images is None:
        return table
    lower_is_better = [name for name in columns if name.startswith(("fd", "cmmd"))]
    note = f"{num_images:,} images in each row"
    if lower_is_better:
        note += f"; lower is better for {', '.join(lower_is_better)}, higher for the others"
    return f"{table}\n\n{note}."


def aggregate_seeds(rows):
    """[(label, {metric: value})] with repeated labels -> one row per label, with 'mean ± std' of the metrics
    that differ between the seeds."""
    groups = {}
    for label, metrics in rows:
        groups.setdefault(label, []).append(metrics)
    aggregated = []
    for label, runs in groups.items():
        merged = dict(runs[0])
        for name, value in runs[0].items():
            if isinstance(value, float) and len({run[name] for run in runs}) > 1:
                values = torch.tensor([run[name] for run in runs])
                merged[name] = f"{format_number(values.mean())} ± {format_number(values.std(), 2)}"
        aggregated.append((label if len(runs) == 1 else f"{label}, {len(runs)} seeds", merged))
    return aggregated


def show_progress(image_batches, total, label):
    """Yield the batches and show on stderr how many of `total` images are done: on a terminal after a second,
    elsewhere (a log file) only if it takes longer than 20 seconds."""
    on_terminal = sys.stderr.isatty()
    progress = tqdm(total=total, desc=label, leave=False, disable=distributed.get_rank() > 0,
                    delay=1 if on_terminal else 20, mininterval=.5 if on_terminal else 20,
                    bar_format="{desc} {n:,}/{total:,} images [{elapsed}<{remaining}]")
    with progress:
        for images in image_batches:
            yield images
            progress.update(len(images))


# --------------------------------------------------------------------------------------------------- grids

FONT_SIZE = 8                                           # points
LINE = 1.25 * FONT_SIZE / 72                            # inches of one line of text
CELL = 1.04                                             # inches of one image and the gap beside it
SMALL = 64                                              # pixels; up to here single pixels are shown
MAX_COLUMNS = 10                                        # of a grid; longer rows are broken


def wrap(text, width, max_lines, num_last=1):
    """Text in at most max_lines lines of `width` characters; what does not fit is left out before the last
    num_last lines, which tell the labels of a grid apart."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width)]
    if len(lines) > max_lines:
        lines = [*lines[:max_lines - num_last - 1], "…", *lines[-num_last:]]
    return lines


def image_grid(rows, captions=None, heading=""):
    """[(label, images (B, 3, H, W))] -> a matplotlib figure: one row per label, a caption above each column,
    a heading above all. More than MAX_COLUMNS columns are broken into blocks, one below the other."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    num_images = len(rows[0][1])
    num_blocks = math.ceil(num_images / MAX_COLUMNS)
    columns = math.ceil(num_images / num_blocks)
    labels = [wrap(label, 20, 6, num_last=2) for label, _ in rows]     # steps and guidance are at the end
    titles = [wrap(caption, 15, 5) for caption in captions or []][:num_images]
    left = .62 * FONT_SIZE / 72 * max((len(line) for label in labels for line in label), default=0) + .1
    title_height = LINE * max((len(title) for title in titles), default=0) + .08
    block_height = title_height + CELL * len(rows)
    headings = wrap(heading, max(20, int(16 * columns)), 3)
    first_top = LINE * 1.2 * len(headings) + (.08 if headings else 0)
    width, height = left + CELL * columns, first_top + block_height * num_blocks

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes([0, 0, 1, 1])                # its coordinates are inches, y downwards
    for block, (i, (_, images)) in product(range(num_blocks), enumerate(rows)):
        top = first_top + block * block_height + title_height + CELL * i
        axes.text(left - .08, top + .5, "\n".join(labels[i]), ha="right", va="center", fontsize=FONT_SIZE,
                  parse_math=False)
        for j, image in enumerate(islice(images, block * columns, (block + 1) * columns)):
            x = left + CELL * j
            pixels = ((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()
            interpolation = "nearest" if len(pixels) <= SMALL else "antialiased"
            axes.imshow(pixels, interpolation=interpolation, extent=(x, x + 1, top + 1, top))
            axes.add_patch(Rectangle((x, top), 1, 1, fill=False, ec=".85", lw=.5))
    for k, title in enumerate(titles):
        block, j = divmod(k, columns)
        bottom = first_top + block * block_height + title_height - .04
        axes.text(left + CELL * j + .5, bottom, "\n".join(title), ha="center", va="bottom",
                  fontsize=FONT_SIZE, parse_math=False)
    axes.text(left, .06, "\n".join(headings), va="top", fontsize=FONT_SIZE + 1, parse_math=False)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.axis("off")
    return figure


def save_image_grid(rows, path, captions=None, note="", heading=""):
    """Write image_grid as a PNG; `note` becomes its description. Large images are shown with up to 512
    pixels a side."""
    dpi = max(160, min(rows[0][1].shape[-1], 512))
    with atomic_write(path) as tmp_path:
        image_grid(rows, captions, heading).savefig(tmp_path, format="png", dpi=dpi,
                                                    metadata={"Description": note})


# -------------------------------------------------------------------------------------------------- curves

CURVE_LABELS = {                                        # start of a key of log.jsonl: label of the y axis
    "loss": "loss × its weight", "grad_norm": "norm", "acc_d": "share of logits right",
    "skipped_steps": "steps",
}
HEALTHY_BANDS = {"acc_d_real": (.5, .8), "acc_d_fake": (.5, .8)}


def curve_label(key):
    """Label of the y axis for a key of log.jsonl."""
    return next((label for start, label in CURVE_LABELS.items() if key.startswith(start)), "value")


def plot_training_curves(log, path):
    """Rows of log.jsonl -> a PNG with one plot per quantity: each step, and the mean over a window of a
    twentieth of the run. Where a healthy range is known, it is shaded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    keys = dict.fromkeys(key for row in log for key, value in row.items()
                         if value is not None and key not in ("step", "seconds"))
    num_rows = max(1, math.ceil(len(keys) / 4))
    figure = Figure(figsize=(13, 2.6 * num_rows))
    figure.subplots_adjust(.055, .56 / (2.6 * num_rows), .99, 1 - .3 / (2.6 * num_rows), .28, .48)
    for i, key in enumerate(keys, 1):
        points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
        step, value = torch.tensor(points, dtype=torch.float64).T
        half_window = len(step) // 40
        mean = F.avg_pool1d(value[None], 2 * half_window + 1, 1, half_window, count_include_pad=False)[0]
        axes = figure.add_subplot(num_rows, 4, i)
        axes.plot(step, value, "C0", lw=.5, alpha=.4)
        axes.plot(step, mean, "C0", marker="." if len(step) < 4 else None)
        if key in HEALTHY_BANDS:
            axes.axhspan(*HEALTHY_BANDS[key], color="C2", alpha=.15, lw=0, label="healthy")
            axes.set_ylim(-.02, 1.02)
            axes.legend(fontsize=FONT_SIZE, loc="lower right")
        axes.set_title(key, fontsize=FONT_SIZE + 2)
        axes.set_xlabel("training step", fontsize=FONT_SIZE + 1)
        axes.set_ylabel(curve_label(key), fontsize=FONT_SIZE + 1)
        axes.tick_params(labelsize=FONT_SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=110)


# --------------------------------------------------------------------------------------------------- files

def to_pil(image):
    """(3, H, W) in [-1, 1] -> a PIL image, 8 bits."""
    from PIL import Image
    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def save_images(image_batches, captions, image_dir):
    """Write images to a folder that --data and other tools read: numbered PNGs and metadata.jsonl. A
    generator: it yields each batch (b, 3, H, W) once its images are written, so that a large set can be
    written and measured without being in memory at once."""
    image_dir = Path(image_dir)
    image_dir.mkdir(parents=True, exist_ok=True)
    indexed_captions = enumerate(captions)              # goes on from batch to batch
    with open(image_dir / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for images in image_batches:
            for image, (i, caption) in zip(images, indexed_captions):
                name = f"{i:06d}.png"
                to_pil(image).save(image_dir / name)
                line = {"file_name": name, "text": caption}
                metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
            yield images
