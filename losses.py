"""The formulas of both papers as pure functions of tensors.

Both methods keep a regression loss and add an adversarial loss. D is high on real images and low on generated
ones. The adversarial losses are means over tokens; over heads they are sums in ADD (eqs. 2 and 3) and means
in ADT. R1 is a sum over heads. Comments "ADT ..." and "ADD eq. ..." are the tags of docs/equations.md.

    ADT:  L_G = L_diffusion - lambda_adv D(fake)
    ADD:  L_G = -lambda_adv D(fake) + lambda_distill L_distill
    both: L_D = relu(1 - D(real)) + relu(1 + D(fake))          (+ gamma R1 in ADD)

Read next: discriminator.py
"""

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------- diffusion loss

def sample_timesteps(n, T, scheme="uniform", generator=None):
    """n random timestep indices in 0..T-1 -> (n,) int64.

    scheme: uniform (DDPM, SD 1.x to XL) or logit_normal (SD3: the sigmoid of a normal number, which prefers
    the middle of the path)."""
    if scheme == "uniform":
        return torch.randint(T, (n,), generator=generator)
    if scheme == "logit_normal":
        return (torch.randn(n, generator=generator).sigmoid() * T).long()
    raise ValueError(f"unknown timestep sampling '{scheme}': wanted uniform or logit_normal")


def diffusion_loss(model, x0, t, eps, cond, recompute=False):
    """The model's own pretraining loss E || y_theta(x_t, t, c) - (a x0 + b eps) ||^2, mean over all elements.

    x0, eps: (B, C, h, w) · t: (B,) · cond: from model.encode_prompts · recompute: keep no graph until the
    backward pass -> scalar"""
    predict = model.predict_recomputed if recompute else model.predict
    y = predict(model.add_noise(x0, t, eps), t, cond)
    return F.mse_loss(y.float(), model.training_target(x0, eps, t))    # DDPM eq. 14, ADT L_diff


# ---------------------------------------------------------------------------------------- adversarial losses

def reduce_heads(terms, reduction):
    """One scalar per head -> their sum (ADD) or their mean, whose size does not depend on the number
    of heads."""
    total = sum(terms)
    return total if reduction == "sum" else total / len(terms)


def hinge_real(logits, reduction="mean"):
    """relu(1 - D(real)); logits: one (B, N) tensor per head -> scalar"""
    return reduce_heads([F.relu(1 - d).mean() for d in logits], reduction)  # ADT L_D, ADD eq. 3


def hinge_fake(logits, reduction="mean"):
    """relu(1 + D(fake)); logits: one (B, N) tensor per head -> scalar. The caller detaches the image."""
    return reduce_heads([F.relu(1 + d).mean() for d in logits], reduction)  # ADT L_D, ADD eq. 3


def hinge_generator(logits, reduction="mean"):
    """-D(fake) -> scalar. Linear: relu(1 - D(fake)) would have no gradient where D(fake) > 1."""
    return -reduce_heads([d.mean() for d in logits], reduction)        # ADT L_G, ADD eq. 2


def r1_penalty(logits, features):
    """R1 with respect to the heads' inputs: sum over layers of the batch mean of || d(sum D_k) / d F_k ||^2.

    logits: of real images, one (B, N) per head · features: the heads' inputs (B, D, h, w), requires_grad
    The penalty is on the logits, not on the hinge loss, whose gradient is zero wherever D(real) > 1. The
    logits are summed over tokens: with a mean the penalty would be N^2 times weaker, and gamma = 1e-5 would
    have no effect. No second backward pass goes through the backbone. -> scalar"""
    grads = torch.autograd.grad(sum(d.sum() for d in logits), features, create_graph=True)
    return sum(grad.float().square().flatten(1).sum(1).mean() for grad in grads)  # ADD eq. 3, R1


# ----------------------------------------------------------------------------------------- score distillation

def distillation_weight(weighting, alpha, sigma):
    """c(t) of the distillation loss; alpha, sigma: (B, 1, 1, 1) -> the same shape.

    exponential: c = alpha, so noisier targets count less. sds and nfsd: c = alpha w / (2 sigma) with
    DreamFusion's w = sigma^2; exponential therefore is SDS with w = 2 sigma."""
    if weighting == "exponential":
        return alpha                                                   # ADD eq. 4, c(t) = alpha_t
    if weighting in ("sds", "nfsd"):
        return alpha * sigma / 2                                       # ADD eq. 4, c(t) of SDS
    raise ValueError(f"unknown distillation weighting '{weighting}': wanted exponential, sds or nfsd")


def nfsd_target(x0, alpha, sigma, eps_uncond, eps_cond, eps_negative, is_small_t, guidance_scale=7.5):
    """Target of noise-free score distillation (Katzir et al. 2023), x0 - sigma / alpha (delta_D + s delta_C).

    With c(t) above the loss has the gradient w(t) (delta_D + s delta_C). delta_C = eps(c) - eps(empty) is the
    direction of the caption. delta_D is the direction towards the data: eps(empty) at small t, otherwise
    eps(empty) - eps(negative prompt). is_small_t: (B, 1, 1, 1) bool -> (B, C, h, w)"""
    delta_domain = torch.where(is_small_t, eps_uncond, eps_uncond - eps_negative)
    return x0 - sigma / alpha * (delta_domain + guidance_scale * (eps_cond - eps_uncond))


def distillation_distance(metric, pred, target):
    """Distance of each sample, mean over its elements: (B, ...), (B, ...) -> (B,).

    metric: l2 (squared error, the paper's), l1, huber (pseudo-Huber, c = .03)"""
    diff = (pred - target).float().flatten(1)
    if metric == "l2":
        return diff.square().mean(1)
    if metric == "l1":
        return diff.abs().mean(1)
    if metric == "huber":
        return ((diff.square() + .03 ** 2).sqrt() - .03).mean(1)
    raise ValueError(f"unknown distillation loss '{metric}': wanted l2, l1 or huber")
