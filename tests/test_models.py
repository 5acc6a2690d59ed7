"""The denoiser interface: one linear identity for every prediction type and model family. The tiny model, the
loading of pretrained networks and of their files."""

import pytest
import torch

from conftest import Toy, family_schedule
from models import loading
from models.backbones import EvalClassifier, TinyCNN, TinyViT
from models.tiny import TinyDenoiser, noise_schedule
from utils.checkpoint import save_weights

PREDICTION_TYPES = "eps", "x0", "v", "flow"
TIMESTEPS = torch.tensor([0, 1, 249, 500, 998, 999])


# ----------------------------------------------------------------------------------------------- identities

@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("family", ["sd15", "sd2-v-zero-snr", "sd3", "tiny"])
def test_to_x0_eps_inverts_training_target(prediction_type, family):
    """For every prediction type on the schedule of every family."""
    alpha, sigma = noise_schedule("flow")[:2] if family == "tiny" else family_schedule(family)[1:]
    if prediction_type == "eps" and alpha[-1] < 1e-6:
        if alpha[-1] == 0:
            with pytest.raises(ValueError, match="alpha_T > 0"):
                Toy(prediction_type, alpha, sigma)
        return
    model = Toy(prediction_type, alpha, sigma)
    x0, eps = torch.randn(2, len(TIMESTEPS), 2, 4, 4, dtype=torch.float64)
    x_t = model.add_noise(x0, TIMESTEPS, eps)
    y = model.training_target(x0, eps, TIMESTEPS)
    solved_x0, solved_eps = model.to_x0_eps(x_t, y, TIMESTEPS)
    # an x0-model's eps is undetermined where there is no noise
    determined = sigma[TIMESTEPS] > (1e-4 if prediction_type == "x0" else -1)
    torch.testing.assert_close(solved_x0, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(solved_eps[determined], eps[determined], rtol=0, atol=1e-5)


def test_perfect_networks_of_all_prediction_types_give_the_same_x0():
    alpha, sigma = family_schedule("sd15")[1:]
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([10, 500, 999])
    for prediction_type in PREDICTION_TYPES:
        model = Toy(prediction_type, alpha, sigma)
        solved_x0, _ = model.to_x0_eps(model.add_noise(x0, t, eps), model.training_target(x0, eps, t), t)
        torch.testing.assert_close(solved_x0, x0, rtol=0, atol=1e-9)


def test_flow_target_is_the_derivative_of_the_forward_process():
    """d x_sigma / d sigma, by a finite difference."""
    model = Toy("flow")
    x0, eps = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    t, t_next = torch.tensor([400]), torch.tensor([401])
    step = (model.sigma[401] - model.sigma[400]).item()
    derivative = (model.add_noise(x0, t_next, eps) - model.add_noise(x0, t, eps)) / step
    torch.testing.assert_close(derivative, model.training_target(x0, eps, t), rtol=1e-6, atol=1e-6)


def test_v_target_is_the_derivative_along_the_circle():
    """On a variance-preserving schedule v = d x / d angle, with angle = atan2(sigma, alpha)."""
    angle = torch.linspace(.1, 1.4, 2001, dtype=torch.float64)
    model = Toy("v", angle.cos(), angle.sin())
    x0, eps = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    before, t, after = (torch.tensor([i]) for i in (999, 1000, 1001))
    difference = model.add_noise(x0, after, eps) - model.add_noise(x0, before, eps)
    derivative = difference / (angle[1001] - angle[999])
    torch.testing.assert_close(derivative, model.training_target(x0, eps, t), rtol=1e-5, atol=1e-6)


def test_terminal_timestep_contains_nothing_of_x0():
    model = Toy("flow")
    eps = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    x0_a, x0_b = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([999])
    assert torch.equal(model.add_noise(x0_a, t, eps), model.add_noise(x0_b, t, eps))


def test_fractional_timesteps_interpolate_between_two_entries():
    model = Toy("flow")
    alpha, sigma = model.alpha_sigma(torch.tensor([10.25, 999.0]).double())
    torch.testing.assert_close(sigma.flatten(), torch.tensor([.01125, 1.]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close((alpha + sigma).flatten(), torch.ones(2).double(), rtol=0, atol=1e-6)


def test_guidance_is_an_extrapolation_and_scale_one_turns_it_off(toy):
    model = toy()
    x, t = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([5, 900])
    cond, uncond = model.encode_prompts(["ab", "c"]), model.encode_prompts([""])
    y_c = model.predict(x, t, cond)
    y_u = model.predict(x, t, {"scale": uncond["scale"].expand(2)})
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 1.0), y_c)
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 0.0), y_u)
    torch.testing.assert_close(model.predict(x, t, cond, uncond, 3.0), y_u + 3 * (y_c - y_u))
    with pytest.raises(ValueError, match="uncond"):
        model.predict(x, t, cond, None, 2.0)


