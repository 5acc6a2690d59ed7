"""The frozen backbone with its whitening, and the two discriminators with all their variants."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

import data
import discriminator
import losses
from conftest import DISCRIMINATORS, build_discriminator, untrained_params
from models.loading import load_backbone

MAP_SIZES = 256, 64, 64, 64, 64                                        # tokens of TinyViT's five layers


def buffer_hash(module):
    return hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in module.buffers())).hexdigest()


def random_images(n, scale=1.):
    """-> two different batches (n, 3, 32, 32)."""
    return torch.randn(2, n, 3, 32, 32).mul(scale).unbind()


# --------------------------------------------------------------------------------------- frozen backbone

def test_the_backbone_cannot_be_trained(backbone):
    hash_before = buffer_hash(backbone)
    disc = build_discriminator("similarity", backbone, 128)
    disc.train().requires_grad_(True)
    assert not backbone.training and not backbone.network.training
    assert not list(backbone.parameters())
    assert len(list(backbone.buffers())) > 50
    assert not any(buffer.requires_grad for buffer in backbone.buffers())
    optimizer = torch.optim.AdamW(disc.parameters(), lr=.1)
    losses.hinge_generator(disc(*random_images(2))).backward()
    optimizer.step()
    assert buffer_hash(backbone) == hash_before


def test_features_are_normalised_and_differentiable(backbone):
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    maps = backbone(image)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 32, 32), (2, 64, 16, 16)] + [(2, 128, 8, 8)] * 3
    assert [tuple(shape) for shape in backbone.map_shapes] == [tuple(x.shape[1:]) for x in maps]
    for x in maps:
        assert x.mean(1).abs().max() < 1e-4
        assert (x.std(1, correction=0) - 1).abs().max() < .05
        assert torch.autograd.grad(x[:, 0].mean(), image, retain_graph=True)[0].abs().sum() > 0


def test_the_cls_token_of_a_layer_is_added_to_all_its_tokens(backbone, monkeypatch):
    """With maps of zeros every token is its layer's CLS token, layer-normalised."""
    image, cls_token = torch.zeros(2, 3, 32, 32), torch.randn(2, 128)
    maps, cls = backbone.network(image)
    zero_maps = [torch.zeros_like(x) for x in maps]
    same_cls = [None if c is None else cls_token for c in cls]
    monkeypatch.setattr(backbone.network, "forward", lambda image: (zero_maps, same_cls))
    features = backbone(image)
    expected = F.layer_norm(cls_token, (128,))[..., None, None].expand(2, 128, 8, 8)
    assert not features[0].any() and not features[1].any()             # the stem has no CLS token
    for x in features[2:]:
        torch.testing.assert_close(x, expected)


def test_masked_patches_do_not_reach_other_tokens(backbone):
    """What pretraining masks is removed before the convolutional stem could mix it with its neighbours."""
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 27] = True                                                 # row 3, column 3: pixels 12 to 15
    changed = image.clone()
    changed[:, :, 12:16, 12:16] = 7.
    last_map = backbone.network(image, mask)[0][-1]
    assert torch.equal(last_map, backbone.network(changed, mask)[0][-1])
    changed[:, :, 0, 0] = 7.
    assert not torch.equal(last_map, backbone.network(changed, mask)[0][-1])


def test_the_shapes_of_the_features_are_found_on_the_device_of_the_network():
    backbone = discriminator.FrozenBackbone(load_backbone("tiny", "fashion").to("meta"))
    assert len(backbone.map_shapes) == len(backbone.layers)


