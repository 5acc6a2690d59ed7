"""The contract: one linear identity for every target and family, and the tiny model that fulfils it."""

import pytest
import torch
from conftest import Toy, family

import models

TIMES = torch.tensor([0, 1, 249, 500, 998, 999])


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", ["sd15", "sd2-v-zero-snr", "sd3", "tiny"])
def test_split_undoes_training_target_for_every_target_and_family(target, name):
    alpha, sigma = models.tables("flow")[:2] if name == "tiny" else family(name)[1:]
    if target == "eps" and alpha[-1] < 1e-6:
        if alpha[-1] == 0:
            with pytest.raises(ValueError, match="alpha_T > 0"):
                Toy(target, alpha, sigma)
        return
    model = Toy(target, alpha, sigma)
    x0, eps = torch.randn(2, len(TIMES), 2, 4, 4, dtype=torch.float64)
    x = model.add_noise(x0, TIMES, eps)
    back_x0, back_eps = model.split(x, model.training_target(x0, eps, TIMES), TIMES)
    known = sigma[TIMES] > 1e-4 if target == "x0" else torch.ones(len(TIMES), dtype=torch.bool)
    torch.testing.assert_close(back_x0, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(back_eps[known], eps[known], rtol=0, atol=1e-5)


def test_all_targets_describe_the_same_picture():
    """Perfect networks of the four targets give the same next point:
    what is predicted is a matter of taste."""
    alpha, sigma = family("sd15")[1:]
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([10, 500, 999])
    found = []
    for target in ("eps", "x0", "v", "flow"):
        model = Toy(target, alpha, sigma)
        found.append(model.split(model.add_noise(x0, t, eps), model.training_target(x0, eps, t), t)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


def test_flow_target_is_the_derivative_of_the_path():
    """d x_sigma / d sigma by a finite difference of the forward process itself."""
    model = Toy("flow")
    x0, eps = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    low, high = torch.tensor([400]), torch.tensor([401])
    step = (model.sigma[401] - model.sigma[400]).item()
    slope = (model.add_noise(x0, high, eps) - model.add_noise(x0, low, eps)) / step
    torch.testing.assert_close(slope, model.training_target(x0, eps, low), rtol=1e-6, atol=1e-6)


def test_v_target_is_the_derivative_along_the_circle():
    """On a variance-preserving schedule v = d x / d angle, the angle being atan2(sigma, alpha)."""
    angle = torch.linspace(.1, 1.4, 2001, dtype=torch.float64)
    model = Toy("v", angle.cos(), angle.sin())
    x0, eps = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    low, middle, high = (torch.tensor([i]) for i in (999, 1000, 1001))
    slope = (model.add_noise(x0, high, eps) - model.add_noise(x0, low, eps)) / (angle[1001] - angle[999])
    torch.testing.assert_close(slope, model.training_target(x0, eps, middle), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_the_tiny_network_is_left_what_a_line_cannot_say(target):
    """Of pictures with the assumed spread, its input and its task have unit variance, and the task is
    uncorrelated with x_t: no line through x_t does better."""
    model = models.TinyDenoiser(["a"], target).double()
    seen = {}
    def network(x, *rest):
        seen["x"] = x
        return torch.zeros_like(x)
    model.network.forward = network
    x0, eps = torch.randn(2, 3, 12, 160, 160, dtype=torch.float64)
    x0, t = .8 * x0, torch.tensor([99, 499, 899])
    x, y = model.add_noise(x0, t, eps), model.training_target(x0, eps, t)
    line = model.predict(x, t, model.condition([""] * 3))
    task = (y - line) / model.gain[t].view(-1, 1, 1, 1)
    for i in range(3):
        assert abs(seen["x"][i].std() - 1) < .01 and abs(task[i].std() - 1) < .01
        assert abs((task[i] * x[i]).mean()) < .01


def test_at_pure_noise_only_the_network_speaks():
    """A flow's linear part takes all of the noise away: the one-step picture is -gain F."""
    model = models.TinyDenoiser(["a"])
    torch.nn.init.normal_(model.network.leave[2].weight, std=.1)
    eps, t, cond = torch.randn(2, 12, 16, 16), torch.tensor([999, 999]), model.condition(["", ""])
    y = model.predict(eps, t, cond)
    made = model.network(eps, torch.ones(2), cond["text"], cond["mask"], cond["pooled"])
    torch.testing.assert_close(model.split(eps, y, t)[0], -.8 * made, rtol=0, atol=1e-4)


def test_terminal_time_contains_nothing_of_x0():
    model = Toy("flow")
    eps = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    one, two = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([999])
    assert torch.equal(model.add_noise(one, t, eps), model.add_noise(two, t, eps))


def test_fractional_times_read_between_the_rows():
    model = Toy("flow")
    alpha, sigma = model.at(torch.tensor([10.25, 999.0]).double())
    torch.testing.assert_close(sigma.flatten(), torch.tensor([.01125, 1.]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close((alpha + sigma).flatten(), torch.ones(2).double(), rtol=0, atol=1e-6)


def test_guidance_is_an_extrapolation_and_one_means_off(toy):
    model = toy()
    x, t = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([5, 900])
    cond, uncond = model.condition(["ab", "c"]), model.condition([""])
    both = {"scale": uncond["scale"].expand(2)}
    y_c, y_u = model.predict(x, t, cond), model.predict(x, t, both)
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 1.0), y_c)
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 0.0), y_u)
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 3.0), y_u + 3 * (y_c - y_u))
    with pytest.raises(ValueError, match="uncond"):
        model.predict(x, t, cond, None, 2.0)


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_tiny_model_runs_and_is_exactly_invertible(target, glyphs):
    model = models.TinyDenoiser(glyphs.words, target)
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    z = model.encode(image)
    assert z.shape == (3, 12, 16, 16) and torch.equal(model.decode(z), image)
    cond = model.condition(["a red umbrella", "", "a letter g on blue"])
    y = model.predict(z, torch.tensor([0, 500, 999]), cond, model.condition([""]), 2.0)
    assert y.shape == z.shape and y.isfinite().all()


