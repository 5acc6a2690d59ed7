"""The benchmark's arithmetic: operations and bytes of a layer, the calls and operations of a step."""

import re
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from tiny_families import setup_run
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_trainer
from scripts import benchmark, memory_of_large_models, network_calls

pytestmark = pytest.mark.usefixtures("cache_home")


def test_a_matrix_product_has_the_operations_and_bytes_of_the_textbook():
    """2 N K M operations forward, and as many backward for each of its two gradients."""
    with torch.device("meta"):
        layer, x = torch.nn.Linear(256, 512, bias=False), torch.empty(8, 256)
        gib, forward, backward = memory_of_large_models.measure_call(lambda: layer(x), layer.parameters())
    assert forward == backward == pytest.approx(2 * 8 * 256 * 512 / 1e12)
    assert 0 < gib * 2 ** 30 - 256 * 512 * 4 < 4 * 8 * 512 * 4         # the gradient, and not the weight


@pytest.mark.parametrize("method", ["diffusion", "adt", "add"])
def test_the_benchmark_counts_every_call_of_a_step(pretrained, method):
    """Also the teacher's, if there is one: it shares the VAE. A missed call would count as overhead."""
    trainer = setup_run(pretrained, "sd15", method)
    trainer.train_step()
    parts = {"network": trainer.model.network, "VAE decoder": trainer.model.vae.decoder,
             "VAE encoder": trainer.model.vae.encoder}
    if trainer.teacher:
        parts["teacher"] = trainer.teacher.network
    num_images = dict.fromkeys(parts, 0)

    def count_images(name):
        def hook(module, inputs):
            num_images[name] += len(inputs[0])
        return hook

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(count_images(name)).remove)
        call_counts = network_calls.CallRecorder(trainer).call_counts
    for name, expected in num_images.items():
        found = sum(size * times for (part, size, _), times in call_counts.items() if part == name)
        assert found == expected, name


def test_the_operations_of_a_step_are_those_of_its_calls(base):
    """A step with the diffusion loss is one call of the network and its backward pass, which takes twice as
    many operations, less the gradients of the first layer's and of the caption's inputs."""
    trainer = make_trainer("--method", "diffusion")
    batch = trainer.dataset.sample_batch(2, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        cond = trainer.model.encode_prompts(batch.caption)
        text_flops = forward.get_total_flops()
        trainer.model.forward_network(torch.randn(2, 12, 16, 16), torch.rand(2), cond)
    network_flops = forward.get_total_flops() - text_flops
    flops = benchmark.count_flops(trainer)
    assert .97 * 3 * network_flops < flops - text_flops < 3 * network_flops


def test_the_operations_of_r1_are_counted():
    """It differentiates the heads inside the forward pass (autograd.grad)."""
    with_r1, without = (benchmark.count_flops(make_trainer("--method", "add", "--set", f"r1_gamma={gamma}"))
                        for gamma in (1e-5, 0))
    assert 0 < without < with_r1


@pytest.mark.thorough
def test_a_team_takes_the_steps_of_a_run_together(tmp_path):
    """Two processes share a batch of two; what they report is summed."""
    team = benchmark.Team(2, "diffusion", "--set", "batch_size=2")
    try:
        assert team.run("step") == 0
        assert team.run("memory") > 400                                # MiB; torch alone has 200 in each
    finally:
        team.close()
    assert not any(worker.is_alive() for worker in team.workers)


def test_the_rate_of_the_machine_is_that_of_a_product_with_all_cores(monkeypatch):
    threads = []
    monkeypatch.setattr(benchmark, "GEMM_SIZE", 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(benchmark.launch, "usable_cores", lambda: 5)
    benchmark.gemm_job("fp32")()
    assert threads == [5, 1]


def test_memory_and_time_of_a_long_run_are_reported_at_its_start_middle_and_end(monkeypatch):
    monkeypatch.setattr(benchmark, "LONG_WINDOW", 1)
    columns, rows = benchmark.long_run(SimpleNamespace(long_steps=4))
    assert columns == ["method", "step 1", "step 2", "step 4"]
    assert [row[0] for row in rows] == ["adt", "add"]
    assert all(re.fullmatch(r"\d+ ms, \d+ MiB", cell) for row in rows for cell in row[1:])
