"""Bad input in bulk: command lines, settings, folders, images, checkpoints, configurations, weights. A case
either works or ends with one clear sentence and exit code 2, and nothing is written. Run as a script, this
file prints a table of all cases."""

import io
import json
import os
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
from PIL import Image
from safetensors.torch import save_file

import data
import evaluate
import train
from conftest import ROOT
from models import named
from models.loading import load_model
from scripts import benchmark, panel, pretrain, run_study, user_study

STRANGE_TEXTS = {
    "empty": "", "blank": "  \t ", "10,000 characters": "cat " * 2500, "one long word": "c" * 10000,
    "emoji": "a 🐈‍⬛ on a 🛋️", "control characters": "a\x00\x07\x1b[31mcat\x7f",
    "right to left": "قطة على أريكة", "stacked accents": "c" + "\u0301" * 300,
    "half a character": "a \ud83d cat", "lines": "a\ncat\r\n",
    "line separators": "a\u2028cat\u2029on\x85a mat",
    "markup": "<script>alert(1)</script>", "shell syntax": "$(touch canary); `touch canary`",
    "a path": "../../etc/passwd", "format syntax": "%s %n {0} {x.__class__}"}
COMMAND_LINES = {  # main: arguments, separated by | or a line break
    train: """--method | --method gan | --seed 99999999999999999999 | --eval-samples 99999999999
        --set batch_size=100000000000 | --model sd15 | --method ADT | --model dalle
        --model sd15 --pretrained nowhere | --model sd15 --pretrained .
        --model sdxl --pretrained nobody | --model sd3 --resolution 100 --pretrained .
        --data cats | --data glyphs: | --data glyphs:gothic | --data /dev/null | --data README.md
        --data ../.. | --steps 0 | --steps -3
        --steps 1.5 | --steps many | --steps 99999999999999999999x | --eval-samples 3 | --eval-samples -1
        --eval-samples x | --seed x | --seed -1 | --set | --set batch_size | --set =3 | --set batch_size=
        --set batch_size=3=4 | --set lambda=1 | --set __class__=1 | --lora-rank x | --lora-rank -4
        --resolution 64 | --resolution -1 | --resolution 0 | --fsdp | --resume nowhere
        --resume . | --resume README.md | --pretrained nowhere | --pretrained README.md | --pretrained .
        --backbone nowhere | --backbone README.md | --on-nan explode
        --nonsense | nonsense | --output-dir README.md | --output-dir . | --output-dir /dev/null/x
        --method add --set num_inference_steps=4 | --method diffusion --set lambda_adv=1
        --method add --set t_max=0 | --method add --set student_steps=1001
        --set num_inference_steps=1001 | --set num_inference_steps=0 | --set input_grad_scale=2
        --method add --set teacher_steps=0 | --set num_grad_steps=0
        --method add --set backward_simulation_prob=2
        --model sd15 --set backbone=cnn --pretrained nowhere | --lora-rank 4 | --gradient-checkpointing""",
    evaluate: """nowhere | README.md | . | base --steps x | base --steps 0 | base --steps 1001
        base --steps 1, | base --steps -1 | base --guidance-scale x | base --guidance-scale -1
        base --guidance-scale nan | base --stochasticity 2 | base --timestep-shift 0
        base --timestep-shift -1 | base --timestep-shift nan | base --eval-samples 3
        base --eval-samples x | base --split moon | base --split held_out --data fashion
        base --data cats | --data /dev/null | base --prompt zebra | base --output /nowhere/x.png
        base --model dalle | base --seed x | base --seed 99999999999999999999 | base --output notes.txt
        base --output tests | base --save-images README.md | base --save-images tests
        base --eval-samples 99999999999 | --nonsense
        base --model sd15 --pretrained nowhere --data glyphs | add --data cats | base --resolution 64
        base --resolution -1 | base --dinov2 nowhere""",
    pretrain: """--data cats | --steps 0 | --steps x | --prediction-type z | --network everything
        --output-dir README.md | --nonsense | --data README.md""",
    data: """--preview | --preview cats | --preview README.md | --preview glyphs --output /nowhere/x.png
        --seed 1 | --preview glyphs --output tests | --preview glyphs --output x.txt | --nonsense""",
    run_study: """nothing | adt --data cats | adt --eval-samples 3 | adt --seeds x
        add --output-dir README.md | --nonsense | adt --seeds 0 | adt --seeds -1 | adt --steps 0
        adt --steps -5""",
    user_study: "base | base add | base add --prompts-file nowhere | --count nowhere | --nonsense",
    panel: """base --steps 0 | base --steps x | base --stochasticity 3 | base --eval-samples 20
        base --eval-samples 99999999 | base --data cats | base --output tests | base --output x.png | nowhere
        base --model sd15 | base --resolution 64 | --nonsense""",
    benchmark: "nothing | start --output /nowhere/x.md | start --output tests | --nonsense"}
