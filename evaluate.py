"""Sample from models, measure them, print a table and draw a grid of images.

The Fréchet distance (FD) measures the distribution, accuracy each image's agreement with its caption,
precision the fidelity, recall the diversity. The row "real images" shows what other real images score with
the same classifier and number of images. fd_excess = FD - FD of real images.

    python evaluate.py --data fashion                         the pretrained models: base, ADT, ADD
    python evaluate.py base runs/adt-glyphs-seed0 --steps 4,10,50
    python evaluate.py --prompt "a yellow umbrella on blue"   eight images per model, no measuring
Read next: scripts/run_study.py, which makes the tables of results/"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
import torch.nn.functional as F

import data
import sampler
from models.loading import MODEL_FAMILIES, load_eval_classifier
from models.named import check_sampling_configs, load_named_models
from utils import arguments, distributed, failures, launch, metrics, plotting
from utils.batch import check_num_samples
from utils.checkpoint import short_file_name
from utils.precision import compute_dtype, without_tf32

PRETRAINED = {"base": "denoiser", "adt": "adt", "add": "add"}          # name: its file in weights/DATA/
DEFAULT_SAMPLING_CONFIGS = [(1, {}), (4, {}), (10, {}), (25, {})]      # (num_steps, settings)
PROMPT_MAX_STEPS = 10                                                  # of the defaults, with --prompt


# ------------------------------------------------------------------------------------------------- samples

@torch.no_grad()
def sample_batches(model, captions, num_steps, guidance_scale=1.0, seed=0, timestep_shift=1.0, t_max=1.0,
                   stochasticity=0.0, callback=None):
    """One image per caption, the noise fixed by the seed; settings as in sampler.py. Yields (b, 3, H, W) in
    [-1, 1], fp32 on the CPU, with b = model.sample_batch_size or less. All processes yield the same; of a
    small model each samples its share of the batches."""
    generator = torch.Generator().manual_seed(seed)
    # all initial noise is drawn first: it must not depend on the batch size
    noise = torch.randn(len(captions), *model.latent_shape, generator=generator)
    timesteps = sampler.make_timesteps(model.T, num_steps, timestep_shift, t_max)
    uncond = model.encode_prompts([""])

    def sample_batch(i, x):
        cond = model.encode_prompts(captions[i * model.sample_batch_size:][:len(x)])
        with model.autocast():
            x0 = sampler.rollout(model, x.to(model.alpha.device), timesteps, cond, uncond, guidance_scale,
                                 stochasticity=stochasticity, generator=generator, callback=callback)
            return model.decode(x0).clamp(-1, 1).float().cpu()

    def skip_batch(i, x):
        sampler.skip_noise(x.shape, num_steps, stochasticity, generator)
        return torch.zeros(len(x), 3, model.resolution, model.resolution)

    skip = None if model.is_large or model.alpha.is_cuda else skip_batch  # large: perhaps sharded
    yield from distributed.alternate(enumerate(noise.split(model.sample_batch_size)), sample_batch, skip)


def sample(model, captions, num_steps, **settings):
    """All images of sample_batches -> (B, 3, H, W)."""
    return torch.cat(list(sample_batches(model, captions, num_steps, **settings)))


# ----------------------------------------------------------------------------------------------- measuring

class Evaluator:
    """Real images, their captions and the evaluation classifier of a data set, loaded once for all models.

    reference_batch: n real images that models are compared with; `features` (n, 128) are the classifier's.
    eval_batch: n other real images; models get its captions, and its images give real_metrics."""

    def __init__(self, dataset, n=2000, seed=1234, split="test", weights_dir=None):
        check_num_samples(n, dataset.split_sizes, split)
        self.dataset = dataset
        self.device = distributed.get_device()
        self.classifier = load_eval_classifier(dataset.name, weights_dir, dataset.fingerprint).to(self.device)
        num_classes = [head[-1].out_features for head in self.classifier.attribute_heads]
        if num_classes != [len(classes) for classes in dataset.attributes.values()]:
            raise ValueError(f"the evaluation classifier of '{dataset.name}' was trained on other attributes")
        batch = dataset.sample_batch(2 * n, torch.Generator().manual_seed(seed), split)
        self.reference_batch = batch[:n]
        self.eval_batch = batch[n:]
        self.captions = self.eval_batch.caption
        self.features, _ = self.extract_features(self.reference_batch.image)
        self.real_metrics = self.compute_metrics(self.eval_batch.image)

    def reference_images(self):
        """The images that models are compared with -> (batches (b, 3, H, W), captions)."""
        return self.reference_batch.image.split(250), self.reference_batch.caption

    @torch.no_grad()
    def extract_features(self, images):
        """(N, 3, H, W) -> features (N, 128), predicted class of each attribute (N, A), on the CPU."""
        with without_tf32():
            outputs = [self.classifier(chunk.to(self.device)) for chunk in images.split(250)]
        features = torch.cat([chunk_features for chunk_features, _ in outputs])
        classes = [torch.stack([l.argmax(1) for l in logits], 1) for _, logits in outputs]
        return features.cpu(), torch.cat(classes).cpu()

    def compute_metrics(self, images):
        """Images made for self.captions, (N, 3, H, W) or an iterable of batches -> {metric: value}.
        accuracy counts attributes, not captions: of all attributes that the captions mention, the share that
        the classifier finds in the images. fd_pixel: FD of 4x4-averaged pixels."""
        images = images if torch.is_tensor(images) else torch.cat(list(images))
        features, classes = self.extract_features(images)
        mentioned = self.eval_batch.mentioned                                 # (N, A)
        correct = (classes == self.eval_batch.attributes) & mentioned
        precision, recall = metrics.precision_recall(self.features, features)
        thumbnails = [F.avg_pool2d(x, 4).flatten(1) for x in (self.reference_batch.image, images)]
        return {"fd": metrics.frechet_distance(self.features, features),
                "accuracy": (correct.sum() / mentioned.sum()).item(),
                **{f"accuracy {name}": (correct[:, i].sum() / mentioned[:, i].sum()).item()
                   for i, name in enumerate(self.dataset.attributes)},
                "precision": precision, "recall": recall,
                "fd_pixel": metrics.frechet_distance(*thumbnails)}


def evaluate_model(evaluator, model, num_steps, image_dir=None, **settings):
    """One image per caption of an Evaluator or MetricSuite -> {metric: value}. settings: of sample_batches.
    image_dir: a folder to which the images are written as well."""
    images = sample_batches(model, evaluator.captions, num_steps, **settings)
    images = plotting.show_progress(images, len(evaluator.captions), f"sampling (num_steps={num_steps})")
    if image_dir:
        images = plotting.save_images(images, evaluator.captions, image_dir)
    scores = {"steps": num_steps, "guidance_scale": settings.get("guidance_scale", 1.0),
              **evaluator.compute_metrics(images)}
    for name in {"fd", "fd_dinov2"} & scores.keys():
        scores["fd_excess"] = scores[name] - evaluator.real_metrics[name]
    return scores


def evaluate_models(models, captions, evaluator=None, seed=0, image_dir=None, recorded=None):
    """models: [(label, model, num_steps, settings)] -> (rows of a table, rows of a grid); without evaluator
    the table has no rows. The grid shows `captions`, sampled from other noise than the measured images.
    recorded: metrics that need not be measured (utils/report.py, recorded_metrics)."""
    rows, image_rows = [], []
    if evaluator and image_dir:
        for _ in plotting.save_images(*evaluator.reference_images(), Path(image_dir, "real images")):
            pass
    for label, model, num_steps, settings in models:
        label = f"{label}, {plotting.format_steps(num_steps)}"
        if model.is_large and settings.get("guidance_scale", 1.) != 1:
            label += f", guidance {settings['guidance_scale']:g}"
        image_rows.append((label, sample(model, captions, num_steps, seed=seed + 1, **settings)))
        if evaluator:
            num_seeds = [known_label for known_label, _ in rows].count(label)
            folder = label.replace("/", "-") + (f", seed {num_seeds + 1}" if num_seeds else "")
            model_dir = Path(image_dir, short_file_name(folder)) if image_dir else None
            scores = (recorded or {}).get((label, settings.get("guidance_scale", 1.)))
            if scores is None:
                scores = evaluate_model(evaluator, model, num_steps, model_dir, seed=seed, **settings)
            rows.append((label, scores))
    if evaluator:
        rows.append(("real images", {**evaluator.real_metrics, "steps": "", "fd_excess": 0.}))
    return rows, image_rows


# ---------------------------------------------------------------------------------------- the command line

def possible_configs(item, args):
    """The (num_steps, settings) with which a LoadedModel is sampled: its own, changed by the command line.
    Those that it cannot do are named on stderr; ValueError if no other is left."""
    configs = check_sampling_configs(item.sampling_configs, item.path) or DEFAULT_SAMPLING_CONFIGS
    if args.steps:
        configs = [(int(num_steps), configs[0][1]) for num_steps in args.steps.split(",")]
    elif getattr(args, "prompt", None):                                # a look that takes seconds
        configs = [config for config in configs if config[0] <= PROMPT_MAX_STEPS] or configs
    possible, left_out = [], {}
    for num_steps, settings in configs:
        settings = {**settings, **arguments.sampling_settings(args)}
        try:
            sampler.make_timesteps(item.model.T, num_steps, settings.get("timestep_shift", 1.),
                                   settings.get("t_max", 1.))
            possible.append((num_steps, settings))
        except ValueError as error:
            left_out[plotting.format_steps(num_steps)] = error
    if not possible:
        raise next(iter(left_out.values()))
    for steps, error in left_out.items():
        print(f"{item.group} left out in {steps}: {error}", file=sys.stderr)
    is_student = any(settings.get("stochasticity") for _, settings in configs)
    if is_student and any(settings.get("guidance_scale", 1) != 1 for _, settings in possible):
        print(f"{item.group}: guidance mostly makes the images of a few-step student worse", file=sys.stderr)
    return possible


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_sampling_arguments(parser, PRETRAINED, MODEL_FAMILIES)
    arguments.add_measuring_arguments(parser)
    return parser, parser.parse_args(argv)


def prepare(args):
    """Everything that can fail before sampling -> models for evaluate_models, evaluator or None, captions."""
    arguments.check_sampling_arguments(args, output_suffix=".png")
    if args.save_images:
        arguments.check_new_dir(args.save_images, "--save-images")
    loaded = load_named_models(args.models, PRETRAINED, args.data, args.model, args.pretrained,
                               args.resolution)
    models = [(item.group, item.model, *config) for item in loaded for config in possible_configs(item, args)]
    first, device = loaded[0], distributed.get_device()
    launch.set_threads(first.model.is_large)
    metric_models = {name: getattr(args, name) for name in metrics.METRIC_MODELS if getattr(args, name)}
    if metric_models and not first.model.is_large:
        raise ValueError(f"{metrics.flag_of(min(metric_models))} is for large models (--model), not for tiny")
    captions, evaluator = [args.prompt] * 8, None
    if args.prompt is None:
        dataset = data.build_dataset(first.dataset_name, first.model.resolution)
        captions = dataset.sample_batch(16, torch.Generator().manual_seed(7), args.split).caption
        if not first.model.is_large:
            evaluator = Evaluator(dataset, args.eval_samples, split=args.split, weights_dir=first.weights_dir)
        elif metric_models:
            evaluator = metrics.MetricSuite(dataset, args.eval_samples, metric_models, device)
    for item in loaded:
        item.model.requires_grad_(False).to(device)
        item.model.precompute_prompt_embeds(["", *captions, *(evaluator.captions if evaluator else [])])
        item.model.unload_text_encoders()
        if item.model.is_large and device.type == "cuda":
            half_dtype = compute_dtype(item.model.precision)
            is_amplified = item.model.needs_fp32(half_dtype)           # in a student's steps from pure noise
            item.model.cast_frozen(half_dtype, torch.float16 if is_amplified else half_dtype)
    return models, evaluator, captions


def main(argv=None):
    parser, args = parse_args(argv)
    with failures.clear_exit(parser, "evaluate.py", "fewer --eval-samples or a lower --resolution need less"):
        models, evaluator, captions = prepare(args)
        rows, image_rows = evaluate_models(models, captions, evaluator, args.seed, args.save_images)
        if evaluator:
            print(plotting.metrics_table(plotting.aggregate_seeds(rows), args.all_columns, args.eval_samples))
        command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
        plotting.save_image_grid(list(dict(image_rows).items()), args.output,
                                 None if args.prompt else captions, command, args.prompt or "")
        print(f"wrote {args.output}: a row for each model and number of steps, the same noise in each column")


if __name__ == "__main__":
    failures.start_program()
    main()
