"""Trains the four small networks of a data set from scratch:  python -m scripts.pretrain --data glyphs

    eval_classifier   the classifier behind the metrics; no discriminator sees it
    backbone          a small ViT, the frozen backbone of the discriminators in place of DINOv2
    cnn               another backbone, which only classifies: for ADD's Table 1
    denoiser          the text-to-image flow model that the two papers then improve

Each network has one loss function below and one recipe; the loop is shared. A network's state is saved every
minute, so the same command continues an interrupted run. weights/ holds the finished networks of glyphs and
fashion. Read next: train.py"""

import argparse
import json
import math
import shlex
import signal
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import losses
from models.backbones import EvalClassifier, TinyCNN, TinyViT
from models.tiny import TinyDenoiser, TinyTextEncoder
from utils import checkpoint
from utils.failures import RunFailed, clear_exit, start_program
from utils.precision import autocast
from utils.training_state import ramped_ema_decay

SAVE_EVERY_S = 60


@dataclass
class Recipe:
    """All ours: the smallest number of steps after which the images looked right."""

    steps: int
    batch_size: int
    lr: float
    ema_decay: float = .999            # of the weights that are saved
    decay_fraction: float = 1.         # fraction of the steps in which the learning rate falls to 0
    warmup_steps: int = 200            # linear from 0 to lr


RECIPES = {
    "eval_classifier": {"glyphs": Recipe(3000, 128, 2e-3), "fashion": Recipe(2000, 128, 1e-3)},
    "backbone": {"glyphs": Recipe(4000, 64, 1e-3), "fashion": Recipe(2500, 64, 1e-3)},
    "cnn": {"glyphs": Recipe(2500, 64, 1e-3), "fashion": Recipe(1500, 64, 1e-3)},
    "denoiser": {"glyphs": Recipe(19500, 32, 1e-3, decay_fraction=1 / 3),
                 "fashion": Recipe(7000, 32, 1e-3, decay_fraction=1 / 3)},
}
# one seed each, so that no two networks see the same random numbers
SEEDS = {"eval_classifier": 1000, "backbone": 2000, "denoiser": 3000, "cnn": 4000}


# ------------------------------------------------------------------------------------------------- losses

def attribute_loss(logits, attributes):
    """Cross-entropy, mean over attributes. logits: one (B, n) per attribute; attributes: (B, A) classes, -1
    where an image does not have the attribute. An attribute that no image of the batch has adds 0."""
    terms = [F.cross_entropy(l.float(), t, ignore_index=-1, reduction="sum") / (t >= 0).sum().clamp(min=1)
             for l, t in zip(logits, attributes.T)]
    return torch.stack(terms).mean()


def random_translate(image, max_shift=2):
    """Translate the whole batch by up to max_shift pixels and repeat the edges, against overfitting to
    positions. (B, 3, H, W) -> the same shape."""
    dx, dy = torch.randint(0, 2 * max_shift + 1, (2,)).tolist()
    padded = F.pad(image, (max_shift,) * 4, mode="replicate")
    return padded[..., dy:dy + image.shape[-2], dx:dx + image.shape[-1]]


def classifier_loss(network, batch):
    """Classify the attributes, and reconstruct the image at half resolution from the 128 features."""
    image = random_translate(batch.image)
    features, logits = network(image)
    reconstruction = network.reconstruction_head(features).float()
    error = F.mse_loss(reconstruction, F.avg_pool2d(image, 2).flatten(1))
    return attribute_loss(logits, batch.attributes) + 10 * error


def vit_loss(network, batch):
    """Classify the attributes from the CLS token with up to three quarters of the patches masked, and
    reconstruct the masked patches."""
    image = random_translate(batch.image)
    mask = torch.rand(len(image), 64) < torch.rand(len(image), 1) * .75
    maps, cls = network(image, mask)
    tokens = maps[-1].flatten(2).transpose(1, 2)                       # (B, 64, D)
    reconstruction = network.pixel_head(network.norm(tokens)).float()  # (B, 64, 48)
    logits = [head(network.norm(cls[-1])) for head in network.attribute_heads]
    error = (reconstruction - network.patchify(image))[mask].square().mean()
    return attribute_loss(logits, batch.attributes) + 2 * error


def cnn_loss(network, batch):
    """Classify the attributes."""
    cls = network(random_translate(batch.image))[1][-1]
    return attribute_loss([head(network.norm(cls)) for head in network.attribute_heads], batch.attributes)


