"""ADT, Adversarial Diffusion Tuning (Shen et al. 2025, arXiv 2504.11423): practise the way you will perform.

A diffusion model is trained on noised true pictures but used on its own half-finished ones. ADT closes the
gap: start from a noised real picture (the paper) or from pure noise (our default in the small world), let the
sampler finish the job, and have a siamese discriminator compare the result with the real picture. The old
diffusion loss stays, so that the discriminator cannot be hacked; gradients stay small and cheap because they
flow along the path, never through the network's inputs.

    L_G = L_diff + lambda_adv * ( -D(x_0, x0_hat) )    L_D = relu(1 - D(x_0, x_0')) + relu(1 + D(x_0, x0_hat))

Same three names as add.py: Config, generator_loss, discriminator_loss.                Read next: train.py"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import discriminator
import losses
import sampler


@dataclass
class Config:
    """Each field carries its provenance: paper (abstract), secondary (summaries, related work), ours."""
    has_teacher = False                                      # it learns from pictures alone
    # the path
    path_steps: Annotated[int, "ours: steps of the sampler that training runs"] = 10
    train_steps: Annotated[int, "ours: K, how many executed steps keep their graph"] = 2
    pick: Annotated[Literal["even", "last", "random", "all"], "secondary: which ones"] = "even"
    start: Annotated[Literal["image", "text"], "ours: noise, or noised real pictures (paper)"] = "text"
    starts: Annotated[int, "secondary: 0, an image starts at any step; ours: of so many noisiest"] = 0
    guidance: Annotated[float, "ours: classifier-free guidance inside the path"] = 1.0
    leak: Annotated[float, "secondary: gradient let through the network's input, 0 = none"] = 0.0
    checkpoint: Annotated[bool, "ours: recompute calls, one graph of memory; slower"] = False
    # the losses
    variant: Annotated[Literal["similarity", "twin", "difference", "relative", "projected"],
                       "ours: which discriminator"] = "relative"
    pool: Annotated[Literal["tokens", "score", "mean", "all"], "ours: what is judged: see Siamese"] = "tokens"
    geometry: Annotated[Literal["shared", "apart"], "ours: one geometric draw per pair, or two"] = "shared"
    features: Annotated[Literal["vit", "cnn", "random"], "secondary: frozen eyes, DINOv2's place"] = "vit"
    whiten: Annotated[bool, "ours: features of equal variance in all directions"] = True
    augment: Annotated[float, "ours: strength of the differentiable augmentation"] = 0.1
    instance_noise: Annotated[float, "ours: noise on whatever the discriminator sees"] = 0.05
    real: Annotated[Literal["photo", "decoded"], "ours: x_0 or decode(encode(x_0))"] = "photo"
    lambda_adv: Annotated[float, "ours: weight of the adversarial loss; 0 is plain diffusion"] = 0.2
    lambda_diff: Annotated[float, "ours: weight of the diffusion loss, which the paper keeps"] = 1.0
    drop_caption: Annotated[float, "ours: share of empty captions in the diffusion loss"] = 0.1
    times: Annotated[Literal["uniform", "lognormal"], "ours: how the diffusion loss draws t"] = "uniform"
    # the generator and the optimisers
    init: Annotated[Literal["base", "random"], "paper: tuning starts from a trained model"] = "base"
    batch: Annotated[int, "ours: pictures per micro-batch"] = 32
    accumulate: Annotated[int, "ours: micro-batches per step"] = 1
    lr: Annotated[float, "ours: AdamW, generator"] = 1e-4
    beta1: Annotated[float, "ours: AdamW, generator"] = 0.0  # momentum makes the game circle
    lr_d: Annotated[float, "ours: AdamW, discriminator"] = 5e-3
    beta1_d: Annotated[float, "secondary: no momentum in the discriminator"] = 0.0
    clip: Annotated[float, "ours: largest gradient norm, generator; 0 = no limit"] = 1.0
    clip_d: Annotated[float, "secondary: largest gradient norm, discriminator"] = 1.0
    steps_d: Annotated[int, "ours: steps of the discriminator per step of the generator"] = 1
    ema: Annotated[float, "ours: decay of the averaged generator, the one that is kept"] = 0.99
    warmup_d: Annotated[int, "ours: first steps, of the adversary alone; a quarter of the run at most"] = 60

    def __post_init__(self):
        for name in ("batch", "accumulate", "path_steps", "train_steps", "steps_d"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more")
        for name in ("ema", "beta1", "beta1_d", "leak", "drop_caption", "augment"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share, 0 to 1")
        if self.ema == 1:
            raise ValueError("ema is below 1: an average that never moves learns nothing")
        if self.lambda_adv == self.lambda_diff == 0:
            raise ValueError("lambda_adv and lambda_diff are both 0: nothing is left to learn from")
        if self.lambda_adv == 0:
            self.warmup_d = 0                                # there is no adversary to wait for

    def path(self, T):
        """The times that training runs on a schedule of T."""
        return sampler.timeline(T, self.path_steps)

    def rows(self):
        """Who is measured at the end of a run: (name, steps, sampler settings)."""
        return [(who, self.path_steps, {"guidance": self.guidance}) for who in ("before", "after")]

    def critic(self, features, text_width):
        if self.variant in ("projected", "relative"):
            return discriminator.Projected(features, text_width, self.variant == "relative")
        return discriminator.Siamese(features, self.variant, self.pool)


# What large models want otherwise, and where it is from: CoMat, by some of the same authors, has numbers for
# SD 1.5 and XL. A decoder's traces are no fault of the generator's: real pictures wear them, too.
COMAT = dict(path_steps=50, train_steps=5, guidance=7.5, clip=.1, beta1=.9)
LATENT = dict(COMAT, start="image", variant="similarity", real="decoded", batch=4, steps_d=1, augment=1.,
              instance_noise=0., checkpoint=True, warmup_d=100, ema=.999)
PRESETS = {"sd15": dict(LATENT, lr=5e-5, lr_d=2e-5), "sdxl": dict(LATENT, lr=2e-5, lr_d=5e-5, batch=1),
           "sd3": dict(LATENT, lr=2e-5, lr_d=5e-5, batch=1, path_steps=28, times="lognormal"),
           "diffusion": dict(beta1=.9)}                      # ours: alone, the diffusion loss plays no game
KNOWN = {"start": "paper", "variant": "secondary", **dict.fromkeys([*COMAT, "lr", "lr_d"], "secondary")}
SOURCES = {"sd15": {**KNOWN, "batch": "secondary"}, "sdxl": KNOWN,            # all else is ours
           "sd3": {k: v for k, v in KNOWN.items() if k not in ("path_steps", "lr", "lr_d")}}


def simulate(model, x0, cond, uncond, config, luck=None):
    """Image-to-image inference: noise x_0 (B, C, h, w) to a uniformly drawn step of the path, run the sampler
    from there. One draw for the whole batch (luck). -> x0_hat (B, C, h, w), with the constrained gradient."""
    times = config.path(model.T)
    most = min(config.starts or config.path_steps, config.path_steps)
    first = int(torch.randint(most, (), generator=luck)) if config.start == "image" else 0
    times = times[first:]                                    # ADT start: t_s uniform over the path
    eps = torch.randn_like(x0)
    x = eps if config.start == "text" else model.add_noise(x0, times[:1].to(x0.device), eps)
    chosen = sampler.pick_steps(len(times), config.train_steps, config.pick, luck)
    return sampler.rollout(model, x, times, cond, uncond, config.guidance, chosen, config.leak,
                           config.checkpoint)


def pair(real, other, config):
    """Two pictures (B, 3, H, W), augmented: colours and noise always apart, geometry shared or apart."""
    draw = discriminator.geometry(len(real), real.device)
    second = draw if config.geometry == "shared" else discriminator.geometry(len(real), real.device)
    return (discriminator.augment(real, draw, config.augment, config.instance_noise),
            discriminator.augment(other, second, config.augment, config.instance_noise))


def generator_loss(model, teacher, critic, batch, config):
    """-> {term: weighted loss}, the generated picture (B, 3, H, W) with its graph, and the captions' vectors
    (B, P); None for both without an adversary. The teacher is ADD's; ADT learns from pictures alone."""
    keep = torch.rand(len(batch.caption)) >= config.drop_caption
    with torch.no_grad():                                    # encoders are frozen; only the network learns
        x0 = model.encode(batch.image)
        dropped = model.condition([c if k else "" for c, k in zip(batch.caption, keep)], batch.frame)
    t = losses.sample_times(len(x0), model.T, config.times).to(x0.device)
    diff = losses.diffusion_loss(model, x0, t, torch.randn_like(x0), dropped)
    if config.lambda_adv == 0:
        return {"diff": config.lambda_diff * diff}, None, None
    with torch.no_grad():
        cond, uncond = model.condition(batch.caption, batch.frame), model.condition([""])
        if config.real == "decoded":
            batch.image = discriminator.visible(model.decode(x0))             # from here on, in both halves
    x0_hat = simulate(model, x0, cond, uncond, config, batch.luck)
    fake = discriminator.visible(model.decode(x0_hat))                                       # with gradient
    adv = losses.hinge_generator(critic(*pair(batch.image, fake, config), cond["pooled"]))
    terms = {"diff": config.lambda_diff * diff, "adv": config.lambda_adv * adv}         # ADT L_G: their sum
    return terms, fake, cond["pooled"]


def discriminator_loss(critic, batch, fake, known, config):
    """-> {term: loss}, logits on real, logits on fake. The real pair is one picture twice, augmented apart;
    the fake pair holds the real picture and what the model made of it. With `relative` the two views of the
    real pair could change places, so its hinge cannot fall below 1 (Jensen): it only keeps the verdicts on
    them alike, and what teaches is the fake pair, a relativistic comparison (Jolicoeur-Martineau 2018)."""
    real = critic(*pair(batch.image, batch.image, config), known)               # D(x_0, x_0')
    made = critic(*pair(batch.image, fake.detach(), config), known)             # D(x_0, sg[x0_hat])
    return {"D": losses.hinge_real(real) + losses.hinge_fake(made)}, real, made         # ADT L_D
