"""Losses, frozen eyes, light heads, and the augmentation between them and the picture."""

import hashlib

import pytest
import torch

import data
import discriminator
import losses
import models
from conftest import build_critic


@pytest.fixture(scope="module")
def features():
    return discriminator.Features(models.features("tiny", "glyphs"))


def fingerprint(module):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.buffers())).hexdigest()


def test_levelled_features_have_equal_variance_in_all_directions():
    """On the pictures they were levelled by: mean zero, and each variance v of before is now v / (v + floor),
    one but for the quietest. A second time, by parts, changes nothing; a checkpoint brings it back."""
    eyes = discriminator.Features(models.features("tiny", "fashion"))
    pictures = data.build("fashion").batch(64, torch.Generator().manual_seed(0)).image
    before = [x.flatten(0, 2) for x in eyes.tokens(pictures)]
    eyes.level([pictures])
    eyes.level(pictures.split(20))
    for old, new in zip(before, eyes(pictures)):
        new = new.movedim(1, -1).flatten(0, 2)
        v = torch.linalg.eigvalsh(torch.cov(old.T.double()))
        assert v[-1] > 20 * v[len(v) // 2]                                    # it was needed
        assert new.mean(0).abs().max() < 1e-3
        found = torch.linalg.eigvalsh(torch.cov(new.T.double()))
        assert torch.allclose(found, (v / (v + .1 * v.mean())).sort().values, atol=2e-2)
    other = discriminator.Features(models.features("tiny", "fashion"))
    other.load_state_dict(eyes.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other(pictures[:2]), eyes(pictures[:2])))
    assert not list(eyes.parameters())


# ------------------------------------------------------------------------------------------------- losses

@pytest.mark.equation("ADT L_D")
@pytest.mark.equation("ADD eq. 3")
def test_hinge_is_flat_beyond_the_margin_and_one_inside():
    """Gradient of each half by autograd: -1/n for an unconvinced real, +1/n for a convincing fake, else 0."""
    logits = torch.tensor([[-3.], [0.5], [1.5]], requires_grad=True)
    real = torch.autograd.grad(losses.hinge_real([logits]), logits)[0].flatten() * 3
    fake = torch.autograd.grad(losses.hinge_fake([logits]), logits)[0].flatten() * 3
    assert real.tolist() == [-1, -1, 0] and fake.tolist() == [0, 1, 1]
    assert losses.hinge_real([torch.full((2, 5), 1.)]) == 0 == losses.hinge_fake([torch.full((2, 5), -1.)])


@pytest.mark.equation("ADD eq. 2")
@pytest.mark.equation("ADD eq. 3")
@pytest.mark.parametrize("loss", [losses.hinge_real, losses.hinge_fake, losses.hinge_generator])
def test_every_head_has_one_vote_however_fine_its_map(loss):
    """Four copies of each of a head's tokens say nothing new."""
    torch.manual_seed(0)
    fine, coarse = torch.randn(3, 16), torch.randn(3, 4)
    assert loss([fine.repeat(1, 4), coarse]).item() == pytest.approx(loss([fine, coarse]).item())
    alone = [loss([head]).item() for head in (fine, coarse)]
    assert loss([fine, coarse]).item() == pytest.approx(sum(alone) / 2)


@pytest.mark.equation("ADT L_D")
def test_hinge_optimum_separates_by_the_margin():
    """Where real and fake overlap fully, the best constant logit is anywhere in [-1, 1],
    with loss exactly 2."""
    for d in (-1., -.3, 0., .8, 1.):
        both = [torch.full((4, 1), d)]
        assert abs(losses.hinge_real(both) + losses.hinge_fake(both) - 2) < 1e-6
    for d in (-1.5, 1.5):
        both = [torch.full((4, 1), d)]
        assert losses.hinge_real(both) + losses.hinge_fake(both) > 2


@pytest.mark.equation("ADT L_G")
@pytest.mark.equation("ADD eq. 2")
def test_generator_loss_never_saturates():
    logits = torch.tensor([[-50.], [0.], [50.]], requires_grad=True)
    assert (torch.autograd.grad(losses.hinge_generator([logits]), logits)[0].flatten().tolist()
            == pytest.approx([-1/3] * 3))


