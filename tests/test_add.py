"""ADD's generator half: what the student and the teacher receive, and which gradients are left."""

from copy import deepcopy

import pytest
import torch

import add
import data
import losses
import sampler
from conftest import untrained_params, zero_grads


def constant_image(value, n, size=4):
    return torch.full((n, 2, size, size), value, dtype=torch.float64)


def predict_x0(monkeypatch, model, x0_of):
    """Give the toy flow model a network that predicts x0_of(t, cond); its calls are still recorded."""
    def forward_network(x, t_input, cond):
        model.calls.append((x.detach().clone(), t_input, torch.is_grad_enabled()))
        t = model.timestep(t_input)
        alpha, sigma = model.alpha_sigma(t)
        x0 = x0_of(t, cond)
        return (x - alpha * x0) / sigma - x0

    monkeypatch.setattr(model, "forward_network", forward_network)


# ------------------------------------------------------------------------------------------- the student

@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v", "flow"])
def test_at_pure_noise_the_students_input_holds_nothing_of_the_image(toy, prediction_type):
    """Zero terminal SNR for every prediction type: two images and the same noise give the same input there,
    and different inputs at the other timesteps."""
    model, inputs = toy(prediction_type), []
    cond = model.encode_prompts(["a"] * 64)
    for value in (-3., 3.):
        torch.manual_seed(1)
        model.calls.clear()
        _, hide_image = add.student_prediction(model, constant_image(value, 64), cond,
                                                  add.Config(backward_simulation_prob=0.))
        inputs.append(model.calls[0][0])
    difference = (inputs[0] - inputs[1]).abs().flatten(1).amax(1)
    assert 4 < hide_image.sum() < 32                                   # a quarter of 64
    assert (difference[hide_image] == 0).all()
    assert (difference[~hide_image] > .1).all()


def test_with_backward_simulation_no_input_holds_anything_of_the_image(toy):
    model, inputs = toy("eps"), []
    for value in (-3., 3.):
        torch.manual_seed(1)
        model.calls.clear()
        add.student_prediction(model, constant_image(value, 16), model.encode_prompts(["a"] * 16),
                               add.Config(backward_simulation_prob=1.))
        inputs.append([x for x, _, _ in model.calls])
    assert len(inputs[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*inputs))


def test_simulated_samples_keep_their_captions(toy, monkeypatch):
    """A student whose prediction is five times the caption's scale."""
    model = toy()
    predict_x0(monkeypatch, model, lambda t, cond: 5 * cond["scale"].view(-1, 1, 1, 1))
    cond = model.encode_prompts(["a" * i for i in range(8)])
    add.student_prediction(model, constant_image(0., 8, 64), cond,
                           add.Config(backward_simulation_prob=1., pure_noise_prob=1e-9))
    x_s, t_input, _ = model.calls[-1]
    alpha, _ = model.alpha_sigma(model.timestep(t_input))
    torch.testing.assert_close(x_s.mean((1, 2, 3)) / alpha.flatten(), 5 * cond["scale"], rtol=0, atol=.3)


@pytest.mark.parametrize("t_max", [1., .9])
def test_the_student_receives_the_timestep_that_its_input_was_noised_to(toy, t_max):
    """The fraction of the image in x_s is alpha of the timestep in the call (a timestep, not an index into
    the list of timesteps). Only pure noise comes with an earlier timestep, t_max, which also converts the
    network's output to x0."""
    model = toy()
    cond = model.encode_prompts(["a"] * 64)
    x0_hat, hide_image = add.student_prediction(model, constant_image(3., 64, 64), cond,
                                                   add.Config(t_max=t_max, backward_simulation_prob=0.))
    x_s, t_input, _ = model.calls[0]
    t, t_noise = model.timestep(t_input), round(t_max * 1000) - 1
    assert sorted(set(t.tolist())) == [249, 499, 749, t_noise]
    assert ((t == t_noise) == hide_image).all()
    torch.testing.assert_close(x0_hat, model.to_x0_eps(x_s, model.predict(x_s, t, cond), t)[0])
    alpha, sigma = model.alpha_sigma(torch.where(hide_image, 999, t))
    torch.testing.assert_close(x_s.mean((1, 2, 3)) / 3, alpha.flatten(), rtol=0, atol=.03)
    torch.testing.assert_close(x_s.std((1, 2, 3)), sigma.flatten(), rtol=.05, atol=0)