# the option that says where a program writes, so that no case writes into the repository
OUTPUT_OPTIONS = {train: "--output-dir", evaluate: "--output", pretrain: "--output-dir", data: "--output",
                  run_study: "--output-dir", user_study: "--output", panel: "--output",
                  benchmark: "--output"}
OUTPUT_NAMES = {evaluate: "grid.png", data: "sheet.png", user_study: "study.html", panel: "panel.md",
                benchmark: "table.md"}


def command_lines():
    for module, lines in COMMAND_LINES.items():
        for line in lines.replace("\n", "|").split("|"):
            yield f"{module.__name__}.py", line.strip(), module.main, line.split()


def wrong_settings():
    """Every setting of every method with values of another type."""
    for method_name, method in train.METHODS.items():
        for key, kind in typing.get_type_hints(method.module.Config).items():
            values = ["", "x", "-1", "nan", "inf", "1e999"] if kind in (int, float) else ["", "Nonsense"]
            for value in values if kind is not str else []:
                yield ("--set", f"{method_name}: {key}={value}", train.main,
                       ["--method", method_name, "--set", f"{key}={value}"])


def load_folder(folder):
    """What every program does with a folder of images: build the data set, sample a batch."""
    try:
        batch = data.build_dataset(str(folder)).sample_batch(4)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error}") from None
    assert batch.image.shape == (4, 3, 32, 32)
    assert batch.image.isfinite().all()
    assert batch.image.abs().max() <= 1
    assert len(batch.caption) == 4


def save_blank(path, mode="RGB", size=(40, 30), **kwargs):
    Image.new(mode, size).save(path, **kwargs)


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
    "no such image": b'{"file_name": "b.png", "text": "a cat"}\n',
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
    "half a character": STRANGE_TEXTS["half a character"],
    "the same image twice": b'{"file_name": "a.png", "text": "a cat"}\n' * 2,
    "Windows line ends": b'{"file_name": "a.png", "text": "a cat"}\r\n',
    "more keys": b'{"file_name": "a.png", "text": "a cat", "licence": "MIT"}\n'}
TABLES = {"metadata.csv": {"empty": b"", "no columns": b"a,b\n1,2\n",
                           "too few cells": b"file_name,text\na.png\n", "zero bytes": b"\0\0,\0\n",
                           "too many cells": b"file_name,text\na.png,a cat,and more\n",
                           "a cell of a megabyte": b'file_name,text\na.png,"' + b"a" * 2 ** 20 + b'"\n',
                           "an open quote": b'file_name,text\na.png,"a cat\n'},
          "metadata.parquet": {"text": b"file_name,text\n", "empty": b"", "only the magic": b"PAR1PAR1"}}