def test_whitened_features_have_equal_variance_in_all_directions():
    """On the images that the whitening was fitted on: mean zero, and the variance v of a direction becomes
    v / (v + eps mean(v)), close to 1 but for the smallest. Fitting again, in parts, changes nothing, and a
    state_dict restores it."""
    backbone = discriminator.FrozenBackbone(load_backbone("tiny", "fashion"))
    images = data.build_dataset("fashion").sample_batch(64, torch.Generator().manual_seed(0)).image
    maps_before = [x.flatten(0, 2) for x in backbone.normalized_maps(images)]
    backbone.fit_whitening([images])
    backbone.fit_whitening(images.split(20))
    for before, after in zip(maps_before, backbone(images)):
        after = after.movedim(1, -1).flatten(0, 2)
        v = torch.linalg.eigvalsh(torch.cov(before.T.double()))
        assert v[-1] > 20 * v[len(v) // 2]                             # whitening is needed
        assert after.mean(0).abs().max() < 1e-3
        eigvals = torch.linalg.eigvalsh(torch.cov(after.T.double()))
        assert torch.allclose(eigvals, (v / (v + .1 * v.mean())).sort().values, atol=2e-2)
    restored = discriminator.FrozenBackbone(load_backbone("tiny", "fashion"))
    restored.load_state_dict(backbone.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(restored(images[:2]), backbone(images[:2])))
    assert not list(backbone.parameters())


def test_build_backbone_fits_the_whitening_to_images_with_instance_noise(glyphs):
    """Equal to fitting on the noised images; noise widens the distribution of the features."""
    images = glyphs.sample_batch(16, torch.Generator().manual_seed(0)).image
    torch.manual_seed(3)
    built = discriminator.build_backbone(load_backbone("tiny", "glyphs"), images, .2)
    torch.manual_seed(3)
    expected = discriminator.FrozenBackbone(load_backbone("tiny", "glyphs"))
    expected.fit_whitening([images + .2 * torch.randn_like(images)])
    clean = discriminator.build_backbone(load_backbone("tiny", "glyphs"), images)
    torch.testing.assert_close(built.feat_whiten0, expected.feat_whiten0, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(built.feat_whiten0, clean.feat_whiten0, atol=.1)


@pytest.mark.parametrize("kind", ["vit", "cnn", "vit+cnn", "random"])
def test_any_backbone_works_in_any_discriminator(kind):
    """It is frozen, and the gradient reaches the image through it."""
    backbone = discriminator.FrozenBackbone(load_backbone("tiny", "glyphs", kind))
    assert not list(backbone.parameters())
    assert backbone.global_embedding(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.embed_dim)
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    for disc in (build_discriminator("relativistic", backbone, 16),
                 build_discriminator("similarity", backbone, 16)):
        logits = disc(image.detach().flip(0), image, torch.randn(2, 16))
        assert len(logits) >= 3
        assert all(len(d) == 2 and d.shape[1] >= 64 for d in logits)
        assert torch.autograd.grad(losses.hinge_generator(logits), image)[0].abs().sum() > 0


def test_joined_backbones_have_the_maps_of_both_and_the_embedding_of_the_vit():
    image = torch.rand(2, 3, 32, 32)
    joined, vit, cnn = (discriminator.FrozenBackbone(load_backbone("tiny", "glyphs", kind))
                        for kind in ("vit+cnn", "vit", "cnn"))
    assert torch.equal(joined.global_embedding(image), vit.global_embedding(image))
    for found, expected in zip(joined(image), [*cnn(image), *vit(image)], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_random_backbone_depends_on_the_seed_and_is_not_the_pretrained_one():
    image = torch.rand(1, 3, 32, 32)
    maps = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        maps.append(load_backbone("tiny", "glyphs", "random")(image)[0][-1])
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2], atol=.1)
    assert not torch.allclose(maps[0], load_backbone("tiny", "glyphs")(image)[0][-1], atol=.1)


# ------------------------------------------------------------------------------------------ discriminators

@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_logits_do_not_depend_on_the_other_samples_of_the_batch(backbone, kind):
    torch.manual_seed(0)
    disc = build_discriminator(kind, backbone, 16).eval()
    (x, y), text = random_images(5), torch.randn(5, 16)
    logits = disc(x, y, text)
    assert [d.shape for d in logits] == [(5, n) for n in MAP_SIZES]
    torch.testing.assert_close(disc(x[2:3], y[2:3], text[2:3]), [d[2:3] for d in logits], rtol=1e-3,
                               atol=1e-4)


@pytest.mark.equation("ADT similarity")
def test_similarity_is_scale_times_cosine_plus_bias(backbone, monkeypatch):
    """Heads that return known vectors at a known angle; the vectors' lengths must not matter."""
    disc = build_discriminator("similarity", backbone, 16)
    disc.scale.data, disc.bias.data = torch.tensor(3.), torch.tensor(.5)
    vectors = iter([torch.tensor([5., 0.]), torch.tensor([2., 2.])] * 5)
    monkeypatch.setattr(discriminator.Head, "forward", lambda head, x: next(vectors).expand(1, 64, 2))
    logits = disc(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(logits, [torch.full((1, 64), 3 * .5 ** .5 + .5)] * 5)


@pytest.mark.equation("ADT similarity")
@pytest.mark.parametrize("kind", ["similarity", "difference"])
def test_siamese_logits_are_symmetric(backbone, kind):
    torch.manual_seed(0)
    disc = discriminator.SiameseDiscriminator(backbone, kind).eval()
    x, y = random_images(3)
    torch.testing.assert_close(disc(x, y), disc(y, x), rtol=1e-4, atol=1e-5)


@pytest.mark.equation("ADT similarity")
def test_equal_images_have_the_largest_similarity(backbone):
    disc = build_discriminator("similarity", backbone, 16).eval()
    x, y = random_images(3)
    largest = [torch.full((3, n), 4. * 1 - 2) for n in MAP_SIZES]      # scale and bias at initialisation
    torch.testing.assert_close(disc(x, x), largest, rtol=0, atol=1e-4)
    assert all((d.mean(1) < 2 - 1e-3).all() for d in disc(x, y))


@pytest.mark.equation("ADT comparison")
@pytest.mark.parametrize("kind", ["ordered", "relativistic"])
def test_ordered_and_relativistic_logits_are_antisymmetric(backbone, kind):
    torch.manual_seed(0)
    disc = build_discriminator(kind, backbone, 16).eval()
    assert disc.is_antisymmetric
    (x, y), text = random_images(3), torch.randn(3, 16)
    forward, backward, same = (torch.cat(disc(*pair, text), 1) for pair in ((x, y), (y, x), (x, x)))
    torch.testing.assert_close(forward, -backward, rtol=1e-4, atol=1e-5)
    assert same.abs().max() < 1e-5 < forward.abs().max()


@pytest.mark.equation("ADT L_D")
@pytest.mark.parametrize("kind", ["ordered", "relativistic"])
def test_an_antisymmetric_hinge_of_two_views_is_1_at_least_in_the_mean(backbone, kind):
    """Two views of one image can be exchanged, so no heads can do better: such a pair teaches nothing."""
    torch.manual_seed(0)
    disc = build_discriminator(kind, backbone, 16).eval()
    for scale in (1, 100):                                             # in the range of images, far outside
        (x, y), text = random_images(3, scale), torch.randn(3, 16)
        both_orders = losses.hinge_real(disc(x, y, text)) + losses.hinge_real(disc(y, x, text))
        assert both_orders >= 2 - 1e-5
    assert abs(losses.hinge_real(disc(x, x, text)) - 1) < 1e-5


@pytest.mark.equation("ADT similarity")
@pytest.mark.parametrize("kind", ["reference", "ordered"])
def test_similarity_with_a_reference_is_an_inner_product_given_the_caption(backbone, kind):
    """The real image and the caption are added, then compared with the other image; ordered: minus the same
    with the two images exchanged."""
    torch.manual_seed(0)
    disc = build_discriminator(kind, backbone, 16).eval()
    (x, y), text = random_images(2), torch.randn(2, 16)
    expected = []
    for i, (map_x, map_y) in enumerate(zip(backbone(x), backbone(y))):
        w = disc.cond_proj[i](8 * F.normalize(text))[:, None]
        logit = torch.einsum("bnc,bnc->bn", disc.heads_real[i](map_x) + w, disc.heads[i](map_y))
        if kind == "ordered":
            logit -= torch.einsum("bnc,bnc->bn", disc.heads_real[i](map_y) + w, disc.heads[i](map_x))
        expected.append(logit / 64 ** .5)
    torch.testing.assert_close(disc(x, y, text), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_frozen_discriminator_gives_gradients_to_the_fake_image_alone(backbone, kind):
    disc = build_discriminator(kind, backbone, 16).requires_grad_(False)
    real, fake = (torch.randn(2, 3, 32, 32, requires_grad=True) for _ in range(2))
    losses.hinge_generator(disc(real, fake, torch.randn(2, 16))).backward()
    assert fake.grad.abs().sum() > 0
    assert real.grad is None
    assert all(param.grad is None for param in disc.parameters())


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_every_parameter_of_a_discriminator_receives_a_gradient(backbone, kind):
    torch.manual_seed(0)
    disc = build_discriminator(kind, backbone, 16).requires_grad_(True)
    logits = torch.cat(disc(*random_images(3), torch.randn(3, 16)), 1)
    (logits * torch.randn(logits.shape)).sum().backward()
    cancels = "conv_out.bias" if kind in ("difference", "relativistic") else "none"  # in h(x) - h(y)
    assert not [name for name in untrained_params(disc) if not (name.endswith("bias") and cancels in name)]


def test_unknown_kinds_are_rejected(backbone):
    with pytest.raises(ValueError, match="wanted similarity, reference"):
        discriminator.SiameseDiscriminator(backbone, "triplet")


def test_projected_logits_depend_on_the_caption(backbone):
    disc = build_discriminator("projected", backbone, 16)
    x = torch.randn(2, 3, 32, 32)
    logits, other_logits = disc(x, x, torch.ones(2, 16)), disc(x, x, -torch.ones(2, 16))
    assert not any(torch.allclose(a, b) for a, b in zip(logits, other_logits))


def test_projection_is_an_inner_product_over_the_root_of_its_length(backbone):
    """Of c only the direction counts; its length is 8."""
    disc, cond = build_discriminator("projected", backbone, 16).eval(), torch.randn(2, 16)
    maps, c = backbone(torch.randn(2, 3, 32, 32)), 8 * F.normalize(cond)
    expected = [(head(x) @ proj(c)[..., None]).squeeze(-1) / 64 ** .5
                for head, x, proj in zip(disc.heads, maps, disc.cond_proj)]
    torch.testing.assert_close(disc.logits(maps, 3 * cond), expected, rtol=1e-4, atol=1e-4)


def test_spectral_norms_change_only_in_update_spectral_norm(backbone):
    disc = build_discriminator("projected", backbone, 16).eval()
    layer = disc.heads[0].conv
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(torch.rand_like(layer.weight) * 9)
        before = layer.weight.clone()
        disc(None, torch.randn(2, 3, 32, 32), torch.randn(2, 16))
        assert torch.equal(layer.weight, before)
        for _ in range(300):
            discriminator.update_spectral_norm(disc)
        assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 1e-2
    assert not disc.training
