"""Measures tiny models by metrics in which no network of this project has a part (utils/panel.py):

    python -m scripts.panel --data fashion                        the pretrained models: base, ADT, ADD
    python -m scripts.panel base runs/adt-glyphs-seed0 --steps 4,10,50

Real images, captions and noise are others than those of the tables in results/, and beside the panel stand
the tables' own metrics for the same images. The row "real images" is what other real images score.
Read next: utils/panel.py"""

import argparse
import signal
import sys
from collections import Counter

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch

import data
import evaluate
from models.loading import MODEL_FAMILIES, load_efficientnet
from models.named import load_named_models
from utils import arguments, checkpoint, distributed, failures, plotting
from utils.panel import Panel, caption_variance

REAL_SEED, NOISE_SEED = 77, 5                           # evaluate.py uses 1234 and 0
NUM_TRAIN_IMAGES = 60000, 20000                         # at most; of glyphs, which has no last image
NUM_TEST_IMAGES = 20000                                 # from which captions with several images are taken
NUM_CAPTIONS, IMAGES_PER_CAPTION = 20, 12               # for the variance within a caption


def draw_real(dataset, n, split, seed):
    """Up to n different real images -> images, captions. Glyphs are rendered in parts, to save memory."""
    generator = torch.Generator().manual_seed(seed)
    available = dataset.split_sizes[split]
    if available is not None:
        batch = dataset.sample_batch(min(n, available), generator, split)
        return batch.image, batch.caption
    batches = [dataset.sample_batch(2000, generator, split) for _ in range(n // 2000)]
    captions = [caption for batch in batches for caption in batch.caption]
    return torch.cat([batch.image for batch in batches]), captions


class RepeatedCaptions:
    """The captions that most real images share, IMAGES_PER_CAPTION times each, and the variance of the real
    images within these captions."""

    def __init__(self, dataset, seed):
        images, captions = draw_real(dataset, NUM_TEST_IMAGES, "test", seed)
        common = [caption for caption, n in Counter(captions).most_common(NUM_CAPTIONS) if n > 1]
        self.captions = common * IMAGES_PER_CAPTION
        rows = [i for i, caption in enumerate(captions) if caption in common]
        self.real_variance = caption_variance(images[rows], [captions[i] for i in rows]) if rows else None

    def relative_variance(self, model, num_steps, **settings):
        """Variance within a caption of a model's images, relative to real images."""
        images = evaluate.sample(model, self.captions, num_steps, **settings)
        return caption_variance(images, self.captions) / self.real_variance


class PanelEvaluator:
    """The tables' metrics, the panel, and the variance within a caption, for one data set. seed: of the real
    images and their captions."""

    def __init__(self, dataset, n, weights_dir=None, seed=REAL_SEED):
        self.evaluator = evaluate.Evaluator(dataset, n, seed=seed, weights_dir=weights_dir)
        self.captions = self.evaluator.captions
        sizes = dataset.split_sizes
        has_unseen_images = sizes["train"] is None or sizes["train"] != sizes["test"]
        train = None
        if has_unseen_images:
            train, _ = draw_real(dataset, NUM_TRAIN_IMAGES[sizes["train"] is None], "train", seed)
        device = distributed.get_device()
        self.panel = Panel(self.evaluator.reference_batch.image, self.evaluator.eval_batch.image,
                           load_efficientnet().to(device).extract_features, train, device)
        self.repeated = RepeatedCaptions(dataset, seed)
        self.real_metrics = {**self.evaluator.real_metrics, **self.panel.real_metrics}
        if self.repeated.real_variance:
            self.real_metrics["caption_variance"] = 1.

    def compute_metrics(self, images):
        """Batches of images made for self.captions -> {metric: value}."""
        images = torch.cat(list(images))
        return {**self.evaluator.compute_metrics(images), **self.panel.compute_metrics(images)}

    def measure(self, model, num_steps, seed, settings):
        """A model sampled in num_steps -> {metric: value}. seed: of the noise."""
        scores = evaluate.evaluate_model(self, model, num_steps, seed=seed, **settings)
        if self.repeated.real_variance:
            scores["caption_variance"] = self.repeated.relative_variance(model, num_steps, seed=seed + 1,
                                                                         **settings)
        return scores


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.panel", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_sampling_arguments(parser, evaluate.PRETRAINED, MODEL_FAMILIES)
    parser.set_defaults(seed=NOISE_SEED)
    parser.add_argument("--eval-samples", type=int, default=2000, help="images to measure per model")
    parser.add_argument("--output", default="panel.md", help="the table to write")
    return parser, parser.parse_args(argv)


def measure_all(args):
    """-> rows of the table, [(label, {metric: value})]."""
    arguments.check_sampling_arguments(args, output_suffix=".md")
    if args.model != "tiny":
        raise ValueError(f"--model {args.model}: the panel measures tiny models; evaluate.py measures large "
                         "ones with --dinov2 and --clip")
    loaded = load_named_models(args.models, evaluate.PRETRAINED, args.data, resolution=args.resolution)
    if any(item.model.is_large for item in loaded):
        raise ValueError("the panel measures tiny models; evaluate.py measures large ones with --dinov2 and "
                         "--clip")
    models = [(item, config) for item in loaded for config in evaluate.possible_configs(item, args)]
    dataset = data.build_dataset(loaded[0].dataset_name)
    panel_evaluator = PanelEvaluator(dataset, args.eval_samples, loaded[0].weights_dir)
    rows = []
    for item, (num_steps, settings) in models:
        item.model.requires_grad_(False).to(distributed.get_device())
        scores = panel_evaluator.measure(item.model, num_steps, args.seed, settings)
        scores = {name: scores[name] for name in panel_evaluator.real_metrics}
        rows.append((f"{item.group}, {plotting.format_steps(num_steps)}", scores))
    return [*plotting.aggregate_seeds(rows), ("real images", panel_evaluator.real_metrics)]


def main(argv=None):
    parser, args = parse_args(argv)
    with failures.clear_exit(parser, "panel", "fewer --eval-samples need less"):
        rows = measure_all(args)
        table = (f"{plotting.metrics_table(rows)}\n\n{args.eval_samples:,} images in each row. Lower is "
                 "better for fd, fd_efficientnet, sw_pixel, sw_patch, border, grain; auc is best at .5; "
                 "nyquist, nearest and caption_variance at 1; higher is better for the others.")
        print(table)
        checkpoint.atomic_write_text(args.output, table + "\n")


if __name__ == "__main__":
    failures.start_program()
    main()
