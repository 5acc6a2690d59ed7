"""Each part of the differentiable augmentation seen alone, and the clamp of generated images."""

import pytest
import torch

import discriminator

NO_GEOMETRY = torch.zeros(4000, 4)                                     # no translation


# ---------------------------------------------------------------------------------------------------- colours

def colour_effects(strength):
    """Recover what augment did to the colours of 4000 images (the same one: a cosine pattern of one colour)
    -> brightness (4000, 3), saturation factor (4000,), contrast factor (4000,).

    For each channel c, let m_c be the mean over pixels and a_c the amplitude of the pattern. Contrast is the
    factor of mean(a_c), contrast times saturation that of a_c - mean(a_c). Brightness is m_c, whose
    differences between channels were scaled by both."""
    pattern = torch.cos(2 * torch.pi * torch.arange(8) / 8).expand(8, 8)
    colour = torch.tensor([.5, .3, -.2])
    image = (colour.view(3, 1, 1) * pattern).expand(4000, 3, 8, 8)
    augmented = discriminator.augment(image, NO_GEOMETRY, strength, cutout=False)
    mean = augmented.mean((2, 3))                                      # (4000, 3)
    amplitude = ((augmented - mean[..., None, None]) * pattern).sum((2, 3)) / pattern.square().sum()
    luminance = amplitude.mean(1)
    contrast = luminance / colour.mean()
    chroma = colour - colour.mean()
    saturation = (amplitude @ chroma) / chroma.square().sum() / contrast
    overall = mean.mean(1, keepdim=True)
    brightness = overall + (mean - overall) / (saturation * contrast).clamp(min=1e-3)[:, None]
    return brightness, saturation, contrast


@pytest.mark.parametrize("strength", [.3, .9])
@pytest.mark.parametrize("effect,centre,half_width", [(0, 0., .4), (1, 1., 1.), (2, 1., .5)],
                         ids=["brightness", "saturation", "contrast"])
def test_each_colour_change_alone_is_uniform_with_its_own_width(effect, centre, half_width, strength):
    values = colour_effects(strength)[effect] - centre
    bound = half_width * strength
    assert values.abs().max() < bound * 1.01 + 1e-4
    assert values.max() > .95 * bound and values.min() < -.95 * bound
    assert values.std().item() == pytest.approx(bound / 3 ** .5, rel=.05)
    assert abs(values.mean()) < .05 * bound


def test_colour_changes_are_independent_of_each_other_and_brightness_of_the_channel():
    brightness, saturation, contrast = colour_effects(.5)
    effects = torch.stack([*brightness.T, saturation, contrast])       # (5, 4000)
    correlations = torch.corrcoef(effects) - torch.eye(5)
    assert correlations.abs().max() < .08                              # five standard deviations


def test_a_weak_tint_of_grey_images_is_hidden():
    """The difference between two channels is as wide as the augmentation draws it, and has no sign."""
    grey = torch.zeros(4000, 3, 8, 8)
    mean = discriminator.augment(grey, discriminator.sample_aug_params(4000), .1, cutout=False).mean((2, 3))
    tint = mean[:, 0] - mean[:, 1]
    assert tint.std() > .02
    assert abs(tint.mean()) < 5 * tint.std() / 4000 ** .5


# --------------------------------------------------------------------------------------------------- geometry

def test_aug_params_are_uniform():
    aug_params = discriminator.sample_aug_params(4000)
    assert aug_params.shape == (4000, 4)
    assert aug_params.min() < -.99 and aug_params.max() > .99 and aug_params.abs().max() <= 1
    assert aug_params.mean(0).abs().max() < .05
    assert torch.allclose(aug_params.std(0), torch.tensor(3 ** -.5), rtol=.05)


@pytest.mark.parametrize("strength,max_shift", [(.1, 1), (.5, 2), (1., 4)])
def test_translation_moves_by_whole_pixels_up_to_an_eighth_of_the_side(strength, max_shift):
    """One bright pixel on a flat background: it moves by -round(parameter max_shift) along x and y, and the
    edge is continued."""
    image = torch.full((9, 3, 32, 32), -1.)
    image[:, :, 20, 12] = 1.
    aug_params = torch.zeros(9, 4)
    aug_params[:, 0], aug_params[:, 1] = torch.linspace(-1, 1, 9), torch.linspace(1, -.5, 9)
    augmented = discriminator.augment(image, aug_params, strength, cutout=False)
    background = augmented[:, :, :1, :1]
    is_pixel = (augmented - background).abs().sum(1) > 1e-4            # (9, 32, 32)
    assert (is_pixel.flatten(1).sum(1) == 1).all()
    _, row, column = is_pixel.nonzero().T
    assert (column - 12).tolist() == (-(aug_params[:, 0] * max_shift).round()).tolist()
    assert (row - 20).tolist() == (-(aug_params[:, 1] * max_shift).round()).tolist()


