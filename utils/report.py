"""What a run shows: sample grids and curves while it trains, the table and its verdict at the end."""

import gc
import json

from utils import plotting
from utils.checkpoint import atomic_write_text, read_log


def save_progress(run_dir, step, samples, log):
    """samples_STEP.png, from fixed noise, and curves.png."""
    plotting.save_image_grid([(f"step {step}", samples)], run_dir / f"samples_{step:06d}.png")
    plotting.plot_training_curves(read_log(log.path, max_rows=500), run_dir / "curves.png")
    gc.collect()                                            # matplotlib's figures hold reference cycles


def save_report(run_dir, rows, image_rows, captions, num_images):
    """before_after.png and, if anything was measured, result.json, table.md, and the table on the screen.
    rows, image_rows: of evaluate.evaluate_models; num_images: measured in each row."""
    plotting.save_image_grid(image_rows, run_dir / "before_after.png", captions)
    if rows:
        table = plotting.metrics_table(rows, num_images=num_images)
        atomic_write_text(run_dir / "result.json", json.dumps(dict(rows), indent=1))
        atomic_write_text(run_dir / "table.md", table + "\n")
        print(f"\n{table}\n\n{verdict(rows)}")
    else:
        print("no table: measuring needs 400 images or more in --data; Stable Diffusion is measured by "
              "evaluate.py")
    print(f"images before and after: {run_dir}/before_after.png    curves: {run_dir}/curves.png")


def verdict(rows):
    """One sentence on the best rows before and after training."""
    before = [(label, metrics) for label, metrics in rows if label.startswith("before")]
    after = [(label, metrics) for label, metrics in rows if label.startswith("after")]
    _, real = rows[-1]
    label, best = min(after, key=lambda row: row[1]["fd"])
    reference, base = min(before, key=lambda row: row[1]["fd"])
    word = "closer to" if best["fd"] < base["fd"] else "not closer to"
    return (f"Images sampled in {label.removeprefix('after, ')} after training are {word} real images than "
            f"in {reference.removeprefix('before, ')} before: Frechet distance {best['fd']:.2f}, was "
            f"{base['fd']:.2f} (other real images: {real['fd']:.2f}).")
