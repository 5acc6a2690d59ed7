"""The formulas of either paper, as pure functions. Nothing here owns a network.

Both papers play the same game: the generator keeps a regression loss that anchors it, and adds an adversarial
loss that tells it what regression cannot. Signs: D is high on real, low on fake. The papers' sum over heads
is a mean here, each head's own a mean over its tokens: lambda then depends on neither number nor size.

    L_G = L_diff + lambda * (-D(fake)), or (ADD) -D(fake) + lambda L_distill
    L_D = relu(1 - D(real)) + relu(1 + D(fake)), or (ADD, relative) of D(real) - D(fake)

Read next: discriminator.py"""

import torch
import torch.nn.functional as F


# -------------------------------------------------------------------------------------------- diffusion

def sample_times(n, steps, how="uniform", generator=None):
    """n time indices in 0..steps-1. 'uniform' is DDPM's and SD's; 'lognormal' is SD3's sigmoid of a normal,
    which looks more often at the middle of the line, where there is most to learn."""
    if how == "uniform":
        return torch.randint(steps, (n,), generator=generator)
    if how == "lognormal":
        return (torch.randn(n, generator=generator).sigmoid() * steps).long()
    raise ValueError(f"unknown way to draw times '{how}': wanted uniform or lognormal")


def diffusion_loss(model, x0, t, eps, cond):
    """L_diff = E || y_theta(x_t, t, c) - (a x0 + b eps) ||^2, the model's own pretraining loss; mean over all
    elements. x0, eps (B, C, h, w), t (B,)."""
    y = model.predict(model.add_noise(x0, t, eps), t, cond)
    return F.mse_loss(y.float(), model.training_target(x0, eps, t))           # DDPM eq. 14, ADT L_diff


# ------------------------------------------------------------------------------------------ adversarial

def hinge_real(logits):
    """relu(1 - D(real)). logits: one (B, N) per head."""
    return sum(F.relu(1 - d).mean() for d in logits) / len(logits)            # ADT L_D, ADD eq. 3


def hinge_fake(logits):
    """relu(1 + D(fake)). The fake picture must be detached by the caller."""
    return sum(F.relu(1 + d).mean() for d in logits) / len(logits)            # ADT L_D, ADD eq. 3


def hinge_generator(logits):
    """-D(fake): linear, never saturates; a relu here would stop teaching once D is beaten by a margin."""
    return -sum(d.mean() for d in logits) / len(logits)                       # ADT L_G, ADD eq. 2


def r1(logits, inputs):
    """R1 on what the heads see: sum over layers of the batch mean of || d (sum of logits) / d F_k ||^2.

    logits of real pictures, one (B, N) per head; inputs: the heads' maps (B, D, h, w) with requires_grad.
    On the logits, never on the hinge, whose slope is zero wherever a real logit exceeds 1. Summed over them,
    not averaged: a mean would make the penalty N^2 times weaker, and 1e-5 of it nothing at all. The gradient
    stops at the heads' inputs, so there is no second backward pass through the backbone."""
    slopes = torch.autograd.grad(sum(d.sum() for d in logits), inputs, create_graph=True)
    return sum(slope.float().square().flatten(1).sum(1).mean() for slope in slopes)           # ADD eq. 3, R1


# ---------------------------------------------------------------------------------- score distillation

def distillation_weight(how, alpha, sigma):
    """c(t). 'exponential' trusts clean targets more; 'sds' and 'nfsd' are c = alpha / (2 sigma) w(t) with
    DreamFusion's w = sigma^2. Hence exponential is SDS with w = 2 sigma."""
    if how == "exponential":
        return alpha                                                          # ADD eq. 4, c(t) = alpha_t
    if how in ("sds", "nfsd"):
        return alpha / (2 * sigma) * sigma ** 2                               # ADD eq. 4, c(t) of SDS
    raise ValueError(f"unknown weighting '{how}': wanted exponential, sds or nfsd")


def nfsd_target(x0, alpha, sigma, eps_empty, eps_caption, eps_negative, small, scale=7.5):
    """The picture that noise-free score distillation (Katzir et al. 2023) pulls x0 towards:
    x0 - sigma / alpha (delta_D + s delta_C); with c(t) above its gradient is w(t) (delta_D + s delta_C).
    delta_C = eps(c) - eps(empty) follows the caption; delta_D leads back to the data: eps(empty) where there
    is little noise (`small`, (B, 1, 1, 1) bool), else eps(empty) - eps(negative prompt)."""
    domain = torch.where(small, eps_empty, eps_empty - eps_negative)
    return x0 - sigma / alpha * (domain + scale * (eps_caption - eps_empty))


def distance(how, a, b):
    """(B, …), (B, …) -> (B,), mean over the picture's elements: lambda then does not depend on its size."""
    gap = (a - b).float().flatten(1)
    if how == "squared":
        return gap.square().mean(1)
    if how == "l1":
        return gap.abs().mean(1)
    if how == "huber":
        return ((gap.square() + .03 ** 2).sqrt() - .03).mean(1)               # pseudo-Huber
    raise ValueError(f"unknown distance '{how}': wanted squared, l1 or huber")
