"""Pictures and captions: what the data promise, they keep."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_world_is_as_rich_as_promised(glyphs):
    letters = [s for s in glyphs.shapes if s.split()[0] in ("letter", "digit", "capital")]
    assert (len(letters) == 62 and len(glyphs.shapes) - 62 >= 150
            and len(set(glyphs.shapes)) == len(glyphs.shapes))
    assert len(glyphs.attributes["family"]) >= 3 and len(data.COLOURS) >= 8
    assert {tuple(v) for v in glyphs.variants[:, 2:].tolist()} >= {(0, 0), (1, 0), (0, 1), (1, 1)}


def test_the_same_seed_draws_the_same_pictures(glyphs):
    one, two, other = glyphs.batch(8, g()), glyphs.batch(8, g()), glyphs.batch(8, g(1))
    assert torch.equal(one.image, two.image) and one.caption == two.caption
    assert not torch.equal(one.image, other.image)


def test_pictures_are_antialiased_jittered_and_in_range(glyphs):
    image = glyphs.batch(256, g()).image
    assert image.shape == (256, 3, 32, 32) and image.min() >= -1 and image.max() <= 1
    variant, ink, ground = (torch.full((9,), v) for v in (3, 1, 0))
    drawn = glyphs.draw(variant, ink, ground, g())
    assert (drawn[0] - drawn[1]).abs().mean() > .01          # no two drawings of one glyph agree
    cover = (drawn.mean(1) + .95) / 1.9
    assert ((cover > .2) & (cover < .8)).float().mean() > .02                 # soft edges exist


def test_held_out_compositions_are_never_seen_in_training(glyphs):
    pairs = {split: {tuple(p) for p in glyphs.batch(30000, g(), split).truth[:, :2].tolist()}
             for split in ("train", "test", "held_out")}
    assert not pairs["held_out"] & (pairs["train"] | pairs["test"])
    assert len(pairs["held_out"]) == len(glyphs.shapes)      # one ink per shape
    assert ({s for s, _ in pairs["train"]} == set(range(len(glyphs.shapes)))
            and {i for _, i in pairs["train"]} == set(range(8)))
    with pytest.raises(ValueError, match="held_out"):
        glyphs.batch(1, g(), "validation")


def test_captions_say_what_is_there_and_no_more(glyphs):
    batch = glyphs.batch(400, g())
    for text, truth, named in zip(batch.caption, batch.truth.tolist(), batch.named.tolist()):
        for column, key in enumerate(("ink", "ground", "family"), 1):
            word = glyphs.attributes[key][truth[column]]
            assert (f" {word}" in text) or not named[column]
        assert ("bold" in text) == named[4] and ("italic" in text) == named[5]
        assert glyphs.shapes[truth[0]] in text and set(text.split()) <= set(glyphs.words)
        inks = set(text.split(" on ")[0].split()) & set(data.COLOURS)
        assert inks == ({list(data.COLOURS)[truth[1]]} if named[1] else set())
        assert (" on " in text) == named[2]
    assert glyphs.batch(200, g(), "held_out").named[:, 1].all()               # what is unseen is asked for
    assert 0 < (~batch.named[:, 1]).float().mean() < .5      # some captions forget the ink


def test_ink_never_hides_on_its_own_colour(glyphs):
    for split in ("train", "held_out"):
        truth = glyphs.batch(2000, g(), split).truth
        assert (truth[:, 1] != truth[:, 2]).all()


def test_rendering_is_no_bottleneck(glyphs, base):
    """Drawing a batch costs at most a fifth of merely running the network once on it, in the same run."""
    def best(work):
        times = []
        for _ in range(7):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)
    batch = glyphs.batch(32)
    with torch.no_grad():
        z, cond, t = base.encode(batch.image), base.condition(batch.caption), torch.full((32,), 500)
        assert best(lambda: glyphs.batch(32)) < best(lambda: base.predict(z, t, cond)) / 5


def test_fashion_is_fashion_mnist():
    fashion = data.build("fashion")
    batch = fashion.batch(500, g(), "test")
    assert batch.image.shape == (500, 3, 32, 32) and len(fashion.labels["train"]) == 60000
    assert torch.equal(batch.image[:, 0], batch.image[:, 2]) and batch.image[:, :, :2].max() == -1
    assert torch.bincount(fashion.labels["test"]).tolist() == [1000] * 10
    assert "a photo of an ankle boot" in batch.caption


def test_fashion_missing_says_all_three_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(data.FASHION_MD5, "train-images-idx3-ubyte", "no such sum")
    monkeypatch.setattr(data, "FASHION_HOME", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match="apt install.*download failed.*put the four"):
        data.fashion_file("train-images-idx3-ubyte")


# ------------------------------------------------------------------------------------------------ your folder

def folder(path, n=3, table=True):
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
    source = data.build(str(folder(tmp_path / "mine", table=table)))
    batch = source.batch(64, g())
    assert (batch.image.shape == (64, 3, 32, 32)
            and set(batch.caption) == {"a picture 0", "a picture 1", "a picture 2"})
    assert source.name == "mine"
    for image, text in zip(batch.image, batch.caption):      # the right caption stays with the right picture
        assert abs((image[0].mean() + 1) * 127.5 - 80 * int(text[-1])) < 1


def test_bad_folders_each_get_a_sentence(tmp_path):
    def complaint(path):
        with pytest.raises((ValueError, OSError)) as caught:
            data.build(str(path))
        return str(caught.value)

    assert "wanted glyphs, fashion, or a folder" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in complaint(tmp_path / "empty")
    (folder(tmp_path / "silent", table=False) / "1.txt").unlink()
    assert "no caption, first 1.png" in complaint(tmp_path / "silent")
    (folder(tmp_path / "broken") / "2.png").write_bytes(b"this is no picture")
    assert "2.png" in complaint(tmp_path / "broken")
    (folder(tmp_path / "cut") / "2.png").write_bytes((tmp_path / "cut" / "2.png").read_bytes()[:60])
    assert "2.png" in complaint(tmp_path / "cut")
    (folder(tmp_path / "table") / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    assert "line 1" in complaint(tmp_path / "table")
    (folder(tmp_path / "out") / "metadata.jsonl").write_text('{"file_name": "../broken/0.png", "text": "a"}')
    assert "outside" in complaint(tmp_path / "out")
    (folder(tmp_path / "null") / "metadata.jsonl").write_text('{"file_name": "0.png", "text": null}')
    assert "line 1" in complaint(tmp_path / "null")
    (folder(tmp_path / "latin", table=False) / "1.txt").write_bytes("für".encode("latin-1"))
    assert "UTF-8" in complaint(tmp_path / "latin")
    (folder(tmp_path / "gone") / "0.png").unlink()
    assert "0.png" in complaint(tmp_path / "gone")


def test_what_a_data_folder_may_not_do(tmp_path, monkeypatch):
    """No file of it leads out, none is a program, none waits for ever, none fills the memory."""
    def complaint(name, prepare, table=True):
        prepare(folder(tmp_path / name, table=table))
        with pytest.raises((ValueError, OSError)) as caught:
            data.build(str(tmp_path / name))
        return str(caught.value)

    (tmp_path / "secret").write_text("root:x:0:0")
    (tmp_path / "elsewhere.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    def link(name, target):
        return lambda path: ((path / name).unlink(), (path / name).symlink_to(target))
    assert "1.txt lies outside" in complaint("caption", link("1.txt", tmp_path / "secret"), table=False)
    assert "jsonl lies outside" in complaint("table", link("metadata.jsonl", tmp_path / "elsewhere.jsonl"))
    assert "lies outside" in complaint("picture", link("0.png", tmp_path / "caption" / "2.png"))
    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert "0.png" in complaint("program", lambda path: (path / "0.png").write_bytes(program))
    assert not called.exists()
    def pipe(path):
        (path / "0.png").unlink(), os.mkfifo(path / "0.png")
    assert "no such file" in complaint("pipe", pipe)
    assert "32 bits" in complaint("deep", lambda path: Image.new("F", (9, 9)).save(path / "0.png", "TIFF"))
    def vast(path):
        Image.new("1", (12000, 9000)).save(path / "0.png")
    assert "100 million pixels" in complaint("vast", vast)


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "3f2a"
    folder(blobs, n=4)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(set(data.build(str(snapshot)).batch(4, g()).caption)) == 4


def test_tables_may_be_csv_and_parquet_says_what_it_needs(tmp_path):
    path = folder(tmp_path / "mine")
    (path / "metadata.jsonl").unlink()
    (path / "metadata.csv").write_text('file_name,text\n1.png,"a cat, asleep"\n2.png,a dog\n')
    source = data.build(str(path))
    assert source.captions == ["a cat, asleep", "a dog"]
    assert [p.name for p in source.paths] == ["1.png", "2.png"]
    (path / "metadata.csv").write_text("picture,text\n1.png,a cat\n")
    with pytest.raises(ValueError, match="metadata.csv line 2: wanted"):
        data.build(str(path))
    (path / "metadata.csv").rename(path / "metadata.parquet")
    with pytest.raises(ValueError, match="pip install pyarrow|cannot read"):
        data.build(str(path))


def test_a_few_broken_images_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    path = folder(tmp_path / "many", n=120)
    (path / "7.png").write_bytes(b"no picture")
    for keep in (2 ** 30, 0):                                # in memory, or read when asked for
        monkeypatch.setattr(data, "KEEP", keep)
        source = data.build(str(path))
        captions = source.batch(119, g()).caption
        assert len(set(captions)) == 119 and "a picture 7" not in captions
        assert "7.png" in capsys.readouterr().out
    for i in (8, 9):
        (path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the image .* of 120 images are broken"):
        data.build(str(path)).batch(119, g())


def test_what_memory_keeps_and_what_disk_gives_is_the_same(tmp_path, monkeypatch):
    path = folder(tmp_path / "mine", n=12)
    kept = data.build(str(path)).batch(5, g())
    monkeypatch.setattr(data, "KEEP", 0)
    read = data.build(str(path)).batch(5, g())
    assert torch.equal(kept.image, read.image) and kept.caption == read.caption
    assert torch.equal(kept.frame, read.frame)


def test_the_frame_says_what_was_cut(tmp_path):
    Image.new("RGB", (40, 60)).save(folder(tmp_path / "mine", n=1) / "0.png")
    batch = data.build(str(tmp_path / "mine")).batch(1)
    assert batch.frame.tolist() == [[60, 40, 8, 0]]          # 40x60 -> 32x48, eight rows above, eight below
    Image.new("RGB", (128, 64)).save(tmp_path / "mine" / "0.png")
    assert data.build(str(tmp_path / "mine"), 16).batch(1).frame.tolist() == [[64, 128, 0, 8]]


def test_contact_sheet_command(tmp_path):
    for name in ("glyphs", "fashion"):
        path = tmp_path / f"{name}.png"
        done = subprocess.run([sys.executable, "data.py", "--show", name, "--out", path], cwd=ROOT,
                              capture_output=True)
        assert done.returncode == 0 and Image.open(path).size[0] > 1000
    done = subprocess.run([sys.executable, "data.py", "--show", "cats"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "no data set 'cats'" in done.stderr and "Traceback" not in done.stderr
