"""Every setting of ADT and ADD has an effect: for each there is a test that fails if no code reads it.

Three training steps of a toy model are repeated with one setting changed. Losses, gradients, weights, EMA and
the number of network calls must then differ. That the effect is the right one is tested elsewhere."""

from dataclasses import fields, replace

import pytest
import torch

import add
import adt
import data
import train
from conftest import RandomConv, Toy, make_trainer
from discriminator import FrozenBackbone
from models.backbones import TinyCNN
from utils import config as settings

METHODS = {"adt": adt, "add": add}

# a setting -> a value that differs from its default
SHARED = {"batch_size": 5, "gradient_accumulation_steps": 2, "lr": 1e-3, "lr_d": 1e-2, "beta1": .5,
          "beta1_d": .5, "beta2": .9, "beta2_d": .9, "weight_decay": .1, "max_grad_norm": .01,
          "max_grad_norm_d": .01, "n_critic": 2, "ema_decay": .05,
          "augment_strength": .5, "instance_noise": .2, "warmup_steps_d": 1, "lr_schedule": "cosine",
          "lr_warmup_steps": 2}
CHANGES = {
    "adt": {**SHARED, "discriminator": "relativistic", "lambda_adv": 1., "rollout_start": "noise",
            "num_inference_steps": 5, "num_grad_steps": 3, "grad_step_selection": "last",
            "guidance_scale": 3., "input_grad_scale": .5, "checkpoint_rollout": True,
            "real_images": "vae_reconstruction", "lambda_diff": .5, "caption_dropout": .9,
            "timestep_sampling": "logit_normal"},
    "add": {**SHARED, "lambda_distill": 1., "lambda_adv": .5, "student_steps": 2, "r1_gamma": 1.,
            "relativistic": True, "t_max": 1., "pure_noise_prob": .1, "backward_simulation_prob": 1.,
            "distill_weighting": "sds", "distill_loss": "l1", "distill_space": "latent", "teacher_steps": 2,
            "teacher_guidance_scale": 3., "disc_conditioning": "text"}}
# settings in which the change is made, where they are not the defaults
CONTEXT = {"adt": dict(batch_size=4, num_inference_steps=4, warmup_steps_d=0),
           "add": dict(batch_size=8, warmup_steps_d=0)}
# each has a test of its own
READ_ELSEWHERE = {"adt": {"init", "backbone", "whiten_features", "optimizer"}}
READ_ELSEWHERE["add"] = READ_ELSEWHERE["adt"]


class LossyToy(Toy):
    """A toy model of images in float32. Its decoder does not invert its encoder exactly."""

    resolution = 32

    def __init__(self):
        super().__init__(channels=3)
        self.float()

    def decode(self, z):
        return .9 * z


class RandomImages:
    """A dataset of random images whose captions have zero to four letters."""

    name = fingerprint = "random"

    def sample_batch(self, n, generator):
        image = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
        lengths = torch.randint(5, (n,), generator=generator)
        return data.Batch(image, ["a" * length for length in lengths], None, None)


def toy_trainer(method, config, total_steps=8):
    torch.manual_seed(0)
    model = LossyToy()
    disc = config.build_discriminator(FrozenBackbone(RandomConv()), 1)
    return train.Trainer(model, model.frozen_copy(), disc, METHODS[method], config, RandomImages(),
                         total_steps)


def three_steps(method, config):
    """Train a toy model for three steps -> (logs of each step, tensors, number of network calls)."""
    trainer = toy_trainer(method, config)
    logs = [trainer.train_step() for _ in range(3)]
    params = trainer.g_params + trainer.d_params
    tensors = [*params, *(param.grad for param in params), *trainer.ema_params]
    return logs, torch.cat([tensor.detach().flatten() for tensor in tensors]), len(trainer.model.calls)


@pytest.fixture(scope="module")
def reference():
    """method, settings -> the result of three_steps, computed once for each."""
    results = {}

    def get(method, **values):
        key = method, *values.items()
        if key not in results:
            results[key] = three_steps(method, METHODS[method].Config(**values))
        return results[key]

    return get


