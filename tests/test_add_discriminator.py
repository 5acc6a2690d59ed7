"""ADD's discriminator half: its gradients, loss values and R1, and what the discriminator receives."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import add
import discriminator
import losses
from conftest import LinearHead, RandomConv, record_conditioning, tokens_of, zero_grads
from discriminator import DiscriminatorInputs

CONDITIONINGS = ["text+image", "text", "image", "none"]
# without augmentation the discriminator receives the images themselves
NO_AUGMENTATION = add.Config(augment_strength=0., instance_noise=0.)
UNCONDITIONAL = replace(NO_AUGMENTATION, disc_conditioning="none")


# -------------------------------------------------------------------------------------------------- gradients

@pytest.mark.equation("ADD eq. 3")
def test_the_discriminator_half_leaves_gradients_in_the_heads_alone(add_setup):
    model, teacher, disc, batch = add_setup
    disc.requires_grad_(False)
    _, inputs = add.generator_loss(model, teacher, disc, batch, add.Config())
    zero_grads(model, teacher, disc)
    disc.requires_grad_(True)
    losses_dict, logits_real, logits_fake = add.discriminator_loss(disc, inputs, add.Config())
    assert set(losses_dict) == {"d", "r1"}
    assert [d.shape for d in logits_real] == [d.shape for d in logits_fake]
    sum(losses_dict.values()).backward()
    for frozen in (model, teacher):
        assert all(param.grad is None for param in frozen.parameters())
    assert all(param.grad is not None for param in disc.parameters())
    disc.requires_grad_(False)


@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("relativistic", [True, False])
def test_real_and_fake_images_have_their_gradients_in_the_discriminator_loss(relativistic):
    """A linear head, D(x) = w f(x). The gradient of the hinges with respect to w is a mean over the tokens
    whose hinge is active: of -f(real) and of f(fake), and in the relativistic loss of 2 (f(fake) - f(real))
    where D(real) - D(fake) < 1."""
    torch.manual_seed(1)
    config = replace(UNCONDITIONAL, relativistic=relativistic, r1_gamma=0.)
    disc = config.build_discriminator(discriminator.FrozenBackbone(RandomConv()), 128)
    disc.heads = torch.nn.ModuleList([LinearHead(8, 1)])
    weight = disc.heads[0].linear.weight
    weight.data.mul_(4)
    real, fake = torch.rand(2, 8, 3, 32, 32) * 2 - 1
    losses_dict, _, _ = add.discriminator_loss(disc, DiscriminatorInputs(real, fake, None), config)
    losses_dict["d"].backward()
    f_real, f_fake = (tokens_of(disc.backbone(image)[0]) for image in (real, fake))  # (B, N, 8)
    d_real, d_fake = (f @ weight.detach().T for f in (f_real, f_fake))  # (B, N, 1)
    is_active = d_real - d_fake < 1
    expected = 2 * (f_fake - f_real) * is_active
    if not relativistic:
        is_active = d_real < 1
        expected = f_fake * (d_fake > -1) - f_real * is_active
    assert .1 < is_active.float().mean() < .9
    torch.testing.assert_close(weight.grad[0], expected.mean((0, 1)), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ loss values

class FixedLogits(torch.nn.Module):
    """A discriminator that returns one logit for every real and one for every fake image."""

    def __init__(self, backbone, d_real, d_fake):
        super().__init__()
        self.backbone, self.d_real, self.d_fake = backbone, d_real, d_fake

    def logits(self, features, cond):
        return [torch.full((len(features[0]), 1), self.d_real)]

    def forward(self, _, image, cond):
        return [self.d_fake + 0 * image.mean((1, 2, 3))[:, None]]


def fixed_logits_loss(add_setup, d_real, d_fake, **settings):
    """-> the hinge loss, and the logits that discriminator_loss returns."""
    _, _, disc, batch = add_setup
    config = add.Config(r1_gamma=0., **settings)
    inputs = DiscriminatorInputs(batch.image, batch.image, None)
    losses_dict, *logits = add.discriminator_loss(FixedLogits(disc.backbone, d_real, d_fake), inputs, config)
    return losses_dict["d"].item(), *(heads[0].unique().item() for heads in logits)


@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("d_real,d_fake,loss", [(1., -1., 0.), (0., -1., 1.), (1., 3., 4.), (-2., .5, 4.5)])
def test_the_hinge_wants_real_logits_high_and_fake_logits_low(add_setup, d_real, d_fake, loss):
    assert fixed_logits_loss(add_setup, d_real, d_fake, relativistic=False) == pytest.approx(
        (loss, d_real, d_fake))


@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("d_real,d_fake,loss", [(1., 0., 0.), (7., 6., 0.), (-3., -3.5, 1.), (0., 2., 6.)])
def test_the_relativistic_hinge_depends_on_the_difference_alone(add_setup, d_real, d_fake, loss):
    assert fixed_logits_loss(add_setup, d_real, d_fake, relativistic=True) == pytest.approx(
        (loss, d_real - d_fake, d_fake - d_real))


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.equation("ADD eq. 1")
def test_the_generator_losses_have_their_weights_and_signs(add_setup):
    model, teacher, disc, batch = add_setup
    rows = []
    for weight in (.5, 2.):
        torch.manual_seed(3)
        config = add.Config(lambda_adv=weight, lambda_distill=3 * weight)
        rows.append(add.generator_loss(model, teacher, FixedLogits(disc.backbone, 0., 7.), batch, config)[0])
    assert [row["adv"].item() for row in rows] == pytest.approx([-3.5, -14.])
    assert rows[1]["distill"].item() == pytest.approx(4 * rows[0]["distill"].item(), rel=1e-3)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_batch_may_have_any_size(add_setup, n, conditioning):
    model, teacher, disc, batch = add_setup
    config = add.Config(disc_conditioning=conditioning, teacher_steps=2, teacher_guidance_scale=2.)
    disc = config.build_discriminator(disc.backbone, 128)
    losses_g, inputs = add.generator_loss(model, teacher, disc, batch[:n], config)
    losses_d, _, _ = add.discriminator_loss(disc, inputs, config)
    assert all(loss.isfinite() for loss in (*losses_g.values(), *losses_d.values()))


# --------------------------------------------------------------------------------------------------------- R1

@pytest.mark.equation("ADD eq. 3")
def test_r1_acts_beyond_the_margin_and_stops_at_the_heads_inputs(add_setup):
    """A penalty on the hinge would be zero where D(real) > 1; one on the image would need the backbone's
    second derivatives. Here every head receives a gradient from R1 alone, and the image none."""
    _, _, disc, batch = add_setup
    config = add.Config(r1_gamma=1., disc_conditioning="none", relativistic=False)
    disc = config.build_discriminator(disc.backbone, 128).requires_grad_(True).train()
    for head in disc.heads:
        head.conv_out.bias.data.fill_(100.)                            # all real logits are far above 1
    image = batch.image.clone().requires_grad_()
    losses_dict, logits_real, _ = add.discriminator_loss(
        disc, DiscriminatorInputs(image, torch.zeros_like(image), None), config)
    assert min(d.min() for d in logits_real) > 1
    losses_dict["r1"].backward()
    assert image.grad is None
    assert all(head.conv_in.parametrizations.weight.original.grad.abs().sum() > 0 for head in disc.heads)


def test_r1_has_the_weight_gamma(add_setup):
    _, _, disc, batch = add_setup
    disc.eval()
    inputs = DiscriminatorInputs(batch.image, batch.image, torch.zeros(4, disc.cond_proj[0].in_features))
    penalties = []
    for gamma in (1e-4, 3e-4):
        torch.manual_seed(0)
        losses_dict, _, _ = add.discriminator_loss(disc, inputs, add.Config(r1_gamma=gamma))
        penalties.append(losses_dict["r1"].item())
    assert penalties[1] == pytest.approx(3 * penalties[0], rel=1e-3)
    assert penalties[0] > 0


@pytest.mark.equation("ADD eq. 3")
def test_r1_is_of_the_logits_of_real_images_with_their_own_conditioning(add_setup):
    _, _, disc, batch = add_setup
    disc = deepcopy(disc).eval()
    cond = torch.randn(4, disc.cond_proj[0].in_features)
    config = replace(NO_AUGMENTATION, r1_gamma=1.)
    losses_dict, _, _ = add.discriminator_loss(
        disc, DiscriminatorInputs(batch.image, batch.image.flip(0), cond), config)
    features = [f.detach().requires_grad_() for f in disc.backbone(batch.image)]
    expected = losses.r1_penalty(disc.logits(features, cond), features)
    assert losses_dict["r1"].item() == pytest.approx(expected.item(), rel=1e-3)


# ---------------------------------------------------------------------------- what the discriminator receives

class RecordingDiscriminator(torch.nn.Module):
    """Passes everything on to a discriminator and records its inputs."""

    def __init__(self, disc):
        super().__init__()
        self.disc, self.backbone, self.images, self.conds = disc, disc.backbone, [], []

    def logits(self, features, cond):
        self.conds.append(cond)
        return self.disc.logits(features, cond)

    def forward(self, _, image, cond):
        self.images.append(image.detach())
        self.conds.append(cond)
        return self.disc(None, image, cond)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_logits_depend_on_what_the_discriminator_is_conditioned_on(add_setup, conditioning):
    model, _, disc, batch = add_setup
    config = add.Config(disc_conditioning=conditioning)
    torch.manual_seed(0)
    disc = config.build_discriminator(disc.backbone, 128).eval()
    cond, hide_none = model.encode_prompts(batch.caption), torch.zeros(4, dtype=torch.bool)
    flipped = replace(batch, image=batch.image.flip(0), caption=batch.caption[::-1])
    flipped_cond = model.encode_prompts(flipped.caption)
    disc_cond = add.discriminator_condition(disc, batch, cond, hide_none, config)
    other_cond = add.discriminator_condition(disc, flipped, flipped_cond, hide_none, config)
    logits, other_logits = (torch.cat(disc(None, batch.image, c), 1) for c in (disc_cond, other_cond))
    assert torch.equal(logits, other_logits) == (conditioning == "none")
    assert (disc_cond is None) == (conditioning == "none")


@pytest.mark.parametrize("conditioning", ["text+image", "image"])
def test_the_image_embedding_is_hidden_where_the_student_saw_no_image(add_setup, conditioning):
    """There c_img is zero. Real and fake images get the same c, so its presence tells nothing."""
    model, _, disc, batch = add_setup
    config = add.Config(disc_conditioning=conditioning, r1_gamma=0.)
    disc = config.build_discriminator(disc.backbone, 128)
    hide_image = torch.tensor([True, False, True, False])
    disc_cond = add.discriminator_condition(disc, batch, model.encode_prompts(batch.caption), hide_image,
                                            config)
    image_part = disc_cond[:, -128:]
    assert (image_part[hide_image] == 0).all()
    assert (image_part[~hide_image].abs().sum(1) > 1).all()
    recorder = RecordingDiscriminator(disc)
    add.discriminator_loss(recorder, DiscriminatorInputs(batch.image, batch.image, disc_cond), config)
    assert len(recorder.conds) == 2
    assert recorder.conds[0] is recorder.conds[1] is disc_cond


def test_at_pure_noise_the_discriminator_receives_no_image_embedding(add_setup):
    model, teacher, disc, batch = add_setup
    config = add.Config(disc_conditioning="image", pure_noise_prob=1.)
    disc = config.build_discriminator(disc.backbone, 128)
    _, inputs = add.generator_loss(model, teacher, disc, batch, config)
    assert inputs.cond.shape == (4, disc.backbone.embed_dim)
    assert not inputs.cond.any()


@pytest.mark.parametrize("backward_simulation_prob", [0., 1.])
def test_all_networks_receive_the_caption_of_each_image(add_setup, monkeypatch, backward_simulation_prob):
    """Student, its simulated steps, teacher, discriminator: row by row. The image embedding is that of the
    real image, or hidden."""
    model, teacher, disc, batch = add_setup
    recorder, text = RecordingDiscriminator(disc.eval()), model.encode_prompts(batch.caption)["pooled"]
    student_conds, teacher_conds = (record_conditioning(monkeypatch, network) for network in (model, teacher))
    config = replace(NO_AUGMENTATION, pure_noise_prob=1e-9, backward_simulation_prob=backward_simulation_prob)
    add.generator_loss(model, teacher, recorder, batch, config)
    assert len(student_conds) == (4 if backward_simulation_prob else 1)
    assert len(teacher_conds) == 1
    for cond in (*student_conds, *teacher_conds):
        torch.testing.assert_close(cond, text)
    text_part, image_part = recorder.conds[0][:, :128], recorder.conds[0][:, 128:]
    torch.testing.assert_close(text_part, F.layer_norm(text, text.shape[1:]))
    torch.testing.assert_close(image_part,
                               disc.backbone.global_embedding(batch.image) * (1 - backward_simulation_prob))


def test_the_discriminator_receives_clamped_and_augmented_images(add_setup, monkeypatch):
    """Both images in both halves; otherwise D would learn from what no viewer sees."""
    model, teacher, disc, batch = add_setup
    given, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z: 5 * decode(z))
    monkeypatch.setattr(teacher, "decode", decode)

    def augment(image, *_):
        given.append(image)
        return 0 * image + .125 * len(given)

    monkeypatch.setattr(discriminator, "augment", augment)
    recorder = RecordingDiscriminator(disc.eval())
    _, inputs = add.generator_loss(model, teacher, recorder, batch, add.Config())
    add.discriminator_loss(recorder, inputs, add.Config(r1_gamma=0.))
    assert len(given) == 3
    assert given[0] is inputs.fake and inputs.fake.abs().max() <= 1
    assert given[1] is batch.image
    assert torch.equal(given[2], inputs.fake) and not given[2].requires_grad
    assert [image.unique().tolist() for image in recorder.images] == [[.125], [.375]]


def test_real_and_fake_images_are_augmented_independently(add_setup, monkeypatch):
    _, _, disc, batch = add_setup
    recorded, augment = [], discriminator.augment

    def record(image, aug_params, *rest):
        recorded.append(aug_params)
        return augment(image, aug_params, *rest)

    monkeypatch.setattr(discriminator, "augment", record)
    cond = torch.zeros(4, disc.cond_proj[0].in_features)
    add.discriminator_loss(disc.eval(), DiscriminatorInputs(batch.image, batch.image, cond),
                           add.Config(r1_gamma=0.))
    assert len(recorded) == 2
    assert (recorded[0] != recorded[1]).all()
