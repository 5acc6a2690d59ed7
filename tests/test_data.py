"""Data sets: glyphs, Fashion-MNIST, folders, and the command that previews them."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from conftest import ROOT
from utils import captioned_images, image_decoding, training_state
from utils.shuffling import EpochOrder


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------- glyphs

def test_number_of_shapes_fonts_and_colours(glyphs):
    letters = [s for s in glyphs.shapes if s.split()[0] in ("letter", "digit", "capital")]
    assert len(letters) == 62
    assert len(glyphs.shapes) - 62 >= 150
    assert len(set(glyphs.shapes)) == len(glyphs.shapes)
    assert len(glyphs.attributes["family"]) >= 3 and len(data.COLOURS) >= 8
    assert {tuple(v) for v in glyphs.variants[:, 2:].tolist()} >= {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert list(glyphs.attributes) == ["shape", "foreground", "background", "family", "weight", "slant"]


def test_same_seed_same_batch(glyphs):
    first, again, other = (glyphs.sample_batch(8, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.image, again.image) and first.caption == again.caption
    assert not torch.equal(first.image, other.image)


def test_images_are_antialiased_jittered_and_in_range(glyphs):
    image = glyphs.sample_batch(256, seeded()).image
    assert image.shape == (256, 3, 32, 32) and image.min() >= -1 and image.max() <= 1
    variant, foreground, background = (torch.full((9,), index) for index in (3, 1, 0))
    rendered = glyphs.render(variant, foreground, background, seeded())
    assert (rendered[0] - rendered[1]).abs().mean() > .01    # one glyph twice: two different images
    coverage = (rendered.mean(1) + .95) / 1.9
    assert ((coverage > .2) & (coverage < .8)).float().mean() > .02


def test_held_out_pairs_do_not_occur_in_training(glyphs):
    pairs = {split: {tuple(p) for p in glyphs.sample_batch(6000, seeded(), split).attributes[:, :2].tolist()}
             for split in ("train", "test", "held_out")}
    assert not pairs["held_out"] & (pairs["train"] | pairs["test"])
    assert len(pairs["held_out"]) == len(glyphs.shapes)    # one foreground colour of each shape
    assert {shape for shape, _ in pairs["train"]} == set(range(len(glyphs.shapes)))
    assert {foreground for _, foreground in pairs["train"]} == set(range(8))
    with pytest.raises(ValueError, match="held_out"):
        glyphs.sample_batch(1, seeded(), "validation")


def test_captions_state_the_mentioned_attributes_and_no_others(glyphs):
    batch = glyphs.sample_batch(400, seeded())
    colours = list(data.COLOURS)
    rows = zip(batch.caption, batch.attributes.tolist(), batch.mentioned.tolist())
    for text, attributes, mentioned in rows:
        for column, key in enumerate(("foreground", "background", "family"), 1):
            word = glyphs.attributes[key][attributes[column]]
            assert f" {word}" in text or not mentioned[column]
        assert ("bold" in text) == mentioned[4] and ("italic" in text) == mentioned[5]
        assert glyphs.shapes[attributes[0]] in text and set(text.split()) <= set(glyphs.vocab)
        foregrounds = set(text.split(" on ")[0].split()) & set(colours)
        assert foregrounds == ({colours[attributes[1]]} if mentioned[1] else set())
        assert (" on " in text) == mentioned[2]
    assert glyphs.sample_batch(200, seeded(), "held_out").mentioned[:, 1].all()
    assert 0 < (~batch.mentioned[:, 1]).float().mean() < .5


def test_a_part_of_the_glyphs_has_letters_in_its_fonts_only(glyphs):
    families = list(data.FONT_FAMILIES)
    part = data.build_dataset("glyphs:serif,typewriter")
    batch = part.sample_batch(200, seeded())
    assert {families[i] for i in batch.attributes[:, 3].tolist()} == {"serif", "typewriter"}  # no pictograms
    assert part.vocab == glyphs.vocab                                  # one text encoder for all parts
    assert data.dataset_name("glyphs:serif") == part.name == "glyphs"  # the networks of all glyphs
    assert part.fingerprint == data.build_dataset("glyphs:typewriter,serif").fingerprint != glyphs.fingerprint


def test_foreground_and_background_differ(glyphs):
    for split in ("train", "held_out"):
        attributes = glyphs.sample_batch(2000, seeded(), split).attributes
        assert (attributes[:, 1] != attributes[:, 2]).all()


def test_rendering_is_no_bottleneck(glyphs, base):
    """Rendering a batch takes at most a fifth of one forward pass of the network."""
    def shortest(function):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    batch = glyphs.sample_batch(32)
    with torch.no_grad():
        z, cond, t = base.encode(batch.image), base.encode_prompts(batch.caption), torch.full((32,), 500)
        assert shortest(lambda: glyphs.sample_batch(32)) < shortest(lambda: base.predict(z, t, cond)) / 5


def test_a_slice_of_a_batch_and_another_resolution(glyphs):
    batch = glyphs.sample_batch(4, seeded())
    part = batch[1:3]
    assert torch.equal(part.image, batch.image[1:3]) and part.caption == batch.caption[1:3]
    assert torch.equal(part.attributes, batch.attributes[1:3]) and part.micro_cond is None
    resized = batch.to("cpu", 48)
    assert resized.image.shape == (4, 3, 48, 48) and resized.image.abs().max() <= 1
    assert torch.equal(batch.to("cpu", 32).image, batch.image)


@pytest.mark.parametrize("resolution", [48, 64, 200])
def test_at_another_resolution_the_same_images_are_drawn(glyphs, resolution):
    dataset = data.build_dataset("glyphs", resolution)
    for split in ("train", "held_out"):
        small, large = (source.sample_batch(6, seeded(), split) for source in (glyphs, dataset))
        assert large.image.shape == (6, 3, resolution, resolution)
        assert large.caption == small.caption and torch.equal(large.attributes, small.attributes)
        reduced = F.interpolate(large.image, (32, 32), mode="bilinear", antialias=True)
        enlarged = F.interpolate(small.image, (resolution, resolution), mode="bicubic")
        assert (reduced - small.image).abs().mean() < .05
        assert (large.image - enlarged).abs().mean() > .01    # drawn, not enlarged
    edges = (large.image[..., 1:] - large.image[..., :-1]).abs().amax(3).mean()
    assert edges > (enlarged[..., 1:] - enlarged[..., :-1]).abs().amax(3).mean()    # and sharper
    assert torch.equal(large.to("cpu", resolution).image, large.image)


# ---------------------------------------------------------------------------------------------- Fashion-MNIST

def test_fashion_is_fashion_mnist():
    fashion = data.build_dataset("fashion")
    batch = fashion.sample_batch(500, seeded(), "test")
    assert batch.image.shape == (500, 3, 32, 32) and len(fashion.labels["train"]) == 60000
    assert torch.equal(batch.image[:, 0], batch.image[:, 2]) and batch.image[:, :, :2].max() == -1
    assert torch.bincount(fashion.labels["test"]).tolist() == [1000] * 10
    assert "a photo of an ankle boot" in batch.caption
    parts = list(fashion.iter_batches(500, 300, seeded(), "test"))
    assert [len(part.caption) for part in parts] == [300, 200]
    assert torch.equal(torch.cat([part.image for part in parts]), batch.image)


def test_missing_fashion_names_all_three_remedies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(data.FASHION_MD5, "train-images-idx3-ubyte", "no such sum")
    monkeypatch.setattr(data, "FASHION_URL", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match="apt install.*download failed.*put the four"):
        data.fashion_bytes("train-images-idx3-ubyte")


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_download_is_checked_and_cached_where_that_is_possible(tmp_path, monkeypatch, is_writable):
    content = b"pixels"
    monkeypatch.setitem(data.FASHION_MD5, "name", hashlib.md5(content).hexdigest())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(gzip.compress(content)))
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if not is_writable:
        cache.write_text("a file where the folder should be")
    assert data.fashion_bytes("name") == content
    assert (cache / "fashion-mnist" / "name.gz").is_file() == is_writable
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"damaged"))
    if is_writable:
        assert data.fashion_bytes("name") == content
    else:
        with pytest.raises(FileNotFoundError, match="download failed"):
            data.fashion_bytes("name")


# -------------------------------------------------------------------------------------------------- a folder

def make_image_folder(path, n=3, table=True):
    """n images with the captions 'a picture 0', 'a picture 1', ... in metadata.jsonl or in .txt files."""
    path.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        Image.new("RGB", (40 + i % 9, 60), (80 * i % 256, 10, 200)).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a picture {i}"}))
        if not table:
            (path / f"{i}.txt").write_text(f"a picture {i}\n")
    if table:
        (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("table", [True, False])
def test_both_conventions_of_a_folder(tmp_path, table):
    dataset = data.build_dataset(str(make_image_folder(tmp_path / "mine", table=table)))
    batch = dataset.sample_batch(64, seeded())
    assert batch.image.shape == (64, 3, 32, 32)
    assert set(batch.caption) == {"a picture 0", "a picture 1", "a picture 2"}
    assert dataset.name == "mine"
    for image, text in zip(batch.image, batch.caption):
        assert abs((image[0].mean() + 1) * 127.5 - 80 * int(text[-1])) < 1
    assert [dataset.all_captions[i] for i in batch.attributes[:, 0]] == batch.caption


def test_a_few_unreadable_images_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    path = make_image_folder(tmp_path / "many", n=120)
    (path / "7.png").write_bytes(b"no picture")
    for cache_bytes in (2 ** 30, 0):    # kept in memory, or read when sampled
        monkeypatch.setattr(captioned_images, "CACHE_BYTES", cache_bytes)
        dataset = data.build_dataset(str(path))
        captions = dataset.sample_batch(119, seeded()).caption
        assert len(set(captions)) == 119 and "a picture 7" not in captions
        assert "7.png" in capsys.readouterr().out
    for i in (8, 9):
        (path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the image .* of 120 images are broken"):
        data.build_dataset(str(path)).sample_batch(119, seeded())


def test_a_lack_of_memory_is_not_blamed_on_an_image(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    path = make_image_folder(tmp_path / "mine")
    monkeypatch.setattr(image_decoding, "load_image", fail)
    with pytest.raises(MemoryError):
        data.build_dataset(str(path))


def test_images_in_memory_and_on_disk_give_the_same_batch(tmp_path, monkeypatch):
    path = make_image_folder(tmp_path / "mine", n=12)
    cached = data.build_dataset(str(path)).sample_batch(5, seeded())
    monkeypatch.setattr(captioned_images, "CACHE_BYTES", 0)
    dataset = data.build_dataset(str(path))
    loaded = dataset.sample_batch(5, seeded())
    assert dataset.image_cache is None and torch.equal(cached.image, loaded.image)
    assert cached.caption == loaded.caption and torch.equal(cached.micro_cond, loaded.micro_cond)
    parts = list(dataset.iter_batches(5, 3, seeded()))
    assert torch.equal(torch.cat([part.image for part in parts]), loaded.image)


def test_micro_cond_is_the_original_size_and_what_was_cut_off(tmp_path):
    Image.new("RGB", (40, 60)).save(make_image_folder(tmp_path / "mine", n=1) / "0.png")
    batch = data.build_dataset(str(tmp_path / "mine")).sample_batch(1)
    assert batch.micro_cond.tolist() == [[60, 40, 8, 0]]    # 40x60 -> 32x48, eight rows above, eight below
    Image.new("RGB", (128, 64)).save(tmp_path / "mine" / "0.png")
    batch = data.build_dataset(str(tmp_path / "mine"), 16).sample_batch(1)
    assert batch.micro_cond.tolist() == [[64, 128, 0, 8]]


def test_a_fingerprint_identifies_the_data(tmp_path, glyphs):
    """Two folders of one name differ in it; a copy elsewhere does not, whatever the order of its table."""
    def fingerprint(path):
        dataset = data.build_dataset(str(path))
        assert dataset.name == "mine"
        return dataset.fingerprint

    first, copy = tmp_path / "mine", tmp_path / "other" / "mine"
    copy.parent.mkdir()
    for path in (first, copy):
        make_image_folder(path)
    original = fingerprint(first)
    assert len(original) == 16 and int(original, 16) >= 0
    table = copy / "metadata.jsonl"
    table.write_text("\n".join(reversed(table.read_text().split("\n"))))
    assert fingerprint(copy) == original
    table.write_text(table.read_text().replace("a picture 1", "a picture l"))
    assert fingerprint(copy) != original
    make_image_folder(copy)
    (copy / "1.png").write_bytes((copy / "1.png").read_bytes() + b"\0")
    assert fingerprint(copy) != original
    make_image_folder(copy)
    (copy / "1.png").rename(copy / "one.png")
    table.write_text(table.read_text().replace('"1.png"', '"one.png"'))
    assert fingerprint(copy) != original
    assert glyphs.fingerprint == "glyphs" and data.Fashion.fingerprint == "fashion"


@pytest.mark.parametrize("side", [8, 800])
def test_a_picture_repainted_in_a_file_of_the_same_size_changes_the_fingerprint(tmp_path, side):
    """The larger file is hashed in parts."""
    image, prints = tmp_path / "0.bmp", set()
    (tmp_path / "0.txt").write_text("a picture")
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (side, side), colour).save(image)
        prints.add(data.build_dataset(str(tmp_path)).fingerprint)
    assert len(prints) == 2


# --------------------------------------------------------------------------------------------------- epochs

def test_an_epoch_has_every_row_once_and_its_own_order():
    order = EpochOrder(100)
    epochs = [order.rows(100 * epoch, 100, seed=0) for epoch in range(3)]
    assert all(sorted(rows) == list(range(100)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order.rows(0, 100, seed=1) != epochs[0]
    rows = [row for epoch in epochs for row in epoch]
    assert EpochOrder(100).rows(90, 130, seed=0) == rows[90:220]    # across two borders, in a new process
    assert EpochOrder(3).rows(2, 2, seed=5) == [order3[0] for order3 in (EpochOrder(3).rows(2, 1, 5),
                                                                         EpochOrder(3).rows(3, 1, 5))]


def test_a_permutation_is_drawn_once_an_epoch(monkeypatch):
    order, calls = EpochOrder(1000), []
    monkeypatch.setattr(torch, "randperm", lambda size, randperm=torch.randperm, **options:
                        calls.append(size) or randperm(size, **options))
    for position in range(0, 3000, 8):
        order.rows(position, 8, seed=0)
    assert calls == [1000] * 3


def loading_trainer(dataset, accumulation=1, rank=0, world_size=1, total_steps=9):
    """What the methods of a Trainer that load batches need."""
    trainer = SimpleNamespace(
        dataset=dataset, seed=3, step=0, total_steps=total_steps, num_micro_batches=accumulation * world_size,
        micro_batch_ids=range(accumulation * rank, accumulation * (rank + 1)),
        batch_size=2,
        model=SimpleNamespace(alpha=torch.zeros(1), resolution=32),
        prefetch_pool=ThreadPoolExecutor(1), prefetched={})
    for name in ("next_batches", "load_batches", "data_position", "derive_seed"):
        setattr(trainer, name, getattr(training_state.TrainingState, name).__get__(trainer))
    return trainer


def test_micro_batches_and_processes_have_all_images_once_an_epoch(tmp_path):
    dataset = data.build_dataset(str(make_image_folder(tmp_path / "mine", n=24)), random_flip=True)
    accumulated = loading_trainer(dataset, accumulation=4)
    processes = [loading_trainer(dataset, accumulation=2, rank=rank, world_size=2) for rank in (0, 1)]
    captions = []
    for step in range(6):                                 # of 4 micro-batches of 2 images: two epochs
        batches = accumulated.load_batches(step)
        split = [batch for process in processes for batch in process.load_batches(step)]
        assert all(torch.equal(a.image, b.image) for a, b in zip(batches, split, strict=True))
        captions += [text for batch in batches for text in batch.caption]
    for epoch in (captions[:24], captions[24:]):
        assert sorted(epoch) == sorted(dataset.captions)
    assert captions[:24] != captions[24:]


def test_the_batches_of_fashion_are_those_of_the_published_runs():
    dataset = data.build_dataset("fashion")
    trainer = loading_trainer(dataset, accumulation=2)
    for micro_batch_id, batch in enumerate(trainer.load_batches(5)):
        digest = hashlib.sha256(repr((3, 5, micro_batch_id, "data")).encode()).digest()
        expected = dataset.sample_batch(2, seeded(int.from_bytes(digest[:8])))
        assert torch.equal(batch.image, expected.image)


def test_a_few_steps_are_read_in_advance_and_each_has_its_own_batches(glyphs):
    trainer, loaded = loading_trainer(glyphs), []
    load_batches = trainer.load_batches
    trainer.load_batches = lambda step: loaded.append(step) or load_batches(step)
    for trainer.step in (0, 1, 5, 6, 7, 8):                       # a resumed run jumps
        batch, = trainer.next_batches()
        expected, = load_batches(trainer.step)
        assert torch.equal(batch.image, expected.image) and batch.caption == expected.caption
        assert len(loaded) <= trainer.step + 1 + training_state.PREFETCH_STEPS
    trainer.prefetch_pool.shutdown()
    assert sorted(loaded) == list(range(9))


def test_images_for_a_gpu_are_in_pinned_memory(glyphs, monkeypatch):
    trainer, pinned = loading_trainer(glyphs, accumulation=2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda image: pinned.append(image.shape) or image)
    trainer.load_batches(0)
    assert pinned == []                                           # the model is on the CPU
    trainer.model = SimpleNamespace(alpha=SimpleNamespace(is_cuda=True))
    trainer.load_batches(0)
    assert pinned == [(2, 3, 32, 32)] * 2


def test_grey_images_can_be_pinned(monkeypatch):
    """A tensor whose channels share their memory cannot: pinning copies into a tensor of the same strides."""
    def pin(x):
        return torch.empty_strided(x.shape, x.stride()).copy_(x)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    image = torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    with pytest.raises(RuntimeError, match="single memory location"):
        pin(image)
    batch = data.Batch(image, ["a", "b"], torch.zeros(2, 1), torch.zeros(2, 1))
    assert torch.equal(batch.pin_memory().image, image)


def test_a_broken_image_is_replaced_wherever_the_run_was_before(tmp_path):
    path = make_image_folder(tmp_path / "mine", n=120)
    (path / "7.png").write_bytes(b"no picture")
    dataset = data.build_dataset(str(path))
    batches = [dataset.training_batch(position, 8, 0, seeded(position)) for position in range(0, 120, 8)]
    captions = [text for batch in batches for text in batch.caption]
    assert len(captions) == 120 and len(set(captions)) == 119 and "a picture 7" not in captions
    for position in (112, 0):
        again = data.build_dataset(str(path)).training_batch(position, 8, 0, seeded(position))
        assert torch.equal(again.image, batches[position // 8].image)


# ---------------------------------------------------------------------------------------------- augmentation

@pytest.fixture
def coordinates(tmp_path):
    """A folder with one image, 128 wide and 64 high, whose red is the column and whose green is the row."""
    path = tmp_path / "mine"
    path.mkdir()
    columns, rows = torch.meshgrid(torch.arange(128), torch.arange(64), indexing="xy")
    pixels = torch.stack([columns, rows, torch.zeros_like(rows)], 2).byte().numpy()
    Image.fromarray(pixels).save(path / "a.png")
    (path / "a.txt").write_text("coordinates")
    return str(path)


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("random_crop", [False, True])
def test_flips_and_crops_are_random_and_told_to_the_model(coordinates, random_flip, random_crop):
    dataset = data.build_dataset(coordinates, 64, random_flip, random_crop)
    batch = dataset.training_batch(0, 40, 0, seeded())
    red = ((batch.image[:, 0, 32] + 1) * 127.5).round()           # the column that each pixel came from
    is_flipped = red[:, 0] > red[:, -1]
    top, left = batch.micro_cond[:, 2], batch.micro_cond[:, 3].float()
    assert batch.micro_cond[:, :2].tolist() == [[64, 128]] * 40 and (top == 0).all()
    # SDXL is told where the square lies in the image as it is seen, flipped or not
    leftmost = torch.where(is_flipped, 127 - red[:, 0], red[:, 0])
    assert (leftmost - left).abs().max() <= 1
    assert (left == 32).all() if not random_crop else len(set(left.tolist())) > 20
    assert 10 < is_flipped.sum() < 30 if random_flip else not is_flipped.any()
    assert torch.equal(dataset.training_batch(0, 40, 0, seeded()).image, batch.image)
    plain = dataset.sample_batch(3).image                         # what is measured is not augmented
    assert torch.equal(plain, data.build_dataset(coordinates, 64).sample_batch(3).image)


def test_flips_of_images_in_memory_and_on_disk_are_equal(coordinates, monkeypatch):
    cached = data.build_dataset(coordinates, 64, random_flip=True).training_batch(0, 8, 0, seeded())
    monkeypatch.setattr(captioned_images, "CACHE_BYTES", 0)
    loaded = data.build_dataset(coordinates, 64, random_flip=True).training_batch(0, 8, 0, seeded())
    assert torch.equal(cached.image, loaded.image) and torch.equal(cached.micro_cond, loaded.micro_cond)


@pytest.mark.parametrize("name", ["glyphs", "fashion"])
def test_the_embedded_data_sets_are_not_augmented(name):
    with pytest.raises(ValueError, match="--random-flip is for folders"):
        data.build_dataset(name, 32, random_flip=True)
    with pytest.raises(ValueError, match="--random-crop is for folders"):
        data.build_dataset(name, 32, random_crop=True)


# ---------------------------------------------------------------------------------------------- command line

def run_data(*args, cwd=ROOT, **env):
    return subprocess.run([sys.executable, ROOT / "data.py", *args], cwd=cwd, capture_output=True, text=True,
                          errors="replace", env=os.environ | env)


@pytest.mark.parametrize("name", ["glyphs", "fashion"])
def test_contact_sheet_command(name, tmp_path):
    path = tmp_path / f"{name}.png"
    data.main(["--preview", name, "--output", str(path)])
    assert Image.open(path).size[0] > 1000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("arguments, sentence", [
    (["--preview", "cats"], "no data set 'cats'"),
    (["--preview", ""], "no data set ''"),
    (["--preview", "README.md"], "no data set"),
    (["--preview", "glyphs", "--output", "/nowhere/x.png"], "in a folder that exists"),
    (["--preview", "glyphs", "--output", "tests"], "wanted a file name ending in .png"),
    (["--preview", "glyphs", "--seed", "99999999999999999999"], "--seed"),
    (["--preview", "glyphs", "--seed", "-1"], "--seed")])
def test_bad_arguments_get_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1


def test_preview_of_the_current_folder_has_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_image_folder(tmp_path / "mine"))
    data.main(["--preview", "."])
    assert Image.open(tmp_path / "mine" / "mine.png").size[0] > 1000
    assert "in the data folder" in capsys.readouterr().out
    (tmp_path / "mine" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    data.main(["--preview", ".."])
    assert (tmp_path / "mine" / "sub" / "mine.png").is_file()


def test_a_preview_replaces_no_file_that_was_not_named(tmp_path, monkeypatch, capsys):
    """In the folder cat, the default name cat.png may be one of the images."""
    folder = make_image_folder(tmp_path / "cat", table=False)
    image = (folder / "0.png").rename(folder / "cat.png")
    (folder / "0.txt").rename(folder / "cat.txt")
    content = image.read_bytes()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        data.main(["--preview", "."])
    assert stop.value.code == 2
    assert "cat.png exists already: --output names another file" in capsys.readouterr().err
    assert image.read_bytes() == content
    for _ in range(2):
        data.main(["--preview", ".", "--output", str(tmp_path / "sheet.png")])


def folder_with_odd_names(path):
    """120 images, one of them unreadable, and three files that are no images. Some names have characters
    beyond Latin-1, a byte that is not UTF-8, or control characters."""
    folder = make_image_folder(path, n=119, table=False)
    for name in ("図.avif", os.fsdecode(b"\xff.avif"), "a\n\x1b[31m.avif", "図.png"):
        (folder / name).write_bytes(b"")
    (folder / "図.txt").write_text("broken")
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_messages_survive_any_encoding(tmp_path, monkeypatch, encoding):
    folder = folder_with_odd_names(tmp_path / "図")
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding=encoding, errors="strict"))
    assert len(data.build_dataset(str(folder)).reader.unreadable) == 1
    sys.stdout.flush()
    lines = stdout.getvalue().decode(encoding).splitlines()
    assert len(lines) == 2 and "left out: 3 file" in lines[0] and "cannot be read" in lines[1]
    assert ("図.png" if encoding == "utf-8" else "\\u56f3.png") in lines[1]
    assert all(line.isprintable() for line in lines)


def test_the_command_survives_an_encoding_without_the_characters(tmp_path):
    folder = folder_with_odd_names(tmp_path / "図")
    done = run_data("--preview", folder, cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and "wrote \\u56f3.png" in done.stdout and done.stderr.isascii()
    assert (tmp_path / "図.png").is_file()
    (folder / "図.txt").unlink()
    done = run_data("--preview", folder, "--output", "図.png", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 2 and "no caption" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["data.py", "evaluate.py", "train.py", *(
    f"-m scripts.{name}" for name in ("pretrain", "panel", "run_study", "user_study", "benchmark",
                                      "make_figures"))])
def test_ctrl_c_during_the_imports_is_exit_code_130(program):
    process = subprocess.Popen([sys.executable, "-X", "importtime", *program.split(), "--help"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:    # one line per imported module
        if "torch" in line:
            break
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in error


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "contact_sheet", interrupt)
    with pytest.raises(SystemExit) as stop:
        data.main(["--preview", "glyphs", "--output", "x.png"])
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
