"""ADT: where paths start, which gradients each half of a step leaves, and what the discriminator receives."""

import itertools
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import adt
import data
import discriminator
from conftest import (
    DISCRIMINATORS,
    LinearHead,
    RandomConv,
    build_discriminator,
    record_conditioning,
    tokens_of,
    untrained_params,
    zero_grads,
)
from discriminator import DiscriminatorInputs

# without augmentation the discriminator receives the images themselves
NO_AUGMENTATION = adt.Config(num_inference_steps=2, augment_strength=0., instance_noise=0.)


class FixedLogits(torch.nn.Module):
    """A discriminator that returns the given logits, one value per call, and records its inputs."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.pairs, self.conds = list(logits), [], []
        self.is_antisymmetric = False

    def forward(self, real, fake, cond):
        self.pairs.append((real, fake))
        self.conds.append(cond)
        logit = self.logits.pop(0)
        return [torch.full((len(real), 1), logit) + 0 * fake.mean()]


# -------------------------------------------------------------------------------- gradients of the two halves

@pytest.mark.equation("ADT L_G")
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_the_generator_half_leaves_gradients_in_the_network_alone(tiny_setup, kind):
    model, disc, batch = tiny_setup
    disc = build_discriminator(kind, disc.backbone, 128).requires_grad_(False)
    zero_grads(model, disc)
    config = adt.Config(num_inference_steps=4, discriminator=kind)
    losses, inputs = adt.generator_loss(model, None, disc, batch, config)
    sum(losses.values()).backward()
    assert inputs.fake.shape == batch.image.shape
    assert set(losses) == {"diffusion", "adv"}
    assert all(param.grad is None for param in disc.parameters())
    assert all(param.grad is None for param in model.text_encoder.parameters())
    assert all(param.grad is not None for param in model.network.parameters())


@pytest.mark.equation("ADT L_D")
def test_the_discriminator_half_leaves_gradients_in_the_heads_alone(tiny_setup):
    model, disc, batch = tiny_setup
    config = adt.Config(num_inference_steps=4)
    disc.requires_grad_(False)
    _, inputs = adt.generator_loss(model, None, disc, batch, config)
    zero_grads(model, disc)
    disc.requires_grad_(True)
    losses, logits_real, logits_fake = adt.discriminator_loss(disc, inputs, config)
    losses["d"].backward()
    assert [d.shape for d in logits_real] == [d.shape for d in logits_fake]
    assert all(param.grad is None for param in model.parameters())
    assert all(param.grad is not None for param in disc.parameters())


@pytest.mark.equation("ADT L_G")
def test_the_adversarial_loss_alone_reaches_every_parameter_of_the_network(tiny_setup):
    model, disc, batch = tiny_setup
    model = deepcopy(model)
    for param in model.network.parameters():                           # zero weights would stop a gradient
        torch.nn.init.normal_(param, std=.05)
    disc.requires_grad_(False)
    losses, _ = adt.generator_loss(model, None, disc, batch, adt.Config(num_inference_steps=3))
    losses["adv"].backward()
    assert not untrained_params(model.network)


def linear_discriminator(kind, scale=1.):
    """A discriminator of this kind with one layer, on 8 features per token, with linear heads."""
    torch.manual_seed(1)
    backbone = discriminator.FrozenBackbone(RandomConv())
    disc = build_discriminator(kind, backbone, 0)
    out_channels = 1 if kind in ("relativistic", "projected") else 64
    for name in ("heads", "heads_real"):
        if hasattr(disc, name):
            setattr(disc, name, torch.nn.ModuleList([LinearHead(8, out_channels)]))
    disc.heads[0].linear.weight.data.mul_(scale)
    return disc


def linear_logits(disc, kind, x, y):
    """D(x, y) of a linear discriminator, written without the discriminator's own code -> (B, N)."""
    x, y = (tokens_of(disc.backbone(image)[0]) for image in (x, y))    # (B, N, 8)
    w = disc.heads[0].linear.weight
    if kind == "projected":
        return (y @ w.T)[..., 0]
    if kind == "relativistic":
        return ((y - x) @ w.T)[..., 0]
    if kind in ("reference", "ordered"):
        v = disc.heads_real[0].linear.weight
        swapped = ((y @ v.T) * (x @ w.T)).sum(-1) if kind == "ordered" else 0.
        return (((x @ v.T) * (y @ w.T)).sum(-1) - swapped) / 64 ** .5
    if kind == "difference":
        v = disc.diff_heads[0]
        return (((x - y) @ w.T).abs() @ v.weight.T)[..., 0] + v.bias
    h_x, h_y = x @ w.T, y @ w.T
    return disc.scale * (h_x * h_y).sum(-1) / (h_x.norm(dim=-1) * h_y.norm(dim=-1)) + disc.bias


