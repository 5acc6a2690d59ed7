"""Training steps, sampling and measuring on a pretended GPU: no tensor is forgotten on the CPU."""

from functools import partial

import pytest
import torch
from pretended_gpu import DEVICE, GpuTensor, pretended_gpu
from tiny_families import setup_run

import evaluate
from conftest import make_trainer
from models.loading import load_model
from scripts.panel import PanelEvaluator
from utils import distributed, panel

# The second derivative of group norm changes shapes in place, which GpuTensor cannot follow: no R1.
SETTINGS = {"adt": ["--set", "whiten_features=true"], "add": ["--set", "r1_gamma=0"]}


def check_run(build_trainer, *args):
    with pretended_gpu():
        trainer = build_trainer(*args, "--precision", "fp32", "--processes", "1")
        params = [*trainer.g_params, *trainer.d_params]
        before = [param.values.clone() for param in params]
        for _ in range(2):
            logs = trainer.train_step()
        assert all(isinstance(param, GpuTensor) and param.device == DEVICE for param in params)
        assert all(torch.isfinite(torch.tensor(value)) for value in logs.values())
        assert any((param.values != old).any() for param, old in zip(params, before))
        with trainer.ema_weights() as model:
            images = evaluate.sample(model, trainer.dataset.all_captions[:2], 2)
    assert images.shape[:2] == (2, 3) and images.isfinite().all()


def test_operations_on_two_devices_are_refused():
    with pretended_gpu():
        x = torch.ones(2, 3).to(DEVICE)
        assert (x + x).sum().item() == 12 and (x * 2).device == DEVICE
        for mix in (lambda: x + torch.zeros(2, 3), lambda: torch.cat([x, torch.zeros(2, 3)]),
                    lambda: torch.randn(2, device=DEVICE, generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="on the (GPU|CPU)"):
                mix()


@pytest.mark.thorough
@pytest.mark.parametrize("method", SETTINGS)
def test_the_tiny_model_trains_and_samples_on_one_device(method):
    check_run(make_trainer, "--method", method, *SETTINGS[method])


@pytest.mark.thorough
@pytest.mark.parametrize("name, method, trained", [("sd15", "adt", ["--lora-rank", "2"]), ("sdxl", "add", []),
                                                   ("sd3", "adt", ["--lora-rank", "2"])])
def test_a_large_model_trains_and_samples_on_one_device(pretrained, cache_home, name, method, trained):
    check_run(setup_run, pretrained, name, method, *SETTINGS[method], *trained)


@pytest.mark.thorough
def test_a_model_is_measured_on_one_device(glyphs, monkeypatch):
    monkeypatch.setattr(panel, "two_sample_auc", partial(panel.two_sample_auc, num_steps=3))
    monkeypatch.setattr("scripts.panel.NUM_TRAIN_IMAGES", (2000, 2000))
    monkeypatch.setattr("scripts.panel.NUM_TEST_IMAGES", 2000)

    def measure():
        model = load_model("tiny", "glyphs").to(distributed.get_device())
        model.precision = "fp32"
        return PanelEvaluator(glyphs, 200).measure(model, 1, 0, {})

    expected = measure()
    with pretended_gpu():
        assert measure() == pytest.approx(expected, rel=1e-3, abs=1e-4)
