"""The arithmetic behind models/estimates.json: adapters, calls in fp32 and what these copy."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from tiny_families import build_model
from torch.utils.flop_counter import FlopCounterMode

import train
from conftest import Toy, family_schedule
from models.denoiser import MAX_AMPLIFICATION
from models.half_precision import accept_fp32_inputs
from models.preflight import ESTIMATES, expected_gib
from models.stable_diffusion import LatentDenoiser
from scripts import full_size_networks
from scripts import memory_of_large_models as memory
from utils import config as settings
from utils.plotting import markdown_table

GIB = 2 ** 30
ROOT = Path(__file__).parent.parent


def test_the_shares_of_calls_in_fp32_are_those_of_the_denoiser():
    """A batch is computed in fp32 if one of its timesteps is amplified: 2 of 4 of the student's are."""
    config = settings.build_config(train.METHODS["add"], [], "sd15", True)
    model = Toy(*family_schedule("sd15"))
    amplified = (model.amplification(torch.arange(1000)) > MAX_AMPLIFICATION).double()
    assert amplified[config.timesteps(1000)].tolist() == [1, 1, 0, 0]
    student, teacher = memory.fp32_shares(config)
    assert student == pytest.approx(1 - .5 ** config.batch_size)
    assert teacher == pytest.approx(1 - (1 - amplified.mean().item()) ** config.batch_size, rel=1e-3)
    config = settings.build_config(train.METHODS["add"], ["student_steps=1"], "sd15", True)
    assert memory.fp32_shares(config)[0] == 1


def test_operations_are_those_that_pytorch_counts():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        y = network(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    backward = counter.get_total_flops() - forward
    _, *tflop = memory.measure_call(lambda: network(x), network.parameters())
    assert forward > 0 and tflop == [forward / 1e12, backward / 1e12]


@pytest.mark.parametrize("is_fp32", [False, True])
def test_a_call_in_fp32_keeps_copies_of_weights_in_half_precision(is_fp32):
    """Three frozen layers: their copies belong to the call, not to each of its images."""
    with torch.device("meta"), memory.cuda_autocast():
        dtype = torch.float16 if is_fp32 else torch.bfloat16
        network = nn.Sequential(*(nn.Linear(256, 256, dtype=dtype) for _ in range(3))).requires_grad_(False)
        if is_fp32:
            accept_fp32_inputs(network, None)
        costs = memory.measure_network(lambda n: network(torch.randn(n, 256).requires_grad_()),
                                       network.parameters(), is_fp32)
    copies = 3 * 4 * 256 * 256 / GIB
    if not is_fp32:
        assert costs["network copies"] == 0 and costs["network"][0] < .1 * copies
    else:
        assert costs["network copies"] == pytest.approx(copies, rel=.05)
        assert 0 < costs["network"][0] < .1 * copies


def test_calls_in_fp32_take_twice_the_time():
    costs = {"network": (1., 10., 20.), "network graph": .1, "network copies": 3., "encode": (0., 1., 0.),
             "decode": (0., 0., 0.), "backbone": (0., 0., 0.)}
    config = settings.build_config(train.METHODS["add"], [], "sd15", True)
    plain_gib, plain = memory.step_cost("add", config, costs, False, False)
    _, mixed = memory.step_cost("add", config, costs, False, True)
    student, teacher = memory.fp32_shares(config)
    assert plain == 1 + 30 + 10
    assert mixed == pytest.approx(1 + 30 * (1 + student) + 10 * (1 + teacher))
    assert plain_gib(5) == 3 + 5


def num_adapter_weights(targets):
    with torch.device("meta"):
        network = full_size_networks.full_size_network("sd15")
        before = sum(param.numel() for param in network.parameters())
        model = type("", (), {"lora_rank": 0, "network": network})()
        LatentDenoiser.add_lora(model, 64, targets)
    return sum(param.numel() for param in network.parameters()) - before


def test_adapters_of_all_layers_are_in_the_estimate():
    """22 bytes for each of their weights; the decoder is in ADD's estimate alone."""
    estimates = json.loads(ESTIMATES.read_text())
    with torch.device("meta"), memory.cuda_autocast():
        decoder_gib = memory.measure_frozen_models(4, 512)[1]["decode"][0]
    more = num_adapter_weights("all") - num_adapter_weights("attention")
    fixed = [estimates[f"{method} sd15 lora checkpointing"]["fixed_gib"] for method in ("diffusion", "add")]
    assert more > 3e7 and fixed[1] - fixed[0] > decoder_gib + 22 * more / GIB


@pytest.mark.parametrize("method,targets", [("adt", "attention"), ("add", "all")])
def test_more_ranks_take_the_memory_of_their_weights(method, targets):
    estimate = json.loads(ESTIMATES.read_text())[f"{method} sd15 lora"]
    lower, higher = (expected_gib(estimate, SimpleNamespace(batch_size=1), 512,
                                  {"lora_rank": rank, "fsdp": False})
                     for rank in (64, 128))
    assert higher - lower == pytest.approx(num_adapter_weights(targets) * 22 / GIB, rel=.01)


def test_a_teacher_of_its_own_takes_two_bytes_a_weight(pretrained):
    """As prepare_networks makes it on a GPU. More layers of a tiny network stay fp32."""
    teacher = build_model(pretrained, "sd15").frozen_copy()
    teacher.cast_frozen(torch.bfloat16, torch.float16)
    params = list(teacher.network.parameters())
    num_params, num_bytes = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    more = memory.fixed_bytes("add", 0, num_params, 0, 0) - memory.fixed_bytes("adt", 0, num_params, 0, 0)
    assert more == pytest.approx(num_bytes, rel=.1)


@pytest.mark.thorough
def test_the_estimates_are_current():
    """Of one model; the others take minutes."""
    estimates = json.loads(ESTIMATES.read_text())
    for key, entry in memory.estimate_model("sd15", "lora").items():
        assert estimates[key] == entry, "run python -m scripts.memory_of_large_models"


def test_documents_have_the_numbers_of_the_estimates():
    estimates = json.loads(ESTIMATES.read_text())
    table = markdown_table(*memory.estimates_table(estimates))
    assert table.strip() in (ROOT / "docs" / "stable_diffusion.md").read_text()
    computed, measured = {}, {}
    for method, model in itertools.product(("adt", "add"), ("sd15", "sdxl", "sd3")):
        entry = estimates[f"{method} {model} lora checkpointing"]
        gib = entry["fixed_gib"] + entry["batch_size"] * entry["activations_gib"]
        computed[method, model] = round(gib)
        row = re.search(rf"\| {method}, {model} \|  \| \d+ \| {entry['batch_size']} \| ([\d.]+) \|",
                        (ROOT / "docs" / "gpu.md").read_text())
        if row:
            measured[method, model] = float(row[1])
            assert abs(measured[method, model] / gib - 1) < .2
    sentence = (f"GPU memory with LoRA, measured: ADT {measured['adt', 'sd15']} GiB on SD 1.5 and "
                f"{measured['adt', 'sd3']:.0f} on SD 3, ADD {measured['add', 'sd15']:.0f} on SD 1.5; "
                f"by arithmetic: ADT {computed['adt', 'sdxl']} on SDXL, "
                f"ADD {computed['add', 'sdxl']} on SDXL and {computed['add', 'sd3']} on SD 3.")
    assert sentence in " ".join((ROOT / "README.md").read_text().split())
