"""Latents of training images on disk: they are those of the VAE, and a run with them takes the same steps."""

import os

import pytest
import torch
from PIL import Image
from test_aspect_buckets import make_images
from tiny_families import FAMILIES, RESOLUTION, assert_refused, build_model, setup_run
from tiny_families import make_images as make_squares

import data
from models import latent_cache
from utils import distributed

pytestmark = pytest.mark.usefixtures("cache_home")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoded(monkeypatch):
    """-> a list that receives the entries which are encoded, (row, flip)."""
    entries, encode_entries = [], latent_cache.encode_entries

    def record(model, dataset, cache, missing):
        entries.extend(missing)
        encode_entries(model, dataset, cache, missing)

    monkeypatch.setattr(latent_cache, "encode_entries", record)
    return entries


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_drawn_from_moments_are_those_of_encode(pretrained, name):
    model, image = build_model(pretrained, name), torch.rand(3, 3, RESOLUTION, RESOLUTION) * 2 - 1
    with torch.no_grad():
        moments = model.encode_moments(image)
        torch.manual_seed(5)
        expected = model.encode(image)
        torch.manual_seed(5)
        assert torch.equal(model.sample_latents(moments), expected)
        torch.manual_seed(5)
        rounded = model.sample_latents(moments.half().float())
    assert 0 < (rounded - expected).norm() < 1e-3 * expected.norm()


def test_a_vae_in_bf16_loses_nothing_in_the_cache(pretrained):
    model, image = build_model(pretrained, "sd15"), torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    model.vae.bfloat16()
    with torch.no_grad():
        torch.manual_seed(5)
        expected = model.encode(image)
        torch.manual_seed(5)
        found = model.sample_latents(model.encode_moments(image).half().float())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name,method,args", [
    ("sd15", "adt", ["--random-flip"]),
    ("sdxl", "adt", ["--set", "real_images=original"]),
    ("sdxl", "add", ["--random-flip", "--aspect-buckets"])])
def test_a_run_with_cached_latents_takes_the_same_steps(pretrained, tmp_path, name, method, args):
    images = make_images(tmp_path / "images")
    args = [*args, "--data", str(images), "--lora-rank", "4"]
    plain, cached = setup_run(pretrained, name, method, *args), setup_run(pretrained, name, method, *args,
                                                                          "--cache-latents")
    for step in range(2):
        a, b = plain.load_batches(step)[0], cached.load_batches(step)[0]
        assert a.caption == b.caption and torch.equal(a.micro_cond, b.micro_cond)
        assert torch.equal(a.attributes, b.attributes)
        assert b.moments is not None and a.moments is None
        if cached.config.needs_images:
            assert torch.equal(a.image, b.image)
        else:
            assert b.image is None
    expected, found = plain.train_step(), cached.train_step()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-2, abs=5e-2), key
    assert name == "sd15" or cached.config.needs_images


def test_a_flipped_image_has_a_latent_of_its_own(pretrained, tmp_path, monkeypatch):
    entries = encoded(monkeypatch)
    trainer = setup_run(pretrained, "sd15", "adt", "--random-flip", "--cache-latents")
    assert sorted(entries) == [(row, flip) for row in range(3) for flip in (False, True)]
    dataset, model = trainer.dataset, trainer.model
    for flip in (False, True):
        pixels = dataset.load_image(1, flip=flip)[0][None].float() / 127.5 - 1
        with torch.no_grad():
            expected = model.encode_moments(pixels)
        torch.testing.assert_close(dataset.load_latent(1, flip)["moments"][None].float(), expected, rtol=1e-3,
                                   atol=1e-3)


def test_a_second_run_encodes_nothing_and_a_damaged_file_is_encoded_again(pretrained, monkeypatch, capsys):
    entries = encoded(monkeypatch)
    args = [pretrained, "sd15", "adt", "--cache-latents"]
    setup_run(*args)
    assert len(entries) == 3
    setup_run(*args)
    assert len(entries) == 3
    printed = capsys.readouterr().out
    assert "0 of this process's 3 are there" in printed and "3 of this process's 3 are there" in printed
    cache = latent_cache.LatentCache(latent_cache.latent_hash(*model_and_data(pretrained)))
    path, = cache.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    path.write_bytes(bytes(content))
    setup_run(*args)
    assert len(entries) > 3