def test_padding_does_not_reach_the_picture(base):
    """A caption's states do not depend on the company it keeps in the batch."""
    alone = base.condition(["a snowman"])
    company = base.condition(["a snowman", "a red bold serif letter g on a yellow background"])
    for key in alone:
        torch.testing.assert_close(alone[key], company[key][:1], rtol=1e-4, atol=1e-5)


def test_unknown_words_and_long_captions_are_named(base):
    with pytest.raises(ValueError, match="'zebra'"):
        base.condition(["a zebra on blue"])
    with pytest.raises(ValueError, match="umbrella"):
        base.condition(["an umbrela"])
    with pytest.raises(ValueError, match="15 words"):
        base.condition(["a " * 20])


def test_only_the_network_is_trainable(base):
    assert all(p.requires_grad == name.startswith("network.") for name, p in base.named_parameters())


def test_weights_round_trip_in_half_precision(tmp_path, base):
    models.save(base, tmp_path / "denoiser.safetensors", words=base.words, target="flow")
    again = models.build("tiny", "glyphs", tmp_path)
    for one, two in zip(base.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.glob("*.part*"))


def test_weights_of_another_shape_missing_or_broken(tmp_path, base):
    with pytest.raises(FileNotFoundError, match="no such file"):
        models.build("tiny", "glyphs", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="pretrain.py"):
        models.build("tiny", "glyphs", tmp_path)
    models.save(base, tmp_path / "denoiser.safetensors", words=base.words[:50], target="flow")
    with pytest.raises(ValueError, match="another network"):
        models.build("tiny", "glyphs", tmp_path)
    (tmp_path / "denoiser.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        models.build("tiny", "glyphs", tmp_path)
    with pytest.raises(ValueError, match="wanted tiny"):
        models.build("dalle", "glyphs")