@pytest.mark.equation("ADT L_D")
@pytest.mark.equation("ADT similarity")
@pytest.mark.equation("ADT comparison")
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_both_images_of_both_pairs_have_their_gradient_in_the_discriminator_loss(kind):
    """Linear heads on known features: the loss of the augmented pairs, written out, has the same gradient in
    every weight. Some hinges are active and some are not, so no side's gradient cancels another's."""
    disc, pairs = linear_discriminator(kind, 4.), []
    forward = disc.forward

    def record(real, fake, cond):
        pairs.append((real, fake))
        return forward(real, fake, cond)

    disc.forward = record
    real, fake = torch.rand(2, 8, 3, 32, 32) * 2 - 1
    config = adt.Config(discriminator=kind, augment_strength=1., instance_noise=.2)
    losses, logits_real, logits_fake = adt.discriminator_loss(disc, DiscriminatorInputs(real, fake, None),
                                                              config)
    losses["d"].backward()
    grads = {name: param.grad.clone() for name, param in disc.named_parameters()}
    zero_grads(disc)
    if disc.is_antisymmetric:
        pairs.insert(0, pairs[0][::-1])                                # the real pair is the other order
    d_real, d_fake = (linear_logits(disc, kind, *pair) for pair in pairs)
    (F.relu(1 - d_real).mean() + F.relu(1 + d_fake).mean()).backward()
    for is_active in (logits_real[0] < 1, logits_fake[0] > -1):
        assert is_active.any() and not is_active.all()
    for name, param in disc.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-3, atol=1e-5)
        assert param.grad.abs().max() > 1e-3


