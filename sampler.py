"""Sampling paths with truncated gradients: which timesteps, and through which steps gradients flow.

One step, for every model family: call the network, solve for (x0, eps), combine them at the next timestep,
    x_{t'} = alpha_{t'} x0 + sigma_{t'} eps,
which is DDIM for an eps-model and an Euler step for a flow model. ADT trains through this path under one
constraint: the network's input is detached, and only K selected steps keep their graph. Then
    d x0_final / d theta = sum over the K steps of (a schedule scalar) * d y_theta(sg[x_t], t) / d theta,
which contains no product of network Jacobians: gradients cannot explode along the path, and memory is that of
K network graphs, or of one with recomputation, however long the path is.
Read next: losses.py
"""

import torch


def make_timesteps(T, num_steps, shift=1.0, t_max=1.0):
    """Timesteps of a sampling path, "trailing" spacing -> (num_steps,) decreasing indices in 0..T-1.

    They are round(u T) - 1 for u = 1, ..., 1 / num_steps. shift: > 1 places more steps at the noisy end,
    u -> shift u / (1 + (shift - 1) u); leave it at 1 for SD3, whose noise schedule is shifted already. t_max:
    replaces the first u = 1, for students that are given an earlier time than T at pure noise (add.py).
    ValueError if the path is impossible."""
    if not 1 <= num_steps <= T:
        raise ValueError(f"a sampling path has 1 to {T} steps, not {num_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"the timestep shift is a positive number, not {shift}")
    u = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps  # 1 ... 1 / num_steps
    u = shift * u / (1 + (shift - 1) * u)
    u[0] = t_max
    if not 0 < t_max <= 1 or num_steps > 1 and u[1] >= t_max:
        raise ValueError(f"t_max is a fraction of T above the path's second timestep, not {t_max:g}: "
                         "take fewer steps")
    return (u * T).round().long().clamp(min=1) - 1


def select_grad_steps(n, k, selection="strided", generator=None):
    """Which of n steps keep their graph -> a set of k positions in 0..n-1 (all of them if k >= n).

    selection: strided (evenly spaced with a random offset, as in CoMat and DRTune), last, random, all."""
    k = max(1, min(k, n))
    if selection == "all" or k == n:
        return set(range(n))
    if selection == "last":
        return set(range(n - k, n))
    if selection == "random":
        return set(torch.randperm(n, generator=generator)[:k].tolist())
    if selection == "strided":
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        return {int((i + offset) * n / k) for i in range(k)}
    raise ValueError(f"unknown selection of steps '{selection}': wanted strided, last, random or all")


def stratified_starts(n, batch_size, generator=None):
    """Where the images of a batch join a path of n steps -> (B,) ascending positions in 0..n-1. The position
    of a random image of the batch is uniform; together they cover the path evenly, so the cost of batches
    varies little."""
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    return ((torch.arange(batch_size) + offset) * n / batch_size).long()


def select_grad_steps_of_batch(n, starts, k, selection="strided", generator=None):
    """select_grad_steps for images that join a path of n steps at `starts` (B,): K of the steps that each one
    takes -> (n, B) bool. Images with equal starts have the same, so that the network is called less often."""
    keeps_graph = torch.zeros(n, len(starts), dtype=torch.bool)
    for start in starts.unique().tolist():
        for i in select_grad_steps(n - start, k, selection, generator):
            keeps_graph[start + i] |= starts == start
    return keeps_graph


def predict_truncated(predict, keeps_graph, x, t, cond, *guidance):
    """One network call for the images that keep their graph, keeps_graph (B,) bool, and one for the others,
    whose output is a constant -> y (B, C, h, w)."""
    if keeps_graph.all() or not torch.is_grad_enabled():
        return predict(x, t, cond, *guidance)
    outputs, rows = [], []
    for has_graph in (True, False):
        part = (keeps_graph == has_graph).nonzero().flatten()
        if len(part):
            with torch.set_grad_enabled(has_graph):
                outputs.append(predict(x[part], t[part], {k: v[part] for k, v in cond.items()}, *guidance))
            rows.append(part)
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def rollout(model, x, timesteps, cond, uncond=None, guidance_scale=1.0, grad_steps=(), input_grad_scale=0.0,
            checkpointing=True, stochasticity=0.0, generator=None, callback=None, starts=None, calls=None,
            outputs=None):
    """Run the sampler from x at timesteps[0] to the clean latents x0 (B, C, h, w).

    x: (B, C, h, w) · cond, uncond: from model.encode_prompts
    timesteps: (n,) decreasing indices, or (n, B), a path for each sample
    starts: (B,) ascending positions in timesteps (n,); image b joins the path there, from x[b]. None: all
    images take all steps
    grad_steps: positions in timesteps whose network call keeps its graph, a set or, for each image its own,
    (n, B) bool; elsewhere the network's output is a constant
    input_grad_scale: gradient let through the network's input; 0 is ADT's rule; 1, with all steps in
    grad_steps, is plain backpropagation
    checkpointing: recompute each call in the backward pass, so that one network graph is alive at a time; it
    has no effect where every block is recomputed already (models/denoiser.py, predict_recomputed)
    stochasticity: fraction of new noise in every step; 0 is DDIM or Euler; 1 replaces eps completely, as a
    distilled student is sampled: predict x0, noise it to the next timestep, repeat
    callback(i, x0): called after every step with the current prediction
    calls, outputs: of rollout_in_two_passes. A dict that gets step i: (x_t, y); a dict of step i: y, which is
    taken instead of calling the network."""
    if not 0 <= stochasticity <= 1:
        raise ValueError(f"stochasticity is a fraction from 0 to 1, not {stochasticity}")
    starts = torch.zeros(len(x), dtype=torch.long) if starts is None else starts
    if not torch.is_tensor(grad_steps):
        grad_steps = torch.tensor([[i in grad_steps] for i in range(len(timesteps))]).expand(-1, len(x))
    for i, t in enumerate(timesteps):
        num_active = int((starts <= i).sum())                          # the first images of the batch
        if num_active == 0:
            continue
        x_t = x[:num_active]
        t = t.to(x.device).expand(num_active)
        t_next = timesteps[i + 1:i + 2].to(x.device) if i + 1 < len(timesteps) else None
        x_in = x_t.detach()                                            # ADT constraint: sg[x_t]
        if input_grad_scale:
            x_in = x_in + input_grad_scale * (x_t - x_in)
        if outputs is not None:
            y = outputs[i]
        else:
            predict = model.predict_recomputed if checkpointing else model.predict
            with model.precision_for(t, t_next, stochasticity):
                y = predict_truncated(predict, grad_steps[i, :num_active], x_in, t,
                                      {k: v[:num_active] for k, v in cond.items()}, uncond, guidance_scale)
        if calls is not None:
            calls[i] = x_t, y
        x0, eps = model.to_x0_eps(x_t, y, t)                           # linear in x_t, which keeps its graph
        if callback is not None:
            callback(i, x0)
        if t_next is not None:
            if stochasticity:
                noise = torch.randn(x_t.shape, generator=generator).to(x.device)
                eps = (1 - stochasticity ** 2) ** .5 * eps + stochasticity * noise
            alpha, sigma = model.alpha_sigma(t_next)
            x = torch.cat([alpha * x0 + sigma * eps, x[num_active:]])  # ADT path: DDIM and Euler in one line
    return x0


def rollout_in_two_passes(model, x, timesteps, cond, uncond=None, guidance_scale=1.0, *, grad_steps,
                          starts=None, call_size=None):
    """The x0 and the gradient of `rollout` with input_grad_scale=0, up to rounding, in fewer, larger calls.

    The inputs of all calls are constants, so the path is run without gradients first. Then those calls that
    keep their graph are repeated, call_size images and steps at once (None: all), and the second pass along
    the path takes their outputs. Small calls have much overhead; memory is that of all K graphs.
    timesteps: (n,); grad_steps: (n, B) bool; the rest as in rollout."""
    path = model, x, timesteps, cond, uncond, guidance_scale
    calls = {}
    with torch.no_grad():                                              # ADT constraint: every x_t is sg[x_t]
        x0 = rollout(*path, starts=starts, calls=calls)
    if not torch.is_grad_enabled():                                    # warm-up of the discriminator
        return x0
    steps, images = grad_steps.nonzero(as_tuple=True)                  # one of each for every kept graph
    x_t = torch.cat([x_t[grad_steps[i, :len(x_t)]] for i, (x_t, _) in calls.items()])
    t = timesteps[steps].to(x.device)
    t_next = torch.cat([timesteps[1:], timesteps.new_zeros(1)])[steps].to(x.device)  # the cleanest, for x0
    y = []
    for rows in torch.arange(len(steps)).split(call_size or len(steps)):
        with model.precision_for(t[rows], t_next[rows]):
            y.append(model.predict(x_t[rows], t[rows], {k: v[images[rows]] for k, v in cond.items()}, uncond,
                                   guidance_scale))
    y = torch.cat(y)
    outputs = {i: constant.index_copy(0, images[steps == i].to(x.device), y[steps == i].to(constant.dtype))
               for i, (_, constant) in calls.items()}
    return rollout(*path, starts=starts, outputs=outputs)


def skip_noise(shape, num_steps, stochasticity, generator):
    """Draw what a rollout from x of this shape would draw, so that the generator is where it would be."""
    for _ in range(num_steps - 1 if stochasticity else 0):
        torch.randn(shape, generator=generator)
