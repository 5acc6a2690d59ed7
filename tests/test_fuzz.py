"""Nonsense in bulk. Whatever is typed, written into a file or put into a folder, the answer is one clear
sentence and exit code 2, or it simply works. `python tests/test_fuzz.py` prints the table of NOTES.md."""

import io
import json
import pickle
import random
import shutil
import struct
import typing
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import benchmark
import data
import evaluate
import models
import pretrain
import study
import train

WEIRD = {"empty": "", "blank": "  \t ", "10,000 characters": "cat " * 2500, "one long word": "c" * 10000,
         "emoji": "a 🐈‍⬛ on a 🛋️", "control characters": "a\x00\x07\x1b[31mcat\x7f",
         "right to left": "قطة على أريكة",
         "marks upon marks": "c" + "\u0301" * 300, "half a character": "a \ud83d cat", "lines": "a\ncat\r\n",
         "markup": "<script>alert(1)</script>", "a shell's": "$(touch canary); `touch canary`",
         "a path": "../../etc/passwd", "a format's": "%s %n {0} {x.__class__}"}
TYPED = {  # main: command lines, as typed
    train: """--method | --method gan | --seed 99999999999999999999 | --samples 99999999999
        --set batch=100000000000 | --model sd15 | --method ADT | --model dalle
        --model sd15 --weights nowhere | --model sd15 --weights .
        --model sdxl --weights nobody | --model sd3 --size 100 --weights .
        --data cats | --data /dev/null | --data README.md | --data ../.. | --steps 0 | --steps -3
        --steps 1.5 | --steps many | --steps 99999999999999999999x | --samples 3 | --samples -1 | --samples x
        --seed x | --set | --set batch | --set =3 | --set batch= | --set batch=3=4 | --set lambda=1
        --set __class__=1 | --lora x | --size 64 | --size -1 | --shard | --resume nowhere
        --resume . | --resume README.md | --weights nowhere | --weights README.md | --weights .
        --features nowhere | --features README.md | --on-nan explode
        --nonsense | nonsense | --out README.md | --out . | --out /dev/null/x
        --method add --set path_steps=4 | --method diffusion --set lambda_adv=1 | --method add --set last=0
        --method add --set student_steps=1001 | --set path_steps=1001 | --set path_steps=0 | --set leak=2
        --method add --set teacher_steps=0 | --set train_steps=0 | --method add --set own=2
        --model sd15 --set features=cnn --weights nowhere | --lora 4 | --lean""",
    evaluate: """nowhere | README.md | . | base --steps x | base --steps 0 | base --steps 1001
        base --steps 1, | base --steps -1 | base --guidance x | base --guidance -1 | base --guidance nan
        base --fresh 2 | base --shift 0 | base --shift -1 | base --shift nan | base --samples 3
        base --samples x | base --split moon | base --split held_out --data fashion
        base --data cats | --data /dev/null | base --prompt zebra | base --out /nowhere/x.png
        base --model dalle | base --seed x | base --seed 99999999999999999999 | base --out notes.txt
        base --out tests | base --images README.md | base --images tests | base --samples 99999999999
        --nonsense | base --model sd15 --weights nowhere --data glyphs
        add --data cats | base --size 64""",
    pretrain: """--data cats | --steps 0 | --steps x | --target z | --only everything | --out README.md
        --nonsense | --data README.md""",
    data: """--show | --show cats | --show README.md | --show glyphs --out /nowhere/x.png | --seed 1
        --show glyphs --out tests | --show glyphs --out x.txt
        --nonsense""",
    study: """nothing | adt --data cats | adt --samples 3 | adt --seeds x | add --out README.md | --nonsense
        adt --seeds 0 | adt --seeds -1 | adt --steps 0 | adt --steps -5""",
    benchmark: "nothing | start --out /nowhere/x.md | start --out tests | --nonsense"}


def typed():
    for module, lines in TYPED.items():
        for line in lines.replace("\n", "|").split("|"):
            yield f"{module.__name__}.py", line.strip(), module.main, line.split()


def settings():
    """Every field of every Config, given what it is not."""
    for method, (module, *_) in train.METHODS.items():
        for key, kind in typing.get_type_hints(module.Config).items():
            wrong = ["", "x", "-1", "nan", "inf", "1e999"] if kind in (int, float) else ["", "Nonsense"]
            for value in wrong if kind is not str else []:
                yield "--set", f"{method}: {key}={value}", train.main, ["--method", method, "--set",
                                                                        f"{key}={value}"]