def folders():
    """Malformed metadata beside one good image."""
    def write(folder, name, content):
        save_blank(folder / "a.png")
        save_blank(folder.parent / "outside.png")
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        (folder / "door").symlink_to(folder.parent)
        if isinstance(content, str):
            content = json.dumps({"file_name": "a.png", "text": content}).encode() + b"\n"
        (folder / name).write_bytes(content)
        load_folder(folder)

    for what, content in METADATA.items():
        yield "metadata.jsonl", what, write, ["metadata.jsonl", content]
    for name, cases in TABLES.items():
        for what, content in cases.items():
            yield name, what, write, [name, content]
    for what, text in STRANGE_TEXTS.items():
        yield "captions", f"{what}, in metadata.jsonl", write, ["metadata.jsonl", text]

    def beside(folder, text):
        save_blank(folder / "a.png")
        (folder / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
        load_folder(folder)

    for what, text in STRANGE_TEXTS.items():
        yield "captions", f"{what}, in a.txt", beside, [text]

    def prompt(folder, text):
        evaluate.main(["base", "--data", "glyphs", "--steps", "1", "--prompt", text,
                       "--output", str(folder / "x.png")])
    for what, text in STRANGE_TEXTS.items():
        yield "captions", f"{what}, as --prompt", prompt, [text]


def images():
    """Unusual and damaged image files, each alone in a folder with its caption."""
    def case(folder, name, make):
        make(folder / name)
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
        load_folder(folder)

    def png(path, width, height, body=b""):
        def chunk(kind, content):
            return (struct.pack(">I", len(content)) + kind + content
                    + struct.pack(">I", zlib.crc32(kind + content)))
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))

    def cut(path, share):
        save_blank(path, size=(400, 300))
        whole = path.read_bytes()
        path.write_bytes(whole[:int(share * len(whole))])

    def noise(path):
        path.write_bytes(random.Random(0).randbytes(5000))

    def rotated(path):
        exif = Image.Exif()
        exif[274] = 6
        save_blank(path, exif=exif)

    def animated(path):
        frames = [Image.new("P", (30, 40), i) for i in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])

    made = {"0 bytes.png": lambda p: p.touch(), "truncated at 10%.png": lambda p: cut(p, .1),
            "truncated at 90%.png": lambda p: cut(p, .9), "truncated at half.jpg": lambda p: cut(p, .5),
            "one pixel.png": lambda p: save_blank(p, size=(1, 1)),
            "20,000 pixels wide.png": lambda p: save_blank(p, size=(20000, 10)),
            "one wide, 20,000 high.png": lambda p: save_blank(p, size=(1, 20000)),
            "CMYK.jpg": lambda p: save_blank(p, "CMYK"), "16 bits.png": lambda p: save_blank(p, "I;16"),
            "32 bits.tiff": lambda p: save_blank(p, "I"), "floats.tiff": lambda p: save_blank(p, "F"),
            "black and white.png": lambda p: save_blank(p, "1"),
            "a palette.png": lambda p: save_blank(p, "P"),
            "transparent.png": lambda p: save_blank(p, "RGBA"),
            "grey and alpha.png": lambda p: save_blank(p, "LA"),
            "animated.gif": animated, "rotated by EXIF.jpg": rotated,
            "text named png.png": lambda p: p.write_text("this is not an image"),
            "noise named jpg.jpg": noise, "a folder named png.png": lambda p: p.mkdir(),
            "no pixels.png": lambda p: png(p, 0, 0),
            "a bomb of 2,500 megapixels.png": lambda p: png(p, 50000, 50000),
            "a size it does not keep.png": lambda p: png(p, 3000, 3000, b"\0" * 10),
            "a link to nowhere.png": lambda p: p.symlink_to("nowhere"),
            "a link to itself.png": lambda p: p.symlink_to(p),
            "wrong ending.jpg": lambda p: save_blank(p, format="PNG"),
            "bmp.bmp": save_blank, "webp.webp": save_blank,
            "svg.svg": lambda p: p.write_text("<svg/>"),
            "EPS.eps": lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}
    for name, make in made.items():
        yield "images", name.rsplit(".", 1)[0], case, [name, make]


class Evil:
    """A pickle that would run a command."""
    def __reduce__(self):
        return open, (str(ROOT / "canary"), "w")


def resume_with(folder, name, content):
    """Resume a finished run after one of its files was replaced."""
    folder = trained_run("adt", folder)
    (folder / name).write_bytes(content)
    train.main(["--resume", str(folder), "--eval-samples", "0"])


def checkpoints():
    """Files in place of checkpoint.pt: damaged, of another run, or malicious."""
    def bundle(content):
        packed = io.BytesIO()
        torch.save(content, packed)
        return packed.getvalue()

    def zipped():
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Evil()))
        return packed.getvalue()

    state = {"run_id": ["adt", 0], "data": "glyphs", "params": [], "ema": [], "step": 0,
             "num_skipped": 0, "warmup_steps_d": 0, "disc": {}, "opt_g": {}, "opt_d": {}}
    cases = {
        "0 bytes": b"", "text": b"no checkpoint", "zero bytes": b"\0" * 1000, "a list": bundle([1, 2]),
        "a number": bundle(3), "an empty dictionary": bundle({}),
        "no weights": bundle({**state, "params": None}),
        "numbers for weights": bundle({**state, "params": [1, 2]}), "another network's": bundle(state),
        "an older version's": bundle({"network": {}, "step": 3}), "an evil pickle": pickle.dumps(Evil()),
        "an evil pickle, zipped": zipped(), "an evil pickle, by torch": bundle({**state, "step": Evil()})}
    for what, content in cases.items():
        yield "checkpoint.pt", what, resume_with, ["checkpoint.pt", content]

    def cut(folder, share):
        complete = (trained_run("adt", folder) / "checkpoint.pt").read_bytes()
        resume_with(folder, "checkpoint.pt", complete[:int(share * len(complete))])

    for share in (.01, .3, .6, .9, .999):
        yield "checkpoint.pt", f"cut off at {share:.1%}", cut, [share]
    yield "checkpoint.pt", "of another method", lambda folder: resume_with(
        folder, "checkpoint.pt", (trained_run("add", folder) / "checkpoint.pt").read_bytes()), []