@pytest.mark.parametrize("student_steps,pure_noise_prob,fraction",
                         [(4, .25, .25), (4, .5, .5), (2, 1., 1.), (1, .5, 1.),
                          (4, 0., .25), (2, 0., .5), (1, 0., 1.)])
def test_pure_noise_has_its_fraction_of_the_batch(toy, student_steps, pure_noise_prob, fraction):
    """The other timesteps share the rest equally. With 0 all timesteps are equally frequent."""
    model = toy()
    torch.manual_seed(0)
    config = add.Config(student_steps=student_steps, pure_noise_prob=pure_noise_prob,
                        backward_simulation_prob=0.)
    _, hide_image = add.student_prediction(model, constant_image(0., 4000, 1),
                                           model.encode_prompts(["a"] * 4000), config)
    assert hide_image.float().mean().item() == pytest.approx(fraction, abs=.03)
    t = model.timestep(model.calls[0][1])
    is_step = t == config.timesteps(model.T)[:, None]                  # (n, B)
    assert is_step.any(0).all()
    step_index = is_step.int().argmax(0)
    assert torch.equal(step_index == 0, hide_image)
    frequencies = torch.bincount(step_index, minlength=student_steps)[1:] / 4000
    assert all(f == pytest.approx((1 - fraction) / (student_steps - 1), abs=.03) for f in frequencies)


def test_the_student_of_an_eps_model_divides_by_the_schedules_alpha(toy):
    """The input is pure noise, but x0 follows from the schedule's (alpha_T, sigma_T): no division by zero."""
    model = toy("eps")
    torch.manual_seed(0)
    cond = model.encode_prompts(["a"] * 32)
    x0_hat, hide_image = add.student_prediction(model, constant_image(0., 32), cond,
                                                   add.Config(t_max=1., backward_simulation_prob=0.))
    alpha, sigma = model.alpha_sigma(torch.tensor([999]))
    x_s, t_input, _ = model.calls[0]
    expected = (x_s - sigma * model.forward_network(x_s, t_input, cond)) / alpha
    torch.testing.assert_close(x0_hat[hide_image], expected[hide_image])
    assert x0_hat.isfinite().all()


@pytest.mark.parametrize("fraction", [.5, 1.])
def test_backward_simulation_noises_the_prediction_of_the_previous_timestep(toy, monkeypatch, fraction):
    """A student that always predicts 2 + t / T, and real images of 9. x_s is made of the real image or,
    without gradient, of the student's prediction one timestep before; hide_image tells which."""
    model = toy()
    predict_x0(monkeypatch, model, lambda t, cond: 2 + t.view(-1, 1, 1, 1) / 1000)
    _, hide_image = add.student_prediction(model, constant_image(9., 64, 64),
                                              model.encode_prompts(["a"] * 64),
                                              add.Config(backward_simulation_prob=fraction))
    *simulation, (x_s, t_input, has_graph) = model.calls
    assert has_graph
    assert len(simulation) == 3 and not any(grad for _, _, grad in simulation)
    t = model.timestep(t_input)
    alpha, _ = model.alpha_sigma(t)
    is_lower = t < 899
    mean = (x_s.mean((1, 2, 3)) / alpha.flatten())[is_lower]
    prediction_before = {249: 2.499, 499: 2.749, 749: 2.899}           # at the timestep before
    predictions = torch.tensor([prediction_before[i] for i in t[is_lower].tolist()]).double()
    torch.testing.assert_close(mean, torch.where(hide_image[is_lower], predictions, 9.), rtol=0, atol=.2)
    assert hide_image[~is_lower].all()
    assert hide_image[is_lower].double().mean() == pytest.approx(fraction, abs=.25)