def look(folder):
    """What every program does with a folder: read it, take a batch."""
    try:
        batch = data.build(str(folder)).batch(4)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error}") from None
    assert batch.image.shape == (4, 3, 32, 32) and batch.image.isfinite().all() and len(batch.caption) == 4
    assert batch.image.abs().max() <= 1


def picture(path, mode="RGB", size=(40, 30), **how):
    Image.new(mode, size).save(path, **how)


METADATA = {
    "nothing in it": b"", "not JSON": b"a.png, a cat\n", "a list": b'["a.png", "a cat"]\n',
    "a number": b"3\n",
    "null": b"null\n", "no text": b'{"file_name": "a.png"}\n', "no file_name": b'{"text": "a cat"}\n',
    "text is null": b'{"file_name": "a.png", "text": null}\n',
    "text is a number": b'{"file_name": "a.png", "text": 3}\n',
    "file_name is a list": b'{"file_name": ["a.png"], "text": "a cat"}\n',
    "file_name is empty": b'{"file_name": "", "text": "a cat"}\n',
    "file_name is the folder": b'{"file_name": ".", "text": "a cat"}\n',
    "file_name with a zero byte": b'{"file_name": "a\\u0000.png", "text": "a cat"}\n',
    "file_name of 5,000 letters": b'{"file_name": "' + b"a" * 5000 + b'.png", "text": "a cat"}\n',
    "no such picture": b'{"file_name": "b.png", "text": "a cat"}\n',
    "a path upwards": b'{"file_name": "../outside.png", "text": "a cat"}\n',
    "an absolute path": b'{"file_name": "/etc/passwd", "text": "a cat"}\n',
    "a link to the outside": b'{"file_name": "link.png", "text": "a cat"}\n',
    "a folder that is a link": b'{"file_name": "door/outside.png", "text": "a cat"}\n',
    "half a line": b'{"file_name": "a.png", "te', "Latin-1": b'{"file_name": "a.png", "text": "caf\xe9"}\n',
    "UTF-16": '{"file_name": "a.png", "text": "a cat"}\n'.encode("utf-16"), "zero bytes": b"\0" * 100,
    "a byte order mark": b'\xef\xbb\xbf{"file_name": "a.png", "text": "a cat"}\n',
    "nested 100,000 deep": b"[" * 100000,
    "a huge number": b'{"file_name": "a.png", "text": ' + b"9" * 5000 + b"}\n",
    "blank lines": b'\n\n{"file_name": "a.png", "text": "a cat"}\n\n',
    "half a character": WEIRD["half a character"],
    "the same picture twice": b'{"file_name": "a.png", "text": "a cat"}\n' * 2,
    "Windows line ends": b'{"file_name": "a.png", "text": "a cat"}\r\n',
    "more keys": b'{"file_name": "a.png", "text": "a cat", "licence": "MIT"}\n'}
TABLES = {"metadata.csv": {"empty": b"", "no columns": b"a,b\n1,2\n",
                           "too few cells": b"file_name,text\na.png\n", "zero bytes": b"\0\0,\0\n",
                           "too many cells": b"file_name,text\na.png,a cat,and more\n",
                           "a cell of a megabyte": b'file_name,text\na.png,"' + b"a" * 2 ** 20 + b'"\n',
                           "an open quote": b'file_name,text\na.png,"a cat\n'},
          "metadata.parquet": {"text": b"file_name,text\n", "empty": b"", "only the magic": b"PAR1PAR1"}}


