"""The ADD algorithm: every mistake seen in public attempts has a test here that it would fail."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import clear, overheard

import add
import data
import discriminator
import losses
import models
import sampler

CONDITIONS = ["both", "text", "image", "none"]
EXACT = add.Config(augment=0., instance_noise=0.)           # what is shown is what there is


@pytest.fixture(scope="module")
def world(glyphs):
    torch.manual_seed(0)
    model = models.build("tiny", "glyphs")
    teacher = deepcopy(model).eval().requires_grad_(False)
    critic = add.Config().critic(discriminator.Features(models.features("tiny", "glyphs")), 128)
    return model, teacher, critic, glyphs.batch(4, torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- the student

@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_at_the_last_time_the_student_sees_nothing_of_the_picture(toy, target):
    """Zero terminal SNR for every target: two pictures, the same noise, the same input. Below the last time
    the inputs do differ."""
    model, inputs = toy(target), []
    cond = model.condition(["a"] * 64)
    for value in (-3., 3.):
        torch.manual_seed(1)
        model.calls.clear()
        picture = torch.full((64, 2, 4, 4), value, dtype=torch.float64)
        _, _, terminal = add.leap(model, picture, cond, add.Config(own=0.))
        inputs.append(model.calls[0][0])
    apart = (inputs[0] - inputs[1]).abs().flatten(1).amax(1)
    assert 16 < terminal.sum() < 48 and (apart[terminal] == 0).all() and (apart[~terminal] > .1).all()


def test_its_own_leaps_see_nothing_of_the_picture_either(toy):
    model, inputs = toy("eps"), []
    for value in (-3., 3.):
        torch.manual_seed(1)
        model.calls.clear()
        picture = torch.full((16, 2, 4, 4), value, dtype=torch.float64)
        add.leap(model, picture, model.condition(["a"] * 16), add.Config(own=1.))
        inputs.append([x for x, *_ in model.calls])
    assert len(inputs[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*inputs))


def test_each_of_its_own_leaps_stays_with_its_caption(toy, monkeypatch):
    """A student that leaps to five times what its caption says."""
    model = toy()
    def output(x, time, cond):
        t = (time * model.T).round().long()
        model.calls.append((x, t))
        (alpha, sigma), goal = model.at(t), 5 * cond["scale"].view(-1, 1, 1, 1)
        return (x - goal * alpha) / sigma - goal             # the flow that means x0 = goal
    monkeypatch.setattr(model, "output", output)
    cond = model.condition(["a" * i for i in range(8)])
    add.leap(model, torch.zeros(8, 2, 64, 64, dtype=torch.float64), cond, add.Config(own=1., terminal=1e-9))
    x, t = model.calls[-1]
    torch.testing.assert_close(x.mean((1, 2, 3)) / model.at(t)[0].flatten(), 5 * cond["scale"],
                               rtol=0, atol=.3)


@pytest.mark.parametrize("last", [1., .9])
def test_the_student_is_told_the_time_its_input_was_noised_to(toy, last):
    """The index into a list of times is not a time: alpha of the time it is told is the share of picture.
    Only pure noise may be told an earlier time, by which its output is then read."""
    model = toy()
    picture = torch.full((64, 2, 64, 64), 3., dtype=torch.float64)
    x0_hat, _, terminal = add.leap(model, picture, model.condition(["a"] * 64), add.Config(last=last, own=0.))
    x, time, _ = model.calls[0]
    told, end = (time * model.T).round().long(), round(last * 1000) - 1
    assert sorted(set(told.tolist())) == [249, 499, 749, end] and ((told == end) == terminal).all()
    torch.testing.assert_close(x0_hat, model.split(x, model.predict(x, told, model.condition(["a"] * 64)),
                                                   told)[0])
    alpha, sigma = model.at(torch.where(terminal, 999, told))
    torch.testing.assert_close(x.mean((1, 2, 3)) / 3, alpha.flatten(), rtol=0, atol=.03)
    torch.testing.assert_close(x.std((1, 2, 3)), sigma.flatten(), rtol=.05, atol=0)


@pytest.mark.parametrize("steps,terminal,share", [(4, .25, .25), (4, .5, .5), (2, 1., 1.), (1, .5, 1.),
                                                  (4, 0., .25), (2, 0., .5), (1, 0., 1.)])
def test_pure_noise_has_its_share_of_the_batch(toy, steps, terminal, share):
    """And the other student times share the rest evenly. 0: none has more than another."""
    model = toy()
    torch.manual_seed(0)
    config = add.Config(student_steps=steps, terminal=terminal, own=0.)
    _, _, found = add.leap(model, torch.zeros(4000, 2, 1, 1, dtype=torch.float64),
                        model.condition(["a"] * 4000), config)
    assert found.float().mean().item() == pytest.approx(share, abs=.03)
    counts = torch.bincount((model.calls[0][1] * 1000).round().long()).float()[:800] / 4000
    assert all(c == pytest.approx((1 - share) / (steps - 1), abs=.03) for c in counts[counts > 0])


def test_the_student_of_an_eps_model_keeps_the_schedules_alpha(toy):
    """Pure noise goes in, but x0 comes out by the schedule's own (alpha_T, sigma_T): 0/0 is never near."""
    model = toy("eps")
    torch.manual_seed(0)
    x0_hat, _, terminal = add.leap(model, torch.zeros(32, 2, 4, 4, dtype=torch.float64),
                                model.condition(["a"] * 32), add.Config(last=1., own=0.))
    alpha, sigma = model.at(torch.tensor([999]))
    x, time, _ = model.calls[0]
    expected = (x - sigma * model.output(x, time, model.condition(["a"] * 32))) / alpha
    torch.testing.assert_close(x0_hat[terminal], expected[terminal])
    assert x0_hat.isfinite().all()