def is_equal(result, other):
    logs, tensors, num_calls = result
    other_logs, other_tensors, other_num_calls = other
    return logs == other_logs and torch.equal(tensors, other_tensors) and num_calls == other_num_calls


@pytest.mark.parametrize("method", METHODS)
def test_equal_settings_give_equal_results(method, reference):
    config = METHODS[method].Config(**CONTEXT[method])
    assert is_equal(three_steps(method, config), reference(method, **CONTEXT[method]))


@pytest.mark.parametrize("method", METHODS)
def test_no_setting_is_left_out_below(method):
    names = {field.name for field in fields(METHODS[method].Config)}
    assert CHANGES[method].keys() | READ_ELSEWHERE[method] == names


@pytest.mark.parametrize("method,name", [(method, name) for method in METHODS for name in CHANGES[method]])
def test_a_changed_setting_changes_the_training(method, name, reference):
    context = CONTEXT[method]
    config = METHODS[method].Config(**context)
    changed = replace(config, **{name: CHANGES[method][name]})
    assert getattr(config, name) != getattr(changed, name)
    assert not is_equal(three_steps(method, changed), reference(method, **context))


@pytest.mark.parametrize("method", METHODS)
def test_setup_reads_the_initialisation_and_the_backbone(method, base):
    default = make_trainer("--method", method, "--set", "whiten_features=true")
    assert all(torch.equal(a, b) for a, b in zip(default.g_params, base.network.parameters()))
    assert not isinstance(default.disc.backbone.network, TinyCNN)
    assert not torch.equal(default.disc.backbone.feat_whiten0, torch.eye(32))
    changed = make_trainer("--method", method, "--set", "init=random", "--set", "backbone=cnn",
                           "--set", "whiten_features=false")
    weights = [(a, b) for a, b in zip(changed.g_params, base.network.parameters()) if a.dim() > 1]
    assert not any(torch.equal(a, b) for a, b in weights)
    assert isinstance(changed.disc.backbone.network, TinyCNN)
    assert torch.equal(changed.disc.backbone.feat_whiten0, torch.eye(32))


@pytest.mark.parametrize("method,name,value",
                         [("adt", "num_inference_steps", 7), ("adt", "guidance_scale", 3.),
                          ("add", "student_steps", 8), ("add", "t_max", .95)])
def test_settings_of_the_path_are_those_of_the_evaluation(method, name, value):
    default, changed = (METHODS[method].Config(**values) for values in ({}, {name: value}))
    assert default.eval_sampling_configs() != changed.eval_sampling_configs()


@pytest.mark.parametrize("method", METHODS)
def test_without_adversarial_loss_there_is_no_warmup_of_the_discriminator(method):
    for lambda_adv, warmup in ((1., 60), (0., 0)):
        config = METHODS[method].Config(lambda_adv=lambda_adv, warmup_steps_d=60)
        assert toy_trainer(method, config, total_steps=400).warmup_steps_d == warmup


@pytest.mark.parametrize("model", ["tiny", "sd3"])
@pytest.mark.parametrize("method", METHODS)
def test_the_help_on_settings_is_a_table_with_values_that_set_reads(method, model):
    """Name, value, source and meaning each begin at the same column in every row; the value in the table is
    what --set takes; the words of the meaning are all there."""
    text = settings.settings_help(train.METHODS[method], model)
    lines = text.splitlines()
    header = next(line for line in lines if line.split() == ["name", "value", "source", "meaning"])
    starts = [header.index(word) for word in header.split()]
    assert max(len(line) for line in lines) <= 110
    config = settings.build_config(train.METHODS[method], [], model)
    for field in fields(config):
        i = next(i for i, line in enumerate(lines) if line.startswith(f"  {field.name} "))
        value = lines[i][starts[1]:starts[2]].strip()
        if len(str(getattr(config, field.name))) > starts[2] - starts[1]:
            value, i = lines[i][starts[1]:], i + 1                     # a long value has its own line
        rebuilt = settings.build_config(train.METHODS[method], [f"{field.name}={value}"], model)
        assert rebuilt == config
        assert lines[i][starts[2]:starts[3]].strip() in ("paper", "secondary", "ours")
        assert lines[i][starts[3] - 1] == " " != lines[i][starts[3]]
