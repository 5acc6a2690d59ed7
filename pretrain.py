"""Makes the four small networks that weights/ ships, from nothing:  python pretrain.py --data glyphs

    judge      a CNN that names attributes and repaints; measures everything, and no discriminator ever
               sees it
    features   a small ViT that names attributes and repaints hidden patches: the frozen backbone,
               in DINOv2's place
    cnn        other eyes, which only name: what the choice of features is worth (ADD's Table 1)
    denoiser   the text-to-image model that the two papers then improve

Each is one `loss` function below; the loop is shared. Every run saves its state once a minute and goes on
from there when started again, so it may be stopped at will.                  Read next: adt.py, then train.py
"""

import argparse
import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import losses
import models
import networks
import survival


@dataclass
class Recipe:
    """All `ours`: the smallest budgets after which the pictures looked right."""
    steps: int
    batch: int
    lr: float
    ema: float = .999            # of the weights that are saved
    descent: float = 1.          # share of the steps in which the rate falls to 0
    warmup: int = 200            # steps from 0 to lr


RECIPES = {
    "judge": {"glyphs": Recipe(3000, 128, 2e-3), "fashion": Recipe(2000, 128, 1e-3)},
    "features": {"glyphs": Recipe(4000, 64, 1e-3), "fashion": Recipe(2500, 64, 1e-3)},
    "cnn": {"glyphs": Recipe(2500, 64, 1e-3), "fashion": Recipe(1500, 64, 1e-3)},
    "denoiser": {"glyphs": Recipe(19500, 32, 1e-3, descent=1 / 3),
                 "fashion": Recipe(7000, 32, 1e-3, descent=1 / 3)},
}
SEEDS = {"judge": 1000, "features": 2000, "denoiser": 3000, "cnn": 4000}  # never the same numbers twice


def attribute_loss(logits, truth):
    """Mean cross-entropy over attributes; -1 marks an attribute the picture does not have, and one that no
    picture of the batch has adds nothing."""
    terms = [F.cross_entropy(l.float(), t, ignore_index=-1, reduction="sum") / (t >= 0).sum().clamp(min=1)
             for l, t in zip(logits, truth.T)]
    return torch.stack(terms).mean()


def shift(image, pixels=2):
    """A random shift of the whole batch, edges repeated: cheap insurance against memorised positions."""
    dx, dy = torch.randint(0, 2 * pixels + 1, (2,)).tolist()
    return F.pad(image, (pixels,) * 4, mode="replicate")[
        ..., dy:dy + image.shape[-2], dx:dx + image.shape[-1]]


def judge_loss(network, batch):
    """Name the attributes, and repaint the picture at half size from the 128 features."""
    image = shift(batch.image)
    features, logits = network(image)
    repaint = F.mse_loss(network.paint(features).float(), F.avg_pool2d(image, 2).flatten(1))
    return attribute_loss(logits, batch.truth) + 10 * repaint


def features_loss(network, batch):
    """Name the attributes from CLS with up to three quarters of the patches hidden;
    repaint what is hidden."""
    image = shift(batch.image)
    hide = torch.rand(len(image), 64) < torch.rand(len(image), 1) * .75
    maps, cls = network(image, hide)
    painted = network.repaint(network.norm(maps[-1].flatten(2).transpose(1, 2)))
    logits = [head(network.norm(cls[-1])) for head in network.heads]
    repaint = (painted.float() - network.patches(image))[hide].square().mean()
    return attribute_loss(logits, batch.truth) + 2 * repaint


def cnn_loss(network, batch):
    """Name the attributes."""
    cls = network(shift(batch.image))[1][-1]
    return attribute_loss([head(network.norm(cls)) for head in network.heads], batch.truth)


def denoiser_loss(model, batch):
    """The flow loss, 10 % of the captions empty so that
    classifier-free guidance has something to push against."""
    captions = ["" if forget else c for c, forget in zip(batch.caption, torch.rand(len(batch.caption)) < .1)]
    x0 = model.encode(batch.image)
    t = losses.sample_times(len(x0), model.T)
    return losses.diffusion_loss(model, x0, t, torch.randn_like(x0), model.condition(captions))