def test_below_pure_noise_the_student_may_start_from_its_own_leaps(toy, monkeypatch):
    """A student that always leaps to 2 + t, a real picture of 9: each lower time is reached either from the
    real one or, without gradient, from what the student said at the time before; the adversary is told which
    samples saw nothing of the real one."""
    model = toy()
    def output(x, time, cond):
        t = (time * model.T).round().long()
        model.calls.append((x, t, torch.is_grad_enabled()))
        alpha, sigma = model.at(t)
        return (x - (2 + t.view(-1, 1, 1, 1) / 1000) * alpha) / sigma - (2 + t.view(-1, 1, 1, 1) / 1000)
    monkeypatch.setattr(model, "output", output)
    for share in (.5, 1.):
        model.calls.clear()
        _, _, blind = add.leap(model, torch.full((64, 2, 64, 64), 9., dtype=torch.float64),
                            model.condition(["a"] * 64), add.Config(own=share))
        *chain, (x, s, with_gradient) = model.calls
        assert with_gradient and len(chain) == 3 and not any(grad for *_, grad in chain)
        before = {249: 2.499, 499: 2.749, 749: 2.899}        # what was leapt to from the time before
        alpha, _ = model.at(s)
        lower = s < 899
        mean = (x.mean((1, 2, 3)) / alpha.flatten())[lower]
        own = torch.tensor([before[t] for t in s[lower].tolist()]).double()
        torch.testing.assert_close(mean, torch.where(blind[lower], own, 9.), rtol=0, atol=.2)
        assert blind[~lower].all() and blind[lower].double().mean() == pytest.approx(share, abs=.25)


@pytest.mark.parametrize("fresh", [1., .5, 0.])
def test_later_steps_of_the_student_noise_its_own_picture(toy, monkeypatch, fresh):
    """few_step: the second input is alpha x0_hat + sigma noise of unit variance, of which each leap replaces
    its share. (Noising the truth again would look fine in training and fail in use.)"""
    model, seen = toy(), []
    def constant(x, time, cond):                             # the flow that means x0 = 5 everywhere
        seen.append((x, time))
        alpha, sigma = model.at((time * model.T).round().long())
        return (x - 5 * alpha) / sigma - 5
    monkeypatch.setattr(model, "output", constant)
    noise = torch.randn(1, 2, 64, 64, dtype=torch.float64)
    made = sampler.few_step(model, noise, sampler.timeline(model.T, 4), model.condition(["a"]), fresh,
                            torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, torch.full_like(made, 5.))
    for i, (x, time) in enumerate(seen[1:], 1):
        alpha, sigma = model.at((time * model.T).round().long())
        rest = (x - 5 * alpha) / sigma
        kept = (1 - fresh ** 2) ** (i / 2)
        assert abs(rest.std() - 1) < .05 and abs((rest * noise).mean() - kept) < .05


# ------------------------------------------------------------------------------------------- the teacher