@pytest.mark.equation("ADT comparison")
def test_the_relativistic_gradient_is_the_difference_of_features_where_the_hinge_is_active():
    """D(x, y) = w (f(y) - f(x)): both orders of the pair give the mean of f(fake) - f(real) over the tokens
    with D > -1."""
    disc = linear_discriminator("relativistic", 4.)
    real, fake = torch.rand(2, 8, 3, 32, 32) * 2 - 1
    losses, _, logits_fake = adt.discriminator_loss(disc, DiscriminatorInputs(real, fake, None),
                                                    NO_AUGMENTATION)
    losses["d"].backward()
    difference = tokens_of(disc.backbone(fake)[0] - disc.backbone(real)[0])  # (B, N, 8)
    is_active = logits_fake[0] > -1
    assert .1 < is_active.float().mean() < .9
    expected = 2 * (difference * is_active[..., None]).mean((0, 1))
    torch.testing.assert_close(disc.heads[0].linear.weight.grad[0], expected, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the path

def record_rollouts(monkeypatch):
    """-> a list that receives (x, timesteps, starts) of every rollout. The other arguments are checked."""
    recorded = []

    def record(model, x, timesteps, cond, uncond, guidance_scale, grad_steps, input_grad_scale,
               checkpointing, starts):
        recorded.append((x, timesteps, starts))
        assert (grad_steps.sum(0) == (len(timesteps) - starts).clamp(max=3)).all()  # K of each image's own
        assert not (grad_steps & (torch.arange(len(timesteps))[:, None] < starts)).any()
        assert (guidance_scale, input_grad_scale, checkpointing) == (2., .3, True)
        return x

    monkeypatch.setattr(adt.sampler, "rollout", record)
    return recorded


@pytest.mark.equation("ADT start")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_paths_start_at_a_uniform_timestep_of_the_noised_image_or_at_pure_noise(toy, monkeypatch, batch_size):
    """rollout_start=image: each start is uniform over the path's timesteps, the input is alpha x0 + sigma eps
    of the real image. noise: the whole path, and nothing of the image in its input."""
    model, recorded = toy(), record_rollouts(monkeypatch)
    Config = partial(adt.Config, num_inference_steps=5, num_grad_steps=3, guidance_scale=2.,
                     input_grad_scale=.3, checkpoint_rollout=True)
    x0 = torch.full((batch_size, 2, 64, 64), 3., dtype=torch.float64)
    cond = model.encode_prompts(["a"] * batch_size)
    for _ in range(400 // batch_size):
        adt.rollout_from_batch(model, x0, cond, cond, Config(rollout_start="image"))
    counts = torch.bincount(torch.cat([starts for _, _, starts in recorded]), minlength=5)
    assert counts.min() > 50 and counts.max() < 115                    # expected: 80 +- 5 standard deviations
    for x, timesteps, starts in recorded[:40 // batch_size]:
        assert timesteps.tolist() == [999, 799, 599, 399, 199]
        alpha, sigma = (table.flatten() for table in model.alpha_sigma(timesteps[starts]))
        assert ((x.mean((1, 2, 3)) - 3 * alpha).abs() < 6 * sigma / 64 / 2 ** .5 + 1e-9).all()
        assert ((x.std((1, 2, 3)) - sigma).abs() < .05).all()
    recorded.clear()
    for _ in range(10):
        adt.rollout_from_batch(model, x0, cond, cond, Config(rollout_start="noise"))
    assert all(starts.max() == 0 and abs(x.mean()) < .08 for x, _, starts in recorded)


@pytest.mark.equation("ADT start")
def test_one_generator_gives_all_micro_batches_the_same_start_and_steps(toy):
    model, calls = toy(), []
    cond = model.encode_prompts(["a"])
    config = adt.Config(num_inference_steps=8, num_grad_steps=2, rollout_start="image",
                        grad_step_selection="random")
    for seed in (0, 0, 1, 2, 3):
        model.calls.clear()
        adt.rollout_from_batch(model, torch.randn(1, 2, 4, 4, dtype=torch.float64), cond, cond, config,
                               torch.Generator().manual_seed(seed))
        calls.append([(tuple(t_input.tolist()), has_graph) for _, t_input, has_graph in model.calls])
    assert calls[0] == calls[1]
    assert len(set(map(tuple, calls))) > 2


@pytest.mark.equation("ADT constraint")
def test_where_blocks_are_recomputed_images_share_the_calls_that_keep_a_graph(toy):
    """Four images that join at different steps of a path of 20: at most K = 5 calls of four images keep their
    graphs, instead of one for each step at which any image does; x0 and the gradient are the same. Images
    that start together share all calls anyway."""
    model, x0 = toy(), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    cond, num_calls = model.encode_prompts(["a", "bc", "d", "e"]), {}

    def run(recomputes_blocks, rollout_start):
        model.calls.clear()
        model.recomputes_blocks = recomputes_blocks
        torch.manual_seed(1)
        config = adt.Config(num_inference_steps=20, num_grad_steps=5, rollout_start=rollout_start,
                            checkpoint_rollout=True)
        sample = adt.rollout_from_batch(model, x0, cond, cond, config, torch.Generator().manual_seed(0))
        forward_calls = [(len(x), has_graph) for x, _, has_graph in model.calls]
        num_calls[rollout_start, recomputes_blocks] = len(forward_calls), sum(g for _, g in forward_calls)
        assert max(size for size, has_graph in forward_calls if has_graph) <= len(x0)
        grads = torch.autograd.grad(sample.square().sum(), model.network.parameters())
        return [sample.detach(), *grads]

    for a, b in zip(run(False, "image"), run(True, "image")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    run(True, "noise")
    assert num_calls["image", False][1] >= 10 and num_calls["image", True][1] <= 5
    assert num_calls["image", True][0] < num_calls["image", False][0]
    assert num_calls["noise", True] == (20, 5)


# --------------------------------------------------------------------------------------------- diffusion loss

def test_without_adversarial_loss_the_diffusion_loss_is_left(tiny_setup):
    model, disc, batch = tiny_setup
    losses, inputs = adt.generator_loss(model, None, disc, batch, adt.Config(lambda_adv=0.))
    assert set(losses) == {"diffusion"}
    assert inputs is None


def test_dropped_captions_are_empty(tiny_setup):
    model, disc, batch = tiny_setup

    def diffusion_loss(captions, caption_dropout):
        torch.manual_seed(0)
        config = adt.Config(lambda_adv=0., caption_dropout=caption_dropout)
        with torch.no_grad():
            losses, _ = adt.generator_loss(model, None, disc, replace(batch, caption=captions), config)
        return losses["diffusion"].item()

    without_caption = diffusion_loss([""] * 4, 0.)
    assert diffusion_loss(batch.caption, 1.) == without_caption
    assert diffusion_loss(batch.caption, 0.) != without_caption


@pytest.mark.parametrize("caption_dropout", [0., .1, .5])
def test_the_fraction_of_dropped_captions_is_the_one_set(toy, monkeypatch, caption_dropout):
    """Captions of three letters have the scale 4 in the toy model, empty ones 1."""
    model = toy()
    recorded = record_conditioning(monkeypatch, model)
    batch = data.Batch(torch.zeros(4000, 2, 1, 1, dtype=torch.float64), ["abc"] * 4000, None, None)
    adt.generator_loss(model, None, None, batch, adt.Config(lambda_adv=0., caption_dropout=caption_dropout))
    assert set(recorded[0].flatten().tolist()) <= {1., 4.}
    assert (recorded[0] == 1).double().mean().item() == pytest.approx(caption_dropout, abs=.04)


@pytest.mark.equation("ADT L_diff")
@pytest.mark.parametrize("scheme,middle_half", [("uniform", .5), ("logit_normal", .728)])
def test_the_timesteps_of_the_diffusion_loss_follow_timestep_sampling(toy, scheme, middle_half):
    """The fraction of timesteps in the middle half of the schedule, of those that the network receives."""
    model = toy()
    batch = data.Batch(torch.zeros(4000, 2, 1, 1, dtype=torch.float64), ["a"] * 4000, None, None)
    adt.generator_loss(model, None, None, batch, adt.Config(lambda_adv=0., timestep_sampling=scheme))
    _, t_input, _ = model.calls[0]
    is_middle = (t_input > .25) & (t_input < .75)
    assert is_middle.double().mean().item() == pytest.approx(middle_half, abs=.04)


# -------------------------------------------------------------------------------------------- loss values

@pytest.mark.equation("ADT L_D")
@pytest.mark.parametrize("d_real,d_fake,loss", [(1., -1., 0.), (0., -1., 1.), (1., 3., 4.), (-2., .5, 4.5)])
def test_the_discriminator_loss_is_the_hinge_of_the_right_pairs(tiny_setup, d_real, d_fake, loss):
    batch = tiny_setup[2]
    fake = torch.zeros_like(batch.image)
    disc = FixedLogits(d_real, d_fake)
    losses, _, _ = adt.discriminator_loss(disc, DiscriminatorInputs(batch.image, fake, None), NO_AUGMENTATION)
    assert losses["d"].item() == pytest.approx(loss)
    for pair, expected in zip(disc.pairs, ((batch.image, batch.image), (batch.image, fake))):
        torch.testing.assert_close(pair, expected)


@pytest.mark.equation("ADT L_G")
def test_the_generator_losses_have_their_weights_and_signs(tiny_setup):
    model, _, batch = tiny_setup
    rows = []
    for weight in (.5, 2.):
        torch.manual_seed(4)
        config = adt.Config(lambda_adv=weight, lambda_diff=3 * weight, num_inference_steps=2)
        rows.append(adt.generator_loss(model, None, FixedLogits(7.), batch, config)[0])
    assert [losses["adv"].item() for losses in rows] == pytest.approx([-3.5, -14.])
    assert rows[1]["diffusion"].item() == pytest.approx(4 * rows[0]["diffusion"].item(), rel=1e-3)


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_may_have_any_size(tiny_setup, n):
    model, disc, batch = tiny_setup
    config = adt.Config(num_inference_steps=2, guidance_scale=2.)
    losses, inputs = adt.generator_loss(model, None, disc, batch[:n], config)
    losses_d, _, _ = adt.discriminator_loss(disc, inputs, adt.Config())
    assert all(loss.isfinite() for loss in (*losses.values(), *losses_d.values()))


@pytest.mark.parametrize("settings,message", [({"num_inference_steps": 0}, "1 or more"),
                                              ({"num_grad_steps": 0}, "1 or more"),
                                              ({"ema_decay": 1.}, "ema_decay is below 1"),
                                              ({"beta1": 1.}, "beta1 is below 1"),
                                              ({"input_grad_scale": 1.5}, "input_grad_scale is a fraction"),
                                              ({"caption_dropout": 1.5}, "caption_dropout is a fraction"),
                                              ({"augment_strength": 1.5}, "augment_strength is a fraction"),
                                              ({"lambda_adv": 0., "lambda_diff": 0.}, "no loss left")])
def test_impossible_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        adt.Config(**settings)


# ------------------------------------------------------------------------ what the discriminator receives

def test_the_real_image_may_be_a_vae_reconstruction(tiny_setup):
    """decode(encode(x0)) in place of x0, in both halves, clamped, as a constant."""
    model, _, batch = tiny_setup
    model = deepcopy(model)
    decode = model.decode
    for real_images, scale in itertools.product(("original", "vae_reconstruction"), (.5, 2.)):
        model.decode = lambda z, scale=scale: scale * decode(z)        # fades, or exceeds the range
        disc = FixedLogits(0., 0., 0.)
        config = replace(NO_AUGMENTATION, real_images=real_images)
        _, inputs = adt.generator_loss(model, None, disc, batch, config)
        adt.discriminator_loss(disc, inputs, config)
        expected = (batch.image * (1. if real_images == "original" else scale)).clamp(-1, 1)
        for real, _ in disc.pairs:
            torch.testing.assert_close(real, expected, atol=1e-5, rtol=0)
            assert not real.requires_grad


def test_instance_noise_is_on_both_images_of_a_pair_and_independent():
    flat = torch.zeros(64, 3, 32, 32)
    config = adt.Config(augment_strength=0., instance_noise=.1)
    first, second = discriminator.augment_alike([flat, flat], config)
    for image, std in ((first, .1), (second, .1), (first - second, .1 * 2 ** .5)):
        assert image.std().item() == pytest.approx(std, rel=.02)


def test_a_pair_has_one_geometry_and_two_colours():
    image = torch.full((32, 3, 32, 32), -1.)
    image[:, :, 12:20, 12:20] = 1.
    first, second = discriminator.augment_alike([image, image], adt.Config())
    is_square, is_square_2 = (x.mean(1) > x.mean(1).amin((1, 2))[:, None, None] + .5 for x in (first, second))
    assert (is_square == is_square_2).flatten(1).all(1).float().mean() > .9
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("strength", [0., .3, 1.])
def test_both_images_of_a_pair_are_augmented_with_the_strength_set(strength):
    """The mean over a flat image is .4 times the mean of three brightnesses, uniform in +- strength."""
    flat = torch.zeros(4000, 3, 4, 4)
    config = adt.Config(augment_strength=strength, instance_noise=0.)
    for image in discriminator.augment_alike([flat, flat], config):
        uncut = image.flatten(2).abs().amax(2) * image.flatten(2).sum(2).sign()
        assert uncut.mean(1).std().item() == pytest.approx(.4 * strength / 3, rel=.1)


def test_network_and_discriminator_receive_the_caption_of_each_image(tiny_setup, monkeypatch):
    """In the diffusion loss, on the path, and in the discriminator: row by row."""
    model, _, batch = tiny_setup
    recorded, disc = record_conditioning(monkeypatch, model), FixedLogits(0.)
    text = model.encode_prompts(batch.caption)
    config = adt.Config(num_inference_steps=3, caption_dropout=0., rollout_start="noise")
    _, inputs = adt.generator_loss(model, None, disc, batch, config)
    assert len(recorded) == 5 and len(disc.conds) == 1
    *recorded, of_graphs = recorded                                    # of two steps, in one call
    for cond in (*recorded, *of_graphs.split(len(batch.caption)), *disc.conds, inputs.cond):
        torch.testing.assert_close(cond, text["pooled"])


def test_the_discriminator_receives_images_in_range(tiny_setup, monkeypatch):
    model, _, batch = tiny_setup
    decode, disc = model.decode, FixedLogits(0.)
    monkeypatch.setattr(model, "decode", lambda z: 5 * decode(z))
    _, inputs = adt.generator_loss(model, None, disc, batch, NO_AUGMENTATION)
    assert inputs.fake.abs().max() <= 1
    torch.testing.assert_close(disc.pairs[0][1], inputs.fake)
