"""Training steps and sampling on a pretended GPU: no tensor is forgotten on the CPU."""

import pytest
import torch
from pretended_gpu import DEVICE, GpuTensor, pretended_gpu
from tiny_families import train_args

import evaluate
from conftest import make_trainer

PATH_OF_TWO = ["--set", "num_inference_steps=2", "--set", "num_grad_steps=1"]
# The second derivative of group norm changes shapes in place, which GpuTensor cannot follow: no R1.
METHODS = {"adt": [*PATH_OF_TWO, "--set", "whiten_features=true"], "add": ["--set", "r1_gamma=0"]}


def check_run(monkeypatch, args):
    with pretended_gpu(monkeypatch):
        trainer = make_trainer("--precision", "fp32", "--processes", "1", *args)
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


def test_operations_on_two_devices_are_refused(monkeypatch):
    with pretended_gpu(monkeypatch):
        x = torch.ones(2, 3).to(DEVICE)
        assert (x + x).sum().item() == 12 and (x * 2).device == DEVICE
        for mix in (lambda: x + torch.zeros(2, 3), lambda: torch.cat([x, torch.zeros(2, 3)]),
                    lambda: torch.randn(2, device=DEVICE, generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="on the (GPU|CPU)"):
                mix()


@pytest.mark.parametrize("method", METHODS)
def test_the_tiny_model_trains_and_samples_on_one_device(monkeypatch, method):
    check_run(monkeypatch, ["--method", method, *METHODS[method]])


@pytest.mark.parametrize("name, method, trained", [("sd15", "adt", ["--lora-rank", "2"]), ("sdxl", "add", []),
                                                   ("sd3", "adt", ["--lora-rank", "2"])])
def test_a_large_model_trains_and_samples_on_one_device(monkeypatch, pretrained, cache_home, name, method,
                                                        trained):
    check_run(monkeypatch, ["--method", method, *METHODS[method], *train_args(pretrained, name, *trained)])
