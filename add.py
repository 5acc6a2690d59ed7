"""ADD, Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042): one step, made to look like
fifty.

A student starts as a copy of the diffusion model and learns to leap: from a noised picture at one of four
times straight to the end. A discriminator says how real the leap looks; the frozen teacher, asked about
the student's own leap noised again, says where it should have landed.

    L = L_adv(x0_hat) + lambda E_{t,eps'} c(t) || x0_hat - x0_psi(sg[alpha_t x0_hat + sigma_t eps'], t) ||^2

Same three names as adt.py: Config, generator_loss, discriminator_loss.                Read next: train.py"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

import discriminator
import losses
import sampler


@dataclass
class Config:
    """Each field carries its provenance: paper, secondary (public code and readings of it), ours."""
    has_teacher = True
    # the student
    student_steps: Annotated[int, "paper: n, how many times the student knows; the last is pure noise"] = 4
    last: Annotated[float, "ours: the time it is told at pure noise, a share of T (paper: 1)"] = 0.9
    fresh: Annotated[float, "ours: share of new noise between its leaps in use; 1 forgets the old"] = 1.0
    terminal: Annotated[float, "ours: share of the batch at pure noise (paper: 0, 1/n as every time)"] = 0.5
    init: Annotated[Literal["base", "random"], "paper: it starts as a copy of the trained model"] = "base"
    own: Annotated[float, "ours: share of the lower times that noise its own leaps (paper: 0)"] = 0.5
    # the teacher
    weighting: Annotated[Literal["exponential", "sds", "nfsd"],
                         "paper: c(t); exponential in its ablations, nfsd in its models"] = "exponential"
    lambda_distill: Annotated[float, "ours: the paper's 2.5, but beside a mean over heads"] = 2.5
    lambda_adv: Annotated[float, "paper: weight of the adversarial loss; 0 = distillation only"] = 1.0
    teacher_guidance: Annotated[float, "ours: the teacher's classifier-free guidance"] = 1.0
    teacher_steps: Annotated[int, "paper: sampler steps the teacher takes to its x0"] = 1
    distance: Annotated[Literal["squared", "l1", "huber"], "paper: d"] = "squared"
    space: Annotated[Literal["pixel", "latent"], "paper: where the distance is taken"] = "pixel"
    negative: Annotated[str, "ours: NFSD's negative prompt; empty, it says nothing where t is large"] = ""
    # the discriminator
    features: Annotated[Literal["vit", "cnn", "random"], "paper: its frozen eyes; DINOv2's place"] = "vit"
    condition: Annotated[Literal["both", "text", "image", "none"], "paper: what it knows"] = "both"
    timed: Annotated[bool, "ours: it knows, too, at which of its times the student leapt"] = True
    relative: Annotated[bool, "ours: whether its hinge is of D(real) - D(fake), or of each (paper)"] = True
    gamma: Annotated[float, "ours: R1 on the heads' inputs (paper: 1e-5)"] = 2e-4
    share_r1: Annotated[float, "ours: share of the real pictures that pay R1; all of them is slow"] = 0.25
    whiten: Annotated[bool, "ours: features of equal variance in all directions"] = True
    augment: Annotated[float, "ours: strength of the differentiable augmentation"] = 0.1
    instance_noise: Annotated[float, "ours: noise on whatever the discriminator sees"] = 0.05
    # the optimisers
    batch: Annotated[int, "ours: pictures per micro-batch"] = 32
    accumulate: Annotated[int, "ours: micro-batches per step"] = 1
    lr: Annotated[float, "ours: AdamW, student"] = 1e-4
    beta1: Annotated[float, "ours: AdamW, student"] = 0.0    # momentum makes the game circle
    lr_d: Annotated[float, "ours: AdamW, heads"] = 5e-3
    beta1_d: Annotated[float, "secondary: no momentum in the discriminator"] = 0.0
    clip: Annotated[float, "ours: largest gradient norm, student; 0 = no limit"] = 1.0
    clip_d: Annotated[float, "ours: largest gradient norm, heads; 0 = no limit"] = 1.0
    steps_d: Annotated[int, "ours: steps of the heads per step of the student"] = 1
    ema: Annotated[float, "ours: decay of the averaged student, the one that is kept"] = 0.99
    warmup_d: Annotated[int, "ours: first steps, of the adversary alone; a quarter of the run at most"] = 0

    def __post_init__(self):
        for name in ("batch", "accumulate", "student_steps", "teacher_steps", "steps_d"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more")
        for name in ("ema", "beta1", "beta1_d", "augment", "terminal", "own", "fresh", "share_r1"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share, 0 to 1")
        if self.ema == 1:
            raise ValueError("ema is below 1: an average that never moves learns nothing")
        if self.weighting == "nfsd" and (self.teacher_steps, self.teacher_guidance) != (1, 1):
            raise ValueError("nfsd asks its teacher once, with a scale of its own: "
                             "leave teacher_steps and teacher_guidance at 1")
        if self.lambda_adv == self.lambda_distill == 0:
            raise ValueError("lambda_adv and lambda_distill are both 0: nothing is left to learn from")
        if self.lambda_adv == 0:
            self.warmup_d = 0                                # there is no adversary to wait for

    def path(self, T):
        """The student's times tau_n … tau_1 on a schedule of T."""
        return sampler.timeline(T, self.student_steps, last=self.last)

    def rows(self):
        """Who is measured at the end of a run: (name, steps, sampler settings). The teacher follows its
        path; the student leaps, and between leaps its picture is noised again."""
        return ([("before", steps, {}) for steps in (1, 4, 25)]
                + [("after", steps, {"fresh": self.fresh, "last": self.last})
                   for steps in sorted({1, 2, 4, self.student_steps}) if self.student_steps % steps == 0])

    def critic(self, features, text_width):
        known = {"both": text_width + features.width, "text": text_width, "image": features.width, "none": 0}
        return discriminator.Projected(features, known[self.condition] + self.timed * self.student_steps)


