"""Stable Diffusion (tiny pipelines) trained on every kind of data: glyphs, augmented folders, streams."""

import json

import pytest
import torch
from test_hub_data import hub, make_shards  # noqa: F401
from tiny_families import RESOLUTION, setup_run, train_args

import data
import train
from utils import hub_data

pytestmark = pytest.mark.usefixtures("cache_home")
SHORT = ["--steps", "2", "--lora-rank", "4", "--set", "warmup_steps_d=0", "--set", "num_inference_steps=2",
         "--set", "num_grad_steps=1"]


def test_glyphs_are_drawn_at_the_resolution_of_the_model(pretrained, tmp_path):
    trainer = setup_run(pretrained, "sd15", "adt", "--data", "glyphs")
    assert RESOLUTION != 32 and trainer.dataset.resolution == RESOLUTION
    drawn, = trainer.load_batches(0)
    assert drawn.image.shape[-1] == RESOLUTION
    batch, = trainer.next_batches()
    assert torch.equal(batch.image, drawn.image) and batch.caption == drawn.caption
    run_dir = tmp_path / "run"
    train.main([*train_args(pretrained, "sd15", *SHORT), "--data", "glyphs",
                "--output-dir", str(run_dir)])
    assert (run_dir / "pytorch_lora_weights.safetensors").is_file()


def test_sdxl_is_told_where_the_random_crop_lies(pretrained, monkeypatch):
    trainer = setup_run(pretrained, "sdxl", "add", "--random-crop", "--random-flip",
                        "--set", "gradient_accumulation_steps=1")
    batch, = trainer.next_batches()
    assert (batch.micro_cond[:, 0] == 60).all() and batch.micro_cond[:, 1].min() >= 40
    assert batch.micro_cond[:, 2].float().std() > 0
    cond = trainer.model.encode_prompts(batch.caption, batch.micro_cond)
    time_ids = []
    forward = type(trainer.model.network).forward

    def record(network, *args, added_cond_kwargs, **kwargs):
        time_ids.append(added_cond_kwargs["time_ids"])
        return forward(network, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(type(trainer.model.network), "forward", record)
    z = trainer.model.encode(batch.image)
    trainer.model.predict(z, torch.full((len(z),), 9), cond)
    assert time_ids[0][:, :4].tolist() == batch.micro_cond.tolist()
    assert (time_ids[0][:, 4:] == RESOLUTION).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_stream_trains_a_large_model(pretrained, tmp_path, monkeypatch, name):
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", -1)
    folder = make_shards(tmp_path / "shards")
    run_dir = tmp_path / "run"
    train.main([*train_args(pretrained, name, *SHORT), "--data", f"{folder}/*.tar",
                "--output-dir", str(run_dir)])
    train.main(["--resume", str(run_dir), "--steps", "3", "--eval-samples", "0"])
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 3


def test_without_data_the_default_set_is_announced_and_trained_on(pretrained, tmp_path, hub,  # noqa: F811
                                                                  capsys):
    run_dir = tmp_path / "run"
    args = train_args(pretrained, "sd15", *SHORT, "--output-dir", str(run_dir))
    del args[args.index("--data"):args.index("--data") + 2]
    train.main(args)
    printed = capsys.readouterr().out
    assert data.default_dataset_message() in printed and "20 images" in printed
    assert hub["calls"] == [(data.DEFAULT_HUB_DATASET, None, "3f2a", False)]
    run_config = json.loads((run_dir / "config.json").read_text())
    assert run_config["data"] == data.DEFAULT_HUB_DATASET