def model_and_data(pretrained, **options):
    dataset = data.build_dataset(str(pretrained / "images"), RESOLUTION, **options)
    return build_model(pretrained, "sd15"), dataset


def test_the_name_of_the_cache_covers_all_that_a_latent_depends_on(pretrained, tmp_path, monkeypatch):
    model, dataset = model_and_data(pretrained)
    names = [latent_cache.latent_hash(model, dataset)]
    assert latent_cache.latent_hash(*model_and_data(pretrained)) == names[0]
    names.append(latent_cache.latent_hash(*model_and_data(pretrained, bucket_multiple=16)))
    other = data.build_dataset(str(make_squares(tmp_path / "other", 4)), RESOLUTION)
    names.append(latent_cache.latent_hash(model, other))
    names.append(latent_cache.latent_hash(model, data.build_dataset(str(pretrained / "images"), 48)))
    table = tmp_path / "other" / "metadata.jsonl"
    table.write_text(table.read_text() + '\n{"file_name": "new.bmp", "text": "a picture"}')
    for colour in ("red", "blue"):                                     # repainted in a file of the same size
        Image.new("RGB", (8, 8), colour).save(tmp_path / "other" / "new.bmp")
        other = data.build_dataset(str(tmp_path / "other"), RESOLUTION)
        names.append(latent_cache.latent_hash(model, other))
    model.precision = "bf16"
    names.append(latent_cache.latent_hash(model, dataset))
    model.precision = None
    with torch.no_grad():
        next(model.vae.parameters()).add_(1e-3)
    names.append(latent_cache.latent_hash(model, dataset))
    assert len(set(names)) == len(names)


def test_a_file_name_need_not_be_unicode(pretrained, tmp_path, monkeypatch):
    folder = make_squares(tmp_path / "images", 1)
    (folder / "metadata.jsonl").unlink()
    (folder / "0.png").rename(folder / os.fsdecode(b"\xff.png"))
    (folder / os.fsdecode(b"\xff.txt")).write_text("a caption")
    entries = encoded(monkeypatch)
    model, dataset = build_model(pretrained, "sd15"), data.build_dataset(str(folder), RESOLUTION)
    latent_cache.cache_latents(model, dataset, needs_images=False)
    assert entries == [(0, False)]
    assert dataset.training_batch(0, 1, 0, seeded()).caption == ["a caption"]


def test_each_process_encodes_its_share(pretrained, tmp_path, monkeypatch):
    model, dataset = model_and_data(pretrained)
    entries = encoded(monkeypatch)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        latent_cache.cache_latents(model, dataset, needs_images=False)
    assert sorted(entries) == [(row, False) for row in range(3)]       # of which each was encoded once
    batch = dataset.training_batch(0, 3, 0, seeded())
    assert batch.image is None and batch.moments.shape == (3, 8, RESOLUTION // 2, RESOLUTION // 2)


def test_an_image_that_cannot_be_read_is_replaced_by_one_of_its_shape(pretrained, tmp_path):
    folder = make_images(tmp_path / "images", 200)
    (folder / "01.png").write_bytes(b"nothing")
    model = build_model(pretrained, "sd15")
    dataset = data.build_dataset(str(folder), RESOLUTION, bucket_multiple=16)
    model.encode_moments = lambda image: image[:, :2]                  # the shape is all that matters
    latent_cache.cache_latents(model, dataset, needs_images=True)
    captions = []
    for i in range(50):
        batch = dataset.training_batch(4 * i, 4, 0, seeded(i))
        assert batch.moments.shape[2:] == batch.image.shape[2:]
        captions += batch.caption
    assert "1" not in captions and len(captions) == 200


@pytest.mark.parametrize("args,message", [
    (["--cache-latents"], "--cache-latents is for Stable Diffusion: the tiny model has no VAE"),
    (["--cache-latents", "--model", "sd15", "--random-crop"], "exclude each other"),
    (["--cache-latents", "--model", "sd15", "--data", "glyphs"], "those of glyphs are streamed or drawn")])
def test_what_cannot_be_cached_is_one_sentence(pretrained, capsys, args, message):
    assert_refused(pretrained, capsys, args, message)


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(pretrained, monkeypatch):
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda path: type("", (), {"free": 10 ** 4}))
    entries = encoded(monkeypatch)
    with pytest.raises(ValueError, match="3 latents want .* GiB in .*, 0.0 are free"):
        setup_run(pretrained, "sd15", "adt", "--cache-latents")
    assert not entries
