"""Reading a folder of captioned images: which files count, and what tables say."""

import io
import json
import os

import pytest
from PIL import Image
from test_data import make_image_folder, seeded

import data
from utils import image_folder


def complaint(path):
    """The sentence with which a folder is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        data.build_dataset(str(path))
    return str(caught.value)


def captions_of(path):
    return image_folder.list_images(path)[1]


def saved(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ which files count

def add_image(path, text="a caption", format=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, format)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


@pytest.mark.parametrize("suffix, format", [
    ("png", "PNG"), ("PNG", "PNG"), ("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("jpe", "JPEG"),
    ("jfif", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF"), ("tiff", "TIFF"),
    ("TIF", "TIFF"), ("apng", "PNG"), ("mpo", "JPEG")])
def test_every_format_is_found_here_and_in_sub_folders(tmp_path, capsys, suffix, format):
    add_image(tmp_path / "a.png", "first")
    add_image(tmp_path / f"c.{suffix}", "second", format)
    add_image(tmp_path / "sub" / "deep" / f"c.{suffix}", "third", format)
    dataset = data.build_dataset(str(tmp_path))
    assert sorted(dataset.sample_batch(3).caption) == ["first", "second", "third"]
    assert capsys.readouterr().out == ""


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path, capsys):
    add_image(tmp_path / "a.png")
    for name in ("b.avif", "b.txt", "sub/README.md", "sub/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something")
    (tmp_path / "link").symlink_to(tmp_path / "sub", target_is_directory=True)
    assert captions_of(tmp_path) == ["a caption"]
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "left out: 5 file" in line
    for name in ("b.avif", "b.txt", "sub/README.md", "sub/c.mp4", "link/"):
        assert name in line
    for i in range(30):
        (tmp_path / f"{i}.mp4").write_text("")
    captions_of(tmp_path)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "left out: 35 file" in line and "and 25 more" in line


def test_images_that_a_table_does_not_list_are_named(tmp_path, capsys):
    path = make_image_folder(tmp_path / "mine")
    add_image(path / "sub" / "more.png", None)
    (path / "metadata.csv").write_text("file_name,text\n")
    assert len(captions_of(path)) == 3
    line = capsys.readouterr().out
    assert "left out: 2 file" in line and "sub/more.png" in line and "metadata.csv" in line


def test_a_table_may_name_its_files_in_any_way(tmp_path, capsys, monkeypatch):
    path = make_image_folder(tmp_path / "mine")
    (path / "sub").mkdir()
    names = ["./0.png", "sub/../1.png", str(path / "2.png")]
    (path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in names))
    monkeypatch.chdir(tmp_path)
    for folder in (str(path), "mine", "./mine/"):
        assert data.build_dataset(folder).captions == names
        assert capsys.readouterr().out == ""


def test_tables_in_sub_folders_hold_there(tmp_path, capsys):
    make_image_folder(tmp_path / "train", n=2)
    add_image(tmp_path / "test" / "a.png", "beside")
    paths, captions = image_folder.list_images(tmp_path)
    assert captions == ["a picture 0", "a picture 1", "beside"]
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == ["train/0.png", "train/1.png", "test/a.png"]
    assert capsys.readouterr().out == ""


def test_system_files_are_ignored_silently(tmp_path, capsys):
    add_image(tmp_path / "a.png")
    for name in ("._a.png", "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes",
                 "__MACOSX/._a.png", ".git/a.png", ".ipynb_checkpoints/a.png", "sub/.DS_Store",
                 "sub/._b.png", ".AppleDouble/a.png", "@eaDir/a.png/b.jpg", "sub/@eaDir/..jpg",
                 ".Trashes/a.png", ".Spotlight-V100/a.png", ".TemporaryItems/a.png", "$RECYCLE.BIN/a.png",
                 ".Trash-1000/files/a.png", ".thumbnails/a.png", ".svn/a.png", ".hg/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert captions_of(tmp_path) == ["a caption"]
    assert capsys.readouterr().out == ""
    assert len(data.build_dataset(str(tmp_path)).sample_batch(2).caption) == 2


def test_captions_in_upper_case_files_are_found(tmp_path):
    add_image(tmp_path / "a.png", None)
    (tmp_path / "a.TXT").write_text("upper case")
    assert captions_of(tmp_path) == ["upper case"]


def test_bad_folders_each_get_a_sentence(tmp_path):
    assert "wanted glyphs, fashion, a folder" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no images" in complaint(tmp_path / "empty")
    (tmp_path / "empty" / "a.avif").write_text("")
    assert "found 1 other file(s): a.avif" in complaint(tmp_path / "empty")
    (make_image_folder(tmp_path / "uncaptioned", table=False) / "1.txt").unlink()
    assert "no caption, first 1.png" in complaint(tmp_path / "uncaptioned")
    add_image(tmp_path / "uncaptioned in sub" / "sub" / "a.png", None)
    assert "no caption, first sub/a.png: write one in sub/a.txt" in complaint(tmp_path / "uncaptioned in sub")
    (make_image_folder(tmp_path / "broken") / "2.png").write_bytes(b"this is no picture")
    assert "2.png" in complaint(tmp_path / "broken")
    path = make_image_folder(tmp_path / "cut") / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "2.png" in complaint(tmp_path / "cut")
    (make_image_folder(tmp_path / "gone") / "0.png").unlink()
    assert "0.png" in complaint(tmp_path / "gone")
    for encoding in ("latin-1", "utf-16"):
        folder = make_image_folder(tmp_path / encoding, table=False)
        (folder / "1.txt").write_bytes("für".encode(encoding))
        assert "1.txt is not UTF-8" in complaint(folder)


def test_what_a_data_folder_may_not_do(tmp_path, monkeypatch):
    """No file of it leads out, none is a program, none waits for ever, none fills the memory."""
    def complaint_after(name, prepare, table=True):
        prepare(make_image_folder(tmp_path / name, table=table))
        return complaint(tmp_path / name)

    def link(name, target):
        def prepare(path):
            (path / name).unlink()
            (path / name).symlink_to(target)
        return prepare

    def pipe(name):
        def prepare(path):
            (path / name).unlink()
            os.mkfifo(path / name)
        return prepare

    (tmp_path / "secret").write_text("root:x:0:0")
    (tmp_path / "elsewhere.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    outside = tmp_path / "caption" / "2.png"
    assert "1.txt lies outside" in complaint_after("caption", link("1.txt", tmp_path / "secret"), table=False)
    table = tmp_path / "elsewhere.jsonl"
    assert "jsonl lies outside" in complaint_after("table", link("metadata.jsonl", table))
    assert "lies outside" in complaint_after("image", link("0.png", outside))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x.png").write_bytes(outside.read_bytes())
    assert "lies outside" in complaint_after("not a snapshot", link("0.png", tmp_path / "blobs" / "x.png"))
    assert "not a regular file" in complaint_after("waiting caption", pipe("1.txt"), table=False)
    assert "not a regular file" in complaint_after("waiting table", pipe("metadata.jsonl"))
    assert "no such file" in complaint_after("waiting image", pipe("0.png"))

    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert "0.png" in complaint_after("program", lambda path: (path / "0.png").write_bytes(program))
    assert not called.exists()

    for name, image in (("32 bits", Image.new("F", (9, 9))), ("100 million", Image.new("1", (12000, 9000)))):
        content = saved(image, "TIFF" if image.mode == "F" else "PNG")
        assert name in complaint_after(name, lambda path, c=content: (path / "0.png").write_bytes(c))


@pytest.mark.parametrize("sub_folder", ["", "train", "data/train"])
def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path, sub_folder):
    (tmp_path / "datasets--x").mkdir()
    blobs = make_image_folder(tmp_path / "datasets--x" / "blobs", n=4)
    snapshot = tmp_path / "datasets--x" / "snapshots" / "3f2a"
    folder = snapshot / sub_folder
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    for root in {snapshot, folder}:    # the whole snapshot, or a folder inside it
        assert len(set(data.build_dataset(str(root)).sample_batch(4, seeded()).caption)) == 4
    blobs.rename(tmp_path / "other disk")
    blobs.symlink_to(tmp_path / "other disk")
    assert len(data.build_dataset(str(snapshot)).captions) == 4


# ----------------------------------------------------------------------------------------------------- tables

def test_tables_are_refused_with_their_line(tmp_path):
    for content, sentence in (('{"file_name": "0.png"}', "line 1"), ("\n\n{", "line 3"),
                              ('{"file_name": "0.png", "text": null}', "line 1"), ("[1]", "line 1"),
                              ('{"file_name": "../broken/0.png", "text": "a"}', "outside")):
        (make_image_folder(tmp_path / "mine") / "metadata.jsonl").write_text(content)
        assert sentence in complaint(tmp_path / "mine")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\u0085b", "a\u2028\u2029\u0085\u00a0b", "a\\nb",
                                  "a\x7fb"])
def test_captions_of_json_lines_may_hold_unicode_line_ends(tmp_path, text, end):
    path = make_image_folder(tmp_path / "mine")
    lines = [f'{{"file_name": "{i}.png", "text": "{text}"}}' for i in range(2)]
    (path / "metadata.jsonl").write_text(end.join([*lines, ""]), encoding="utf-8", newline="")
    assert captions_of(path) == [text.replace("\\n", "\n")] * 2


def csv_folder(path, content):
    make_image_folder(path)
    (path / "metadata.jsonl").unlink(missing_ok=True)
    (path / "metadata.csv").write_bytes(content.encode())
    return path


@pytest.mark.parametrize("content, captions", [
    ('file_name,text\n1.png,"a cat, asleep"\n2.png,a dog\n', ["a cat, asleep", "a dog"]),
    ('file_name,text\r\n1.png,"two\r\nlines"\r\n', ["two\r\nlines"]),
    ('file_name,text\n1.png,"two\nlines"\n2.png,"\n\nthree"\n', ["two\nlines", "three"]),
    ('file_name,text\n1.png,"a ""quoted"" word"\n', ['a "quoted" word']),
    ('file_name,text\n\n1.png,a\u2028b\n\n2.png,a\x0bb\x0c\x1cb\n\n', ["a\u2028b", "a\x0bb\x0c\x1cb"]),
    ("\ufefffile_name,text\n1.png,a\n", ["a"]),
    (",text,file_name\n0,a,1.png\n1,b,2.png\n", ["a", "b"]),
    ("file_name,text\r1.png,a\r2.png,b\r", ["a", "b"]),
    ("file_name,text\n1.png,\n", [""])])
def test_csv_tables(tmp_path, content, captions):
    path = csv_folder(tmp_path / "mine", content)
    paths, found = image_folder.list_images(path)
    assert found == captions
    assert {p.name for p in paths} <= {"1.png", "2.png"}


@pytest.mark.parametrize("content, sentence", [
    ("picture,text\n1.png,a cat\n", "line 1: wanted a column file_name and a column text"),
    ("file_name;text\n1.png;a cat\n", "line 1: wanted a column"),
    ("file_name,text,text\n1.png,a,b\n", "line 1: wanted a column"),
    ("file_name,text\n1.png,a\n2.png,a cat, asleep\n", "line 3: wanted 2 fields as in the header, found 3"),
    ("file_name,text\n1.png\n", "line 2: wanted 2 fields as in the header, found 1"),
    ("file_name,text,x\n1.png,a\n", "line 2: wanted 3 fields"),
    ('file_name,text\n1.png,"two\nlines"\n2.png\n', "line 4: wanted 2 fields"),
    ('file_name,text\n1.png,a\n\n2.png,"open\n\n', "line 4: this is not CSV"),
    ('file_name,text\n1.png,"a"b\n', "line 2: this is not CSV"),
    ("file_name,text\n1.png," + "a" * 200000 + "\n", "line 2: this is not CSV"),
    ("file_name,text\n", "metadata.csv lists none")])
def test_bad_csv_tables_are_refused_with_their_line(tmp_path, content, sentence):
    message = complaint(csv_folder(tmp_path / "mine", content))
    assert sentence in message and "metadata.csv" in message


def test_tables_that_are_not_utf8_are_named(tmp_path):
    for name in ("metadata.jsonl", "metadata.csv"):
        path = make_image_folder(tmp_path / name)
        (path / "metadata.jsonl").unlink()
        (path / name).write_bytes('{"file_name": "0.png", "text": "für"}'.encode("latin-1"))
        assert f"{name} is not UTF-8" in complaint(path)


def test_parquet_says_what_it_needs(tmp_path):
    path = make_image_folder(tmp_path / "mine")
    (path / "metadata.jsonl").rename(path / "metadata.parquet")
    assert "pip install pyarrow" in complaint(path) or "cannot read" in complaint(path)


def test_a_caption_must_be_text(tmp_path):
    path = make_image_folder(tmp_path / "mine", n=1)
    (path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a \\ud83d cat"}')
    assert "0.png" in complaint(path) and "surrogate" in complaint(path)