def denoiser_loss(model, batch):
    """The diffusion loss; 10 % of the captions are empty, which classifier-free guidance needs."""
    dropped = torch.rand(len(batch.caption)) < .1
    captions = ["" if drop else caption for caption, drop in zip(batch.caption, dropped)]
    x0 = model.encode(batch.image)
    t = losses.sample_timesteps(len(x0), model.T)
    return losses.diffusion_loss(model, x0, t, torch.randn_like(x0), model.encode_prompts(captions))


def build_network(name, dataset, prediction_type):
    """-> network, its loss function, metadata of its file."""
    classes = [len(values) for values in dataset.attributes.values()]
    if name == "eval_classifier":
        network = EvalClassifier(classes)
        network.reconstruction_head = torch.nn.Linear(128, 3 * 16 * 16)  # for training only, not saved
        return network, classifier_loss, {"attributes": classes}
    if name == "backbone":
        return TinyViT(classes), vit_loss, {"attributes": classes}
    if name == "cnn":
        return TinyCNN(classes), cnn_loss, {"attributes": classes}
    metadata = {"vocab": dataset.vocab, "prediction_type": prediction_type,
                "image_channels": 1 if is_grey(dataset) else 3}
    return TinyDenoiser(**metadata), denoiser_loss, metadata


def is_grey(dataset, n=256):
    """Whether images of the data set, n random ones, have three equal colour channels."""
    image = dataset.sample_batch(n, torch.Generator().manual_seed(0)).image
    return bool((image == image[:, :1]).all())


# ---------------------------------------------------------------------------------------------- the loop

def lr_factor(step, recipe):
    """Factor on recipe.lr: linear warm-up, constant, then half a cosine to 0."""
    remaining = (1 - step / recipe.steps) / recipe.decay_fraction
    return min(1., (step + 1) / recipe.warmup_steps) * .5 * (1 - math.cos(math.pi * min(1., remaining)))


def load_state(path, network, ema, optimizer, metadata):
    """Restore everything from NAME.state, if it exists -> the next step, seconds trained so far. ValueError
    if the file is damaged or belongs to another data set or prediction type."""
    if not path.is_file():
        return 0, 0.
    try:
        state = torch.load(path, weights_only=True)
        if state["metadata"] != metadata:
            raise ValueError
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return state["step"], state["seconds"]
    except checkpoint.CORRUPT_FILE_ERRORS:
        raise ValueError(f"{path} is damaged or belongs to another data set or prediction type: "
                         "--overwrite starts again, --output-dir names another folder") from None


def save_state(path, network, ema, optimizer, step, seconds, metadata):
    with checkpoint.atomic_write(path) as tmp_path:
        torch.save({"network": network.state_dict(), "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": step,
                    "seconds": seconds, "metadata": metadata}, tmp_path)


def save_network(path, ema, **metadata):
    """Write the averaged weights, without the layers that only training needs."""
    ema_copy = deepcopy(ema)
    if hasattr(ema_copy, "reconstruction_head"):
        del ema_copy.reconstruction_head
    checkpoint.save_weights(ema_copy, path, **metadata)


def train_network(name, dataset, recipe, output_dir, prediction_type, stop_requests):
    """Train one network to the end of its recipe, or until a signal is in stop_requests. Continues from
    NAME.state if there is one; writes NAME.state, NAME.jsonl, NAME.safetensors -> number of steps done."""
    torch.manual_seed(SEEDS[name])
    network, loss_fn, metadata = build_network(name, dataset, prediction_type)
    ema = deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(.9, .99), weight_decay=.01,
                                  fused=True)
    state_path = output_dir / f"{name}.state"
    start_step, elapsed_before = load_state(state_path, network, ema, optimizer, metadata)
    log_path = output_dir / f"{name}.jsonl"
    if start_step == 0:
        log_path.unlink(missing_ok=True)
    start_time = last_save_time = time.time()
    pbar = tqdm(range(start_step, recipe.steps), initial=start_step, total=recipe.steps, desc=name,
                mininterval=5)
    for step in pbar:
        batch = dataset.sample_batch(recipe.batch_size)
        with autocast():
            loss = loss_fn(network, batch)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, recipe)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.)
        optimizer.step()
        decay = ramped_ema_decay(recipe.ema_decay, step)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)

        if step % 100 == 0:
            pbar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            with open(log_path, "a") as log:
                log.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        is_last_step = step == recipe.steps - 1
        if time.time() - last_save_time > SAVE_EVERY_S or is_last_step or stop_requests:
            last_save_time = time.time()
            seconds = elapsed_before + last_save_time - start_time
            save_state(state_path, network, ema, optimizer, step + 1, seconds, metadata)
            save_network(output_dir / f"{name}.safetensors", ema, steps=step + 1,
                         minutes=round(seconds / 60, 1), batch_size=recipe.batch_size,
                         threads=torch.get_num_threads(), data=dataset.name,
                         fingerprint=dataset.fingerprint, **metadata)
        if stop_requests:
            return step + 1
    return recipe.steps