def test_frozen_copy_keeps_its_weights_when_the_model_is_trained(toy):
    model = toy()
    x, t, cond = torch.randn(1, 2, 4, 4).double(), torch.tensor([500]), model.encode_prompts(["a"])
    frozen = model.frozen_copy()
    before = model.predict(x, t, cond)
    with torch.no_grad():
        model.network.weight.add_(1)
    assert torch.equal(frozen.predict(x, t, cond), before)
    assert not torch.equal(model.predict(x, t, cond), before)
    assert model.network.weight.requires_grad and not frozen.network.weight.requires_grad


# -------------------------------------------------------------------------------------------- the tiny model

@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_preconditioning_leaves_what_no_line_through_x_t_predicts(prediction_type):
    """For data with root mean square sigma_data, the network's input and target have unit variance, and the
    target is uncorrelated with x_t."""
    model = TinyDenoiser(["a"], prediction_type).double()
    inputs = []
    def zero_network(x, *args):
        inputs.append(x)
        return torch.zeros_like(x)
    model.network.forward = zero_network
    x0, eps = torch.randn(2, 3, 12, 160, 160, dtype=torch.float64)
    x0, t = .8 * x0, torch.tensor([99, 499, 899])
    x_t, y = model.add_noise(x0, t, eps), model.training_target(x0, eps, t)
    linear_part = model.predict(x_t, t, model.encode_prompts([""] * 3))
    network_target = (y - linear_part) / model.c_out[t].view(-1, 1, 1, 1)
    for i in range(3):
        assert abs(inputs[0][i].std() - 1) < .01
        assert abs(network_target[i].std() - 1) < .01
        assert abs((network_target[i] * x_t[i]).mean()) < .01