def test_all_noises_of_backward_simulation_are_independent(toy, monkeypatch):
    """The noise that the simulation starts from, that of each of its steps (all of it new, as in sampling),
    and that of x_s: recovered from the network's inputs, since the student always predicts x0 = 5."""
    model, noises = toy(), []
    predict_x0(monkeypatch, model, lambda t, cond: 5.)
    add.student_prediction(model, constant_image(0., 8, 64), model.encode_prompts(["a"] * 8),
                           add.Config(backward_simulation_prob=1., pure_noise_prob=1e-9))
    first, *others = model.calls
    noises.append(first[0])
    for x, t_input, _ in others:
        alpha, sigma = model.alpha_sigma(model.timestep(t_input))
        noises.append((x - 5 * alpha) / sigma)
    assert len(noises) == 4
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))
    assert (correlations - torch.eye(4)).abs().max() < .025            # six standard deviations


@pytest.mark.parametrize("n", [1, 3, 4, 5, 6, 8])
def test_a_student_is_evaluated_at_its_own_timesteps(n):
    config = add.Config(student_steps=n, t_max=1.)
    student_timesteps = set(config.timesteps(840).tolist())            # every n divides 840
    rows = [(num_steps, settings) for label, num_steps, settings in config.eval_sampling_configs()
            if label == "after"]
    assert rows[-1][0] == n
    for num_steps, settings in rows:
        assert settings["stochasticity"] == 1
        timesteps = sampler.make_timesteps(840, num_steps, t_max=settings["t_max"])
        assert set(timesteps.tolist()) <= student_timesteps


# ------------------------------------------------------------------------------------------- the teacher

@pytest.mark.equation("ADD eq. 4")
def test_the_teacher_receives_the_students_prediction_noised_again(toy):
    teacher = toy().requires_grad_(False)
    add.distillation_target(teacher, constant_image(7., 64, 64), teacher.encode_prompts(["a"] * 64),
                            add.Config())
    x_t, t_input, has_graph = teacher.calls[0]
    alpha, sigma = teacher.alpha_sigma(teacher.timestep(t_input))
    torch.testing.assert_close(x_t.mean((1, 2, 3)), 7 * alpha.flatten(), rtol=0, atol=.08)
    torch.testing.assert_close((x_t - 7 * alpha).std((1, 2, 3)), sigma.flatten(), rtol=.1, atol=0)
    assert len(set(t_input.tolist())) > 40                             # every sample has its own t
    assert not has_graph


@pytest.mark.equation("ADD eq. 4")
def test_the_teachers_timesteps_are_uniform(toy):
    teacher = toy().requires_grad_(False)
    add.distillation_target(teacher, constant_image(0., 4000), teacher.encode_prompts(["a"] * 4000),
                            add.Config())
    t = teacher.timestep(teacher.calls[0][1]).double()
    assert t.min() < 10 and t.max() > 989
    assert t.mean() == pytest.approx(499.5, abs=25)
    assert t.std() == pytest.approx(1000 / 12 ** .5, rel=.05)


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.equation("ADD eq. 1")
def test_the_distillation_loss_weights_each_sample_with_its_own_c(add_setup, monkeypatch):
    """The teacher is given the student's prediction as a constant, not the real image. The loss is
    lambda times the mean of c(t) times the squared distance."""
    model, teacher, disc, batch = add_setup
    recorded, student_prediction = {}, add.student_prediction

    def record_prediction(*inputs):
        outputs = student_prediction(*inputs)
        recorded["x0_hat"] = outputs[0]
        return outputs

    def fixed_target(teacher, x0_hat, cond, config):
        recorded["given"] = x0_hat
        return x0_hat - torch.arange(4.).view(4, 1, 1, 1), torch.arange(4.)  # distance 0 ... 3, c = 0 ... 3

    monkeypatch.setattr(add, "student_prediction", record_prediction)
    monkeypatch.setattr(add, "distillation_target", fixed_target)
    losses_dict, _ = add.generator_loss(model, teacher, disc, batch, add.Config(distill_space="latent"))
    assert torch.equal(recorded["given"], recorded["x0_hat"].detach())
    assert not recorded["given"].requires_grad
    assert losses_dict["distill"].item() == pytest.approx(2.5 * (1 + 8 + 27) / 4, rel=1e-4)


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.parametrize("teacher_steps", [1, 2, 4])
def test_a_perfect_teacher_reaches_the_same_target_in_any_number_of_steps(toy, monkeypatch, teacher_steps):
    teacher = toy().requires_grad_(False)
    predict_x0(monkeypatch, teacher, lambda t, cond: 2.)
    target, weight = add.distillation_target(teacher, constant_image(0., 32),
                                             teacher.encode_prompts(["a"] * 32),
                                             add.Config(teacher_steps=teacher_steps))
    timesteps = [teacher.timestep(t_input) for _, t_input, _ in teacher.calls]
    torch.testing.assert_close(target, torch.full_like(target, 2.))
    torch.testing.assert_close(weight, teacher.alpha[timesteps[0]])    # c of the first timestep
    assert len(timesteps) == teacher_steps
    assert all((later <= earlier).all() for earlier, later in zip(timesteps, timesteps[1:]))


