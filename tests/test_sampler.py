"""Paths against diffusers' schedulers, gradients against their closed form, memory against path length."""

import weakref

import pytest
import torch

import sampler
from conftest import Toy, family_schedule


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------ against diffusers' samplers

@pytest.mark.equation("ADT path")
@pytest.mark.parametrize("name,diffusers_type", [("sd15", "epsilon"), ("sd2-v-zero-snr", "v_prediction")])
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50])
def test_rollout_equals_ddim_of_diffusers(name, diffusers_type, num_steps):
    from diffusers import DDIMScheduler
    model = Toy(*family_schedule(name))
    oracle = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                           set_alpha_to_one=True, timestep_spacing="trailing", prediction_type=diffusers_type,
                           rescale_betas_zero_snr=name.endswith("snr"))
    oracle.set_timesteps(num_steps)
    x = noise = randn(2, 2, 4, 4)
    cond = model.encode_prompts(["a", ""])
    timesteps = sampler.make_timesteps(1000, num_steps)
    with torch.no_grad():
        for t in oracle.timesteps:
            x = oracle.step(model.predict(x, t.expand(2), cond), t, x).prev_sample
        x0 = sampler.rollout(model, noise, timesteps, cond)
    assert timesteps.tolist() == oracle.timesteps.tolist()
    torch.testing.assert_close(x0, x, rtol=1e-4, atol=1e-4)


