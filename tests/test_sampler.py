"""Paths against diffusers' schedulers, gradients against their closed form,
memory against the number of steps."""

import weakref

import pytest
import torch
from conftest import Toy, family

import sampler


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------- foreign oracles

@pytest.mark.equation("ADT path")
@pytest.mark.parametrize("name,kind", [("sd15", "epsilon"), ("sd2-v-zero-snr", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_rollout_equals_ddim_of_diffusers(name, kind, steps):
    from diffusers import DDIMScheduler
    model = Toy(*family(name))
    oracle = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                           set_alpha_to_one=True, timestep_spacing="trailing", prediction_type=kind,
                           rescale_betas_zero_snr=name.endswith("snr"))
    oracle.set_timesteps(steps)
    x = start = noise(2, 2, 4, 4)
    cond = model.condition(["a", ""])
    with torch.no_grad():
        for t in oracle.timesteps:
            x = oracle.step(model.predict(x, t.expand(2), cond), t, x).prev_sample
        ours = sampler.rollout(model, start, sampler.timeline(1000, steps), cond)
    assert sampler.timeline(1000, steps).tolist() == oracle.timesteps.tolist()
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.equation("ADT path")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rollout_equals_flow_match_euler_on_its_own_sigmas(shift):
    """The oracle's sigmas need not lie on our table: fractional times find them."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    model = Toy("flow")
    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(12)
    x = start = noise(2, 2, 4, 4)
    cond = model.condition(["a", ""])
    times = oracle.sigmas[:-1].double() * 1000 - 1
    with torch.no_grad():
        for t, sigma in zip(times, oracle.timesteps):
            x = oracle.step(model.predict(x, t.expand(2), cond), sigma, x).prev_sample
        ours = sampler.rollout(model, start, times, cond)
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------------------- the gradient

def closed_form(model, path, times, chosen, direction, cond):
    """sum over chosen t of  alpha_0 (sigma_t'/alpha_t' - sigma_t/alpha_t) d eps(sg[x_t])/d theta
    for eps-models, -(sigma_t - sigma_t') d v/d theta for flows, contracted with `direction`;
    x_t read off the recorded path."""
    total = [torch.zeros_like(p) for p in model.network.parameters()]
    for i in chosen:
        t, after = times[i:i + 1], times[i + 1:i + 2]
        (a, s), (a2, s2) = model.at(t), (model.at(after) if len(after) else (torch.ones(1), torch.zeros(1)))
        weight = s2 / a2 - s / a if model.target == "eps" else -(s - s2)
        y = model.predict(path[i], t.expand(len(path[i])), cond)
        for sum_, g in zip(total, torch.autograd.grad((weight * y * direction).sum(),
                                                      model.network.parameters())):
            sum_ += g
    return total


@pytest.mark.equation("ADT constraint")
@pytest.mark.parametrize("name", ["sd15", "tiny", "sd3"])
@pytest.mark.parametrize("chosen", [{0}, {7}, {1, 4, 6}, set(range(8))])
def test_constrained_gradient_equals_its_closed_form(name, chosen):
    model = Toy() if name == "tiny" else Toy(*family(name))
    times, cond, direction = sampler.timeline(1000, 8), model.condition(["abc"]), noise(1, 2, 4, 4, seed=2)
    x0 = sampler.rollout(model, noise(1, 2, 4, 4), times, cond, train=chosen, checkpoint=False)
    path = [x for x, _, _ in model.calls]
    found = torch.autograd.grad((x0 * direction).sum(), model.network.parameters())
    for ours, theirs in zip(found, closed_form(model, path, times, chosen, direction, cond)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("ADT constraint")
def test_no_graph_outside_the_chosen_steps(toy):
    model = toy()
    sampler.rollout(model, noise(1, 2, 4, 4), sampler.timeline(1000, 6), model.condition(["a"]), train={1, 4},
                    checkpoint=False)
    assert [grad for _, _, grad in model.calls] == [False, True, False, False, True, False]


def test_full_leak_is_plain_backpropagation_and_zero_leak_is_not(toy):
    """leak = 1 with every step chosen against an independent loop of plain autograd;
    half-way lies between."""
    model = toy()
    times, cond, start = sampler.timeline(1000, 5), model.condition(["a"]), noise(1, 2, 4, 4)
    x = start
    for i, t in enumerate(times):
        v = model.output(x, model.time[t:t + 1], cond)
        x = x - (model.sigma[t] - (model.sigma[times[i + 1]] if i < 4 else 0)) * v    # Euler, written plainly
    plain = torch.autograd.grad(x.sum(), model.network.weight)[0]
    found = {leak: torch.autograd.grad(
        sampler.rollout(model, start, times, cond, train=set(range(5)), leak=leak).sum(),
        model.network.weight)[0] for leak in (0., .3, 1.)}
    torch.testing.assert_close(found[1.], plain, rtol=1e-6, atol=1e-8)
    assert (found[0.] - plain).norm() > 1e-3 * plain.norm()
    assert 0 < (found[.3] - found[0.]).norm() < (found[1.] - found[0.]).norm()


@pytest.mark.parametrize("leak", [0., 1.])
def test_checkpointing_changes_no_number(toy, leak):
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        model = toy()
        x0 = sampler.rollout(model, noise(1, 2, 4, 4), sampler.timeline(1000, 5), model.condition(["a"]),
                             train={0, 2, 3}, leak=leak, checkpoint=checkpoint)
        grads.append(torch.autograd.grad(x0.square().sum(), model.network.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def peak_graphs(model, steps, chosen, checkpoint):
    """The largest number of network graphs held at once, from rollout to the end of the backward pass: each
    call of the network saves a marker for its backward pass, and markers are counted while they live."""
    alive, most = [0], [0]

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            marker = torch.zeros(1)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(marker, lambda: alive.__setitem__(0, alive[0] - 1))
            ctx.save_for_backward(marker)
            return y.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope + ctx.saved_tensors[0]

    output = model.output
    model.output = lambda *inputs: Marked.apply(output(*inputs))
    x0 = sampler.rollout(model, noise(1, 2, 4, 4), sampler.timeline(1000, steps), model.condition(["a"]),
                         train=chosen, checkpoint=checkpoint)
    x0.sum().backward()
    return most[0]


def test_memory_is_one_network_graph_whatever_the_path(toy):
    """With checkpointing one graph is alive at a time; without, one per trained step."""
    for steps, chosen in ((5, {2}), (5, set(range(5))), (25, {3, 9, 20}), (25, set(range(25)))):
        assert peak_graphs(toy(), steps, chosen, True) <= 2  # the last marker may outlive its call by one
        assert len(chosen) <= peak_graphs(toy(), steps, chosen, False) <= len(chosen) + 1


# ------------------------------------------------------------------------------------------------ small parts

@pytest.mark.parametrize("how", ["even", "last", "random", "all"])
def test_pick_steps_picks_k_different_positions(how):
    for n in range(1, 13):
        for k in (1, 2, 3, 5, 12, 50):
            chosen = sampler.pick_steps(n, k, how)
            assert chosen <= set(range(n)) and len(chosen) == (n if how == "all" else min(n, k))


def test_pick_even_is_even_and_reaches_every_step():
    seen, generator = set(), torch.Generator().manual_seed(0)
    for _ in range(200):
        chosen = sorted(sampler.pick_steps(12, 3, "even", generator))
        assert {b - a for a, b in zip(chosen, chosen[1:])} <= {4}
        seen |= set(chosen)
    assert seen == set(range(12)) and sampler.pick_steps(12, 3, "last") == {9, 10, 11}
    with pytest.raises(ValueError, match="wanted even"):
        sampler.pick_steps(5, 1, "first")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timeline_falls_from_the_noisiest_time(shift):
    for steps in (1, 2, 7, 50, 1000):
        times = sampler.timeline(1000, steps, shift)
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and (times.diff() <= 0).all()
    with pytest.raises(ValueError, match="1 to 1000"):
        sampler.timeline(1000, 0)
    assert sampler.timeline(1000, 4).tolist() == [999, 749, 499, 249]
    assert sampler.timeline(1000, 4, 3.).tolist() == [999, 899, 749, 499]     # u -> 3 u / (1 + 2 u)


def test_few_step_sees_what_an_add_student_is_trained_on(toy):
    """The second input is alpha x0_hat + sigma fresh: x0_hat is the first answer, the noise is new."""
    model, times = toy(), torch.tensor([999, 499])
    generator = torch.Generator().manual_seed(5)
    start = noise(1, 2, 4, 4)
    visited = {}
    with torch.no_grad():
        sampler.rollout(model, start, times, model.condition(["a"]), fresh=1., generator=generator,
                        visit=lambda i, x0: visited.update({i: x0}))
        model.calls.clear()
        last = sampler.few_step(model, start, times, model.condition(["a"]),
                                generator=torch.Generator().manual_seed(5))
    fresh = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    alpha, sigma = model.at(torch.tensor([499]))
    torch.testing.assert_close(model.calls[1][0], alpha * visited[0] + sigma * fresh)
    torch.testing.assert_close(last, visited[1])


def test_a_timeline_may_start_below_pure_noise():
    assert sampler.timeline(1000, 4, last=.9).tolist() == [899, 749, 499, 249]
    assert sampler.timeline(1000, 1, last=.85).tolist() == [849]
    for last in (0, 1.1, .75, .5):                           # above T, or not above the next stop
        with pytest.raises(ValueError, match="last is a share"):
            sampler.timeline(1000, 4, last=last)
