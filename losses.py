"""Every numbered formula of either paper, as a pure function of tensors. Nothing here owns a network.

Both papers play the same game: the generator keeps a regression loss that anchors it, and adds an adversarial
loss that tells it what regression cannot. Signs: D is high on real, low on fake.

    L_G = L_diff + lambda * (-D(fake))         L_D = relu(1 - D(real)) + relu(1 + D(fake))

Read next: discriminator.py
"""

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
    """relu(1 - D(real)), mean over everything. logits (B, L)."""
    return F.relu(1 - logits).mean()                                          # ADT L_D, ADD eq. 3


def hinge_fake(logits):
    """relu(1 + D(fake)). The fake picture must be detached by the caller."""
    return F.relu(1 + logits).mean()                                          # ADT L_D, ADD eq. 3


def hinge_generator(logits):
    """-D(fake): linear, never saturates; a relu here would stop teaching once D is beaten by a margin."""
    return -logits.mean()                                                     # ADT L_G, ADD eq. 2
