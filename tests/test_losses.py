"""The losses as pure functions: values, gradients and closed forms."""

import pytest
import torch

import losses

# --------------------------------------------------------------------------------------------- diffusion loss

@pytest.mark.equation("ADT L_diff")
def test_diffusion_loss_is_zero_for_a_perfect_network_and_a_mean_over_elements(toy, monkeypatch):
    model = toy("v")
    x0, eps = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)
    t, cond = torch.tensor([0, 10, 500, 999]), model.encode_prompts(["a"] * 4)
    target = model.training_target(x0, eps, t)
    monkeypatch.setattr(model, "forward_network", lambda x, t_input, cond: target)
    assert losses.diffusion_loss(model, x0, t, eps, cond) < 1e-12
    monkeypatch.setattr(model, "forward_network", lambda x, t_input, cond: target + 2)
    assert losses.diffusion_loss(model, x0, t, eps, cond).item() == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal"])
def test_timesteps_of_the_diffusion_loss_follow_their_distribution(scheme):
    t = losses.sample_timesteps(20000, 1000, scheme, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 999
    assert abs(t.float().mean() - 500) < 10                            # both are symmetric
    middle = ((t > 250) & (t < 750)).float().mean()
    expected = .5 if scheme == "uniform" else .728                     # P(|normal| < log 3)
    assert abs(middle - expected) < .02
    with pytest.raises(ValueError, match="uniform or logit_normal"):
        losses.sample_timesteps(1, 10, "gaussian")


# ----------------------------------------------------------------------------------------- adversarial losses

@pytest.mark.equation("ADT L_D")
@pytest.mark.equation("ADD eq. 3")
def test_hinge_has_slope_one_inside_the_margin_and_zero_outside():
    """By autograd: -1/n for a real logit below 1, +1/n for a fake logit above -1, otherwise 0."""
    logits = torch.tensor([[-3.], [0.5], [1.5]], requires_grad=True)
    grad_real = torch.autograd.grad(losses.hinge_real([logits]), logits)[0].flatten() * 3
    grad_fake = torch.autograd.grad(losses.hinge_fake([logits]), logits)[0].flatten() * 3
    assert grad_real.tolist() == [-1, -1, 0]
    assert grad_fake.tolist() == [0, 1, 1]
    assert losses.hinge_real([torch.full((2, 5), 1.)]) == 0
    assert losses.hinge_fake([torch.full((2, 5), -1.)]) == 0


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("loss", [losses.hinge_real, losses.hinge_fake, losses.hinge_generator])
def test_every_head_has_the_same_weight_whatever_its_number_of_tokens(loss):
    torch.manual_seed(0)
    fine, coarse = torch.randn(3, 16), torch.randn(3, 4)
    assert loss([fine.repeat(1, 4), coarse]).item() == pytest.approx(loss([fine, coarse]).item())
    single = [loss([head]).item() for head in (fine, coarse)]
    assert loss([fine, coarse]).item() == pytest.approx(sum(single) / 2)


@pytest.mark.equation("ADT L_D")
def test_on_equal_distributions_the_hinge_loss_is_2_between_the_margins():
    """No constant logit is better than any other in [-1, 1]; outside the loss is larger."""
    for d in (-1., -.3, 0., .8, 1.):
        logits = [torch.full((4, 1), d)]
        assert abs(losses.hinge_real(logits) + losses.hinge_fake(logits) - 2) < 1e-6
    for d in (-1.5, 1.5):
        logits = [torch.full((4, 1), d)]
        assert losses.hinge_real(logits) + losses.hinge_fake(logits) > 2


@pytest.mark.equation("ADT L_G")
@pytest.mark.equation("ADD eq. 2")
def test_the_generator_loss_never_saturates():
    logits = torch.tensor([[-50.], [0.], [50.]], requires_grad=True)
    grad = torch.autograd.grad(losses.hinge_generator([logits]), logits)[0]
    assert grad.flatten().tolist() == pytest.approx([-1 / 3] * 3)


@pytest.mark.equation("ADD eq. 3")
def test_r1_of_linear_heads_is_the_squared_norm_of_their_weights():
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)]
    features = [torch.randn(4, 6, channels, requires_grad=True) for channels in (5, 7)]  # (B, N, channels)
    logits = [(x @ w).flatten(1) for x, w in zip(features, weights)]
    penalty = losses.r1_penalty(logits, features)
    analytic = sum(6 * w.sum(1).square().sum() for w in weights)       # each of six tokens adds |W 1|^2
    torch.testing.assert_close(penalty, analytic)
    grad = torch.autograd.grad(penalty, weights[0])[0]
    torch.testing.assert_close(grad, 12 * weights[0].sum(1, keepdim=True).expand(-1, 3))