@pytest.mark.parametrize("strength", [.1, .4, .5, .6, 1.])
def test_translation_is_as_often_odd_as_even(strength):
    image = torch.full((2000, 3, 32, 32), -1.)
    image[:, :, :, 15] = 1.
    shifted = discriminator.augment(image, discriminator.sample_aug_params(2000), strength, cutout=False)
    column = shifted.mean((1, 2)).argmax(1)
    assert abs((column % 2).float().mean().item() - .5) < .06


@pytest.mark.parametrize("strength", [.25, .5, 1.])
def test_cutout_is_a_square_of_half_the_side_times_strength_at_its_centre(strength):
    """Cut-out pixels are zero; the colour changes leave no other pixel of a flat image at exactly zero."""
    aug_params = torch.tensor([[0., 0., -.25, .25], [0., 0., .5, 0.]])
    for image in (torch.full((2, 3, 64, 64), 1.), torch.full((2, 3, 64, 64), -1.)):
        is_cut = (discriminator.augment(image, aug_params, strength) == 0).all(1)
        for centre, mask in zip(aug_params[:, 2:], is_cut):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert mask.sum() == len(rows) * len(columns)              # a rectangle
            assert len(rows) == pytest.approx(32 * strength, abs=1)
            assert len(columns) == pytest.approx(32 * strength, abs=1)
            assert columns.float().mean().item() == pytest.approx((centre[0] + 1) / 2 * 63, abs=1)
            assert rows.float().mean().item() == pytest.approx((centre[1] + 1) / 2 * 63, abs=1)


def test_cutout_is_at_the_same_place_in_both_images_of_a_pair():
    aug_params = discriminator.sample_aug_params(64)
    is_cut, is_cut_2 = ((discriminator.augment(torch.ones(64, 3, 32, 32), aug_params, 1.) == 0).all(1)
                        for _ in range(2))
    assert torch.equal(is_cut, is_cut_2)
    assert .2 < is_cut.float().mean((1, 2)).max() <= .25


def test_a_pair_shares_its_geometry_and_not_its_colours():
    """A coloured square: it lands at the same place in both images, in different colours."""
    image = torch.full((16, 3, 32, 32), -1.)
    image[:, :, 13:18, 13:18] = torch.tensor([1., 0., -1.]).view(3, 1, 1)
    aug_params = discriminator.sample_aug_params(16)
    first, second = (discriminator.augment(image, aug_params, 1., cutout=False) for _ in range(2))
    is_square, is_square_2 = ((x - x[:, :, :1, :1]).abs().sum(1) > 1e-3 for x in (first, second))
    assert torch.equal(is_square, is_square_2)
    assert (is_square.flatten(1).sum(1) == 25).all()                   # whole pixels: nothing is blurred
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-3
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in is_square}) > 5  # the samples differ


# ------------------------------------------------------------------------------------ noise, gradients, clamp

def test_instance_noise_has_its_standard_deviation_and_is_new_for_every_image():
    image, aug_params = torch.full((64, 3, 32, 32), .5), discriminator.sample_aug_params(64)
    noised, noised_2 = (discriminator.augment(image, aug_params, 0., noise_std=.05) for _ in range(2))
    assert noised.std().item() == pytest.approx(.05, rel=.02)
    for difference in (noised - noised_2, noised[1:] - noised[:-1]):
        assert difference.std().item() == pytest.approx(.05 * 2 ** .5, rel=.02)


def test_augmentation_is_the_identity_at_strength_zero():
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(discriminator.augment(image, discriminator.sample_aug_params(4), 0.), image)


def test_the_gradient_of_augmentation_equals_finite_differences():
    image = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    aug_params = discriminator.sample_aug_params(2)

    def augment(x):
        torch.manual_seed(5)
        return discriminator.augment(x.float(), aug_params, 1.).double()

    weight = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    grad = torch.autograd.grad((augment(image) * weight).sum(), image)[0]
    step = torch.randn_like(image)
    finite = ((augment(image + .01 * step) - augment(image - .01 * step)) * weight).sum() / .02
    assert finite.item() == pytest.approx((grad * step).sum().item(), rel=1e-3, abs=1e-3)


def test_clamped_images_receive_no_gradient_that_leads_further_out():
    image = torch.tensor([-3., -3., -.5, .5, 1.2, 1.2], requires_grad=True)
    clamped = discriminator.clamp_straight_through(image)
    torch.testing.assert_close(clamped, torch.tensor([-1., -1., -.5, .5, 1., 1.]))
    clamped.backward(torch.tensor([1., -1., 2., -3., 4., -4.]))
    assert image.grad.tolist() == [0., -1., 2., -3., 4., 0.]
    assert torch.equal(discriminator.clamp_straight_through(image.detach()), clamped)