@pytest.mark.equation("ADD eq. 4")
def test_the_teacher_judges_the_students_own_picture_noised_again(toy):
    teacher = toy().requires_grad_(False)
    leapt = torch.full((64, 2, 64, 64), 7., dtype=torch.float64)
    add.advice(teacher, leapt, teacher.condition(["a"] * 64), add.Config())
    x, time, with_gradient = teacher.calls[0]
    alpha, sigma = teacher.at((time * teacher.T).round().long())
    torch.testing.assert_close(x.mean((1, 2, 3)), 7 * alpha.flatten(), rtol=0, atol=.08)
    assert len(set(time.tolist())) > 40 and not with_gradient                # every sample its own t
    torch.testing.assert_close((x - 7 * alpha).std((1, 2, 3)), sigma.flatten(), rtol=.1, atol=0)


@pytest.mark.equation("ADD eq. 4")
def test_the_teacher_is_asked_at_all_times_alike(toy):
    teacher = toy().requires_grad_(False)
    leapt = torch.zeros(4000, 2, 4, 4, dtype=torch.float64)
    add.advice(teacher, leapt, teacher.condition(["a"] * 4000), add.Config())
    t = (teacher.calls[0][1] * teacher.T).round()
    assert t.min() < 10 and t.max() > 989 and t.mean() == pytest.approx(499.5, abs=25)


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.equation("ADD eq. 1")
def test_the_teacher_is_shown_the_students_leap_and_heeded_by_c_of_t(world, monkeypatch):
    """Not the real picture, and not a picture with a graph; its advice counts c(t) lambda, each sample's its
    own c(t)."""
    model, teacher, critic, batch = world
    seen, leap = {}, add.leap
    def watched(*inputs):
        seen["leap"], *rest = leap(*inputs)
        return (seen["leap"], *rest)
    def advice(teacher, x0, cond, config):
        seen["asked"] = x0
        return x0 - torch.arange(4.).view(4, 1, 1, 1), torch.arange(4.)      # 0 … 3 off, c = 0 … 3
    monkeypatch.setattr(add, "leap", watched)
    monkeypatch.setattr(add, "advice", advice)
    terms, _, _ = add.generator_loss(model, teacher, critic, batch, add.Config(space="latent"))
    assert torch.equal(seen["asked"], seen["leap"].detach()) and not seen["asked"].requires_grad
    assert terms["distill"].item() == pytest.approx(2.5 * (1 + 8 + 27) / 4, rel=1e-4)


@pytest.mark.equation("ADD eq. 4")
def test_nfsd_asks_for_the_empty_the_real_and_the_negative_caption(toy):
    """The toy's noise is its one output u times the length of the caption plus one: empty 1, caption 3,
    negative 5. Little noise: delta_D = 1 u; much: (1 - 5) u; delta_C = 2 u, 7.5 times."""
    teacher = toy("eps").requires_grad_(False)
    x0, config = torch.randn(64, 2, 4, 4, dtype=torch.float64), add.Config(weighting="nfsd", negative="abcd")
    target, _ = add.advice(teacher, x0, teacher.condition(["ab"] * 64), config)
    x_t, time, _ = teacher.calls[0]
    t = (time * teacher.T).round().long()
    alpha, sigma = teacher.at(t)
    u = teacher.output(x_t, time, {"scale": torch.ones(64, dtype=torch.float64)})
    pull = torch.where(t < 200, 1. + 15, -4. + 15).view(-1, 1, 1, 1) * u
    torch.testing.assert_close(target, x0 - sigma / alpha * pull)
    calls = len(teacher.calls)
    add.advice(teacher, x0, teacher.condition(["ab"] * 64), add.Config(weighting="nfsd"))
    assert len(teacher.calls) == calls + 2                   # without a negative caption no third question


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_teacher_that_knows_the_answer_gives_it_in_any_number_of_steps(toy, monkeypatch, steps):
    teacher, times = toy().requires_grad_(False), []
    def oracle(x, time, cond):
        t = (time * teacher.T).round().long()
        times.append(t)
        alpha, sigma = teacher.at(t)
        return (x - 2 * alpha) / sigma - 2                   # the flow that means x0 = 2
    monkeypatch.setattr(teacher, "output", oracle)
    x0 = torch.zeros(32, 2, 4, 4, dtype=torch.float64)
    target, weight = add.advice(teacher, x0, teacher.condition(["a"] * 32), add.Config(teacher_steps=steps))
    torch.testing.assert_close(target, torch.full_like(target, 2.))
    torch.testing.assert_close(weight, teacher.alpha[times[0]])              # c(t) of the t it began at
    assert len(times) == steps and all((b <= a).all() for a, b in zip(times, times[1:]))