@pytest.mark.equation("ADT L_diff")
def test_diffusion_loss_is_zero_for_a_perfect_network_and_counts_every_element(toy, monkeypatch):
    model = toy("v")
    x0, eps = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)
    t, cond = torch.tensor([0, 10, 500, 999]), model.condition(["a"] * 4)
    target = model.training_target(x0, eps, t)
    monkeypatch.setattr(model, "output", lambda x, time, cond: target)
    assert losses.diffusion_loss(model, x0, t, eps, cond) < 1e-12
    monkeypatch.setattr(model, "output", lambda x, time, cond: target + 2)
    assert losses.diffusion_loss(model, x0, t, eps, cond).item() == pytest.approx(4, rel=1e-5)


@pytest.mark.equation("ADT similarity")
def test_similarity_is_scale_times_cosine_plus_bias(features, monkeypatch):
    """Heads replaced by known vectors at a known angle; their lengths must not matter."""
    critic = build_critic("similarity", features, 16)
    critic.scale.data, critic.bias.data = torch.tensor(3.), torch.tensor(.5)
    vectors = iter([torch.tensor([5., 0.]), torch.tensor([2., 2.])] * 5)
    monkeypatch.setattr(discriminator.Head, "forward", lambda head, tokens: next(vectors).expand(1, 64, 2))
    logits = critic(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(logits, [torch.full((1, 64), 3 * .5 ** .5 + .5)] * 5)


@pytest.mark.parametrize("how", ["uniform", "lognormal"])
def test_times_cover_the_line(how):
    t = losses.sample_times(20000, 1000, how, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 999
    assert abs(t.float().mean() - 500) < 10                  # both laws are symmetric about the middle
    middle = ((t > 250) & (t < 750)).float().mean()
    assert abs(middle - .5) < .02 if how == "uniform" else middle > .65
    with pytest.raises(ValueError, match="uniform or lognormal"):
        losses.sample_times(1, 10, "gaussian")


# --------------------------------------------------------------------------------------- frozen backbone

def test_backbone_cannot_be_unfrozen(features):
    before = fingerprint(features)
    critic = build_critic("similarity", features, 128)
    critic.train().requires_grad_(True)
    assert not features.training and not features.backbone.training
    assert not any(v.requires_grad for v in features.buffers()) and len(list(features.buffers())) > 50
    optimiser = torch.optim.AdamW(critic.parameters(), lr=.1)
    losses.hinge_generator(critic(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))).backward()
    optimiser.step()
    assert fingerprint(features) == before and not list(features.parameters())


def test_features_are_normalised_differentiable_maps(features):
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    maps = features(image)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 32, 32), (2, 64, 16, 16)] + [(2, 128, 8, 8)] * 3
    assert [tuple(shape) for shape in features.shapes] == [tuple(m.shape[1:]) for m in maps]
    for seen in maps:
        assert seen.mean(1).abs().max() < 1e-4 and (seen.std(1, correction=0) - 1).abs().max() < .05
        assert torch.autograd.grad(seen[:, 0].mean(), image, retain_graph=True)[0].abs().sum() > 0


def test_cls_is_added_to_every_token_of_its_layer(features, monkeypatch):
    """Maps of zeros: what is left of each token is its layer's CLS, brought to unit variance."""
    image, cls = torch.zeros(2, 3, 32, 32), torch.randn(2, 128)
    maps, tokens = features.backbone(image)
    monkeypatch.setattr(features.backbone, "forward", lambda image: (
        [torch.zeros_like(m) for m in maps], [None if c is None else cls for c in tokens]))
    seen = features(image)
    expected = torch.nn.functional.layer_norm(cls, (128,))
    assert not seen[0].any() and not seen[1].any()           # the stem has no CLS
    for tokens in seen[2:]:
        torch.testing.assert_close(tokens, expected[..., None, None].expand(2, 128, 8, 8))