def folders():
    """Metadata in all kinds of disorder, beside one good picture."""
    def write(folder, name, content):
        picture(folder / "a.png"), picture(folder.parent / "outside.png")
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        (folder / "door").symlink_to(folder.parent)
        if isinstance(content, str):
            content = json.dumps({"file_name": "a.png", "text": content}).encode() + b"\n"
        (folder / name).write_bytes(content)
        look(folder)
    for what, content in METADATA.items():
        yield "metadata.jsonl", what, write, ["metadata.jsonl", content]
    for name, cases in TABLES.items():
        for what, content in cases.items():
            yield name, what, write, [name, content]
    for what, text in WEIRD.items():
        yield "captions", f"{what}, in metadata.jsonl", write, ["metadata.jsonl", text]

    def beside(folder, text):
        picture(folder / "a.png")
        (folder / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
        look(folder)
    for what, text in WEIRD.items():
        yield "captions", f"{what}, in a.txt", beside, [text]

    def asked(folder, text):
        evaluate.main(["base", "--data", "glyphs", "--steps", "1", "--prompt", text,
                       "--out", str(folder / "x.png")])
    for what, text in WEIRD.items():
        yield "captions", f"{what}, as --prompt", asked, [text]


def images():
    """Pictures as they come from the world, each alone in a folder with its caption."""
    def case(folder, name, make):
        make(folder / name)
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
        look(folder)
    def png(path, width, height, body=b""):
        def chunk(kind, content):
            return (struct.pack(">I", len(content)) + kind + content
                    + struct.pack(">I", zlib.crc32(kind + content)))
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
    def cut(path, share):
        picture(path, size=(400, 300))
        whole = path.read_bytes()
        path.write_bytes(whole[:int(share * len(whole))])
    def noise(path):
        path.write_bytes(random.Random(0).randbytes(5000))
    def turned(path):
        exif = Image.Exif()
        exif[274] = 6
        picture(path, exif=exif)
    def animated(path):
        frames = [Image.new("P", (30, 40), i) for i in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    made = {"0 bytes.png": lambda p: p.touch(), "truncated at 10%.png": lambda p: cut(p, .1),
            "truncated at 90%.png": lambda p: cut(p, .9), "truncated at half.jpg": lambda p: cut(p, .5),
            "one pixel.png": lambda p: picture(p, size=(1, 1)),
            "20,000 pixels wide.png": lambda p: picture(p, size=(20000, 10)),
            "one wide, 20,000 high.png": lambda p: picture(p, size=(1, 20000)),
            "CMYK.jpg": lambda p: picture(p, "CMYK"), "16 bits.png": lambda p: picture(p, "I;16"),
            "32 bits.tiff": lambda p: picture(p, "I"), "floats.tiff": lambda p: picture(p, "F"),
            "black and white.png": lambda p: picture(p, "1"), "a palette.png": lambda p: picture(p, "P"),
            "transparent.png": lambda p: picture(p, "RGBA"), "grey and alpha.png": lambda p: picture(p, "LA"),
            "animated.gif": animated, "rotated by EXIF.jpg": turned,
            "text named png.png": lambda p: p.write_text("this is no picture"),
            "noise named jpg.jpg": noise, "a folder named png.png": lambda p: p.mkdir(),
            "no pixels.png": lambda p: png(p, 0, 0),
            "a bomb of 2,500 megapixels.png": lambda p: png(p, 50000, 50000),
            "a size it does not keep.png": lambda p: png(p, 3000, 3000, b"\0" * 10),
            "a link to nowhere.png": lambda p: p.symlink_to("nowhere"),
            "a link to itself.png": lambda p: p.symlink_to(p),
            "wrong ending.jpg": lambda p: picture(p, format="PNG"), "bmp.bmp": picture, "webp.webp": picture,
            "svg.svg": lambda p: p.write_text("<svg/>"),
            "EPS.eps": lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}
    for name, make in made.items():
        yield "images", name.rsplit(".", 1)[0], case, [name, make]


class Evil:
    """A pickle that would run a command."""
    def __reduce__(self):
        return open, (str(ROOT / "canary"), "w")


def resumed(folder, name, content):
    """Go on with a finished run of which one file is now another."""
    folder = made("adt", folder)
    (folder / name).write_bytes(content)
    train.main(["--resume", str(folder), "--samples", "0"])


def checkpoints():
    """Files that are not the checkpoint of this run, or not quite."""
    def bundle(content):
        packed = io.BytesIO()
        torch.save(content, packed)
        return packed.getvalue()
    def zipped():
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Evil()))
        return packed.getvalue()
    state = {"of": ["adt", "glyphs", 0], "weights": [], "average": [], "done": 0, "skipped": 0, "critic": {},
             "opt_g": {}, "opt_d": {}}
    held = {
        "0 bytes": b"", "text": b"no checkpoint", "zero bytes": b"\0" * 1000, "a list": bundle([1, 2]),
        "a number": bundle(3), "an empty dictionary": bundle({}),
        "no weights": bundle({**state, "weights": None}),
        "numbers for weights": bundle({**state, "weights": [1, 2]}), "another network's": bundle(state),
        "an older version's": bundle({"network": {}, "step": 3}), "an evil pickle": pickle.dumps(Evil()),
        "an evil pickle, zipped": zipped(), "an evil pickle, by torch": bundle({**state, "done": Evil()})}
    for what, content in held.items():
        yield "checkpoint.pt", what, resumed, ["checkpoint.pt", content]
    def cut(folder, share):
        whole = (made("adt", folder) / "checkpoint.pt").read_bytes()
        resumed(folder, "checkpoint.pt", whole[:int(share * len(whole))])
    for share in (.01, .3, .6, .9, .999):
        yield "checkpoint.pt", f"cut off at {share:.1%}", cut, [share]
    yield "checkpoint.pt", "of another method", lambda folder: resumed(
        folder, "checkpoint.pt", (made("add", folder) / "checkpoint.pt").read_bytes()), []