@pytest.mark.equation("ADD eq. 4")
def test_sds_weighting_gives_dreamfusions_gradient(toy):
    """d/dx0 of c(t) |x0 - x0_psi|^2 is w(t) (eps_psi - eps'), with w = sigma^2."""
    teacher = toy("eps").requires_grad_(False)
    t, cond = torch.tensor([50, 400, 990]), teacher.condition(["a"] * 3)
    x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    eps = torch.randn_like(x0)
    x_t, (alpha, sigma) = teacher.add_noise(x0.detach(), t, eps), teacher.at(t)
    target, eps_psi = teacher.split(x_t, teacher.predict(x_t, t, cond), t)
    weight = losses.distillation_weight("sds", alpha, sigma)
    slope = torch.autograd.grad((weight * (x0 - target).square()).sum(), x0)[0]
    torch.testing.assert_close(slope, sigma ** 2 * (eps_psi - eps))
    exponential = losses.distillation_weight("exponential", alpha, sigma)    # is SDS with w = 2 sigma
    torch.testing.assert_close(exponential * sigma ** 2, weight * 2 * sigma)


@pytest.mark.equation("ADD eq. 4")
def test_nfsd_target_pulls_along_the_scores_it_names():
    alpha, sigma = torch.tensor([.9, .4]).view(-1, 1, 1, 1), torch.tensor([.3, .8]).view(-1, 1, 1, 1)
    x0, empty, caption, bad = torch.randn(4, 2, 3, 4, 4)
    x0.requires_grad_()
    small = torch.tensor([True, False]).view(-1, 1, 1, 1)
    target = losses.nfsd_target(x0, alpha, sigma, empty, caption, bad, small, 7.5).detach()
    weight = losses.distillation_weight("nfsd", alpha, sigma)
    slope = torch.autograd.grad((weight * (x0 - target).square()).sum(), x0)[0] / sigma ** 2
    torch.testing.assert_close(slope[0], (empty + 7.5 * (caption - empty))[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope[1], (empty - bad + 7.5 * (caption - empty))[1], rtol=1e-4, atol=1e-4)


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.parametrize("how", ["exponential", "sds"])
def test_clean_targets_count_more_than_noisy_ones(toy, how):
    """c(t) the wrong way round would trust the teacher most where it knows least."""
    model = toy("eps")
    weight = losses.distillation_weight(how, model.alpha, model.sigma)
    assert (weight[600:].diff() < 0).all() and weight[999] < .2 * weight.max()
    with pytest.raises(ValueError, match="exponential, sds or nfsd"):
        losses.distillation_weight("dmd", model.alpha, model.sigma)


@pytest.mark.parametrize("how", ["squared", "l1", "huber"])
def test_distance_is_a_mean_that_vanishes_at_the_target(how):
    a = torch.randn(3, 2, 4, 4)
    assert losses.distance(how, a, a).abs().max() < 1e-6
    wide = losses.distance(how, a.repeat(1, 1, 2, 2), 0 * a.repeat(1, 1, 2, 2))
    torch.testing.assert_close(wide, losses.distance(how, a, 0 * a))         # the same at every resolution
    far = {"squared": 100., "l1": 10., "huber": 10.}[how]
    assert losses.distance(how, torch.full((1, 9), 10.), torch.zeros(1, 9)).item() == pytest.approx(far, .01)


# ------------------------------------------------------------------------------------- the discriminator

@pytest.mark.equation("ADD eq. 3")
def test_r1_of_linear_heads_is_the_squared_norm_of_their_weights():
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)]
    inputs = [torch.randn(4, 6, width, requires_grad=True) for width in (5, 7)]     # (B, tokens, width)
    logits = [(x @ w).flatten(1) for x, w in zip(inputs, weights)]
    penalty = losses.r1(logits, inputs)
    analytic = sum(6 * w.sum(1).square().sum() for w in weights)             # every token adds |W 1|^2
    torch.testing.assert_close(penalty, analytic)
    slope = torch.autograd.grad(penalty, weights[0])[0]
    torch.testing.assert_close(slope, 12 * weights[0].sum(1, keepdim=True).expand(-1, 3))