@pytest.mark.equation("ADD eq. 4")
def test_the_teachers_guidance_scale_is_the_one_set(toy):
    """The target is linear in the scale: y_u + w (y_c - y_u)."""
    teacher, x0_hat, targets = toy(), torch.randn(16, 2, 4, 4, dtype=torch.float64), []
    for scale in (1., 2., 4.):
        torch.manual_seed(0)
        targets.append(add.distillation_target(teacher, x0_hat, teacher.encode_prompts(["abc"] * 16),
                                               add.Config(teacher_guidance_scale=scale))[0])
    torch.testing.assert_close(targets[2] - targets[0], 3 * (targets[1] - targets[0]))
    assert (targets[1] - targets[0]).abs().max() > .01


@pytest.mark.equation("ADD eq. 4")
def test_nfsd_calls_the_teacher_with_the_empty_the_real_and_the_negative_caption(toy, monkeypatch):
    """The toy's eps is one output u times the length of the caption plus one: empty 1, caption 3, negative
    5. At small t delta_D = 1 u, otherwise (1 - 5) u; delta_C = 2 u, with the weight 7.5."""
    teacher = toy("eps").requires_grad_(False)
    monkeypatch.setattr(add, "NEGATIVE_PROMPT", "abcd")
    teacher.is_large = True
    x0_hat, cond = torch.randn(64, 2, 4, 4, dtype=torch.float64), teacher.encode_prompts(["ab"] * 64)
    target, _ = add.distillation_target(teacher, x0_hat, cond, add.Config(distill_weighting="nfsd"))
    assert len(teacher.calls) == 3
    x_t, t_input, _ = teacher.calls[0]
    t = teacher.timestep(t_input)
    alpha, sigma = teacher.alpha_sigma(t)
    u = teacher.forward_network(x_t, t_input, {"scale": torch.ones(64, dtype=torch.float64)})
    direction = torch.where(t < 200, 1. + 15, -4. + 15).view(-1, 1, 1, 1) * u
    torch.testing.assert_close(target, x0_hat - sigma / alpha * direction)
    teacher.calls.clear()
    teacher.is_large = False
    add.distillation_target(teacher, x0_hat, cond, add.Config(distill_weighting="nfsd"))
    assert len(teacher.calls) == 2                                     # no negative prompt, no third call


@pytest.mark.equation("ADD eq. 4")
def test_nfsd_never_divides_by_alpha_zero(toy):
    """Of 8192 uniform timesteps about eight would be the last one, where a flow model has alpha = 0."""
    teacher, x0_hat = toy(), torch.randn(8192, 2, 2, 2, dtype=torch.float64)
    target, weight = add.distillation_target(teacher, x0_hat, teacher.encode_prompts(["a"] * 8192),
                                             add.Config(distill_weighting="nfsd"))
    assert target.isfinite().all() and weight.isfinite().all()


