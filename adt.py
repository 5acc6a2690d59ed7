"""ADT, Adversarial Diffusion Tuning (Shen et al. 2025, arXiv 2504.11423): practise the way you will perform.

A diffusion model is trained on noised true pictures but used on its own half-finished ones. ADT closes the
gap: noise a real picture part of the way, let the sampler finish the job, and ask a siamese discriminator
whether the result and the real picture belong together. The old diffusion loss stays, so that the
discriminator cannot be hacked; gradients stay small and cheap because they flow along the path, never
through the network's inputs.

    L_G = L_diff + lambda_adv * ( -D(x_0, x0_hat) )    L_D = relu(1 - D(x_0, x_0')) + relu(1 + D(x_0, x0_hat))

Same three names as add.py: Config, generator_loss, discriminator_loss.                Read next: train.py"""

from dataclasses import dataclass
from typing import Annotated

import torch

import discriminator
import losses
import sampler


@dataclass
class Config:
    """Each field carries its provenance: paper (abstract), secondary (summaries, related work), ours."""
    # the path
    path_steps: Annotated[int, "ours: steps of the sampler that training runs"] = 10
    train_steps: Annotated[int, "secondary: K, how many executed steps keep their graph"] = 3
    pick: Annotated[str, "secondary: which ones: even (random offset), last, random, all"] = "even"
    start: Annotated[
        str, "paper: image = from a noised real picture, text = always from pure noise"] = "image"
    guidance: Annotated[float, "ours: classifier-free guidance inside the path"] = 1.0
    leak: Annotated[float, "paper: gradient let through the network's input, 0 = none"] = 0.0
    # the losses
    variant: Annotated[str, "ours: similarity, twin, difference, or projected (unpaired)"] = "similarity"
    lambda_diff: Annotated[float, "paper: weight of the diffusion loss (1 = kept, 0 = the ablation)"] = 1.0
    lambda_adv: Annotated[float, "ours: weight of the adversarial loss; 0 is plain diffusion training"] = 0.05
    augment: Annotated[float, "secondary: strength of the differentiable augmentation, 0 = none"] = 1.0
    drop_caption: Annotated[float, "secondary: share of empty captions in the diffusion loss"] = 0.1
    times: Annotated[str, "ours: how the diffusion loss draws t: uniform or lognormal"] = "lognormal"
    # the optimisers
    batch: Annotated[int, "ours: pictures per step"] = 32
    lr: Annotated[float, "ours: AdamW, generator"] = 1e-4
    lr_d: Annotated[float, "ours: AdamW, discriminator"] = 1e-3
    beta1_d: Annotated[float, "secondary: no momentum in the discriminator"] = 0.0
    clip: Annotated[float, "ours: largest gradient norm, generator"] = 1.0
    clip_d: Annotated[float, "secondary: largest gradient norm, discriminator"] = 1.0
    ema: Annotated[float, "ours: decay of the averaged generator, the one that is kept"] = 0.99
    warmup_d: Annotated[
        int, "ours: first steps in which only the discriminator learns the adversarial game"] = 10


def simulate(model, x0, cond, uncond, config):
    """Image-to-image inference: noise x_0 to a uniformly drawn step of the path, run the sampler from there.
    One draw for the whole batch. -> x0_hat (B, C, h, w), with the constrained gradient."""
    times = sampler.timeline(model.T, config.path_steps)
    first = int(torch.randint(config.path_steps, ())) if config.start == "image" else 0
    times = times[first:]                                    # ADT start: t_s uniform over the path
    x = model.add_noise(x0, times[:1].to(x0.device), torch.randn_like(x0))    # pure noise where alpha_T = 0
    chosen = sampler.pick_steps(len(times), config.train_steps, config.pick)
    return sampler.rollout(model, x, times, cond, uncond, config.guidance, chosen, config.leak)


def pair(real, other, strength):
    """Two pictures under one geometric draw and two colour draws."""
    draw = discriminator.geometry(len(real), real.device)
    return discriminator.augment(real, draw, strength), discriminator.augment(other, draw, strength)


def generator_loss(model, critic, batch, config):
    """-> {term: weighted loss}, the generated picture (B, 3, H, W) with its graph or None, and the captions'
    condition. The terms share no graph, so each may be sent backward on its own."""
    keep = torch.rand(len(batch.caption)) >= config.drop_caption
    with torch.no_grad():                                    # encoders are frozen; only the network learns
        x0 = model.encode(batch.image)
        cond, uncond = model.condition(batch.caption), model.condition([""])
        dropped = model.condition([c if k else "" for c, k in zip(batch.caption, keep)])
    t = losses.sample_times(len(x0), model.T, config.times).to(x0.device)
    diff = losses.diffusion_loss(model, x0, t, torch.randn_like(x0), dropped)
    if config.lambda_adv == 0:
        return {"diff": config.lambda_diff * diff}, None, cond
    fake = model.decode(simulate(model, x0, cond, uncond, config))            # with gradient, not clamped
    adv = losses.hinge_generator(critic(*pair(batch.image, fake, config.augment), cond["pooled"]))
    return {"diff": config.lambda_diff * diff, "adv": config.lambda_adv * adv}, fake, cond   # ADT L_G


def discriminator_loss(critic, batch, fake, cond, config):
    """-> L_D and its two logits. The real pair is one picture twice, augmented apart; the fake pair holds the
    real picture and what the model made of it."""
    real = critic(*pair(batch.image, batch.image, config.augment), cond["pooled"])      # D(x_0, x_0')
    made = critic(*pair(batch.image, fake.detach(), config.augment), cond["pooled"])    # D(x_0, sg[x0_hat])
    return losses.hinge_real(real) + losses.hinge_fake(made), real, made                # ADT L_D
