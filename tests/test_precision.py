"""Precision of a run: what the hardware can do, and the loss scale of fp16."""

from types import SimpleNamespace

import pytest
import torch
from test_settings import LossyToy, RandomImages, toy_trainer

import adt
import train
from conftest import make_trainer
from utils import precision
from utils.training_state import lr_factor, make_optimizer


def trainer_of(name):
    config = adt.Config(batch_size=4, num_inference_steps=4, warmup_steps_d=0)
    trainer = toy_trainer("adt", config)
    torch.manual_seed(0)
    model = LossyToy()
    model.precision = name
    return train.Trainer(model, None, trainer.disc, adt, config, RandomImages(), 8)


def test_fp16_has_the_gradients_of_fp32():
    """Gradients are divided by the loss scale before they are measured and clipped."""
    exact, half = trainer_of("fp32"), trainer_of("fp16")
    half.scaler_g, half.scaler_d = (torch.amp.GradScaler("cpu", init_scale=2. ** 6) for _ in range(2))
    exact_logs, half_logs = exact.train_step(), half.train_step()
    for name in ("grad_norm", "grad_norm_d", "grad_norm/diffusion", "grad_norm/adv", "loss_diffusion"):
        assert half_logs[name] == pytest.approx(exact_logs[name], rel=.05)
    for a, b in zip(exact.g_params + exact.d_params, half.g_params + half.d_params):
        assert (b.grad - a.grad).norm() <= .05 * a.grad.norm() + 1e-6


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_the_scale_falls():
    trainer = trainer_of("fp16")
    trainer.scaler_g = torch.amp.GradScaler("cpu", init_scale=2. ** 60)
    before = [param.clone() for param in trainer.g_params]
    trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.g_params))
    assert trainer.scaler_g.get_scale() == 2. ** 59
    assert trainer.num_skipped == 0
    trainer.scaler_g = torch.amp.GradScaler("cpu", init_scale=2. ** 10)
    trainer.train_step()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.g_params))


def test_a_gradient_that_overflows_at_every_scale_stops_the_run(monkeypatch):
    trainer = trainer_of("fp16")
    monkeypatch.setattr(train, "clip_grad_norm", lambda *_: float("inf"))
    trainer.scaler_g = torch.amp.GradScaler("cpu", init_scale=precision.MIN_LOSS_SCALE)
    with pytest.raises(ArithmeticError, match="grad_norm is inf"):
        trainer.train_step()


def test_the_loss_scale_survives_a_resume():
    first, second = trainer_of("fp16"), trainer_of("fp16")
    first.scaler_g = torch.amp.GradScaler("cpu", init_scale=2. ** 60)
    first.train_step()
    second.load_state_dict(first.state_dict())
    assert second.scaler_g.get_scale() == first.scaler_g.get_scale() == 2. ** 59
    assert second.scaler_d.get_scale() == first.scaler_d.get_scale()


def test_without_fp16_there_is_no_scale():
    trainer = trainer_of("fp32")
    assert trainer.scaler_g.get_scale() == trainer.scaler_d.get_scale() == 1
    assert trainer.scaler_g.state_dict() == {}


@pytest.mark.parametrize("device,bf16,expected", [("cpu", True, "bf16"), ("cpu", False, "fp32"),
                                                  ("cuda", True, "bf16"), ("cuda", False, "fp16")])
def test_the_default_precision_is_what_the_device_computes_itself(device, bf16, expected, monkeypatch):
    monkeypatch.setattr(precision, "get_device", lambda: SimpleNamespace(type=device))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert precision.default_precision() == expected


@pytest.mark.parametrize("name,dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                        ("fp32", torch.float32)])
def test_network_calls_have_the_precision_of_the_run(name, dtype):
    trainer = make_trainer("--precision", name)
    layer = trainer.model.network.conv_in
    with trainer.model.autocast():
        assert layer(torch.zeros(1, layer.in_channels, 16, 16)).dtype == dtype


def test_sharding_wants_a_precision_without_a_loss_scale():
    with pytest.raises(ValueError, match="--precision bf16 or fp32"):
        precision.check_precision("fp16", is_sharded=True)
    precision.check_precision("fp16", is_sharded=False)


# ------------------------------------------------------------------------------------ rates and optimisers

def test_schedules_of_the_learning_rate():
    factors = {name: [lr_factor(name, step, 100) for step in range(100)]
               for name in ("constant", "linear", "cosine")}
    assert set(factors["constant"]) == {1.}
    assert factors["linear"] == [1 - step / 100 for step in range(100)]
    assert factors["cosine"][0] == 1
    assert factors["cosine"][50] == pytest.approx(.5)
    for name in ("linear", "cosine"):
        assert all(a > b for a, b in zip(factors[name], factors[name][1:]))
        assert factors[name][-1] < .02
    warm = [lr_factor("constant", step, 100, warmup_steps=4) for step in range(6)]
    assert warm == pytest.approx([.2, .4, .6, .8, 1, 1])
    late = [lr_factor("constant", step, 100, 4, num_updates=step - 10) for step in (5, 10, 11, 20)]
    assert late == pytest.approx([.2, .2, .4, 1])


def test_8_bit_adam_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_optimizer("adamw8bit", [torch.nn.Parameter(torch.zeros(2))], 1e-3, (.9, .99))


class Adam8BitDouble(torch.optim.SGD):
    """Has the nested state of bitsandbytes' optimisers and trains by plain gradient descent."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, lr)

    def step(self):
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                row = self.state[param]
                row["step"] = row.get("step", 0) + 1
                row["state1"] = param.detach().mul(100).to(torch.uint8)

    def state_dict(self):
        state = super().state_dict()
        state["state"] = {i: {"step": row["step"], "quantised": {"state1": row["state1"]}}
                          for i, row in state["state"].items()}
        return state

    def load_state_dict(self, state):
        rows = {i: {"step": row["step"], **row["quantised"]} for i, row in state["state"].items()}
        super().load_state_dict({**state, "state": rows})


def test_a_run_with_8_bit_adam_resumes(monkeypatch, tmp_path):
    double = SimpleNamespace(AdamW8bit=Adam8BitDouble)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", SimpleNamespace(optim=double))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", double)
    config = adt.Config(batch_size=4, num_inference_steps=4, warmup_steps_d=0, optimizer="adamw8bit")
    first, second = (toy_trainer("adt", config) for _ in range(2))
    first.model.precision = second.model.precision = "fp32"
    assert isinstance(first.opt_g, Adam8BitDouble)
    assert isinstance(first.opt_d, torch.optim.AdamW)
    first.train_step()
    second.load_state_dict(first.state_dict())
    assert all(row["step"] == 1 for row in second.opt_g.state.values())
    assert first.train_step() == second.train_step()
    assert all(torch.equal(a, b) for a, b in zip(first.g_params, second.g_params))