def plans():
    """A run's config.json, after somebody edited it."""
    plan = {"method": "adt", "model": "tiny", "data": "glyphs", "weights": None, "features": None,
            "size": None, "lora": 0, "lean": False, "shard": False, "on_nan": "stop", "world": 1, "seed": 0,
            "steps": 2, "set": []}
    held = {"empty": b"", "text": b"no plan", "a list": b"[]", "null": b"null", "nothing in it": b"{}",
            "zero bytes": b"\0" * 50, "nested 100,000 deep": b"[" * 100000,
            **{f"{key} is {value!r}": json.dumps({**plan, key: value}).encode() for key, value in [
                 ("method", "gan"), ("method", 3), ("method", None), ("model", "dalle"), ("model", []),
                 ("data", "cats"), ("data", 3), ("data", None), ("seed", "x"), ("seed", None),
                 ("steps", "many"), ("steps", 0), ("steps", -1), ("steps", None), ("steps", 1.5),
                 ("set", "batch=2"), ("set", 3), ("set", [3]), ("set", ["batch"]),
                 ("weights", "nowhere"), ("weights", 3), ("size", "big"), ("world", 2), ("world", "x"),
                 ("on_nan", 3),
                 ("size", 64), ("lora", "x"), ("features", 5), ("shard", "yes"), ("set", None)]}}
    for what, content in held.items():
        yield "config.json", what, resumed, ["config.json", content]


def networks():
    """Weights that are of something else, or lie about themselves."""
    def weights(folder, content, program):
        path = folder / "denoiser.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, content[1])
        if program is train:
            train.main(["--weights", str(path), "--out", str(folder / "run"), "--samples", "0"])
        else:
            evaluate.main([str(path), "--data", "glyphs", "--steps", "1", "--prompt", "a red star",
                           "--out", str(folder / "x.png")])
    one, tiny = {"x": torch.zeros(1)}, models.build("tiny", "glyphs")
    good = {"words": json.dumps(["a"]), "target": json.dumps("flow")}
    held = {"0 bytes": b"", "text": b"no weights", "noise": random.Random(1).randbytes(3000),
            "a header of 2^60 bytes": struct.pack("<Q", 2 ** 60) + b"{}",
            "an evil pickle": pickle.dumps(Evil()),
            "no header": (one, {}), "another network": (one, good), "no tensors": ({}, good),
            "header: words are not JSON": (one, {**good, "words": "a b"}),
            "header: words are a number": (one, {**good, "words": "3"}),
            "header: words are null": (one, {**good, "words": "null"}),
            "header: a word is a number": (one, {**good, "words": "[3]"}),
            "header: a target of its own": (one, {**good, "target": '"z"'}),
            "header: target is a list": (one, {**good, "target": "[]"}),
            "no numbers": ({name: torch.full_like(value, float("nan"))
                            for name, value in tiny.state_dict().items()},
                           {"words": json.dumps(tiny.words), "target": json.dumps(tiny.target)})}
    for what, content in held.items():
        for program in (train, evaluate):
            yield "weights", f"{what}, {program.__name__}.py", weights, [content, program]


KEPT = {}


def made(method, folder):
    """A copy of a small finished run of that method."""
    if method not in KEPT:
        KEPT[method] = folder.parent / f"a-run-of-{method}"
        with redirect_stderr(io.StringIO()):
            train.main(["--method", method, "--steps", "1", "--set", "batch=2", "--samples", "0",
                        "--out", str(KEPT[method])])
    target = folder / method
    shutil.copytree(KEPT[method], target, dirs_exist_ok=True)
    return target


