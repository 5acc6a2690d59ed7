"""Aspect-ratio buckets: their shapes, which images are trained together, runs of large models with them."""

import io
import json
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from tiny_families import RESOLUTION, assert_refused, setup_run, train_args

import data
import train
from utils import distributed, hub_data, image_decoding
from utils.aspect_buckets import BucketedImages, BucketOrder, bucket_shapes, nearest_bucket
from utils.image_folder import ImageFolder
from utils.messages import BadInput

SIZES = [(64, 64), (40, 90), (90, 40), (70, 60), (120, 80)]    # (width, height)
SHORT = ["--steps", "2", "--lora-rank", "4", "--set", "warmup_steps_d=0", "--set", "num_inference_steps=2",
         "--set", "num_grad_steps=1", "--aspect-buckets"]


def make_images(folder, n=20):
    """n images of the sizes in turn. A pixel's red rises from left to right, its green from top to bottom."""
    folder.mkdir()
    rows = []
    for i in range(n):
        size = SIZES[i % len(SIZES)]
        ramp = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", (ramp.rotate(90), ramp, Image.new("L", size, 10 * i))).save(folder / f"{i:02}.png")
        rows.append(json.dumps({"file_name": f"{i:02}.png", "text": f"{i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def as_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)


# -------------------------------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("resolution,multiple", [(512, 64), (1024, 64), (256, 64), (768, 64), (64, 16)])
def test_shapes_have_about_the_pixels_of_the_square(resolution, multiple):
    shapes = bucket_shapes(resolution, multiple)
    assert (resolution, resolution) in shapes and len(shapes) >= 3
    assert {(w, h) for h, w in shapes} == set(shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert .9 * resolution ** 2 <= height * width <= resolution ** 2
        assert max(height, width) <= 2 * min(height, width)


def test_sdxls_usual_shapes_are_among_them():
    """(width, height) of the report of SDXL, appendix I, up to 1:2."""
    shapes = {(w, h) for h, w in bucket_shapes(1024, 64)}
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (768, 1344), (704, 1408)} <= shapes


def test_an_image_belongs_to_the_nearest_ratio():
    shapes = bucket_shapes(512, 64)
    for size, expected in [((1000, 1000), (512, 512)), ((100, 180), (384, 640)), ((9000, 10), (640, 384)),
                           ((1100, 900), (576, 448)), ((0, 0), (512, 512))]:
        assert shapes[nearest_bucket(size, shapes)] == expected


def test_a_resolution_with_the_square_alone_is_refused():
    with pytest.raises(BadInput, match="at 128 pixels there is only the square.*larger --resolution, 256"):
        bucket_shapes(128, 64)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_that_of_the_decoded_image(tmp_path, suffix, orientation):
    if suffix in ("gif", "bmp") and orientation != 1:
        return                                                         # they hold no EXIF
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif} if orientation != 1 else {}
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path, **options)
    expected = tuple(image_decoding.load_image(path, 16)[1][:2].tolist())
    assert image_decoding.image_size(path) == expected
    assert image_decoding.image_size(path.read_bytes()) == expected
    assert expected == ((300, 200) if orientation == 6 else (200, 300))


def test_only_the_beginning_of_a_file_is_read_for_its_size(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.effect_noise((900, 600), 90).save(path, quality=100)
    monkeypatch.setattr(image_decoding, "HEADER_BYTES", 2000)
    whole, path = path.read_bytes(), tmp_path / "b.jpg"
    path.write_bytes(whole[:2000] + b"\0" * 10)
    assert image_decoding.image_size(path) == (600, 900)


def test_the_crop_covers_the_shape_and_its_corner_is_told(tmp_path):
    folder = make_images(tmp_path / "images", 5)
    for i, (width, height) in enumerate(SIZES):
        for shape in [(48, 80), (80, 48)]:
            image, cond = image_decoding.load_image(folder / f"{i:02}.png", RESOLUTION, shape=shape)
            assert image.shape == (3, *shape)
            scale = max(shape[0] / height, shape[1] / width)
            top, left = (scale * height - shape[0]) / 2, (scale * width - shape[1]) / 2
            assert cond.tolist() == [height, width, int(top), int(left)]


# --------------------------------------------------------------------------------------------------- order

BUCKETS = [0] * 13 + [1] * 7 + [2] * 30 + [4] * 1                      # bucket 3 has no image


@pytest.mark.parametrize("size", [1, 4, 8])
def test_every_image_comes_once_in_an_epoch_and_nothing_is_lost(size):
    order = BucketOrder(BUCKETS, 5)
    num_epochs, seen = 15, Counter()
    for number in range(order.num_all_groups(num_epochs, size)):
        bucket, rows = order.group(number, size, seed=0)
        assert len(rows) == size and {BUCKETS[row] for row in rows} == {bucket}
        seen.update(rows)
    for row, bucket in enumerate(BUCKETS):
        n = BUCKETS.count(bucket)
        waiting = num_epochs * n % size                                # carried into the next epoch
        assert num_epochs - -(-waiting // n) <= seen[row] <= num_epochs
        assert sum(seen[other] for other in range(len(BUCKETS)) if BUCKETS[other] == bucket) == (
            num_epochs * n - waiting)


def test_groups_of_an_epoch_are_shuffled_and_follow_from_seed_and_number():
    order, again = BucketOrder(BUCKETS, 5), BucketOrder(BUCKETS, 5)
    groups = [order.group(number, 4, 0) for number in range(40)]
    assert [again.group(number, 4, 0) for number in reversed(range(40))] == groups[::-1]
    assert [order.group(number, 4, 1) for number in range(40)] != groups
    assert [bucket for bucket, _ in groups[:10]] != sorted(bucket for bucket, _ in groups[:10])


def test_processes_share_the_shape_and_no_image(tmp_path, monkeypatch):
    source = ImageFolder(make_images(tmp_path / "images"))
    dataset = BucketedImages("images", source, RESOLUTION, 16)
    batches = []
    for rank in (0, 1):
        as_process(monkeypatch, rank, 2)
        batches.append([dataset.training_batch(2 * i, 2, 0, torch.Generator().manual_seed(9))
                        for i in range(5)])
    epoch = []
    for a, b in zip(*batches):
        assert a.image.shape == b.image.shape
        epoch += a.caption + b.caption
    assert len(set(epoch)) == len(epoch) == 20                         # 4, 4 and 12 images: no remainder


def test_processes_share_the_work_of_opening_the_images(tmp_path, monkeypatch):
    source, opened = ImageFolder(make_images(tmp_path / "images")), []
    monkeypatch.setattr(BucketedImages, "image_size", lambda self, row: opened.append(row) or (1, 1))
    as_process(monkeypatch, 1, 4)
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda tensors: None)
    BucketedImages("images", source, RESOLUTION, 16)
    assert opened == list(range(1, 20, 4))


def test_an_image_that_cannot_be_read_is_replaced_in_the_shape_of_its_bucket(tmp_path, capsys):
    folder = make_images(tmp_path / "images", 200)
    (folder / "01.png").write_bytes(b"nothing")
    dataset = BucketedImages("images", ImageFolder(folder), RESOLUTION, 16)
    captions = [caption for i in range(50) for caption in
                dataset.training_batch(4 * i, 4, 0, torch.Generator().manual_seed(i)).caption]
    assert "1" not in captions and len(captions) == 200
    assert "01.png cannot be read" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- large models

@pytest.mark.parametrize("name,method", [("sd15", "adt"), ("sdxl", "add"), ("sd3", "adt")])
def test_the_model_is_trained_at_the_shape_of_the_bucket(pretrained, tmp_path, cache_home, monkeypatch, name,
                                                         method):
    images = make_images(tmp_path / "images")
    args = ["--aspect-buckets", "--data", str(images), "--lora-rank", "4"]
    trainer = setup_run(pretrained, name, method, *args)
    model, calls = trainer.model, []
    forward = type(trainer.model).call_network

    def record(self, x, t_input, cond):
        calls.append(tuple(x.shape[2:]))
        return forward(self, x, t_input, cond)

    monkeypatch.setattr(type(model), "call_network", record)
    shapes = set()
    for step in range(3):
        batch, = trainer.load_batches(step)
        logs = trainer.train_step()
        assert all(torch.isfinite(torch.tensor(list(logs.values()))))
        expected = tuple(side // 2 for side in batch.image.shape[2:])
        assert set(calls) == {expected}
        shapes.add(expected)
        calls.clear()
    assert len(shapes) > 1


def test_sdxl_is_told_the_size_the_crop_and_the_target(pretrained, tmp_path, cache_home, monkeypatch):
    images = make_images(tmp_path / "images")
    trainer = setup_run(pretrained, "sdxl", "adt", "--aspect-buckets", "--data", str(images), "--random-crop")
    time_ids, forward = [], type(trainer.model.network).forward

    def record(network, *args, added_cond_kwargs, **kwargs):
        time_ids.append(added_cond_kwargs["time_ids"])
        return forward(network, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(type(trainer.model.network), "forward", record)
    for step in range(6):
        batch, = trainer.load_batches(step)
        cond = trainer.model.encode_prompts(batch.caption, batch.micro_cond)
        z = trainer.model.encode(batch.image)
        trainer.model.predict(z, torch.full((len(z),), 9), cond)
        expected = [(*row.tolist(), *batch.image.shape[2:]) for row in batch.micro_cond]
        assert [tuple(row) for row in time_ids[-1].tolist()] == expected
        for caption, row in zip(batch.caption, batch.micro_cond.tolist()):
            assert tuple(row[:2]) == SIZES[int(caption) % len(SIZES)][::-1]


def test_a_run_names_its_buckets_and_resumes_bit_by_bit(pretrained, tmp_path, cache_home, capsys):
    images = make_images(tmp_path / "images")
    args = [*train_args(pretrained, "sd15", *SHORT), "--data", str(images), "--random-flip"]
    train.main([*args, "--steps", "2", "--output-dir", str(tmp_path / "whole")])
    printed = capsys.readouterr().out
    summary = "buckets  80x48: 40 %, 64x64: 40 %, 48x80: 20 %"
    assert summary in printed
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["aspect_buckets"] is True
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "in the shapes (width x height) of `buckets` below" in card
    assert '- buckets: `"80x48: 40 %, 64x64: 40 %, 48x80: 20 %"`' in card
    train.main([*args, "--steps", "1", "--output-dir", str(tmp_path / "parts")])
    train.main(["--resume", str(tmp_path / "parts"), "--steps", "2", "--eval-samples", "0"])
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                    for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole["params"], parts["params"], strict=True))


def test_squares_and_small_sets_stay_as_they_were(pretrained, tmp_path, cache_home):
    """The samples for other purposes are squares, and a card without buckets does not mention them."""
    images = make_images(tmp_path / "images")
    bucketed = data.build_dataset(str(images), RESOLUTION, bucket_multiple=16)
    plain = data.build_dataset(str(images), RESOLUTION)
    a, b = (dataset.sample_batch(6, torch.Generator().manual_seed(3)) for dataset in (bucketed, plain))
    assert torch.equal(a.image, b.image) and a.caption == b.caption
    assert bucketed.fingerprint == plain.fingerprint


def make_tar(folder):
    """Two shards of 20 images of several sizes."""
    images = make_images(folder / "images")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(10 * shard, 10 * shard + 10):
                for suffix, content in (("png", (images / f"{i:02}.png").read_bytes()),
                                        ("txt", str(i).encode())):
                    info = tarfile.TarInfo(f"{i:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/*.tar"


def test_a_stream_is_trained_in_buckets(pretrained, tmp_path, cache_home, monkeypatch):
    """Both processes have the same shapes and no common image; a position is reached again."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", -1)
    tar = make_tar(tmp_path)
    batches = []
    for rank in (0, 1):
        as_process(monkeypatch, rank, 2)
        dataset = data.build_dataset(tar, RESOLUTION, bucket_multiple=16)
        batches.append([dataset.training_batch(2 * i, 2, 0, torch.Generator().manual_seed(9))
                        for i in range(10)])
        resumed = data.build_dataset(tar, RESOLUTION, bucket_multiple=16)
        again = resumed.training_batch(8, 2, 0, torch.Generator().manual_seed(9))
        assert again.caption == batches[-1][4].caption and torch.equal(again.image, batches[-1][4].image)
    assert len({batch.image.shape for batch in batches[0]}) > 1
    first_epoch = []
    for a, b in zip(*batches):
        assert a.image.shape == b.image.shape and not set(a.caption) & set(b.caption)
        first_epoch += a.caption + b.caption
    assert Counter(first_epoch).most_common(1)[0][1] <= 3              # two epochs, and what waited
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setattr(hub_data, "MAP_STYLE_BYTES", -1)
    train.main([*train_args(pretrained, "sd15", *SHORT, "--steps", "1"), "--data", tar,
                "--output-dir", str(tmp_path / "run")])
    assert "their shares are not known in advance" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("args,message", [
    (["--aspect-buckets"], "--aspect-buckets is for Stable Diffusion: the tiny model's images are squares"),
    (["--aspect-buckets", "--model", "sd15", "--data", "glyphs"], "all images of glyphs are squares")])
def test_where_there_are_no_buckets_one_sentence_says_so(pretrained, cache_home, capsys, args, message):
    assert_refused(pretrained, capsys, args, message)