@pytest.mark.equation("ADT path")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rollout_equals_flow_match_euler_on_its_own_sigmas(shift):
    """The scheduler's sigmas need not be in the model's table: fractional timesteps reach them."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    model = Toy("flow")
    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(12)
    x = noise = randn(2, 2, 4, 4)
    cond = model.encode_prompts(["a", ""])
    timesteps = oracle.sigmas[:-1].double() * 1000 - 1
    with torch.no_grad():
        for t, oracle_t in zip(timesteps, oracle.timesteps):
            x = oracle.step(model.predict(x, t.expand(2), cond), oracle_t, x).prev_sample
        x0 = sampler.rollout(model, noise, timesteps, cond)
    torch.testing.assert_close(x0, x.double(), rtol=0, atol=2e-5)


# ----------------------------------------------------------------------------------------- starts on the path

@pytest.mark.equation("ADT start")
def test_an_image_that_joins_the_path_later_is_sampled_as_if_alone(toy):
    """Each image from its own start, with its own caption, against a path that begins there."""
    model, x, starts = toy(), randn(4, 2, 4, 4), torch.tensor([1, 1, 4, 5])
    timesteps, cond = sampler.make_timesteps(1000, 6), model.encode_prompts(["a", "bcd", "", "ef"])
    uncond = model.encode_prompts([""])
    x0 = sampler.rollout(model, x, timesteps, cond, uncond, 2., starts=starts)
    for b, start in enumerate(starts):
        own_cond = {key: value[b:b + 1] for key, value in cond.items()}
        alone = sampler.rollout(model, x[b:b + 1], timesteps[start:], own_cond, uncond, 2.)
        torch.testing.assert_close(x0[b:b + 1], alone, rtol=0, atol=1e-12)


def test_steps_that_no_image_takes_do_not_call_the_network(toy):
    model, starts = toy(), torch.tensor([2, 3, 3])
    sampler.rollout(model, randn(3, 2, 4, 4), sampler.make_timesteps(1000, 5),
                    model.encode_prompts(["a"] * 3), starts=starts, grad_steps={3}, checkpointing=False)
    assert [len(x) for x, _, _ in model.calls] == [1, 3, 3]
    assert [has_graph for _, _, has_graph in model.calls] == [False, True, False]


def test_the_gradient_of_an_image_is_that_of_its_own_path(toy):
    model, x, starts = toy(), randn(2, 2, 4, 4), torch.tensor([0, 2])
    timesteps, cond = sampler.make_timesteps(1000, 5), model.encode_prompts(["a", "bc"])
    for input_grad_scale in (0., .5):
        x0 = sampler.rollout(model, x, timesteps, cond, starts=starts, grad_steps={1, 3},
                             input_grad_scale=input_grad_scale, checkpointing=False)
        together = torch.autograd.grad(x0[1].sum(), model.network.weight)[0]
        x0 = sampler.rollout(model, x[1:], timesteps[2:], {k: v[1:] for k, v in cond.items()}, grad_steps={1},
                             input_grad_scale=input_grad_scale, checkpointing=False)
        torch.testing.assert_close(together, torch.autograd.grad(x0.sum(), model.network.weight)[0])


@pytest.mark.equation("ADT constraint")
def test_every_image_has_k_steps_of_its_own(toy):
    """Its gradient is that of its own path with its own steps, and a step calls the network once for the
    images with a graph and once for the others."""
    model, x, starts = toy(), randn(3, 2, 4, 4), torch.tensor([0, 0, 2])
    timesteps, cond = sampler.make_timesteps(1000, 5), model.encode_prompts(["a", "bc", "d"])
    keeps_graph = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]).bool()
    x0 = sampler.rollout(model, x, timesteps, cond, starts=starts, grad_steps=keeps_graph,
                         checkpointing=False)
    assert [(len(x), has_graph) for x, _, has_graph in model.calls] == [
        (2, True), (2, False), (2, True), (1, False), (1, True), (2, False), (1, True), (2, False)]
    for b, start in enumerate(starts):
        together = torch.autograd.grad(x0[b].sum(), model.network.weight, retain_graph=True)[0]
        own = {i - int(start) for i in range(5) if keeps_graph[i, b]}
        own_cond = {key: value[b:b + 1] for key, value in cond.items()}
        alone = sampler.rollout(model, x[b:b + 1], timesteps[start:], own_cond, grad_steps=own,
                                checkpointing=False)
        torch.testing.assert_close(x0[b:b + 1], alone)
        torch.testing.assert_close(together, torch.autograd.grad(alone.sum(), model.network.weight)[0])


@pytest.mark.equation("ADT constraint")
@pytest.mark.parametrize("name,guidance_scale", [("tiny", 1.), ("tiny", 3.), ("sd15", 1.), ("sd3", 3.)])
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 0, 2], [1, 3, 3]])
@pytest.mark.parametrize("call_size", [None, 2])
def test_two_passes_give_the_samples_and_gradients_of_one(name, guidance_scale, starts, call_size):
    """The calls with a graph are made afterwards, all in one or call_size images at a time. Each image's own
    gradient is compared."""
    model = Toy() if name == "tiny" else Toy(*family_schedule(name))
    starts, x = torch.tensor(starts), randn(3, 2, 4, 4)
    timesteps, cond = sampler.make_timesteps(1000, 5), model.encode_prompts(["a", "bc", "d"])
    path = model, x, timesteps, cond, model.encode_prompts([""]), guidance_scale
    keeps_graph = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()
    keeps_graph &= torch.arange(5)[:, None] >= starts
    one_pass = sampler.rollout(*path, keeps_graph, checkpointing=False, starts=starts)
    model.calls.clear()
    two_passes = sampler.rollout_in_two_passes(*path, grad_steps=keeps_graph, starts=starts,
                                               call_size=call_size)
    torch.testing.assert_close(two_passes, one_pass, rtol=0, atol=1e-12)
    with torch.no_grad():                                    # warm-up of the discriminator: the path alone
        num_calls = len(model.calls)
        assert torch.equal(sampler.rollout_in_two_passes(*path, grad_steps=keeps_graph, starts=starts),
                           two_passes)
        assert len(model.calls) == num_calls + 5 - int(starts[0])
        del model.calls[num_calls:]
    num_graphs, cfg_factor = int(keeps_graph.sum()), 1 if guidance_scale == 1 else 2
    sizes = [cfg_factor * len(rows) for rows in torch.arange(num_graphs).split(call_size or num_graphs)]
    assert [len(x) for x, _, has_graph in model.calls if has_graph] == sizes
    assert len(model.calls) == 5 - int(starts[0]) + len(sizes)
    for a, b in zip(one_pass, two_passes):
        grads = (torch.autograd.grad(y.square().sum(), model.network.parameters(), retain_graph=True)
                 for y in (a, b))
        for grad_a, grad_b in zip(*grads):
            assert grad_a.norm() > 0
            torch.testing.assert_close(grad_b, grad_a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("selection", ["strided", "last", "random", "all"])
def test_steps_of_a_batch_are_k_of_the_steps_that_each_image_takes(selection):
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 0, 3, 6, 7])
    counts = torch.zeros(8, 5)
    for _ in range(500):
        keeps_graph = sampler.select_grad_steps_of_batch(8, starts, 2, selection, generator)
        taken = torch.arange(8)[:, None] >= starts
        assert not (keeps_graph & ~taken).any()
        expected = taken.sum(0) if selection == "all" else taken.sum(0).clamp(max=2)
        assert (keeps_graph.sum(0) == expected).all()
        assert (keeps_graph[:, 0] == keeps_graph[:, 1]).all()          # equal starts, one call
        counts += keeps_graph
    if selection in ("strided", "random"):                             # each of its steps equally often
        assert (counts[:, 0] / 500 - 2 / 8).abs().max() < .1


@pytest.mark.equation("ADT start")
@pytest.mark.parametrize("n,batch_size", [(10, 32), (10, 4), (50, 4), (5, 1), (3, 3)])
def test_stratified_starts_are_uniform_and_cover_the_path(n, batch_size):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sampler.stratified_starts(n, batch_size, generator) for _ in range(2000)])
    assert draws.min() == 0 and draws.max() == n - 1
    assert (draws.diff(dim=1) >= 0).all()
    frequencies = torch.bincount(draws.flatten(), minlength=n) / draws.numel()
    assert (frequencies - 1 / n).abs().max() < 5 * (1 / n / 2000) ** .5
    expected = torch.arange(n + 1) * batch_size / n                    # images before position i, on average
    for i in range(n + 1):
        assert ((draws < i).sum(1) - expected[i]).abs().max() <= 1


# --------------------------------------------------------------------------------------------- the gradient

def closed_form_gradient(model, path, timesteps, grad_steps, direction, cond):
    """The sum over grad_steps of alpha_0 (sigma_t'/alpha_t' - sigma_t/alpha_t) d eps(sg[x_t]) / d theta for
    eps-models and of -(sigma_t - sigma_t') d v / d theta for flow models, contracted with `direction`.
    path: the network's inputs x_t."""
    params = list(model.network.parameters())
    total = [torch.zeros_like(param) for param in params]
    for i in grad_steps:
        alpha, sigma = model.alpha_sigma(timesteps[i:i + 1])
        next_alpha, next_sigma = torch.ones(1), torch.zeros(1)
        if i + 1 < len(timesteps):
            next_alpha, next_sigma = model.alpha_sigma(timesteps[i + 1:i + 2])
        weight = -(sigma - next_sigma)
        if model.prediction_type == "eps":
            weight = next_sigma / next_alpha - sigma / alpha
        y = model.predict(path[i], timesteps[i].expand(len(path[i])), cond)
        for sum_, grad in zip(total, torch.autograd.grad((weight * y * direction).sum(), params)):
            sum_ += grad
    return total


@pytest.mark.equation("ADT constraint")
@pytest.mark.parametrize("name", ["sd15", "tiny", "sd3"])
@pytest.mark.parametrize("grad_steps", [{0}, {7}, {1, 4, 6}, set(range(8))])
def test_truncated_gradient_equals_its_closed_form(name, grad_steps):
    model = Toy() if name == "tiny" else Toy(*family_schedule(name))
    timesteps, cond = sampler.make_timesteps(1000, 8), model.encode_prompts(["abc"])
    direction = randn(1, 2, 4, 4, seed=2)
    x0 = sampler.rollout(model, randn(1, 2, 4, 4), timesteps, cond, grad_steps=grad_steps,
                         checkpointing=False)
    path = [x for x, _, _ in model.calls]
    grads = torch.autograd.grad((x0 * direction).sum(), model.network.parameters())
    expected = closed_form_gradient(model, path, timesteps, grad_steps, direction, cond)
    for grad, expected_grad in zip(grads, expected):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("ADT constraint")
def test_only_the_selected_steps_have_a_graph(toy):
    model = toy()
    sampler.rollout(model, randn(1, 2, 4, 4), sampler.make_timesteps(1000, 6), model.encode_prompts(["a"]),
                    grad_steps={1, 4}, checkpointing=False)
    assert [has_graph for _, _, has_graph in model.calls] == [False, True, False, False, True, False]


def test_input_grad_scale_one_is_plain_backpropagation_and_zero_is_not(toy):
    """With every step selected, against an independent loop of plain autograd. 0.3 lies in between."""
    model = toy()
    timesteps, cond, noise = sampler.make_timesteps(1000, 5), model.encode_prompts(["a"]), randn(1, 2, 4, 4)
    x = noise
    for i, t in enumerate(timesteps):                                  # Euler's method
        v = model.forward_network(x, model.t_input[t:t + 1], cond)
        next_sigma = model.sigma[timesteps[i + 1]] if i < 4 else 0
        x = x - (model.sigma[t] - next_sigma) * v
    plain = torch.autograd.grad(x.sum(), model.network.weight)[0]
    grads = {}
    for scale in (0., .3, 1.):
        x0 = sampler.rollout(model, noise, timesteps, cond, grad_steps=set(range(5)), input_grad_scale=scale)
        grads[scale] = torch.autograd.grad(x0.sum(), model.network.weight)[0]
    torch.testing.assert_close(grads[1.], plain, rtol=1e-6, atol=1e-8)
    assert (grads[0.] - plain).norm() > 1e-3 * plain.norm()
    assert 0 < (grads[.3] - grads[0.]).norm() < (grads[1.] - grads[0.]).norm()


@pytest.mark.parametrize("input_grad_scale", [0., 1.])
def test_recomputation_changes_no_gradient(toy, input_grad_scale):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = toy()
        x0 = sampler.rollout(model, randn(1, 2, 4, 4), sampler.make_timesteps(1000, 5),
                             model.encode_prompts(["a"]), grad_steps={0, 2, 3},
                             input_grad_scale=input_grad_scale, checkpointing=checkpointing)
        grads.append(torch.autograd.grad(x0.square().sum(), model.network.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def peak_graphs(model, num_steps, grad_steps, checkpointing):
    """The largest number of network graphs that are alive at once, from the rollout to the end of the
    backward pass. Every network call saves a marker for its backward pass; living markers are counted."""
    alive, peak = [0], [0]

    def on_release():
        alive[0] -= 1

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            marker = torch.zeros(1)
            alive[0] += 1
            peak[0] = max(peak[0], alive[0])
            weakref.finalize(marker, on_release)
            ctx.save_for_backward(marker)
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + ctx.saved_tensors[0]

    forward_network = model.forward_network
    model.forward_network = lambda *inputs: Marked.apply(forward_network(*inputs))
    x0 = sampler.rollout(model, randn(1, 2, 4, 4), sampler.make_timesteps(1000, num_steps),
                         model.encode_prompts(["a"]), grad_steps=grad_steps, checkpointing=checkpointing)
    x0.sum().backward()
    return peak[0]


def test_memory_is_one_network_graph_however_long_the_path(toy):
    """With recomputation one graph is alive at a time; without it, one for each selected step."""
    for num_steps, grad_steps in ((5, {2}), (5, set(range(5))), (25, {3, 9, 20}), (25, set(range(25)))):
        assert peak_graphs(toy(), num_steps, grad_steps, True) <= 2    # the last marker may live longer
        assert len(grad_steps) <= peak_graphs(toy(), num_steps, grad_steps, False) <= len(grad_steps) + 1


# ---------------------------------------------------------------------------------- timesteps, selected steps

@pytest.mark.parametrize("selection", ["strided", "last", "random", "all"])
def test_select_grad_steps_selects_k_different_steps(selection):
    for n in range(1, 13):
        for k in (1, 2, 3, 5, 12, 50):
            grad_steps = sampler.select_grad_steps(n, k, selection)
            assert grad_steps <= set(range(n))
            assert len(grad_steps) == (n if selection == "all" else min(n, k))


def test_strided_selection_has_equal_distances_and_reaches_every_step():
    reached, generator = set(), torch.Generator().manual_seed(0)
    for _ in range(200):
        grad_steps = sorted(sampler.select_grad_steps(12, 3, "strided", generator))
        assert {b - a for a, b in zip(grad_steps, grad_steps[1:])} <= {4}
        reached |= set(grad_steps)
    assert reached == set(range(12))
    assert sampler.select_grad_steps(12, 3, "last") == {9, 10, 11}
    with pytest.raises(ValueError, match="wanted strided"):
        sampler.select_grad_steps(5, 1, "first")


def test_random_selection_is_not_strided():
    generator = torch.Generator().manual_seed(0)
    distances = set()
    for _ in range(200):
        first, second = sorted(sampler.select_grad_steps(12, 2, "random", generator))
        distances.add(second - first)
    assert distances == set(range(1, 12))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_decrease_from_the_noisiest_one(shift):
    for num_steps in (1, 2, 7, 50, 1000):
        timesteps = sampler.make_timesteps(1000, num_steps, shift)
        assert len(timesteps) == num_steps
        assert timesteps[0] == 999 and timesteps[-1] >= 0
        assert (timesteps.diff() <= 0).all()
    with pytest.raises(ValueError, match="1 to 1000"):
        sampler.make_timesteps(1000, 0)
    assert sampler.make_timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    assert sampler.make_timesteps(1000, 4, 3.).tolist() == [999, 899, 749, 499]  # u -> 3 u / (1 + 2 u)


def test_timesteps_may_start_below_the_noisiest_one():
    assert sampler.make_timesteps(1000, 4, t_max=.9).tolist() == [899, 749, 499, 249]
    assert sampler.make_timesteps(1000, 1, t_max=.85).tolist() == [849]
    for t_max in (0, 1.1, .75, .5):                                    # above T, or not above the second
        with pytest.raises(ValueError, match="t_max is a fraction"):
            sampler.make_timesteps(1000, 4, t_max=t_max)


# ----------------------------------------------------------------------------------------- few-step sampling

def test_few_step_sampling_noises_the_prediction_with_new_noise(toy):
    """The second input is alpha x0_hat + sigma noise: x0_hat is the first prediction, the noise is new."""
    model, timesteps = toy(), torch.tensor([999, 499])
    cond = model.encode_prompts(["a"])
    start = randn(1, 2, 4, 4)
    predictions = {}
    with torch.no_grad():
        sampler.rollout(model, start, timesteps, cond, stochasticity=1.,
                        generator=torch.Generator().manual_seed(5),
                        callback=lambda i, x0: predictions.update({i: x0}))
        model.calls.clear()
        x0 = sampler.rollout(model, start, timesteps, cond, stochasticity=1.,
                             generator=torch.Generator().manual_seed(5))
    new_noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    alpha, sigma = model.alpha_sigma(torch.tensor([499]))
    torch.testing.assert_close(model.calls[1][0], alpha * predictions[0] + sigma * new_noise)
    torch.testing.assert_close(x0, predictions[1])


@pytest.mark.parametrize("stochasticity", [1., .5, 0.])
def test_stochasticity_is_the_fraction_of_new_noise_in_each_step(toy, monkeypatch, stochasticity):
    """A network that always predicts x0 = 5. Every input is alpha x0_hat + sigma eps; eps has unit variance,
    and each step replaces its fraction of it. (Noising a real image again would look right in training and
    fail in sampling.)"""
    model, calls = toy(), []

    def predict_five(x, t_input, cond):
        calls.append((x, t_input))
        alpha, sigma = model.alpha_sigma(model.timestep(t_input))
        return (x - 5 * alpha) / sigma - 5                             # the flow for x0 = 5

    monkeypatch.setattr(model, "forward_network", predict_five)
    start = torch.randn(1, 2, 64, 64, dtype=torch.float64)
    x0 = sampler.rollout(model, start, sampler.make_timesteps(model.T, 4), model.encode_prompts(["a"]),
                         stochasticity=stochasticity, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x0, torch.full_like(x0, 5.))
    for i, (x, t_input) in enumerate(calls[1:], 1):
        alpha, sigma = model.alpha_sigma(model.timestep(t_input))
        eps = (x - 5 * alpha) / sigma
        fraction_of_start = (1 - stochasticity ** 2) ** (i / 2)
        assert abs(eps.std() - 1) < .05
        assert abs((eps * start).mean() - fraction_of_start) < .05


def test_a_stochasticity_outside_0_to_1_is_rejected(toy):
    model = toy()
    for stochasticity in (-.1, 1.1):
        with pytest.raises(ValueError, match="fraction from 0 to 1"):
            sampler.rollout(model, randn(1, 2, 4, 4), sampler.make_timesteps(1000, 2),
                            model.encode_prompts(["a"]), stochasticity=stochasticity)