CASES = [case for cases in (typed, settings, folders, images, checkpoints, plans, networks)
         for case in cases()]


def outcome(act, arguments, folder):
    """-> 'works', or the sentence. Anything else is an error of ours, and raises."""
    folder.mkdir()
    takes_folder = act not in (module.main for module in TYPED)
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            safe = ["--out", str(folder / ("run.png" if act is evaluate.main else "run"))]
            safe += ["--steps", "1"] * (act is train.main)
            act(folder, *arguments) if takes_folder else act([*safe, *arguments])
        return "works"
    except SystemExit as left:
        sentence = left.code if isinstance(left.code, str) else said.getvalue()
        assert isinstance(left.code, str) or left.code == 2, (left.code, sentence)
    last = sentence.strip().splitlines()[-1]
    usage = sentence.startswith("usage:") or "usage:" in sentence
    assert usage or len(sentence.strip().splitlines()) == 1, sentence
    assert 10 < len(last) < 1200 and "Traceback" not in sentence, sentence
    return last


def untouched():
    """When what lies in the repository was last written to."""
    return {p: p.stat().st_mtime_ns for p in ROOT.rglob("*")
            if not {".git", "__pycache__", ".pytest_cache", ".venv", "venv"} & set(p.relative_to(ROOT).parts)}


@pytest.mark.parametrize("act,arguments", [case[2:] for case in CASES],
                         ids=[f"{where}: {what}"[:80] for where, what, *_ in CASES])
def test_nonsense_gets_a_sentence(act, arguments, tmp_path, monkeypatch):
    before = untouched()
    monkeypatch.chdir(ROOT)
    outcome(act, arguments, tmp_path / "case")
    assert before == untouched(), "something was written that nobody asked for"


@pytest.mark.parametrize("rows", [3, [3], [[1]], [["1", {}]], [[1, []]], [[1, {"eval": 1}]], {"a": 1},
                                  [[4, {"guidance": "x"}]]])
def test_ways_to_sample_are_checked(rows):
    with pytest.raises(ValueError, match="no ways to sample"):
        evaluate.ways(rows, "a file")


def test_there_are_enough_of_them():
    assert len(CASES) >= 200 and len({(a, b) for a, b, *_ in CASES}) == len(CASES)


def test_what_is_odd_but_right_is_read_as_it_is(tmp_path):
    """Sixteen bits are grey and not white; a palette, CMYK and alpha keep their colours; EXIF turns."""
    grey = Image.new("I;16", (40, 40), 257 * 128)
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    half = Image.new("RGB", (40, 20), (255, 255, 255))
    half.paste((0, 0, 0), (0, 0, 20, 20))                    # its left half is black
    exif = Image.Exif()
    exif[274] = 6                                            # turned by a quarter: what was left is on top
    grey.save(tmp_path / "a.png"), red.convert("P").save(tmp_path / "b.png")
    red.convert("CMYK").save(tmp_path / "c.jpg", quality=95), red.convert("RGBA").save(tmp_path / "d.png")
    half.save(tmp_path / "e.jpg", exif=exif, quality=95)
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(name)
    batch = data.build(str(tmp_path)).batch(5)
    seen = dict(zip(batch.caption, batch.image))
    assert seen["a"].abs().max() < .02
    for name in "bcd":
        assert (seen[name][0] > .95).all() and (seen[name][1:] < -.95).all()
    assert (seen["e"][:, :12] < -.9).all() and (seen["e"][:, 20:] > .9).all()


def show():
    """The table of NOTES.md."""
    import collections
    import tempfile
    from pathlib import Path
    said = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for i, (kind, what, act, arguments) in enumerate(CASES):
            place = Path(folder, str(i))
            said[kind].append((what, outcome(act, arguments, place).replace(str(place), "…")))
    print("| where | cases | one sentence | works | for example |\n|---|---|---|---|---|")
    for kind, many in said.items():
        refused = [(what, answer) for what, answer in many if answer != "works"]
        what, answer = refused[len(refused) // 2]
        print(f"| {kind} | {len(many)} | {len(refused)} | {len(many) - len(refused)} | {what}: *{answer}* |")


if __name__ == "__main__":
    show()
