"""Which layers get adapters, and that plain diffusers loads all of them."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_families import (
    CAPTIONS,
    FAMILIES,
    RESOLUTION,
    build_model,
    setup_run,
    train_args,
    trainable,
    write_run_config,
)

import train
from models import loading, stable_diffusion

pytestmark = pytest.mark.usefixtures("cache_home")


def adapted_layers(model):
    """Names of the layers with adapters, as the network without adapters has them."""
    return {name.removesuffix(".lora_A.default") for name, _ in model.network.named_modules()
            if name.endswith(".lora_A.default")}


def build_adapted(pretrained, name, targets):
    model = loading.load_model(name, "", pretrained / name, RESOLUTION)
    model.add_lora(2, targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in trainable(model):
            param.normal_(0, .1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_all_is_every_matrix_and_kernel_inside_of_the_blocks(pretrained, name):
    plain = build_model(pretrained, name)
    attention, adapted = (adapted_layers(build_adapted(pretrained, name, targets))
                          for targets in ("attention", "all"))
    inside = {layer_name for layer_name, layer in plain.network.named_modules()
              if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and "block" in layer_name}
    assert adapted == inside
    assert attention < adapted
    assert all("attn" in layer_name for layer_name in attention)


@pytest.mark.parametrize("targets", stable_diffusion.LORA_TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_loads_every_adapter(pretrained, tmp_path, name, targets):
    model = build_adapted(pretrained, name, targets)
    model.save_pretrained(tmp_path, [(4, {})])
    pipe = DiffusionPipeline.from_pretrained(pretrained / name)
    pipe.load_lora_weights(tmp_path)
    x, t, cond = torch.randn(2, *model.latent_shape), torch.tensor([900, 30]), model.encode_prompts(CAPTIONS)
    with torch.no_grad():
        expected, base = model.predict(x, t, cond), model.frozen_copy().predict(x, t, cond)
        model.network = getattr(pipe, model.component_name)
        torch.testing.assert_close(model.predict(x, t, cond), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_the_adapters_of_a_run_are_trained_on_where_they_are(pretrained, tmp_path):
    build_adapted(pretrained, "sd15", "all").save_pretrained(tmp_path, [(4, {})])
    write_run_config(tmp_path, "sd15", pretrained / "sd15", lora_rank=2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_targets": "all"}))
    lora = ["--lora-rank", "2"]
    trainer = setup_run(pretrained, "sd15", "adt", "--pretrained", str(tmp_path), *lora)
    assert trainer.model.lora_targets == "all"
    assert "down_blocks.0.resnets.0.conv1" in adapted_layers(trainer.model)
    with pytest.raises(ValueError, match="the run that --pretrained names has adapters on all"):
        setup_run(pretrained, "sd15", "adt", "--pretrained", str(tmp_path), *lora, "--lora-targets",
                  "attention")


@pytest.mark.parametrize("method,targets", [("adt", "attention"), ("add", "all"), ("diffusion", "attention")])
def test_a_method_has_its_own_default(pretrained, method, targets):
    lora = ["--lora-rank", "2"]
    assert setup_run(pretrained, "sd15", method, *lora).model.lora_targets == targets
    other = {"attention": "all", "all": "attention"}[targets]
    trainer = setup_run(pretrained, "sd15", method, *lora, "--lora-targets", other)
    assert trainer.model.lora_targets == other


def test_nfsd_in_pixels_is_refused_for_large_models(pretrained, tmp_path, capsys):
    args = train_args(pretrained, "sd15", "--method", "add", "--set", "distill_weighting=nfsd",
                      "--output-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 2
    assert "distill_space=latent" in capsys.readouterr().err
    logs = setup_run(pretrained, "sd15", "add", "--set", "distill_weighting=nfsd", "--set",
                     "distill_space=latent").train_step()
    assert all(value == value for value in logs.values())