def test_hidden_patches_do_not_reach_the_tokens_of_others(features):
    """What pretraining hides is gone before the stem can blur it into its neighbours."""
    image, hide = torch.rand(1, 3, 32, 32), torch.zeros(1, 64, dtype=torch.bool)
    hide[0, 27] = True                                       # row 3, column 3: pixels 12..15
    other = image.clone()
    other[:, :, 12:16, 12:16] = 7.
    assert torch.equal(features.backbone(image, hide)[0][-1], features.backbone(other, hide)[0][-1])
    other[:, :, 0, 0] = 7.
    assert not torch.equal(features.backbone(image, hide)[0][-1], features.backbone(other, hide)[0][-1])


# ---------------------------------------------------------------------------------------------- variants

VARIANTS = ["similarity", "twin", "difference", "relative", "projected"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_scores_each_sample_alone(features, variant):
    """Batch 1, odd batches, and a logit that does not depend on the other samples."""
    torch.manual_seed(0)
    critic = build_critic(variant, features, 16).eval()
    x, y, text = torch.randn(5, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.randn(5, 16)
    together = critic(x, y, text)
    assert [d.shape for d in together] == [(5, 256)] + [(5, 64)] * 4
    torch.testing.assert_close(critic(x[2:3], y[2:3], text[2:3]), [d[2:3] for d in together],
                               rtol=1e-3, atol=1e-4)


@pytest.mark.equation("ADT similarity")
@pytest.mark.parametrize("variant", ["similarity", "difference"])
@pytest.mark.parametrize("pool", ["tokens", "score", "mean"])
def test_siamese_is_symmetric(features, variant, pool):
    torch.manual_seed(0)
    critic = build_critic(variant, features, 16, pool).eval()
    x, y = torch.randn(2, 3, 3, 32, 32)
    torch.testing.assert_close(critic(x, y), critic(y, x), rtol=1e-4, atol=1e-5)


@pytest.mark.equation("ADT similarity")
def test_identical_pictures_are_as_similar_as_can_be(features):
    critic = build_critic("similarity", features, 16).eval()
    x, y = torch.randn(2, 3, 3, 32, 32)
    highest = [torch.full((3, n), 4. * 1 - 2) for n in (256, 64, 64, 64, 64)]
    torch.testing.assert_close(critic(x, x), highest, rtol=0, atol=1e-4)
    assert all((d.mean(1) < 2 - 1e-3).all() for d in critic(x, y))


@pytest.mark.equation("ADT comparison")
def test_relative_is_antisymmetric(features):
    torch.manual_seed(0)
    critic = build_critic("relative", features, 16).eval()
    x, y, text = *torch.randn(2, 3, 3, 32, 32), torch.randn(3, 16)
    there, back, same = (torch.cat(critic(*two, text), 1) for two in ((x, y), (y, x), (x, x)))
    torch.testing.assert_close(there, -back, rtol=1e-4, atol=1e-5)
    assert same.abs().max() < 1e-5 < there.abs().max()


@pytest.mark.equation("ADT L_D")
def test_the_real_pair_of_relative_only_keeps_verdicts_alike(features):
    """Its two views can change places, so whatever the heads say, its hinge is 1 or more in the mean."""
    torch.manual_seed(0)
    critic = build_critic("relative", features, 16).eval()
    for scale in (1, 100):                                   # pictures like any, and none like these
        x, y, text = *torch.randn(2, 3, 3, 32, 32) * scale, torch.randn(3, 16)
        both = losses.hinge_real(critic(x, y, text)) + losses.hinge_real(critic(y, x, text))
        assert both >= 2 - 1e-5
    assert abs(losses.hinge_real(critic(x, x, text)) - 1) < 1e-5


def test_score_is_the_mean_of_the_tokens_verdicts(features):
    torch.manual_seed(0)
    each, score = (build_critic("twin", features, 16, pool).eval() for pool in ("tokens", "score"))
    score.load_state_dict(each.state_dict())
    x, y = torch.randn(2, 3, 3, 32, 32)
    verdicts = [d.mean(1, keepdim=True) for d in each(x, y)]
    torch.testing.assert_close(verdicts, score(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_reaches_the_generated_picture_and_never_the_reference(features, variant):
    """A frozen discriminator still teaches: its weights get nothing, the picture it is shown does."""
    critic = build_critic(variant, features, 16).requires_grad_(False)
    real, fake = (torch.randn(2, 3, 32, 32, requires_grad=True) for _ in range(2))
    losses.hinge_generator(critic(real, fake, torch.randn(2, 16))).backward()
    assert fake.grad.abs().sum() > 0 and real.grad is None
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_head_weight_learns(features, variant):
    torch.manual_seed(0)
    critic = build_critic(variant, features, 16).requires_grad_(True)
    logits = critic(torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.randn(3, 16))
    logits = torch.cat(logits, 1)
    (logits * torch.randn(logits.shape)).sum().backward()
    silent = [n for n, p in critic.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    cancels = "leave.bias" if variant in ("difference", "relative") else "none"
    assert not [n for n in silent if not (n.endswith("bias") and cancels in n)]      # in h(x) - h(y)


def test_unknown_variant_is_a_sentence(features):
    with pytest.raises(ValueError, match="wanted similarity, twin"):
        discriminator.Siamese(features, "triplet")


def test_projection_reads_the_caption(features):
    critic = build_critic("projected", features, 16)
    x = torch.randn(2, 3, 32, 32)
    one, other = critic(x, x, torch.ones(2, 16)), critic(x, x, -torch.ones(2, 16))
    assert not any(torch.allclose(a, b) for a, b in zip(one, other))


# ------------------------------------------------------------------------------------------ augmentation

def test_projection_is_an_inner_product_over_the_root_of_its_width(features):
    """Of c only the direction counts."""
    critic, known = build_critic("projected", features, 16).eval(), torch.randn(2, 16)
    maps, c = features(torch.randn(2, 3, 32, 32)), 8 * torch.nn.functional.normalize(known)
    expected = [(head(x) @ w(c)[..., None]).squeeze(-1) / 64 ** .5
                for head, x, w in zip(critic.heads, maps, critic.project)]
    torch.testing.assert_close(critic.score(maps, 3 * known), expected, rtol=1e-4, atol=1e-4)


def test_augmentation_is_the_identity_at_strength_zero():
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(discriminator.augment(image, discriminator.geometry(4), 0.), image)


def test_noise_is_as_strong_as_it_is_set_new_at_every_look_and_to_every_picture():
    flat, draw = torch.full((64, 3, 32, 32), .5), discriminator.geometry(64)
    one, two = (discriminator.augment(flat, draw, 0., noise=.05) for _ in range(2))
    assert one.std().item() == pytest.approx(.05, rel=.02)
    for gap in (one - two, one[1:] - one[:-1]):
        assert gap.std().item() == pytest.approx(.05 * 2 ** .5, rel=.02)


def test_what_is_visible_is_clamped_and_descent_never_leads_further_out():
    image = torch.tensor([-3., -3., -.5, .5, 1.2, 1.2], requires_grad=True)
    shown = discriminator.visible(image)
    torch.testing.assert_close(shown, torch.tensor([-1., -1., -.5, .5, 1., 1.]))
    shown.backward(torch.tensor([1., -1., 2., -3., 4., -4.]))
    assert image.grad.tolist() == [0., -1., 2., -3., 4., 0.]
    assert torch.equal(discriminator.visible(image.detach()), shown)


def test_augmentation_is_differentiable_and_right():
    image = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    draw = discriminator.geometry(2).double()
    def fixed(x):
        torch.manual_seed(5)
        return discriminator.augment(x.float(), draw.float(), 1.).double()
    weight = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    slope = torch.autograd.grad((fixed(image) * weight).sum(), image)[0]
    step = torch.randn_like(image)
    finite = ((fixed(image + .01 * step) - fixed(image - .01 * step)) * weight).sum() / .02
    assert finite.item() == pytest.approx((slope * step).sum().item(), rel=1e-3, abs=1e-3)


def test_a_pair_shares_its_geometry_and_not_its_colours():
    """One bright pixel each: it lands on the same place in both, in different colours."""
    image = torch.full((16, 3, 32, 32), -1.)
    image[:, :, 13:18, 13:18] = torch.tensor([1., 0., -1.]).view(3, 1, 1)
    draw = discriminator.geometry(16)
    one, two = (discriminator.augment(image, draw, 1., cutout=False) for _ in range(2))
    def place(x):
        return (x - x[:, :, :1, :1]).abs().sum(1) > 1e-3
    assert torch.equal(place(one), place(two))
    assert (place(one).flatten(1).sum(1) == 25).all()        # whole-pixel shifts: nothing is blurred
    assert (one - two).abs().amax((1, 2, 3)).min() > 1e-3
    assert len({tuple(p.nonzero()[0].tolist()) for p in place(one)}) > 5      # and the draws differ


@pytest.mark.parametrize("strength", [.1, .4, .5, .6, 1.])
def test_however_weak_the_augmentation_hides_which_pixels_are_even(strength):
    image = torch.full((2000, 3, 32, 32), -1.)
    image[:, :, :, 15] = 1.
    shifted = discriminator.augment(image, discriminator.geometry(2000), strength, cutout=False)
    column = shifted.mean((1, 2)).argmax(1)
    assert abs((column % 2).float().mean().item() - .5) < .06


def test_a_weak_tint_is_hidden_too():
    """Grey pictures, augmented: the spread between their channels is as wide as the draw, and has no sign."""
    grey = torch.zeros(4000, 3, 8, 8)
    tint = discriminator.augment(grey, discriminator.geometry(4000), .1, cutout=False).mean((2, 3))
    tint = tint[:, 0] - tint[:, 1]
    assert tint.std() > .02 and abs(tint.mean()) < 4 * tint.std() / 4000 ** .5


@pytest.mark.parametrize("which", ["vit", "cnn", "random"])
def test_any_eyes_fit_any_discriminator(which):
    """Frozen all the same, and the gradient reaches the picture through them."""
    eyes = discriminator.Features(models.features("tiny", "glyphs", which))
    assert not list(eyes.parameters()) and eyes.summary(torch.zeros(2, 3, 32, 32)).shape == (2, eyes.width)
    picture = torch.rand(2, 3, 32, 32, requires_grad=True)
    for critic in (build_critic("relative", eyes, 16), build_critic("similarity", eyes, 16)):
        logits = critic(picture.detach().flip(0), picture, torch.randn(2, 16))
        assert len(logits) >= 3 and all(len(d) == 2 and d.shape[1] >= 64 for d in logits)
        assert torch.autograd.grad(losses.hinge_generator(logits), picture)[0].abs().sum() > 0


def test_eyes_that_never_learned_differ_from_seed_to_seed_and_from_those_that_did():
    image = torch.rand(1, 3, 32, 32)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(models.features("tiny", "glyphs", "random")(image)[0][-1])
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2], atol=.1)
    assert not torch.allclose(seen[0], models.features("tiny", "glyphs")(image)[0][-1], atol=.1)


def test_cut_out_is_a_square_of_half_the_side_in_the_same_place_for_both(features):
    draw = discriminator.geometry(64)
    one, two = ((discriminator.augment(torch.ones(64, 3, 32, 32), draw, 1.) == 0).all(1) for _ in range(2))
    assert torch.equal(one, two) and .2 < one.float().mean((1, 2)).max() <= .25


def test_spectral_norms_follow_their_weights_only_when_told(features):
    critic = build_critic("projected", features, 16).eval()
    layer = critic.heads[0].mix
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(torch.rand_like(layer.weight) * 9)
        before = layer.weight.clone()
        critic(None, torch.randn(2, 3, 32, 32), torch.randn(2, 16))
        assert torch.equal(layer.weight, before)             # looking on changes nothing
        for _ in range(30):
            discriminator.tighten(critic)
        assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 1e-2
    assert not critic.training


def test_all_pooled_is_one_verdict(features):
    torch.manual_seed(0)
    layers, one = (build_critic("similarity", features, 16, pool).eval() for pool in ("score", "all"))
    one.load_state_dict(layers.state_dict())
    x, y = torch.randn(2, 3, 3, 32, 32)
    torch.testing.assert_close(one(x, y), [torch.cat(layers(x, y), 1).mean(1, keepdim=True)])