# -------------------------------------------------------------------------------------- the command line

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.pretrain", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--data", default="glyphs", help="glyphs, fashion, or a folder of captioned images")
    parser.add_argument("--network", choices=list(RECIPES), help="train one network instead of all four")
    parser.add_argument("--steps", type=int, help="steps of each network (default: its recipe)")
    parser.add_argument("--prediction-type", default="flow", choices=["eps", "x0", "v", "flow"],
                        help="output of the denoiser")
    parser.add_argument("--output-dir", help="folder for states, logs and weights (default: "
                        "runs/pretrain-DATA)")
    parser.add_argument("--overwrite", action="store_true", help="start again and replace what is there")
    return parser, parser.parse_args(argv)


def check_output(names, dataset, output_dir, overwrite):
    """ValueError if the folder holds networks of other data, or if a finished network would be replaced; with
    overwrite, remove old states instead."""
    own, kept = dataset.fingerprint, [] if overwrite else names
    for name in [name for name in RECIPES if name in kept or name not in names]:
        path = output_dir / f"{name}.safetensors"
        if path.is_file() and checkpoint.load_weights(path)[1].get("fingerprint", own) != own:
            raise ValueError(f"{path} was trained on other images or captions than '{dataset.name}' has now, "
                             "or by an older version, which compared sizes only: --output-dir names another "
                             "folder, --overwrite without --network starts again")
    for name in names:
        state_path = output_dir / f"{name}.state"
        if overwrite:
            state_path.unlink(missing_ok=True)
        elif (output_dir / f"{name}.safetensors").exists() and not state_path.exists():
            raise ValueError(f"{output_dir} already holds a finished {name}: --overwrite replaces it, "
                             "--output-dir names another folder")


def continue_command(args, output_dir):
    """The command that continues an interrupted run."""
    command = ["python", "-m", "scripts.pretrain", "--data", args.data, "--output-dir", str(output_dir)]
    if args.network:
        command += ["--network", args.network]
    if args.steps:
        command += ["--steps", str(args.steps)]
    if args.prediction_type != "flow":
        command += ["--prediction-type", args.prediction_type]
    return shlex.join(command)


def pretrain(args):
    """Train all requested networks -> a sentence that says what is there and what to do next. RunFailed if
    a signal stopped it: before the first network at once, afterwards with everything saved."""
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: a network needs at least one step")
    dataset = data.build_dataset(args.data)
    if isinstance(dataset, data.StreamedImages):
        raise ValueError(f"--data {args.data} is streamed, its words are not known: name a smaller data set")
    default_name = checkpoint.short_file_name(f"pretrain-{dataset.name.replace('/', '-')}")
    output_dir = Path(args.output_dir or Path("runs", default_name))
    names = [name for name in RECIPES if args.network in (None, name)]
    TinyTextEncoder(dataset.vocab).tokenize(dataset.all_captions)      # ValueError for a caption too long
    output_dir.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock_run_dir(output_dir), checkpoint.defer_signals() as stop_requests:
        check_output(names, dataset, output_dir, args.overwrite)
        for name in names:
            recipe = RECIPES[name].get(args.data, RECIPES[name]["fashion"])
            recipe = replace(recipe, steps=args.steps or recipe.steps)
            steps_done = train_network(name, dataset, recipe, output_dir, args.prediction_type, stop_requests)
            if stop_requests:
                raise RunFailed(f"stopped after step {steps_done} of {name}; everything is saved, continue "
                                f"with: {continue_command(args, output_dir)}", 128 + stop_requests[0][0])
    message = f"wrote {', '.join(names)} to {output_dir}"
    if all((output_dir / f"{name}.safetensors").is_file() for name in RECIPES):
        message += ("; use them with: " + shlex.join(["python", "train.py", "--data", args.data,
                                                      "--pretrained", str(output_dir)]))
    return message


def main(argv=None):
    parser, args = parse_args(argv)
    with clear_exit(parser, "pretrain.py"):
        print(f"\n{pretrain(args)}")


if __name__ == "__main__":
    start_program()
    main()
