"""What a run shows: log, grids of samples and curves while it trains, table and summary at the end."""

import gc
import hashlib
import json
import math
import time
from pathlib import Path

from utils import checkpoint, distributed, plotting
from utils.checkpoint import atomic_write_text, read_log


class Reporter:
    """log.jsonl, samples_STEP.png and curves.png in the run folder, and a tracker if one is wanted. Process 0
    has one; in the others its methods do nothing but keep the rows."""

    def __init__(self, run_dir, first_step, run_config):
        self.run_dir, self.tracker = run_dir, None
        if run_config["report_to"] and distributed.get_rank() == 0:
            self.tracker = TRACKERS[run_config["report_to"]](run_dir, run_config)
        self.log = checkpoint.JsonlLog(run_dir / "log.jsonl", first_step)
        seconds_before = self.log.rows[-1]["seconds"] if self.log.rows else 0.
        self.start_time = time.time() - seconds_before

    def add_step(self, step, logs, max_rows):
        """logs: {name: value} of Trainer.train_step. max_rows: how many rows stay in memory."""
        row = {name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in logs.items()}
        self.log.append({"step": step, **row, "seconds": round(time.time() - self.start_time, 2)},
                        max_rows=max_rows)
        if self.tracker:
            self.tracker.add_scalars(step, {name: value for name, value in row.items() if value is not None})

    def add_samples(self, step, image_rows, captions):
        """image_rows: [(label, (B, 3, H, W))], of evaluate.evaluate_models, from fixed noise."""
        plotting.save_image_grid(image_rows, self.run_dir / f"samples_{step:06d}.png", captions)
        rows = read_log(self.log.path, max_rows=500)
        if rows:                                            # none before the first step
            plotting.plot_training_curves(rows, self.run_dir / "curves.png")
        for i, (_, samples) in enumerate(image_rows):
            if self.tracker:
                self.tracker.add_images(step, samples, captions, "samples" if i == 0 else f"samples_{i + 1}")
        gc.collect()                                        # matplotlib's figures hold reference cycles

    def close(self):
        if self.tracker:
            self.tracker.close()


class TensorBoard:
    """Losses and samples for `tensorboard --logdir runs`, in the run folder."""

    def __init__(self, run_dir, run_config):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def add_scalars(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def add_images(self, step, samples, captions, name="samples"):
        self.writer.add_images(name, samples * .5 + .5, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """Losses and samples for Weights & Biases, as a run with the name of the run folder."""

    def __init__(self, run_dir, run_config):
        import wandb
        self.wandb = wandb
        self.run = wandb.init(project="adversarial-diffusion", name=run_dir.name, dir=str(run_dir),
                              config=run_config)

    def add_scalars(self, step, values):
        self.run.log(values, step=step)

    def add_images(self, step, samples, captions, name="samples"):
        images = [self.wandb.Image(plotting.to_pil(sample), caption=caption)
                  for sample, caption in zip(samples, captions)]
        self.run.log({name: images}, step=step)

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_tracker(name):
    """ValueError if the package of --report-to is not installed."""
    import importlib.util
    if name and importlib.util.find_spec(name) is None:
        raise ValueError(f"--report-to {name}: the package is not installed: pip install {name}")


def save_report(run_dir, rows, image_rows, captions, evaluator, recorded):
    """before_after.png and, if anything was measured, result.json, table.md, and the table on the screen. In
    process 0; the others do nothing. rows, image_rows: of evaluate.evaluate_models; evaluator: what measured
    the rows, or None; recorded: of recorded_metrics."""
    if distributed.get_rank() > 0:
        return
    plotting.save_image_grid(image_rows, run_dir / "before_after.png", captions)
    if rows:
        num_images = len(evaluator.captions)
        table = table_with_recorded(rows, recorded, num_images)
        atomic_write_text(run_dir / "result.json", json.dumps(dict(rows), indent=1))
        atomic_write_text(run_dir / "table.md", table + "\n")
        print(f"\n{table}\n\n{summary_sentence(rows, num_images)}")
    else:
        print("no table: evaluate.py measures Stable Diffusion; the tiny model needs 400 images or more in "
              "--data")
    print(f"images before and after: {run_dir}/before_after.png    curves: {run_dir}/curves.png")


ENOUGH_IMAGES = 1000                   # for Fréchet distances that tell small gains from chance
RESULTS_DIR = Path(__file__).parent.parent / "results" / "runs"


def results_name(name, weights, dataset_name):
    """Name of the file with the metrics of a model in weights/. It contains a hash of the file of weights, so
    that other weights are measured anew."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    return f"{name}-{digest}-{dataset_name}.json"


def recorded_metrics(run_config, weights_dir, evaluator):
    """Metrics of the model weights_dir/DATA/denoiser.safetensors that results/runs/ holds -> {(label in a
    run's table, guidance scale): metrics}. They were measured with the real images, captions and noise that a
    run takes, which need not measure them again. {} for other weights, data or numbers of images."""
    if run_config["pretrained"] or run_config["data"] not in ("glyphs", "fashion") or not evaluator:
        return {}
    weights = weights_dir / run_config["data"] / "denoiser.safetensors"
    path = RESULTS_DIR / results_name("base", weights, run_config["data"])
    if not path.is_file():
        return {}
    names = ["steps", "guidance_scale", *evaluator.real_metrics, "fd_excess"]
    of_as_many_images = [metrics for key, metrics in json.loads(path.read_text()).items()
                         if key.endswith(f"({len(evaluator.captions)} images)")]
    return {(f"before, {plotting.format_steps(metrics['steps'])}", metrics["guidance_scale"]):
            {name: metrics[name] for name in names} for metrics in of_as_many_images}


def table_with_recorded(rows, recorded, num_images):
    """The table of a run, with a row for the initial model in its best number of steps, from
    recorded_metrics."""
    if not recorded:
        return plotting.metrics_table(rows, num_images=num_images)
    without_guidance = {label: metrics for (label, scale), metrics in recorded.items() if scale == 1}
    best = min(without_guidance, key=lambda label: without_guidance[label]["fd"])
    if best not in dict(rows):
        rows = [(best, without_guidance[best]), *rows]
    rows = sorted(rows, key=lambda row: row[1]["steps"] if row[0].startswith("before") else math.inf)
    labels = [label for label, metrics in rows if metrics in recorded.values()]
    table = plotting.metrics_table(rows, num_images=num_images)
    num_steps = best.removeprefix("before, ")
    return f"{table} From results/runs/: {'; '.join(labels)}. Before training fd is lowest in {num_steps}."


def summary_sentence(rows, num_images):
    """The best row after training beside the initial model in as many steps and in its best number of them,
    in a sentence, and a second one where so few images were measured that small differences are chance."""
    before, after = ({label.removeprefix(f"{when}, "): metrics["fd"] for label, metrics in rows
                      if label.startswith(when)} for when in ("before", "after"))
    steps = min(after, key=after.get)
    best = min(before, key=before.get)
    reference = steps if steps in before else best
    word = "closer to" if after[steps] < before[reference] else "not closer to"
    others = [f"{best} before: {before[best]:.2f}"] if best != reference else []
    others.append(f"other real images: {rows[-1][1]['fd']:.2f}")
    text = (f"Images sampled in {steps} after training are {word} real images than in {reference} before: "
            f"Frechet distance {after[steps]:.2f}, was {before[reference]:.2f} ({'; '.join(others)}).")
    if num_images < ENOUGH_IMAGES:
        text += (f"\n{num_images:,} images are few: a small difference of two such distances may be chance; "
                 "--eval-samples 2000 tells more.")
    return text
