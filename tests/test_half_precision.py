"""Where bf16 is too coarse: predictions of x0 from pure noise, and weights that do not fit their inputs."""

from unittest import mock

import pytest
import torch
from tiny_families import CAPTIONS, FAMILIES, build_model, setup_run, trainable

import add
import sampler
from conftest import Toy, family_schedule
from models import half_precision
from models.denoiser import MAX_AMPLIFICATION
from models.stable_diffusion import LatentDenoiser
from utils import distributed

pytestmark = pytest.mark.usefixtures("cache_home")


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def computed_in_fp32(model):
    """-> a list that receives, for every call of the network, whether it is computed in fp32."""
    calls, forward_network = [], model.forward_network

    def recording_forward_network(*args):
        calls.append(not torch.is_autocast_enabled("cpu"))
        return forward_network(*args)

    model.forward_network = recording_forward_network
    return calls


@pytest.mark.parametrize("stochasticity", [0., .6, 1.])
@pytest.mark.parametrize("family", ["sd15", "sd2-v-zero-snr", "sd3"])
def test_the_amplification_is_the_derivative_of_the_next_state(family, stochasticity):
    prediction_type, alpha, sigma = family_schedule(family)
    model = Toy(prediction_type, alpha, sigma)
    x, y = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor([999, 500, 20])
    for t_next in (None, torch.tensor([749, 10, 3])):
        y.requires_grad_()
        x0, eps = model.to_x0_eps(x, y, t)
        x_next = x0
        if t_next is not None:
            alpha_next, sigma_next = model.alpha_sigma(t_next)
            x_next = alpha_next * x0 + sigma_next * (1 - stochasticity ** 2) ** .5 * eps
        derivative = torch.autograd.grad(x_next.sum(), y)[0][:, 0, 0, 0]
        torch.testing.assert_close(model.amplification(t, t_next, stochasticity), derivative.abs())
        if prediction_type != "eps":
            assert model.amplification(t, t_next, stochasticity).max() <= 1


def test_only_steps_that_amplify_errors_are_computed_in_fp32(pretrained):
    """One step: yes; each of 50: no. A student's path of four: the first two. fp16 and fp32: no change."""
    model = build_model(pretrained, "sd15")
    calls, cond = computed_in_fp32(model), model.encode_prompts(CAPTIONS)
    x = torch.randn(2, *model.latent_shape)
    expected = {(1, 0.): [True], (4, 1.): [True, True, False, False], (50, 0.): 50 * [False]}
    for (num_steps, stochasticity), in_fp32 in expected.items():
        with torch.no_grad(), bf16():
            sampler.rollout(model, x, sampler.make_timesteps(model.T, num_steps), cond,
                            stochasticity=stochasticity)
        assert calls == in_fp32
        calls.clear()
    for other in (torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False)):
        with torch.no_grad(), other:
            before = torch.is_autocast_enabled("cpu")
            sampler.rollout(model, x[:1], sampler.make_timesteps(model.T, 1), model.encode_prompts(["a"]))
        assert calls == [not before]
        calls.clear()
    assert model.amplification(torch.tensor([999])) > 14 > MAX_AMPLIFICATION


@pytest.mark.parametrize("name", FAMILIES)
def test_student_and_teacher_predict_x0_without_the_noise_of_bf16(pretrained, name):
    """Under autocast to bf16, with frozen weights in fp16, as on a GPU."""
    config = add.Config(student_steps=1, t_max=1., backward_simulation_prob=0.)
    results = {}
    for precision in ("fp32", "bf16"):
        model = build_model(pretrained, name, rank=4)
        if precision == "bf16":
            model.cast_frozen(torch.bfloat16, torch.float16)
        model.requires_grad_(False)
        teacher, cond = model.frozen_copy(), model.encode_prompts(CAPTIONS)
        x0 = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            torch.manual_seed(3)
            student_x0 = add.student_prediction(model, x0, cond, config)[0]
            targets = []
            for weighting in ("exponential", "nfsd"):
                config.distill_weighting = weighting
                torch.manual_seed(4)
                targets.append(add.distillation_target(teacher, x0, cond, config)[0])
        results[precision] = [student_x0, *targets]
    limit = 2e-2 if name == "sd3" else 3e-3                            # a flow is not amplified: bf16 stays
    for exact, half in zip(*results.values(), strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_weights_take_fp32_inputs_and_pass_their_gradient(pretrained, name, dtype):
    """The adapters' gradients are those of a network in fp32 whose weights have been rounded."""
    rounded, model = build_model(pretrained, name, 2), build_model(pretrained, name, 2)
    model.cast_frozen(dtype)
    half_precision.cast_frozen_weights(rounded.network, dtype, rounded.output_layer)
    rounded.network.float()
    x, t, results = torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), []
    for item in (rounded, model):
        y = item.predict(x, t, item.encode_prompts(CAPTIONS))
        results.append([y, *torch.autograd.grad(y.square().mean(), trainable(item))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(type(layer).__name__ == "CastLayer" for layer in model.network.modules()) > 20


# ------------------------------------------------------------------------------------------ text encoders

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_text_encoders_in_half_precision_encode_nearly_the_same(pretrained, name, dtype):
    """None: CLIP in fp16 and T5 in bf16, as on a GPU."""
    exact, model = build_model(pretrained, name), build_model(pretrained, name)
    exact.keep_text_encoders()                                         # on a CPU they stay in fp32
    expected = exact.encode_prompts(CAPTIONS)
    half_precision.cast_text_encoders(model.text_encoders())
    for encoder in model.text_encoders():
        if dtype is not None:
            encoder.to(dtype)
        is_t5 = type(encoder).__name__ == "T5EncoderModel"
        assert encoder.dtype == (dtype or (torch.bfloat16 if is_t5 else torch.float16))
    model.prompt_cache.on_disk = False
    model.prompt_cache.name += "half"
    found = model.encode_prompts(CAPTIONS)
    limit = 1e-2 if dtype is None and name != "sd3" else 5e-2
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert 0 < (found[key] - value).norm() < limit * value.norm(), key


def test_where_new_captions_come_the_text_encoders_stay_in_half_precision(pretrained, monkeypatch):
    """Glyphs and streams have new captions in every batch; a folder has not."""
    cast = []
    monkeypatch.setattr(half_precision, "cast_text_encoders", cast.append)
    monkeypatch.setattr(LatentDenoiser, "keep_text_encoders", on_gpu(LatentDenoiser.keep_text_encoders))
    trainer = setup_run(pretrained, "sdxl", "diffusion", "--data", "glyphs")
    assert len(cast) == 1 and len(cast[0]) == 2
    assert trainer.model.keeps_text_encoders and not trainer.model.prompt_cache.on_disk
    setup_run(pretrained, "sdxl", "diffusion")
    assert len(cast) == 1


def on_gpu(function):
    """The function, during which the device is a GPU."""
    def wrapper(*args):
        with mock.patch.object(distributed, "get_device", lambda: torch.device("cuda")):
            return function(*args)
    return wrapper