@pytest.mark.equation("ADD eq. 3")
def test_r1_acts_on_logits_of_convincing_pictures_and_stops_at_the_heads(world):
    """A penalty on the hinge would vanish where real logits exceed 1; one through the backbone would need its
    second derivatives. Neither here: every head learns from R1 alone, and pictures get no gradient."""
    _, _, critic, batch = world
    config = add.Config(gamma=1., condition="none", timed=False, relative=False)
    critic = config.critic(critic.features, 128).requires_grad_(True).train()
    for head in critic.heads:
        head.leave.bias.data.fill_(100.)                     # all real logits far beyond the margin
    image = batch.image.clone().requires_grad_()
    shown = data.Batch(image, batch.caption, batch.truth, batch.named)
    terms, real, _ = add.discriminator_loss(critic, shown, torch.zeros_like(image), None, config)
    assert min(d.min() for d in real) > 1
    terms["R1"].backward()
    assert image.grad is None
    assert all(head.enter.parametrizations.weight.original.grad.abs().sum() > 0 for head in critic.heads)


def test_r1_on_a_share_of_the_batch_has_the_mean_of_the_whole(world):
    """Each quarter is a sample of the batch: the mean over all quarters is the penalty of the whole."""
    _, _, critic, batch = world
    def penalty(order, share):
        config = replace(EXACT, gamma=1., condition="none", timed=False, share_r1=share)
        shown = data.Batch(*(field[order] if torch.is_tensor(field) else field for field in
                             (batch.image, batch.caption, batch.truth, batch.named)))
        terms, _, _ = add.discriminator_loss(plain, shown, torch.zeros_like(batch.image), None, config)
        return terms["R1"].item()
    plain = add.Config(condition="none", timed=False).critic(critic.features, 128).eval()
    parts = [penalty(torch.arange(4).roll(-i), .25) for i in range(4)]
    assert max(parts) > 1.01 * min(parts)
    assert sum(parts) / 4 == pytest.approx(penalty(torch.arange(4), 1.), rel=1e-3)
    assert parts[0] == pytest.approx(penalty(torch.arange(1), 1.), rel=1e-3)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_the_discriminator_may_know_changes_its_verdict(world, condition):
    model, _, critic, batch = world
    config = add.Config(condition=condition)
    torch.manual_seed(0)
    critic = config.critic(critic.features, 128).eval()
    cond, none = model.condition(batch.caption), torch.zeros(4, dtype=torch.bool)
    first, last = torch.full((4,), 3), torch.zeros(4, dtype=torch.long)
    known = add.knowledge(critic, batch, cond, first, none, config)
    swapped = data.Batch(batch.image.flip(0), batch.caption[::-1], batch.truth.flip(0), batch.named.flip(0))
    other = add.knowledge(critic, swapped, model.condition(batch.caption[::-1]), first, none, config)
    later = add.knowledge(critic, batch, cond, last, none, config)
    verdicts = [torch.cat(critic(None, batch.image, c), 1) for c in (known, other, later)]
    assert torch.equal(*verdicts[:2]) == (condition == "none") and not torch.equal(*verdicts[::2])
    if condition != "none":                                  # the time is as loud as the part before it
        assert known[:, -4:].norm(dim=1) == pytest.approx(known[:, :128].norm(dim=1), rel=.01)
    config.timed = False
    known, later = (add.knowledge(critic, batch, cond, stop, none, config) for stop in (first, last))
    assert known is later is None if condition == "none" else torch.equal(known, later)


@pytest.mark.parametrize("condition", ["both", "image"])
def test_at_the_last_time_the_real_picture_is_unknown_to_both_branches(world, condition):
    """c_img is zero there; one c serves real and fake, so its presence tells them nothing."""
    model, _, critic, batch = world
    config, terminal = add.Config(condition=condition, gamma=0.), torch.tensor([True, False, True, False])
    known = add.knowledge(config.critic(critic.features, 128), batch, model.condition(batch.caption),
                          torch.tensor([0, 1, 0, 2]), terminal, config)
    about_image = known[:, -132:-4]                          # then the time
    assert known[:, -4:].argmax(1).tolist() == [0, 1, 0, 2]
    assert (about_image[terminal] == 0).all() and (about_image[~terminal].abs().sum(1) > 1).all()
    shown = []
    class Recorder(torch.nn.Module):
        features = critic.features
        def score(self, maps, c):
            shown.append(c)
            return [maps[0].mean((1, 2, 3))[:, None]]
        def forward(self, _, picture, c):
            return self.score(self.features(picture), c)
    add.discriminator_loss(Recorder(), batch, batch.image, known, config)
    assert len(shown) == 2 and shown[0] is shown[1]


