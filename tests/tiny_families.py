"""What tests of the large models share: tiny pipelines of the real classes, a folder of images, short runs.
Their fixtures, `pretrained` and `cache_home`, are in conftest.py."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from models import loading
from scripts import tiny_pipelines
from utils import distributed

FAMILIES = "sd15", "sdxl", "sd3"
RESOLUTION = tiny_pipelines.RESOLUTION
CAPTIONS = ["a red fox", "two blue boats"]


def make_images(folder, n=3):
    """A folder of n captioned images -> folder."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        Image.new("RGB", (40 + i % 9, 60), (80 * i % 256, 10, 200)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def make_pretrained(folder):
    """sd15, sdxl, sd3, dino and images in a folder -> folder."""
    for name in FAMILIES:
        tiny_pipelines.make_pipeline(name, folder)
    tiny_pipelines.make_dino(folder / "dino")
    make_images(folder / "images")
    return folder


def build_model(pretrained, name, rank=0):
    """A model of the family; with a rank its LoRA adapters are random, so that they change the output."""
    model = loading.load_model(name, "", pretrained / name, RESOLUTION)
    if rank:
        torch.manual_seed(1)
        model.add_lora(rank)
        with torch.no_grad():
            for param in trainable(model):
                param.normal_(0, .1)
    return model


def trainable(model):
    return [param for param in model.network.parameters() if param.requires_grad]


def train_args(pretrained, name, *args):
    """Arguments of train.py for a run on the tiny pipeline: all weights, no gradient checkpointing unless
    args say otherwise."""
    if "--lora-rank" not in args:
        args = ["--full", *args]
    if "--gradient-checkpointing" not in args:
        args = ["--no-gradient-checkpointing", *args]
    return ["--model", name, "--pretrained", str(pretrained / name), "--backbone", str(pretrained / "dino"),
            "--data", str(pretrained / "images"), "--resolution", str(RESOLUTION), "--eval-samples", "0",
            "--set", "batch_size=2", "--set", "gradient_accumulation_steps=1", *args]


def assert_refused(pretrained, capsys, args, message):
    """train.py ends with this message and exit code 2. With --model, args are added to those of a run on the
    tiny pipeline of sd15."""
    if "--model" in args:
        args = [*train_args(pretrained, "sd15"), *args]
    with pytest.raises(SystemExit) as ended:
        train.main(args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def setup_run(pretrained, name, method, *args):
    """The Trainer of a short run; nothing is written."""
    short = [] if method == "add" else ["--set", "num_inference_steps=3", "--set", "num_grad_steps=2"]
    args = train_args(pretrained, name, "--method", method, "--steps", "4", "--set", "warmup_steps_d=0",
                      *short, *args)
    return train.setup(train.parse_args(args)[1])[2]


def has_grad(params):
    """Whether one of them, or of this process's shares of them, has a gradient other than zero."""
    return any(param.grad is not None and distributed.to_local(param.grad).any() for param in params)


def checked_train_step(trainer, train_step=train.Trainer.train_step):
    """train_step of a run with a discriminator. After each half only what it trains has gradients."""
    modules = [trainer.model, trainer.disc] + ([trainer.teacher] if trainer.teacher else [])
    trained = {id(param) for param in trainer.g_params + trainer.d_params}
    frozen = [param for module in modules for param in module.parameters() if id(param) not in trained]
    updates_g = trainer.step >= trainer.warmup_steps_d
    trainer.opt_d.zero_grad()                                          # those of the step before
    zero_grad_d, checked = trainer.opt_d.zero_grad, []

    def check_then_zero_grad():
        """Called between the halves, before the discriminator's gradients are cleared."""
        if not checked:
            assert has_grad(trainer.g_params) == updates_g
            assert not has_grad(trainer.d_params)
            assert not has_grad(frozen)
            trainer.opt_g.zero_grad()
            checked.append(True)
        zero_grad_d()

    trainer.opt_d.zero_grad = check_then_zero_grad
    logs = train_step(trainer)
    trainer.opt_d.zero_grad = zero_grad_d
    assert checked
    assert has_grad(trainer.d_params)
    assert not has_grad(trainer.g_params)
    assert not has_grad(frozen)
    return logs


def write_run_config(run_dir, name, pretrained_path, lora_rank=0, resolution=RESOLUTION):
    """The config.json of a run of train.py."""
    run_config = {"method": "adt", "model": name, "data": "cats", "pretrained": str(pretrained_path),
                  "seed": 0, "steps": 1, "overrides": [], "resolution": resolution, "lora_rank": lora_rank}
    Path(run_dir, "config.json").write_text(json.dumps(run_config))


def sample_pipeline(pipe, captions, noise, **arguments):
    """Images of a diffusers pipeline from given noise -> (B, 3, H, W) in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    height, width = RESOLUTION, RESOLUTION
    arguments = {"height": height, "width": width, **arguments}
    return pipe(captions, latents=noise.clone(), output_type="pt", **arguments).images * 2 - 1


def initial_noise(model, n, seed):
    """The noise that evaluate.sample starts from."""
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def saved_elements(function):
    """Elements of all tensors that autograd keeps for the backward pass of function(); its result."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(saved), result