# ----------------------------------------------------------------------------------------- score distillation

@pytest.mark.equation("ADD eq. 4")
def test_sds_weighting_gives_the_gradient_of_dreamfusion(toy):
    """d/dx0 of c(t) |x0 - x0_psi|^2 is w(t) (eps_psi - eps'), with w = sigma^2."""
    teacher = toy("eps").requires_grad_(False)
    t, cond = torch.tensor([50, 400, 990]), teacher.encode_prompts(["a"] * 3)
    x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    eps = torch.randn_like(x0)
    x_t, (alpha, sigma) = teacher.add_noise(x0.detach(), t, eps), teacher.alpha_sigma(t)
    target, eps_psi = teacher.to_x0_eps(x_t, teacher.predict(x_t, t, cond), t)
    weight = losses.distillation_weight("sds", alpha, sigma)
    grad = torch.autograd.grad((weight * (x0 - target).square()).sum(), x0)[0]
    torch.testing.assert_close(grad, sigma ** 2 * (eps_psi - eps))
    exponential = losses.distillation_weight("exponential", alpha, sigma)  # SDS with w = 2 sigma
    torch.testing.assert_close(exponential * sigma ** 2, weight * 2 * sigma)


@pytest.mark.equation("ADD eq. 4")
def test_the_nfsd_target_gives_the_gradient_of_nfsd():
    alpha, sigma = torch.tensor([.9, .4]).view(-1, 1, 1, 1), torch.tensor([.3, .8]).view(-1, 1, 1, 1)
    x0, eps_uncond, eps_cond, eps_negative = torch.randn(4, 2, 3, 4, 4)
    x0.requires_grad_()
    is_small_t = torch.tensor([True, False]).view(-1, 1, 1, 1)
    target = losses.nfsd_target(x0, alpha, sigma, eps_uncond, eps_cond, eps_negative, is_small_t, 7.5)
    target = target.detach()
    weight = losses.distillation_weight("nfsd", alpha, sigma)
    grad = torch.autograd.grad((weight * (x0 - target).square()).sum(), x0)[0] / sigma ** 2
    expected = 7.5 * (eps_cond - eps_uncond) + eps_uncond
    expected[1] -= eps_negative[1]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.equation("ADD eq. 4")
@pytest.mark.parametrize("weighting", ["exponential", "sds"])
def test_targets_at_high_noise_have_smaller_weights(toy, weighting):
    model = toy("eps")
    weight = losses.distillation_weight(weighting, model.alpha, model.sigma)
    assert (weight[600:].diff() < 0).all()
    assert weight[999] < .2 * weight.max()
    with pytest.raises(ValueError, match="exponential, sds or nfsd"):
        losses.distillation_weight("dmd", model.alpha, model.sigma)


@pytest.mark.parametrize("metric,far", [("l2", 100.), ("l1", 10.), ("huber", 10.)])
def test_the_distance_is_a_mean_over_elements_and_zero_at_the_target(metric, far):
    a = torch.randn(3, 2, 4, 4)
    assert losses.distillation_distance(metric, a, a).abs().max() < 1e-6
    distance = losses.distillation_distance(metric, a, 0 * a)
    assert distance.shape == (3,)
    a_2 = a.repeat(1, 1, 2, 2)
    torch.testing.assert_close(losses.distillation_distance(metric, a_2, 0 * a_2), distance)
    ten = losses.distillation_distance(metric, torch.full((1, 9), 10.), torch.zeros(1, 9))
    assert ten.item() == pytest.approx(far, .01)
    with pytest.raises(ValueError, match="l2, l1 or huber"):
        losses.distillation_distance("lpips", a, a)