def test_the_student_that_saw_nothing_is_judged_without_the_picture(world):
    model, teacher, critic, batch = world
    config = add.Config(condition="image", timed=False, terminal=1.)
    _, _, known = add.generator_loss(model, teacher, config.critic(critic.features, 128), batch, config)
    assert known.shape == (4, critic.features.width) and not known.any()


def test_r1_counts_gamma(world):
    critic, batch = world[2].eval(), world[3]
    known = torch.zeros(4, critic.project[0].in_features)
    found = []
    for gamma in (1e-4, 3e-4):
        torch.manual_seed(0)
        terms, _, _ = add.discriminator_loss(critic, batch, batch.image, known, add.Config(gamma=gamma))
        found.append(terms["R1"].item())
    assert found[1] == pytest.approx(3 * found[0], rel=1e-3) and found[0] > 0


@pytest.mark.equation("ADD eq. 3")
def test_r1_is_of_the_verdict_on_each_real_picture_with_its_own_c(world):
    critic, batch = deepcopy(world[2]).eval(), world[3]
    known = torch.randn(4, critic.project[0].in_features)
    config = replace(EXACT, gamma=1., share_r1=.5)
    terms, _, _ = add.discriminator_loss(critic, batch, batch.image.flip(0), known, config)
    maps = [f[:2].detach().requires_grad_() for f in critic.features(batch.image)]
    expected = losses.r1(critic.score(maps, known[:2]), maps)
    assert terms["R1"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_real_and_fake_are_augmented_apart(world, monkeypatch):
    critic, batch, draws = world[2].eval(), world[3], []
    augment = discriminator.augment
    def watched(picture, draw, *rest):
        draws.append(draw)
        return augment(picture, draw, *rest)
    monkeypatch.setattr(discriminator, "augment", watched)
    known = torch.zeros(4, critic.project[0].in_features)
    add.discriminator_loss(critic, batch, batch.image, known, add.Config(gamma=0.))
    assert len(draws) == 2 and (draws[0] != draws[1]).all()


# ------------------------------------------------------------------------------------------ the whole step

@pytest.mark.equation("ADD eq. 1")
@pytest.mark.parametrize("weighting", ["exponential", "sds", "nfsd"])
@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_after_the_generator_half_only_the_student_holds_gradients(world, weighting, space):
    model, teacher, critic, batch = world
    critic.requires_grad_(False)
    clear(model, teacher, critic)
    config = add.Config(weighting=weighting, space=space)
    terms, fake, _ = add.generator_loss(model, teacher, critic, batch, config)
    assert set(terms) == {"adv", "distill"} and fake.requires_grad and fake.shape == batch.image.shape
    sum(terms.values()).backward()
    assert all(p.grad is None for other in (critic, teacher, model.text) for p in other.parameters())
    assert all(p.grad is not None for p in model.network.parameters())


@pytest.mark.equation("ADD eq. 3")
def test_after_the_discriminator_half_only_the_heads_hold_gradients(world):
    model, teacher, critic, batch = world
    critic.requires_grad_(False)
    _, fake, known = add.generator_loss(model, teacher, critic, batch, add.Config())
    clear(model, teacher, critic)
    critic.requires_grad_(True)
    terms, real, made = add.discriminator_loss(critic, batch, fake, known, add.Config())
    assert set(terms) == {"D", "R1"} and [d.shape for d in real] == [d.shape for d in made]
    sum(terms.values()).backward()
    assert all(p.grad is None for other in (model, teacher) for p in other.parameters())
    assert all(p.grad is not None for p in critic.parameters())
    critic.requires_grad_(False)


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.parametrize("term", ["adv", "distill"])
def test_each_term_alone_reaches_every_tensor_of_the_student(world, term):
    model, teacher, critic, batch = world
    model = deepcopy(model)
    for p in model.network.parameters():
        torch.nn.init.normal_(p, std=.05)
    critic.requires_grad_(False)
    weights = {"lambda_adv": float(term == "adv"), "lambda_distill": float(term == "distill")}
    terms, _, _ = add.generator_loss(model, teacher, critic, batch, add.Config(**weights))
    assert set(terms) == {term}
    terms[term].backward()
    silent = [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.equation("ADD eq. 1")
def test_the_terms_carry_their_weights_and_signs(world):
    model, teacher, _, batch = world
    class Praise(torch.nn.Module):
        features = world[2].features
        def forward(self, _, picture, c):
            return 7 + 0 * picture.mean((1, 2, 3))[:, None]
    found = []
    for weight in (.5, 2.):
        torch.manual_seed(3)
        config = add.Config(lambda_adv=weight, lambda_distill=3 * weight)
        found.append(add.generator_loss(model, teacher, Praise(), batch, config)[0])
    assert [terms["adv"].item() for terms in found] == pytest.approx([-3.5, -14.])
    assert found[1]["distill"].item() == pytest.approx(4 * found[0]["distill"].item(), rel=1e-3)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_batches_of_any_size_work(world, n, condition):
    model, teacher, critic, batch = world
    config = add.Config(condition=condition, teacher_steps=2, teacher_guidance=2.)
    critic = config.critic(critic.features, 128)
    small = data.Batch(batch.image[:n], batch.caption[:n], batch.truth[:n], batch.named[:n])
    terms, fake, known = add.generator_loss(model, teacher, critic, small, config)
    judged, _, _ = add.discriminator_loss(critic, small, fake, known, config)
    assert all(v.isfinite() for v in (*terms.values(), *judged.values()))


@pytest.mark.parametrize("bad,sentence", [({"student_steps": 0}, "1 or more"),
                                          ({"ema": 1.}, "ema is below 1"),
                                          ({"terminal": 1.5}, "terminal is a share"),
                                          ({"weighting": "nfsd", "teacher_steps": 2}, "nfsd asks"),
                                          ({"weighting": "nfsd", "teacher_guidance": 2.}, "nfsd asks"),
                                          ({"lambda_adv": 0., "lambda_distill": 0.}, "nothing is left")])
def test_settings_that_make_no_sense_are_a_sentence(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        add.Config(**bad)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 6, 8])
def test_a_student_is_measured_at_times_it_knows(n):
    config = add.Config(student_steps=n, last=1.)
    known = set(config.path(840).tolist())                   # 840 stops: every n divides them
    ways = [way for who, *way in config.rows() if who == "after"]
    assert ways[-1][0] == n
    for steps, settings in ways:
        assert set(sampler.timeline(840, steps, last=settings["last"]).tolist()) <= known


def test_without_an_adversary_nobody_waits_for_it():
    assert add.Config(lambda_adv=0., warmup_d=60).warmup_d == 0 < add.Config(warmup_d=60).warmup_d


def judged(world, real, made, **settings):
    """The discriminator's half, given what it says of every real and every made picture."""
    class Says:
        features = world[2].features
        def score(self, maps, known):
            return [torch.full((4, 1), real)]
        def __call__(self, _, picture, known):
            return [torch.full((4, 1), made)]
    config = add.Config(gamma=0., **settings)
    terms, *logits = add.discriminator_loss(Says(), world[3], world[3].image, None, config)
    return terms["D"].item(), *(heads[0].unique().item() for heads in logits)


@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("real,made,loss", [(1., -1., 0.), (0., -1., 1.), (1., 3., 4.), (-2., .5, 4.5)])
def test_the_hinge_asks_the_real_to_be_high_and_the_fake_to_be_low(world, real, made, loss):
    assert judged(world, real, made, relative=False) == pytest.approx((loss, real, made))


@pytest.mark.parametrize("real,made,loss", [(1., 0., 0.), (7., 6., 0.), (-3., -3.5, 1.), (0., 2., 6.)])
def test_the_relative_hinge_counts_nothing_but_the_lead(world, real, made, loss):
    """Where both verdicts stand is no matter; one ahead is enough."""
    assert judged(world, real, made) == pytest.approx((loss, real - made, made - real))


class Spy(torch.nn.Module):
    """Stands before a critic and remembers what it was shown and told."""

    def __init__(self, critic):
        super().__init__()
        self.critic, self.features, self.seen = critic, critic.features, []

    def score(self, maps, known):
        return self.critic.score(maps, known)

    def forward(self, _, picture, known):
        self.seen.append((picture.detach(), known))
        return self.critic(_, picture, known)


@pytest.mark.parametrize("own", [0., 1.])
def test_everybody_hears_the_caption_of_their_own_picture(world, monkeypatch, own):
    """Student, its leaps in between, teacher, discriminator: row by row."""
    model, teacher, critic, batch = world
    spy, said = Spy(critic.eval()), model.condition(batch.caption)["pooled"]
    heard = overheard(monkeypatch, model), overheard(monkeypatch, teacher)
    add.generator_loss(model, teacher, spy, batch, replace(EXACT, terminal=1e-9, own=own))
    assert len(heard[0]) == (4 if own else 1) and len(heard[1]) == 1
    for rows in (*heard[0], *heard[1]):
        torch.testing.assert_close(rows, said)
    about_text, about_image = spy.seen[0][1][:, :128], spy.seen[0][1][:, 128:-4]
    torch.testing.assert_close(about_text, torch.nn.functional.layer_norm(said, said.shape[1:]))
    torch.testing.assert_close(about_image, critic.features.summary(batch.image) * (1 - own))


def test_what_the_discriminator_is_shown_is_in_range_and_augmented(world, monkeypatch):
    """Both halves, both pictures: an adversary that is shown more than is judged finds it."""
    model, teacher, critic, batch = world
    shown, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z: 5 * decode(z))
    monkeypatch.setattr(teacher, "decode", lambda z: decode(z))
    def augment(picture, *_):
        shown.append(picture)
        return 0 * picture + .125 * len(shown)
    monkeypatch.setattr(discriminator, "augment", augment)
    spy = Spy(critic.eval())
    _, fake, known = add.generator_loss(model, teacher, spy, batch, add.Config())
    add.discriminator_loss(spy, batch, fake, known, add.Config(gamma=0.))
    assert shown[0] is fake and fake.abs().max() <= 1 and len(shown) == 3
    assert shown[1] is batch.image and torch.equal(shown[2], fake) and not shown[2].requires_grad
    assert [picture.unique().tolist() for picture, _ in spy.seen] == [[.125], [.375]]


