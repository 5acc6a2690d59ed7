"""Inference paths: where they stop on the way from noise to picture, and where gradients may flow back.

One step, for every family: ask the network, solve for (x0, eps), put them together again at the next time,
    x_{t'} = alpha_{t'} x0 + sigma_{t'} eps,
which is DDIM for an eps-model and an Euler step for a flow. ADT trains *through* this path under one
constraint (`rollout`): the network always sees a detached input, and only chosen steps keep their graph. Then
    d x0_final / d theta = sum over chosen steps of (a scalar of the schedule) * d y_theta / d theta,
with no product of network Jacobians: nothing to explode, and the memory of the chosen steps' graphs alone,
or of one where they are recomputed.
Read next: losses.py"""

import torch
from torch.utils.checkpoint import checkpoint as recompute


def timeline(T, steps, shift=1.0, last=1.0):
    """`steps` indices from T-1 downwards, evenly spaced and ending one stride above clean
    ('trailing' spacing). shift > 1 spends more of them at the noisy end: u -> shift u / (1 + (shift - 1) u);
    SD3's own tables are shifted already, leave it at 1 there. last: where the first of them lies, as a share
    of T, for students that are told an earlier time than T at pure noise (add.py)."""
    if not 1 <= steps <= T:
        raise ValueError(f"a path has 1 to {T} steps, not {steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift is a positive number, not {shift}")
    u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps               # 1 … 1/steps
    u = shift * u / (1 + (shift - 1) * u)
    u[0] = last
    if not 0 < last <= 1 or steps > 1 and u[1] >= last:
        raise ValueError(f"last is a share of T above the path's next stop, not {last:g}: take fewer steps")
    return (u * T).round().long().clamp(min=1) - 1                            # (steps,)


def pick_steps(n, k, how="even", generator=None):
    """Which of n executed steps keep their graph: a set of k positions (all n if k >= n, never none).
    even: evenly spaced with a random offset (CoMat, DRTune) · last · random · all."""
    k = max(1, min(k, n))
    if how == "all" or k == n:
        return set(range(n))
    if how == "last":
        return set(range(n - k, n))
    if how == "random":
        return set(torch.randperm(n, generator=generator)[:k].tolist())
    if how == "even":
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        return {int((i + offset) * n / k) for i in range(k)}
    raise ValueError(f"unknown way to pick steps '{how}': wanted even, last, random or all")


def rollout(model, x, times, cond, uncond=None, guidance=1.0, train=(), leak=0.0, checkpoint=True, fresh=0.0,
            generator=None, visit=None):
    """Run the sampler from x = x_{times[0]} to the picture x0 (B, C, h, w).

    times (n,): decreasing indices. train: positions in it whose network call keeps its graph; elsewhere the
    output is a constant. leak: how much gradient passes through the network's input (0 is ADT's rule, 1 is
    plain backpropagation). checkpoint: recompute each network call in the backward pass, so that one graph is
    alive at a time whatever n and len(train). fresh: share of new noise in each step, 0 = DDIM / Euler, 1 =
    forget eps entirely. visit(i, x0): called after every step, for pictures of the path."""
    if not 0 <= fresh <= 1:
        raise ValueError(f"fresh is a share between 0 and 1, not {fresh}")
    for i, t in enumerate(times):
        t = t.to(x.device).expand(len(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and i in train):
            seen = (x.detach() if leak == 0                  # ADT constraint: sg[x_t]
                    else x.detach() + leak * (x - x.detach()))
            if checkpoint and torch.is_grad_enabled():
                y = recompute(model.predict, seen, t, cond, uncond, guidance, use_reentrant=False)
            else:
                y = model.predict(seen, t, cond, uncond, guidance)
        x0, eps = model.split(x, y, t)                       # the step's linear algebra sees x attached
        if visit is not None:
            visit(i, x0)
        if i + 1 < len(times):
            if fresh:
                noise = torch.randn(x.shape, generator=generator).to(x.device)
                eps = (1 - fresh ** 2) ** .5 * eps + fresh * noise
            alpha, sigma = model.at(times[i + 1:i + 2].to(x.device))
            x = alpha * x0 + sigma * eps                     # ADT path: DDIM and Euler in one line
    return x0


def few_step(model, noise, times, cond, fresh=1.0, generator=None, visit=None):
    """1-4 steps of a distilled model: predict x0, noise it to the next time, repeat. With fresh = 1 exactly
    the inputs an ADD student is trained on, its own x0 in place of the real one; with less, as noisy, but
    some of the noise it was given stays, and with it the variety of its pictures. No guidance."""
    return rollout(model, noise, times, cond, fresh=fresh, generator=generator, visit=visit)