def make(which, source, target):
    """-> network, loss, the facts its file carries."""
    classes = [len(v) for v in source.attributes.values()]
    if which == "judge":
        judge = networks.Judge(classes)
        judge.paint = torch.nn.Linear(128, 3 * 16 * 16)      # scaffold: not part of the file
        return judge, judge_loss, {"attributes": classes}
    if which == "features":
        return networks.TinyViT(classes), features_loss, {"attributes": classes}
    if which == "cnn":
        return networks.TinyCNN(classes), cnn_loss, {"attributes": classes}
    return models.TinyDenoiser(source.words, target), denoiser_loss, {"words": source.words, "target": target}


def learning_rate(step, recipe):
    """The factor on recipe.lr: linear warm-up, a plateau, then half a cosine down to 0."""
    left = (1 - step / recipe.steps) / recipe.descent
    return min(1., (step + 1) / recipe.warmup) * .5 * (1 - math.cos(math.pi * min(1., left)))


def fit(which, source, recipe, out, target="flow"):
    """Train one network to the end of its recipe, continuing from out/<which>.state if it is there."""
    torch.manual_seed(SEEDS[which])
    network, loss_of, facts = make(which, source, target)
    average = deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(.9, .99), weight_decay=.01)
    state, start, spent = out / f"{which}.state", 0, 0.
    if state.is_file():
        try:
            saved = torch.load(state, weights_only=True)
            if saved["facts"] != facts:
                raise ValueError
            network.load_state_dict(saved["network"])
            average.load_state_dict(saved["average"])
            optimiser.load_state_dict(saved["optimiser"])
            torch.set_rng_state(saved["rng"])
            start, spent = saved["step"], saved["seconds"]
        except survival.DAMAGE:
            raise ValueError(f"{state} is damaged, or of another data set or target: remove it to start "
                             "anew") from None
    began = last = time.time()
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=which, mininterval=5)
    for step in bar:
        batch = source.batch(recipe.batch)
        with models.half_precision():
            loss = loss_of(network, batch)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * learning_rate(step, recipe)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.)
        optimiser.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            with open(out / f"{which}.jsonl", "a") as log:
                log.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        if time.time() - last > 60 or step == recipe.steps - 1:
            last = time.time()
            seconds = spent + last - began
            with survival.whole(state) as partial:
                torch.save({"network": network.state_dict(), "average": average.state_dict(),
                            "step": step + 1, "optimiser": optimiser.state_dict(),
                            "rng": torch.get_rng_state(), "seconds": seconds, "facts": facts}, partial)
            finished = deepcopy(average)
            if hasattr(finished, "paint"):
                del finished.paint
            models.save(finished, out / f"{which}.safetensors", steps=step + 1,
                        minutes=round(seconds / 60, 1), batch=recipe.batch,
                        threads=torch.get_num_threads(), data=source.name, **facts)
    return average


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="glyphs", help="glyphs, fashion, or a folder of captioned images")
    parser.add_argument("--only", choices=list(RECIPES), help="make one network instead of all four")
    parser.add_argument("--steps", type=int, help="steps of each network (default: its recipe)")
    parser.add_argument("--target", default="flow", choices=["eps", "x0", "v", "flow"],
                        help="what the denoiser predicts")
    parser.add_argument("--out", help="folder for states, logs and weights (default: weights/DATA)")
    parser.add_argument("--overwrite", action="store_true", help="replace finished networks")
    arguments = parser.parse_args(argv)
    try:
        source = data.build(arguments.data)
        out = Path(arguments.out or models.WEIGHTS / source.name)
        wanted = [which for which in RECIPES if arguments.only in (None, which)]
        for which in wanted:
            if arguments.steps is not None and arguments.steps < 1:
                raise ValueError(f"--steps {arguments.steps}: a network needs at least one step")
            if (out / f"{which}.safetensors").exists() and not (arguments.overwrite
                                                                or (out / f"{which}.state").exists()):
                raise ValueError(f"{out} holds a finished {which} already: --overwrite replaces it, "
                                 "--out names another folder")
        networks.TinyText(source.words).tokens(source.phrases)                # no caption may be too long
        out.mkdir(parents=True, exist_ok=True)
        for which in wanted:
            recipe = deepcopy(RECIPES[which].get(arguments.data, RECIPES[which]["fashion"]))
            recipe.steps = arguments.steps or recipe.steps
            fit(which, source, recipe, out, arguments.target)
    except (ValueError, OSError) as error:
        parser.exit(2, f"pretrain.py: {error}\n")


if __name__ == "__main__":
    main()