def run_configs():
    """Edited versions of config.json."""
    run_config = {"method": "adt", "model": "tiny", "data": "glyphs", "pretrained": None, "backbone": None,
                  "resolution": None, "lora_rank": 0, "gradient_checkpointing": False, "fsdp": False,
                  "on_nan": "stop", "world_size": 1, "seed": 0, "steps": 2, "overrides": []}
    cases = {"empty": b"", "text": b"no config", "a list": b"[]", "null": b"null", "nothing in it": b"{}",
            "zero bytes": b"\0" * 50, "nested 100,000 deep": b"[" * 100000,
            **{f"{key} is {value!r}": json.dumps({**run_config, key: value}).encode() for key, value in [
                 ("method", "gan"), ("method", 3), ("method", None), ("model", "dalle"), ("model", []),
                 ("data", "cats"), ("data", 3), ("data", None), ("seed", "x"), ("seed", None),
                 ("steps", "many"), ("steps", 0), ("steps", -1), ("steps", None), ("steps", 1.5),
                 ("overrides", "batch_size=2"), ("overrides", 3), ("overrides", [3]),
                 ("overrides", ["batch_size"]),
                 ("pretrained", "nowhere"), ("pretrained", 3), ("resolution", "big"), ("world_size", 2),
                 ("world_size", "x"),
                 ("on_nan", 3),
                 ("resolution", 64), ("lora_rank", "x"), ("backbone", 5), ("fsdp", "yes"),
                 ("overrides", None)]}}
    for what, content in cases.items():
        yield "config.json", what, resume_with, ["config.json", content]


def weight_files():
    """Weights of other networks, and files whose header is wrong."""
    def weights(folder, content, program):
        path = folder / "denoiser.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, content[1])
        if program is train:
            train.main(["--pretrained", str(path), "--output-dir", str(folder / "run"),
                        "--eval-samples", "0"])
        else:
            evaluate.main([str(path), "--data", "glyphs", "--steps", "1", "--prompt", "a red star",
                           "--output", str(folder / "x.png")])

    one, tiny = {"x": torch.zeros(1)}, load_model("tiny", "glyphs")
    good = {"vocab": json.dumps(["a"]), "prediction_type": json.dumps("flow")}
    cases = {"0 bytes": b"", "text": b"no weights", "noise": random.Random(1).randbytes(3000),
            "a header of 2^60 bytes": struct.pack("<Q", 2 ** 60) + b"{}",
            "an evil pickle": pickle.dumps(Evil()),
            "no header": (one, {}), "another network": (one, good), "no tensors": ({}, good),
            "header: vocab is not JSON": (one, {**good, "vocab": "a b"}),
            "header: vocab is a number": (one, {**good, "vocab": "3"}),
            "header: vocab is null": (one, {**good, "vocab": "null"}),
            "header: a word is a number": (one, {**good, "vocab": "[3]"}),
            "header: unknown prediction type": (one, {**good, "prediction_type": '"z"'}),
            "header: prediction type is a list": (one, {**good, "prediction_type": "[]"}),
            "NaN weights": ({name: torch.full(value.shape, float("nan"))
                            for name, value in tiny.state_dict().items()},
                           {"vocab": json.dumps(tiny.vocab),
                            "prediction_type": json.dumps(tiny.prediction_type)})}
    for what, content in cases.items():
        for program in (train, evaluate):
            yield "weights", f"{what}, {program.__name__}.py", weights, [content, program]


FINISHED_RUNS = {}


def trained_run(method, folder):
    """A copy of a small finished run of that method."""
    if method not in FINISHED_RUNS:
        FINISHED_RUNS[method] = folder.parent / f"finished-{method}"
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            train.main(["--method", method, "--steps", "1", "--set", "batch_size=2", "--eval-samples", "0",
                        "--output-dir", str(FINISHED_RUNS[method])])
    target = folder / method
    shutil.copytree(FINISHED_RUNS[method], target, dirs_exist_ok=True)
    return target


GENERATORS = (command_lines, wrong_settings, folders, images, checkpoints, run_configs, weight_files)
CASES = [case for generator in GENERATORS for case in generator()]
ENTRY_POINTS = {module.main: module for module in COMMAND_LINES}


