"""Process 0 reads the weights of a large model, the others receive them."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from test_distributed import free_port
from tiny_families import RESOLUTION

from conftest import ROOT
from utils import broadcasting, distributed

# Loads a model in each of two processes; in process 1 every way to open a file of weights is an error.
LOAD = """
import sys, torch, safetensors, safetensors.torch
from contextlib import ExitStack
from unittest.mock import patch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel
from models import loading, pipelines, prompt_cache
from utils import distributed
from utils.broadcasting import build_on_rank0
name, folder, out, resolution = sys.argv[1:]
torch.manual_seed(7)
distributed.init_distributed()
rank = distributed.get_rank()
def refuse(*args, **kwargs):
    raise AssertionError("process 1 reads weights")
with ExitStack() as patches:
    for owner, function in ((DiffusionPipeline, "from_pretrained"), (PreTrainedModel, "from_pretrained"),
                            (safetensors, "safe_open"), (safetensors.torch, "load_file")):
        if rank > 0:
            patches.enter_context(patch.object(owner, function, refuse))
    model = loading.load_model(name, "", f"{folder}/{name}", int(resolution))
    dino = loading.load_backbone(name, "", source=f"{folder}/dino")
    initial = model.initial_copy()
random = torch.rand(3)
texts = model.encode_prompts(["a red fox"])
texts |= {f"map {i}": value for i, value in enumerate(dino(torch.ones(1, 3, 56, 70))[0])}
state = {f"initial {key}": value for key, value in initial.network.state_dict().items()}
state |= {f"model {key}": value for key, value in model.state_dict().items()}
state |= {f"dino {key}": value for key, value in dino.state_dict().items()}
state |= {f"encoder {i} {key}": value for i, encoder in enumerate(model.text_encoders())
          for key, value in encoder.state_dict().items()}
state |= {f"text {key}": value for key, value in texts.items()} | {"random": random}
requires_grad = [param.requires_grad for param in model.parameters()]
torch.save([model.prompt_cache.name, requires_grad, state], f"{out}/{rank}.pt")
def fail():
    assert rank == 0
    raise OSError("the file is damaged")
try:
    build_on_rank0(fail)
except OSError as error:
    print(error)
distributed.barrier()
"""


def start(number, port, arguments, cache):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), "WORLD_SIZE": "2",
                   "RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-c", LOAD, *map(str, arguments)], cwd=ROOT, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def load_in(folder, name, pretrained):
    """-> what each of two processes has loaded, and what it has printed."""
    folder.mkdir()
    arguments, port = [name, pretrained, folder, RESOLUTION], free_port()
    processes = [start(i, port, arguments, folder) for i in range(2)]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)], printed


@pytest.mark.thorough
def test_process_1_has_the_weights_that_process_0_reads(pretrained, tmp_path):
    """Network, VAE, text encoders, tokenizers (through the encodings), DINOv2, and the random state."""
    (reader, receiver), printed = load_in(tmp_path / "pair", "sd3", pretrained)
    assert receiver[:2] == reader[:2]
    assert receiver[2].keys() == reader[2].keys()
    for key, value in receiver[2].items():
        assert value.dtype == reader[2][key].dtype
        assert torch.equal(value, reader[2][key]), key
    assert all(out == "the file is damaged\n" for out, _ in printed)   # of process 0; it reaches both


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 5, bias=False)
        self.layer.weight = self.embed.weight                          # tied
        self.frozen = nn.Parameter(torch.randn(3, 2).T, requires_grad=False)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("flag", torch.tensor(True))


def receive(module, monkeypatch):
    """The module as another process receives it, through the same functions."""
    file = io.BytesIO()
    pickler = broadcasting.StructurePickler(file)
    pickler.dump(module)
    assert len(file.getvalue()) < 10 ** 4
    file.seek(0)
    unpickler = broadcasting.StructureUnpickler(file)
    copied = unpickler.load()
    sent = []
    monkeypatch.setattr(broadcasting.dist, "broadcast", lambda flat, rank: sent.append(flat.clone()))
    broadcasting.broadcast_values(pickler.tensors)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    values = iter(sent)
    monkeypatch.setattr(broadcasting.dist, "broadcast", lambda flat, rank: flat.copy_(next(values)))
    broadcasting.broadcast_values(unpickler.tensors)
    return copied, sent


def test_an_object_arrives_with_its_types_flags_and_tied_weights(monkeypatch):
    module = Small()
    copied, sent = receive(module, monkeypatch)
    assert copied.layer.weight is copied.embed.weight
    assert sum(flat.numel() for flat in sent if flat.is_floating_point()) == 20 + 6    # tied weights once
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in module.parameters()]
    assert copied.state_dict().keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert copied.state_dict()[key].dtype == value.dtype and torch.equal(copied.state_dict()[key], value)


def test_large_tensors_travel_alone_and_small_ones_together(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 100)
    module = nn.ModuleList([nn.Linear(3, 2), nn.Linear(50, 2), nn.Linear(2, 2)])
    copied, sent = receive(copy.deepcopy(module), monkeypatch)
    assert [flat.numel() for flat in sent] == [8, 100, 8]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters()))