# What large models want otherwise, and where it is from: the paper tells the student T at pure noise, which
# gets its fair share of the batch, noises real pictures, and states the hinge and gamma; but no rates.
LATENT = dict(last=1., terminal=0., own=0., relative=False, gamma=1e-5, share_r1=1., augment=1., batch=4,
              instance_noise=0., lr=1e-5, lr_d=1e-4, ema=.999, negative="blurry, low quality, distorted")
PRESETS = {"sd15": LATENT, "sdxl": dict(LATENT, batch=1), "sd3": dict(LATENT, batch=1)}
SOURCES = dict.fromkeys(PRESETS, dict.fromkeys("last terminal own relative gamma share_r1".split(), "paper"))


def knowledge(critic, batch, cond, stop, blind, config):
    """c = (c_text, c_img, the time), what the discriminator may know of either picture (B, C). c_img is the
    CLS token of the real x_0 (ours: the `summary` of its own eyes), for below the last time the student sees
    some of it; where it could not (`blind`, (B,)), c_img is zero for real and fake alike, or its presence
    would give the answer away. The time is `stop` (B,), which of the student's: one discriminator for all of
    them matches only their average sharpness: one step stays too soft, four become too sharp."""
    parts = []
    if config.condition in ("both", "text"):
        parts.append(F.layer_norm(cond["pooled"].float(), cond["pooled"].shape[1:]))
    if config.condition in ("both", "image"):
        parts.append(critic.features.summary(batch.image) * ~blind[:, None])
    if config.timed:
        length = parts[0].shape[1] ** .5 if parts else 1.
        parts.append(length * F.one_hot(stop, config.student_steps))
    return torch.cat(parts, 1) if parts else None


def leap(model, x0, cond, config):
    """The student's leap from a random one of its times -> x0_hat (B, C, h, w), with gradient; which time it
    was (B,), 0 the last; and which samples saw nothing of the real x_0 (B,): those from pure noise, and those
    (a share of the others) whose x_s was made, as it will be in use, of what the student itself leapt to from
    the times before; with all noise new, as `fresh` = 1 has it."""
    times = config.path(model.T).to(x0.device)
    share = config.terminal or 1 / len(times)
    odds = torch.tensor([share] + (len(times) - 1) * [(1 - share) / max(len(times) - 1, 1)])  # tau_n, … tau_1
    stop = torch.multinomial(odds, len(x0), replacement=True).to(x0.device)
    s, terminal, eps = times[stop], stop == 0, torch.randn_like(x0)
    own = (~terminal & (torch.rand(len(x0), device=x0.device) < config.own)).nonzero().flatten()
    if len(own):
        leaps = []
        with torch.no_grad():
            sampler.few_step(model, torch.randn_like(x0[own]), times[:-1],
                             {k: v[own] for k, v in cond.items()}, config.fresh,
                             visit=lambda i, x: leaps.append(x))
        landed = torch.stack(leaps)                          # (n - 1, B', C, h, w)
        x0 = x0.index_copy(0, own, landed[stop[own] - 1, torch.arange(len(own), device=own.device)])
    # zero terminal SNR, whatever alpha the schedule has there: nothing of x_0 reaches the network
    x_s = torch.where(terminal.view(-1, 1, 1, 1), eps, model.add_noise(x0, s, eps))
    return model.split(x_s, model.predict(x_s, s, cond), s)[0], stop, terminal.index_fill(0, own, True)