def run_case(entry_point, arguments, folder):
    """-> 'works', or the sentence. Anything else is a fault of the program, and raises."""
    folder.mkdir()
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            module = ENTRY_POINTS.get(entry_point)
            if module is None:
                entry_point(folder, *arguments)
            else:
                output = str(folder / OUTPUT_NAMES.get(module, "run"))
                steps = ["--steps", "1"] if module is train else []
                entry_point([OUTPUT_OPTIONS[module], output, *steps, *arguments])
        return "works"
    except SystemExit as left:
        sentence = left.code if isinstance(left.code, str) else stderr.getvalue()
        assert isinstance(left.code, str) or left.code == 2, (left.code, sentence)
    last_line = sentence.strip().splitlines()[-1]
    assert "usage:" in sentence or len(sentence.strip().splitlines()) == 1, sentence
    assert 10 < len(last_line) < 1200, sentence
    assert "Traceback" not in sentence, sentence
    return last_line


def snapshot():
    """When each file of the repository was last written."""
    ignored = {".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".venv", "venv"}
    times = {}
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = set(subfolders) - ignored                      # os.walk enters no others
        for name in subfolders + names:
            path = os.path.join(folder, name)
            times[path] = os.stat(path).st_mtime_ns
    return times


@pytest.fixture
def finished_runs(adt_run):
    FINISHED_RUNS["adt"] = adt_run


@pytest.mark.usefixtures("finished_runs")
@pytest.mark.parametrize("entry_point,arguments", [case[2:] for case in CASES],
                         ids=[f"{where}: {what}"[:80] for where, what, *_ in CASES])
def test_bad_input_gets_a_sentence(entry_point, arguments, tmp_path, monkeypatch):
    before = snapshot()
    monkeypatch.chdir(ROOT)
    run_case(entry_point, arguments, tmp_path / "case")
    assert before == snapshot(), "a file of the repository was written"


@pytest.mark.parametrize("configs", [3, [3], [[1]], [["1", {}]], [[1, []]], [[1, {"eval": 1}]], {"a": 1},
                                     [[4, {"guidance_scale": "x"}]]])
def test_stored_sampling_configs_are_validated(configs):
    with pytest.raises(ValueError, match="sampling_configs"):
        named.check_sampling_configs(configs, "a file")


def test_there_are_enough_cases():
    assert len(CASES) >= 200
    assert len({case[:2] for case in CASES}) == len(CASES)


def test_unusual_images_are_read_correctly(tmp_path):
    """16 bits stay grey; palettes, CMYK and alpha keep their colours; EXIF orientation is applied."""
    grey = Image.new("I;16", (40, 40), 257 * 128)
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    half = Image.new("RGB", (40, 20), (255, 255, 255))
    half.paste((0, 0, 0), (0, 0, 20, 20))                    # its left half is black
    exif = Image.Exif()
    exif[274] = 6                                            # a quarter turn: the left half becomes the top
    grey.save(tmp_path / "a.png")
    red.convert("P").save(tmp_path / "b.png")
    red.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    red.convert("RGBA").save(tmp_path / "d.png")
    half.save(tmp_path / "e.jpg", exif=exif, quality=95)
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(name)
    batch = data.build_dataset(str(tmp_path)).sample_batch(5)
    images = dict(zip(batch.caption, batch.image))
    assert images["a"].abs().max() < .02
    for name in "bcd":
        assert (images[name][0] > .95).all()
        assert (images[name][1:] < -.95).all()
    assert (images["e"][:, :12] < -.9).all()
    assert (images["e"][:, 20:] > .9).all()


def print_table():
    """All cases as a Markdown table."""
    import collections
    import tempfile
    from pathlib import Path
    answers = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for i, (kind, what, entry_point, arguments) in enumerate(CASES):
            case_dir = Path(folder, str(i))
            answer = run_case(entry_point, arguments, case_dir).replace(str(case_dir), "...")
            answers[kind].append((what, answer))
    print("| where | cases | one sentence | works | for example |\n|---|---|---|---|---|")
    for kind, cases in answers.items():
        refused = [(what, answer) for what, answer in cases if answer != "works"]
        what, answer = refused[len(refused) // 2]
        works = len(cases) - len(refused)
        print(f"| {kind} | {len(cases)} | {len(refused)} | {works} | {what}: *{answer}* |")


if __name__ == "__main__":
    print_table()