def test_noise_is_on_whatever_the_discriminator_is_shown():
    seen = add.augmented(torch.zeros(64, 3, 32, 32), add.Config(augment=0., instance_noise=.1))
    assert seen.std().item() == pytest.approx(.1, rel=.02)


@pytest.mark.equation("ADD eq. 4")
def test_the_distance_is_taken_where_it_is_said(toy, monkeypatch):
    """A decoder that doubles quadruples the squared distance in pixels, and leaves it in latents."""
    model, found = toy(), {}
    monkeypatch.setattr(model, "decode", lambda z: 2 * z)
    batch = data.Batch(torch.randn(8, 2, 4, 4, dtype=torch.float64), ["ab"] * 8, None, None)
    for space in ("pixel", "latent"):
        torch.manual_seed(0)
        config = add.Config(space=space, lambda_adv=0., condition="none", timed=False)
        found[space] = add.generator_loss(model, model, None, batch, config)[0]["distill"].item()
    assert found["pixel"] == pytest.approx(4 * found["latent"])


@pytest.mark.equation("ADD eq. 4")
def test_the_teachers_guidance_is_the_one_that_was_set(toy):
    teacher, x0, said = toy(), torch.randn(16, 2, 4, 4, dtype=torch.float64), []
    for guidance in (1., 2., 4.):
        torch.manual_seed(0)
        config = add.Config(teacher_guidance=guidance)
        said.append(add.advice(teacher, x0, teacher.condition(["abc"] * 16), config)[0])
    torch.testing.assert_close(said[2] - said[0], 3 * (said[1] - said[0]))
    assert (said[1] - said[0]).abs().max() > .01


@pytest.mark.equation("ADD eq. 4")
def test_nfsd_never_divides_by_an_alpha_of_zero(toy):
    teacher, x0 = toy(), torch.randn(8192, 2, 2, 2, dtype=torch.float64)     # T itself would come eight times
    target, weight = add.advice(teacher, x0, teacher.condition(["a"] * 8192), add.Config(weighting="nfsd"))
    assert target.isfinite().all() and weight.isfinite().all()


def test_the_leaps_in_between_forget_as_much_noise_as_they_will_in_use(toy, monkeypatch):
    model, asked, leaps = toy(), [], sampler.few_step
    def watched(model, noise, times, cond, fresh, **rest):
        asked.append(fresh)
        return leaps(model, noise, times, cond, fresh, **rest)
    monkeypatch.setattr(sampler, "few_step", watched)
    add.leap(model, torch.randn(16, 2, 4, 4, dtype=torch.float64), model.condition(["a"] * 16),
             add.Config(fresh=.3, own=1., terminal=1e-9))
    assert asked == [.3]