def test_at_pure_noise_x0_comes_from_the_network_alone():
    """A flow's linear part removes all of the noise: one-step x0 is -c_out F."""
    model = TinyDenoiser(["a"])
    torch.nn.init.normal_(model.network.conv_out.weight, std=.1)
    eps, t, cond = torch.randn(2, 12, 16, 16), torch.tensor([999, 999]), model.encode_prompts(["", ""])
    y = model.predict(eps, t, cond)
    output = model.network(eps, torch.ones(2), cond["text"], cond["mask"], cond["pooled"])
    torch.testing.assert_close(model.to_x0_eps(eps, y, t)[0], -.8 * output, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_tiny_model_runs_and_its_latents_are_exactly_invertible(prediction_type, glyphs):
    model = TinyDenoiser(glyphs.vocab, prediction_type)
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    z = model.encode(image)
    assert z.shape == (3, *model.latent_shape) == (3, 12, 16, 16)
    assert torch.equal(model.decode(z), image)
    cond = model.encode_prompts(["a red umbrella", "", "a letter g on blue"])
    y = model.predict(z, torch.tensor([0, 500, 999]), cond, model.encode_prompts([""]), 2.0)
    assert y.shape == z.shape and y.isfinite().all()


def test_a_flat_image_stays_flat():
    """All pixels share their weights: without positions and borders, a network of any weights maps a flat
    image to a flat output. Weights of their own for the sub-pixels of a latent would make a pattern."""
    model = TinyDenoiser(["a"])
    network = model.network
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
            torch.nn.init.normal_(module.weight, std=.1)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        for positions in (network.pos_embed, network.mid_pos_embed):
            positions.copy_(positions[:, :1, :1].expand_as(positions))
        network.text_to_map[2].weight.zero_()
        network.text_to_map[2].bias.fill_(.3)
    z = model.encode(torch.tensor([.2, -.5, .7]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    image = model.decode(model.predict(z, torch.tensor([300]), model.encode_prompts(["a"])))
    assert image.std((2, 3)).max() < 1e-4 * image.abs().max()
    assert image.abs().max() > .1


def test_padding_does_not_change_a_captions_embedding(base):
    """The embedding of a caption does not depend on the other captions of its batch."""
    alone = base.encode_prompts(["a snowman"])
    in_batch = base.encode_prompts(["a snowman", "a red bold serif letter g on a yellow background"])
    for key in alone:
        torch.testing.assert_close(alone[key], in_batch[key][:1], rtol=1e-4, atol=1e-5)


def test_unknown_words_and_long_captions_are_named(base):
    with pytest.raises(ValueError, match="'zebra'"):
        base.encode_prompts(["a zebra on blue"])
    with pytest.raises(ValueError, match="umbrella"):
        base.encode_prompts(["an umbrela"])
    with pytest.raises(ValueError, match="15 words"):
        base.encode_prompts(["a " * 20])


def test_only_the_network_is_trainable(base):
    assert all(p.requires_grad == name.startswith("network.") for name, p in base.named_parameters())


# ------------------------------------------------------------------------------------ pretrained networks

@pytest.mark.parametrize("network_cls", [TinyViT, TinyCNN])
def test_a_backbone_returns_the_maps_that_its_layers_name(network_cls):
    network = network_cls([3, 5])
    maps, cls_tokens = network(torch.randn(2, 3, 32, 32))
    assert len(maps) == len(cls_tokens) > max(network.layers)
    for feature_map, cls_token in zip(maps, cls_tokens):
        assert len(feature_map) == 2 and feature_map.ndim == 4
        assert cls_token is None or cls_token.shape == (2, feature_map.shape[1])


def test_a_masked_patch_does_not_reach_the_backbones_features():
    network = TinyViT([3])
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[..., 8:12, 4:8] = 9.  # patch in row 2, column 1
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 2 * 8 + 1] = True
    assert torch.equal(network(image, mask)[0][-1], network(changed, mask)[0][-1])
    assert not torch.equal(network(image)[0][-1], network(changed)[0][-1])
    assert torch.equal(network.patchify(image)[0, 2 * 8 + 1], image[0, :, 8:12, 4:8].flatten())


@pytest.mark.parametrize("dataset_name", ["glyphs", "fashion"])
def test_pretrained_measuring_networks_are_frozen(dataset_name):
    for network, network_cls in ((loading.load_backbone("tiny", dataset_name), TinyViT),
                                 (loading.load_backbone("tiny", dataset_name, "cnn"), TinyCNN),
                                 (loading.load_eval_classifier(dataset_name), EvalClassifier)):
        assert type(network) is network_cls and not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_the_random_backbone_has_the_architecture_and_not_the_weights():
    trained = loading.load_backbone("tiny", "glyphs")
    random = loading.load_backbone("tiny", "glyphs", "random")
    assert [p.shape for p in trained.parameters()] == [p.shape for p in random.parameters()]
    assert not torch.equal(trained.embed.weight, random.embed.weight)


def test_a_folder_with_a_backbone_replaces_the_projects_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="backbone.safetensors"):
        loading.load_backbone("tiny", "glyphs", source=tmp_path)
    save_weights(TinyViT([3]), tmp_path / "backbone.safetensors", attributes=[3])
    for place in ({"source": tmp_path}, {"weights_dir": tmp_path}):
        assert len(loading.load_backbone("tiny", "glyphs", **place).attribute_heads) == 1
    assert loading.weights_path("cnn", "glyphs", tmp_path) == loading.weights_path("cnn", "glyphs")
    with pytest.raises(ValueError, match="unknown backbone"):
        loading.load_backbone("tiny", "glyphs", "vgg")


def test_the_evaluation_classifier_of_other_images_is_refused(tmp_path, capsys):
    """Of a part of the glyphs it is that of all glyphs; of another folder with as many captions it is wrong,
    and a backbone of other images is named."""
    assert loading.load_eval_classifier("glyphs", fingerprint="glyphs:serif")
    classifier = loading.load_eval_classifier("fashion", fingerprint="fashion")
    for own in ({"fingerprint": "0123"}, {"data": "fashion"}):
        save_weights(classifier, tmp_path / "eval_classifier.safetensors", attributes=[10], **own)
        with pytest.raises(ValueError, match="trained on other images or captions than 'pics' has now"):
            loading.load_eval_classifier("pics", tmp_path, "4567")
    save_weights(classifier, tmp_path / "eval_classifier.safetensors", attributes=[10], fingerprint="4567")
    assert loading.load_eval_classifier("pics", tmp_path, "4567")
    save_weights(TinyViT([3]), tmp_path / "backbone.safetensors", attributes=[3], fingerprint="0123")
    loading.load_backbone("tiny", "pics", weights_dir=tmp_path, fingerprint="0123")
    loading.load_backbone("tiny", "pics", source=tmp_path, fingerprint="4567")    # chosen with --backbone
    assert not capsys.readouterr().out
    loading.load_backbone("tiny", "pics", weights_dir=tmp_path, fingerprint="4567")
    assert "backbone.safetensors was trained on other images" in capsys.readouterr().out


def test_weights_survive_saving_in_half_precision(tmp_path, base):
    base.save_pretrained(tmp_path, [(10, {"guidance_scale": 1.0})], seed=3)
    loaded = loading.load_model("tiny", "glyphs", tmp_path)
    for ours, theirs in zip(base.state_dict().values(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert loaded.metadata["sampling_configs"] == [[10, {"guidance_scale": 1.0}]]
    assert loaded.metadata["seed"] == 3 and loaded.vocab == base.vocab
    assert not list(tmp_path.glob("*.part*"))


def test_wrong_missing_and_broken_weights_are_errors(tmp_path, base):
    path = tmp_path / "denoiser.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        loading.load_model("tiny", "glyphs", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="pretrain"):
        loading.load_model("tiny", "glyphs", tmp_path)
    save_weights(base, path, vocab=base.vocab[:50], prediction_type="flow")
    with pytest.raises(ValueError, match="another network"):
        loading.load_model("tiny", "glyphs", tmp_path)
    save_weights(base, path, vocab=base.vocab)
    with pytest.raises(ValueError, match="not a tiny denoiser"):
        loading.load_model("tiny", "glyphs", tmp_path)
    with pytest.raises(ValueError, match="not a TinyViT"):
        loading.load_frozen(TinyViT, path)
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        loading.load_model("tiny", "glyphs", tmp_path)
    with pytest.raises(ValueError, match="wanted tiny"):
        loading.load_model("dalle", "glyphs")
    with pytest.raises(ValueError, match="--resolution 64"):
        loading.load_model("tiny", "glyphs", resolution=64)