@pytest.mark.equation("ADD eq. 4")
def test_the_distance_is_taken_in_distill_space(toy, monkeypatch):
    """A decoder that doubles its input: the squared distance is four times as large in pixels."""
    model, results = toy(), {}
    monkeypatch.setattr(model, "decode", lambda z: 2 * z)
    batch = data.Batch(torch.randn(8, 2, 4, 4, dtype=torch.float64), ["ab"] * 8, None, None)
    for space in ("pixel", "latent"):
        torch.manual_seed(0)
        config = add.Config(distill_space=space, lambda_adv=0., disc_conditioning="none")
        results[space] = add.generator_loss(model, model, None, batch, config)[0]["distill"].item()
    assert results["pixel"] == pytest.approx(4 * results["latent"])


# -------------------------------------------------------------------------------------- gradients, settings

@pytest.mark.equation("ADD eq. 1")
@pytest.mark.parametrize("weighting", ["exponential", "sds", "nfsd"])
@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_the_generator_half_leaves_gradients_in_the_student_alone(add_setup, weighting, space):
    model, teacher, disc, batch = add_setup
    disc.requires_grad_(False)
    zero_grads(model, teacher, disc)
    config = add.Config(distill_weighting=weighting, distill_space=space)
    losses_dict, inputs = add.generator_loss(model, teacher, disc, batch, config)
    assert set(losses_dict) == {"adv", "distill"}
    assert inputs.fake.requires_grad and inputs.fake.shape == batch.image.shape
    sum(losses_dict.values()).backward()
    for frozen in (disc, teacher, model.text_encoder):
        assert all(param.grad is None for param in frozen.parameters())
    assert all(param.grad is not None for param in model.network.parameters())


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.parametrize("term", ["adv", "distill"])
def test_each_loss_alone_reaches_every_parameter_of_the_student(add_setup, term):
    model, teacher, disc, batch = add_setup
    model = deepcopy(model)
    for param in model.network.parameters():                           # zero weights would stop a gradient
        torch.nn.init.normal_(param, std=.05)
    disc.requires_grad_(False)
    weights = {"lambda_adv": float(term == "adv"), "lambda_distill": float(term == "distill")}
    losses_dict, _ = add.generator_loss(model, teacher, disc, batch, add.Config(**weights))
    assert set(losses_dict) == {term}
    losses_dict[term].backward()
    assert not untrained_params(model.network)


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.equation("ADD eq. 3")
def test_the_adversarial_losses_are_sums_over_heads(add_setup, monkeypatch):
    """With the mean they are smaller by the number of heads; R1 and the distillation are the same."""
    model, teacher, disc, batch = add_setup
    disc.eval()                                # in train mode spectral norms change with every call
    num_heads = len(disc.heads)
    assert num_heads > 1
    results = []
    config = add.Config()
    for reduce_heads in (lambda terms, reduction: sum(terms) / len(terms), losses.reduce_heads):
        monkeypatch.setattr(losses, "reduce_heads", reduce_heads)
        torch.manual_seed(0)
        g_losses, inputs = add.generator_loss(model, teacher, disc, batch, config)
        d_losses, _, _ = add.discriminator_loss(disc, inputs, config)
        results.append({name: loss.item() for name, loss in {**g_losses, **d_losses}.items()})
    mean, total = results
    assert total["adv"] == pytest.approx(num_heads * mean["adv"], rel=1e-4)
    assert total["d"] == pytest.approx(num_heads * mean["d"], rel=1e-4)
    assert total["distill"] == pytest.approx(mean["distill"], rel=1e-4)
    assert total["r1"] == pytest.approx(mean["r1"], rel=1e-4)


@pytest.mark.parametrize("settings,message", [({"student_steps": 0}, "1 or more"),
                                              ({"ema_decay": 1.}, "ema_decay is below 1"),
                                              ({"pure_noise_prob": 1.5}, "pure_noise_prob is a fraction"),
                                              ({"distill_weighting": "nfsd", "teacher_steps": 2},
                                               "nfsd calls the teacher once"),
                                              ({"distill_weighting": "nfsd", "teacher_guidance_scale": 2.},
                                               "nfsd calls the teacher once"),
                                              ({"lambda_adv": 0., "lambda_distill": 0.}, "no loss left")])
def test_impossible_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        add.Config(**settings)