@torch.no_grad()
def advice(teacher, x0_hat, cond, config):
    """The teacher's opinion of the student's own leap -> target (B, C, h, w), c(t) (B,)."""
    most = teacher.T - 1 if config.weighting == "nfsd" else teacher.T         # nfsd divides by alpha_t
    t, eps = torch.randint(most, (len(x0_hat),), device=x0_hat.device), torch.randn_like(x0_hat)
    x_t, uncond = teacher.add_noise(x0_hat, t, eps), teacher.condition([""])  # ADD eq. 4: not the real one
    alpha, sigma = teacher.at(t)
    weight = losses.distillation_weight(config.weighting, alpha, sigma).flatten()
    if config.weighting == "nfsd":
        def said(c):
            c = {**cond, **{k: v.expand_as(cond[k]) for k, v in c.items()}}
            return teacher.split(x_t, teacher.predict(x_t, t, c), t)[1]
        empty = said(uncond)
        negative = said(teacher.condition([config.negative])) if config.negative else empty
        small = (t < teacher.T // 5).view(-1, 1, 1, 1)                        # 200 of 1000
        return losses.nfsd_target(x0_hat, alpha, sigma, empty, said(cond), negative, small), weight
    n = config.teacher_steps
    times = torch.stack([t * (n - i) // n for i in range(n)])                 # (n, B): from t down, evenly
    return sampler.rollout(teacher, x_t, times, cond, uncond, config.teacher_guidance), weight


def augmented(picture, config):
    """(B, 3, H, W) as the discriminator sees it; every call draws anew."""
    return discriminator.augment(picture, discriminator.geometry(len(picture), picture.device),
                                 config.augment, config.instance_noise)


def generator_loss(model, teacher, critic, batch, config):
    """-> {term: weighted loss}, the student's picture (B, 3, H, W) with its graph, and what the discriminator
    may know (B, C) or None."""
    with torch.no_grad():
        x0 = model.encode(batch.image)
        cond = model.condition(batch.caption, batch.frame)
    x0_hat, stop, blind = leap(model, x0, cond, config)
    picture, terms = model.decode(x0_hat), {}
    fake = discriminator.visible(picture)
    known = knowledge(critic, batch, cond, stop, blind, config)
    if config.lambda_adv:
        adv = losses.hinge_generator(critic(None, augmented(fake, config), known))            # ADD eq. 2
        terms["adv"] = config.lambda_adv * adv
    if config.lambda_distill:
        target, weight = advice(teacher, x0_hat.detach(), cond, config)
        ours, theirs = (picture, teacher.decode(target)) if config.space == "pixel" else (x0_hat, target)
        gap = losses.distance(config.distance, ours, theirs.detach())
        terms["distill"] = config.lambda_distill * (weight * gap).mean()      # ADD eq. 4
    return terms, fake, known                                                 # ADD eq. 1: their sum


def discriminator_loss(critic, batch, fake, known, config):
    """-> {term: loss}, logits on real, logits on fake. Both pictures share their c, augmented apart; if
    `relative`, the question is which of the two is real (Jolicoeur-Martineau 2018), a logit is its lead."""
    maps = critic.features(augmented(batch.image, config))
    real, made = critic.score(maps, known), critic(None, augmented(fake.detach(), config), known)
    if config.relative:
        real, made = [r - m for r, m in zip(real, made)], [m - r for r, m in zip(real, made)]
    terms = {"D": losses.hinge_real(real) + losses.hinge_fake(made)}          # ADD eq. 3, the hinges
    if config.gamma and config.share_r1:
        few = slice(math.ceil(config.share_r1 * len(fake)))                   # the batch is in no order
        maps = [f[few].detach().requires_grad_() for f in maps]
        logits = critic.score(maps, None if known is None else known[few])
        terms["R1"] = config.gamma * losses.r1(logits, maps)                  # ADD eq. 3, R1
    return terms, real, made
