"""Where pictures and captions come from: glyphs (drawn on the fly), fashion (photographs), your own folder.

A source has `attributes`, `words`, `sizes` and `batch(n, generator, split)`; a batch is pictures in
[-1, 1] and the English sentences that describe them. Glyphs are the default world: 32x32 colour pictures of
letters, digits and pictograms from the fonts matplotlib carries, so nothing is downloaded and the supply
never ends. Captions forget attributes at random, as real captions do. Every shape has one ink colour it is
never seen in during training: those (shape, ink) pairs are the `held_out` compositions.

Look at them:  python data.py --show glyphs          Read next: models.py"""

import argparse
import csv
import gzip
import hashlib
import json
import os
import unicodedata
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32                                                    # pixels, both sides, of every embedded data set
KINDS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"          # no PostScript: it is a program
KEEP = 2 ** 30                                               # bytes of pictures that a folder keeps in memory


@dataclass
class Batch:
    """image (B, 3, H, W) in [-1, 1] · caption: B strings · truth (B, A) class per attribute, -1 where it has
    none · named (B, A) bool: the caption says so. Only named attributes can be asked of a model.
    frame (B, 4): height and width a photograph once had, what was cut off above and left of it; or None.
    luck: for what all micro-batches of a step draw alike, a path's length; None draws from torch's own."""
    image: torch.Tensor
    caption: list
    truth: torch.Tensor
    named: torch.Tensor
    frame: torch.Tensor | None = None
    luck: torch.Generator | None = None

    def __getitem__(self, rows):
        return Batch(self.image[rows], self.caption[rows], self.truth[rows], self.named[rows],
                     None if self.frame is None else self.frame[rows], self.luck)

    def to(self, device, size=None):
        """On a device, and at the size of the model's pictures: the embedded ones have 32 pixels."""
        image = self.image.to(device)
        if size and size != image.shape[-1]:
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        return Batch(image, self.caption, self.truth, self.named, self.frame, self.luck)


# ------------------------------------------------------------------------------------------------ glyphs

COLOURS = {"black": (.04, .04, .06), "white": (.97, .97, .95), "red": (.86, .10, .12),
           "orange": (.98, .55, .08), "yellow": (.99, .88, .20), "green": (.08, .58, .22),
           "blue": (.10, .30, .86), "purple": (.55, .14, .66)}
FAMILIES = {  # family -> the four styles: regular, bold, italic, bold italic
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "roman": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "typewriter": ("cmtt10",)}                              # Computer Modern has one cut of it
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PICTOGRAMS = (
    "☀☁☂☃☄★☆☇☈☎☐☑☒☔☕☘☚☜☝☞☟☠☢☣☤☥☦☧☨☩☪☮☯☸☹☺☻☽☾♀♂♃♄♅♆♇♈♉♊♋♌♍♎♏♐♑♒♓♔♕♖♗♘♙♚♛♜♝♞♟♠♡♢♣♤♥♦♧♨♩♪♫♬♭♮♯"
    "♲♿⚀⚁⚂⚃⚄⚅⚐⚑⚒⚓⚔⚖⚗⚘⚙⚛⚜⚠⚡⚱⛀⛁⛂⛃✂✆✇✈✉✌✍✏✒✓✗✙✚✠✡✦✧✪✯✱✶✹✿❀❄❅❇❖❢❣❦❧←↑→↓↔↕↖↗↘↙↰↱↲↳↺↻⇄⇅⇐⇑⇒⇓⇦⇧⇨⇩"
    "■□▣▦▲△▶▷▼▽◀◁◈◉○●◐◑◒◓◢◣◤◥◫◬⌂⌘⌨⏏⬟⬡⬢😀😇😈😉😎😐😗😠😢😮😴😷😸🙀")
PLAIN = {"black": "solid", "white": "hollow", "heavy": "thick"}      # Unicode's colours are not ours
DROP = {"sign", "symbol", "suit", "universal", "fill"}


def shape_name(character):
    """How a caption calls it: 'letter g', 'capital letter g', 'digit seven', 'hollow chess knight'."""
    words = unicodedata.name(character).lower().replace("-", " ").split()
    if character.isascii():
        return {"small": "letter ", "capital": "capital letter "}.get(words[1], "digit ") + words[-1]
    return " ".join(PLAIN.get(w, w) for w in words if w not in DROP)


def mask(font, character, px=64):
    """The glyph as a (px, px) coverage mask in [0, 1]. Letters keep their font size, so 'c' is not 'C';
    pictograms are scaled to fill. Drawn four times too large, then averaged: that is the anti-aliasing."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font, LoadFlags
    face = FT2Font(f"{get_data_path()}/fonts/ttf/{font}.ttf")
    face.set_size(4 * px * (.80 if character.isascii() else 1.1), 72)
    face.set_text(character, 0, flags=LoadFlags.NO_HINTING)
    face.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(face.get_image(), dtype=np.float32) / 255
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = torch.from_numpy(ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])[None, None]
    fill = 3.1 * px / max(ink.shape[-2:])
    scale = min(1., fill) if character.isascii() else fill
    ink = F.interpolate(ink, scale_factor=scale, mode="bilinear", antialias=True)
    top, left = (4 * px - ink.shape[-2]) // 2, (4 * px - ink.shape[-1]) // 2
    canvas = F.pad(ink, (left, 4 * px - left - ink.shape[-1], top, 4 * px - top - ink.shape[-2]))
    return F.avg_pool2d(canvas, 4)[0, 0].clamp(0, 1)         # (px, px)


class Glyphs:
    """Endless captioned pictures with exactly known attributes; held out are (shape, ink) compositions."""
    name = "glyphs"
    sizes = {"train": None, "test": None, "held_out": None}                   # endless
    closed = False

    def __init__(self):
        characters = LETTERS + PICTOGRAMS
        self.shapes = [shape_name(c) for c in characters]
        self.attributes = {"shape": self.shapes, "ink": list(COLOURS), "ground": list(COLOURS),
                           "family": list(FAMILIES), "weight": ["regular", "bold"],
                           "slant": ["upright", "italic"]}
        self.masks, self.variants = [], []             # variant: (shape, family, bold, italic), -1 = has none
        for shape, c in enumerate(characters):
            cuts = [(f, i % 2, i // 2, font) for f, fonts in enumerate(FAMILIES.values())
                    for i, font in enumerate(fonts)]
            for *cut, font in cuts if c.isascii() else [(-1, -1, -1, "DejaVuSans")]:
                self.variants.append((shape, *cut))
                self.masks.append(mask(font, c))
        self.masks = (torch.stack(self.masks) * 255).round().byte()           # (V, 64, 64)
        self.variants = torch.tensor(self.variants)                           # (V, 4)
        self.palette = torch.tensor(list(COLOURS.values()))                   # (8, 3)
        per_shape = torch.bincount(self.variants[:, 0])[self.variants[:, 0]].float()
        self.weight = (self.variants[:, 1] < 0).float() + (self.variants[:, 1] >= 0) * 2.4 / per_shape
        captions = self.shapes + list(COLOURS) + list(FAMILIES) + ["a an on background bold italic"]
        self.words = sorted({w for text in captions for w in text.split()})
        self.phrases = self.words                            # captions that between them say everything

    def batch(self, n, generator=None, split="train"):
        """n fresh pictures. 'train' and 'test' share compositions, never pictures; 'held_out' has others."""
        check_split(split, self.sizes)
        variant = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        shape, family, bold, italic = self.variants[variant].T
        forbidden = -shape % 8                               # the one ink this shape never wears in training
        step = torch.randint(1, 8, (n,), generator=generator)
        ink = forbidden if split == "held_out" else (forbidden + step) % 8
        ground = (ink + torch.randint(1, 8, (n,), generator=generator)) % 8   # never ink on its own colour
        truth = torch.stack([shape, ink, ground, family, bold, italic], 1)    # (n, 6)
        keep = torch.rand(n, 6, generator=generator) < .75                    # captions forget a quarter
        keep[:, 0] = True
        keep[:, 1] |= split == "held_out"                    # there the unseen ink must be asked for
        named = keep & (truth >= 0)
        named[:, 4:] &= truth[:, 4:] > 0                     # nobody writes 'regular' or 'upright'
        image = self.draw(variant, ink, ground, generator)
        return Batch(image, [self.caption(t, k) for t, k in zip(truth.tolist(), named.tolist())],
                     truth, named)

    def draw(self, variant, ink, ground, generator=None):
        """Jitter the masks (shift, turn, scale), average 2x2, paint: (n,) -> (n, 3, 32, 32) in [-1, 1]."""
        n = len(variant)
        u = torch.rand(n, 4, generator=generator) * 2 - 1
        angle, scale = u[:, 0] * .09, 1 + u[:, 1] * .07                       # +-5 degrees, +-7 %
        c, s = angle.cos() / scale, angle.sin() / scale
        affine = torch.stack([torch.stack([c, -s, u[:, 2] * .11], 1),         # shift: +-1.8 pixels
                              torch.stack([s, c, u[:, 3] * .11], 1)], 1)      # (n, 2, 3)
        grid = F.affine_grid(affine, (n, 1, 64, 64), align_corners=False)
        masks = F.grid_sample(self.masks[variant, None] / 255., grid, align_corners=False)
        cover = F.avg_pool2d(masks, 2)                                        # (n, 1, 32, 32)
        wobble = torch.randn(2, n, 3, generator=generator) * .025             # no two reds are the same
        ink, ground = ((self.palette[i] + w).clamp(0, 1)[:, :, None, None]
                       for i, w in zip((ink, ground), wobble))
        return (ink * cover + ground * (1 - cover)) * 2 - 1

    def caption(self, truth, named):
        """'a red bold serif letter g on a yellow background', saying only what `named` allows."""
        shape, ink, ground, family, bold, italic = truth
        words = [list(COLOURS)[ink]] * named[1] + ["bold"] * named[4] + ["italic"] * named[5]
        words += [list(FAMILIES)[family]] * named[3] + [self.shapes[shape]]
        text = " ".join(words)
        colour = list(COLOURS)[ground]
        where = (f" on {colour}" if shape % 2 else f" on {article(colour)} background") * named[2]
        return article(text) + where


def article(text):
    return ("an " if text[0] in "aeiou" else "a ") + text


def check_split(split, known):
    if split not in known:
        raise ValueError(f"this data set has the splits {', '.join(known)}; '{split}' is none of them")


def draw_rows(size, generator):
    """Row numbers without end, every one before any comes again."""
    while True:
        for some in torch.randperm(size, generator=generator).split(256):     # few of them will be asked for
            yield from some.tolist()


# ----------------------------------------------------------------------------------------------- fashion

FASHION = ["t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot"]
FASHION_HOME = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
FASHION_MD5 = {  # of the unpacked files: mirrors pack them differently
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"}


def fashion_file(name):
    """The bytes of one idx file: from the cache, from Debian's package, or downloaded once and checked."""
    def unpack(packed):
        content = gzip.decompress(packed)
        if hashlib.md5(content).hexdigest() != FASHION_MD5[name]:
            raise OSError(f"{name}.gz has a wrong checksum")
        return content

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fashion-mnist"
    for folder in (cache, Path("/usr/share/datasets/fashion-mnist")):
        try:
            return unpack((folder / f"{name}.gz").read_bytes())
        except (OSError, EOFError, zlib.error):
            continue                                         # absent or damaged: the next place may have it
    try:
        with urllib.request.urlopen(f"{FASHION_HOME}{name}.gz", timeout=20) as reply:
            packed = reply.read()
        content = unpack(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST not found: no good {name}.gz in {cache}, none from Debian's package (apt install "
            f"dataset-fashion-mnist), and the download failed ({error}); put the four .gz there") from None
    cache.mkdir(parents=True, exist_ok=True)
    (partial := cache / f"{name}.part").write_bytes(packed)
    partial.replace(cache / f"{name}.gz")                    # atomic: a half-written file is never found
    return content


class Fashion:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 + 10,000 grey photographs, padded to 32x32."""
    name = "fashion"
    closed = True                                            # phrases are all the captions there are
    attributes = {"class": FASHION}
    sizes = {"train": 60000, "test": 10000}

    def __init__(self):
        self.images, self.labels = {}, {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            pixels = np.frombuffer(fashion_file(f"{stem}-images-idx3-ubyte"), np.uint8, offset=16)
            labels = np.frombuffer(fashion_file(f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8)
            self.images[split] = F.pad(torch.from_numpy(pixels.copy()).view(-1, 28, 28), (2, 2, 2, 2))
            self.labels[split] = torch.from_numpy(labels.astype(np.int64))
        self.phrases = [f"a photo of {article(c)}" for c in FASHION]
        self.words = sorted({w for text in self.phrases for w in text.split()})

    def batch(self, n, generator=None, split="train"):
        """n different pictures of the split (the same picture may return in another batch)."""
        check_split(split, self.sizes)
        rows = torch.tensor(list(islice(draw_rows(self.sizes[split], generator), n)))
        image = self.images[split][rows, None].float() / 127.5 - 1
        label = self.labels[split][rows]
        caption = [self.phrases[k] for k in label.tolist()]
        return Batch(image.expand(-1, 3, -1, -1), caption, label[:, None],
                     torch.ones(len(label), 1, dtype=torch.bool))

    def batches(self, n, most, generator=None, split="train"):
        """The same n pictures, in batches of `most` and a rest."""
        both = self.batch(n, generator, split)
        return (both[slice(start, start + most)] for start in range(0, n, most))


# ------------------------------------------------------------------------------------------ your own folder

def rows_of(table):
    """The rows of a metadata table, as (line, dictionary)."""
    try:
        if table.suffix == ".parquet":
            import pyarrow.parquet
            return list(enumerate(pyarrow.parquet.read_table(table).to_pylist(), 1))
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            return list(enumerate(csv.DictReader(text.splitlines()), 2))
    except ImportError:
        raise ValueError(f"{table} wants pyarrow: pip install pyarrow, or write metadata.jsonl") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"cannot read {table} ({error})") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                raise ValueError(f"{table} line {number}: wanted JSON with file_name and text") from None
    return rows


def within(folder, paths):
    """ValueError if one of the files lies outside their folder, by name or by link. A snapshot from the
    Hugging Face hub is a folder of links to the blobs beside it."""
    home = folder.resolve()
    homes = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    for path in paths:
        try:
            inside = any(path.resolve().is_relative_to(one) for one in homes)
        except (OSError, RuntimeError, ValueError):          # a loop of links, a name that none can have
            inside = False
        if not inside:
            raise ValueError(f"{ascii(str(path))[1:-1][:200]} lies outside {folder}, or can be nowhere: "
                             "a folder may name its own files only")


class Folder:
    """A folder of captioned images: metadata.jsonl, .csv or .parquet with file_name and text (Hugging Face
    'imagefolder'), or a .txt beside each image. Squares are cut from the middle. What fits in a gigabyte is
    kept in memory, the rest is read when it is asked for, by several threads; an image that cannot be read is
    named and left out, and more than 1 % of those are an error. Its one attribute is the caption itself:
    'which of the captions is this a picture of?'"""
    closed = True

    def __init__(self, folder, size=SIZE):
        folder, self.size, self.broken = Path(folder), size, set()
        self.name = folder.resolve().name
        self.paths, self.captions = self.listing(folder)
        if not self.paths:
            raise ValueError(f"no images in {folder}: wanted some with metadata.jsonl or a .txt beside each")
        self.check(folder)
        self.sizes = dict.fromkeys(("train", "test"), len(self.paths))
        self.words = sorted({w for text in self.captions for w in text.lower().split()})
        self.phrases = sorted(set(self.captions))
        self.attributes = {"caption": self.phrases}
        index = {text: i for i, text in enumerate(self.phrases)}
        self.labels = torch.tensor([index[text] for text in self.captions])
        self.readers, self.kept = ThreadPoolExecutor(8), None
        if len(self.paths) * 3 * size ** 2 < KEEP:
            self.kept = list(self.readers.map(self.read, range(len(self.paths))))

    @staticmethod
    def listing(folder):
        """-> paths, captions; an image without a caption is an error that names it."""
        tables = (folder / f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet"))
        table = next((table for table in tables if table.is_file()), None)
        if table:
            within(folder, [table])
            paths, captions = [], []
            for number, row in rows_of(table):
                try:
                    paths.append(folder / row["file_name"])
                    captions.append(row["text"].strip())
                except (KeyError, TypeError, AttributeError):
                    raise ValueError(f"{table} line {number}: wanted a JSON object (or a row) "
                                     "with file_name and text") from None
            return paths, captions
        kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds)
        silent = [p.name for p in paths if not p.with_suffix(".txt").is_file()]
        if silent:
            raise ValueError(f"{len(silent)} image(s) in {folder} have no caption, first {silent[0]}: "
                             f"write one in {Path(silent[0]).stem}.txt, or list all in metadata.jsonl")
        within(folder, [path.with_suffix(".txt") for path in paths])
        try:
            return paths, [p.with_suffix(".txt").read_text(encoding="utf-8-sig").strip() for p in paths]
        except UnicodeDecodeError:
            raise ValueError(f"a caption in {folder} is not UTF-8: save the .txt files as UTF-8") from None

    def check(self, folder):
        """No name or link leads out of the folder, and every caption is text."""
        within(folder, self.paths)
        for path, text in zip(self.paths, self.captions):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}: its caption holds half a character; save it as UTF-8") from None

    def read(self, row):
        """-> picture (3, size, size) uint8 and its frame: height and width it had, rows and columns (of the
        scaled picture) cut off above and left. None if it cannot be read."""
        from PIL import Image, ImageOps
        try:
            if not self.paths[row].is_file():
                raise OSError("there is no such file")
            with Image.open(self.paths[row], formats=KINDS) as image:
                if image.width * image.height > 10 ** 8:
                    raise ValueError("it has more than 100 million pixels")
                if image.mode in ("I", "F"):
                    raise ValueError("it has 32 bits per pixel")
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):            # sixteen bits, which convert would clip to white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
                w, h = image.size
                scale = self.size / min(w, h)
                frame = torch.tensor([h, w, *(int((n * scale - self.size) / 2) for n in (h, w))])
                image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        except Exception as error:                           # a decoder of any file may raise anything
            self.broken.add(row)
            name, why = str(self.paths[row])[-200:], str(error).split(": '")[0][:100]
            if len(self.broken) > .01 * len(self.paths):
                raise ValueError(f"cannot read the image {name} ({why}): {len(self.broken)} of "
                                 f"{len(self.paths)} images are broken; repair or remove them") from None
            print(f"left out: {name} cannot be read ({why}); {len(self.broken)} so far")
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), frame

    def batch(self, n, generator=None, split="train"):
        """n different pictures while there are so many; every split is the whole folder."""
        return next(self.batches(n, n, generator, split))

    def batches(self, n, most, generator=None, split="train"):
        """The same n pictures, in batches of `most` and a rest: they need not all fit into memory."""
        check_split(split, self.sizes)
        order = (row for row in draw_rows(self.sizes[split], generator) if row not in self.broken)
        look = self.kept.__getitem__ if self.kept else self.read
        for start in range(0, n, most):
            size, found = min(most, n - start), []
            while len(found) < size:                         # one was broken: the next one steps in
                rows = list(islice(order, size - len(found)))
                found += [(row, *seen) for row, seen in zip(rows, self.readers.map(look, rows)) if seen]
            rows, pictures, frames = zip(*found)
            yield Batch(torch.stack(pictures).float() / 127.5 - 1, [self.captions[i] for i in rows],
                        self.labels[list(rows), None], torch.ones(size, 1, dtype=torch.bool),
                        torch.stack(frames))


def build(name, size=SIZE):
    """'glyphs', 'fashion', or a path, whose pictures will have `size` pixels -> a source.
    Raises ValueError or FileNotFoundError with a sentence to show."""
    if name in ("glyphs", "fashion"):
        return Glyphs() if name == "glyphs" else Fashion()
    if not Path(name).is_dir():
        raise FileNotFoundError(f"no data set '{name}': wanted glyphs, fashion, or a folder of images")
    return Folder(name, size)


def contact_sheet(source, path, n=96, seed=0):
    """Write a page of pictures with their captions under them."""
    import textwrap
    from matplotlib.figure import Figure
    batch = source.batch(n, torch.Generator().manual_seed(seed))
    figure = Figure(figsize=(18, 2.05 * -(-n // 12)))
    axes = figure.subplots(-(-n // 12), 12)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, text in zip(axes.flat, batch.image, batch.caption):
        axis.imshow((picture.permute(1, 2, 0) + 1).numpy() / 2, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(text, 22)), fontsize=6.5, y=-.05, va="top", parse_math=False)
    figure.subplots_adjust(0, .04, 1, 1, .08, .42)
    figure.savefig(path, dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw a contact sheet of a data set.")
    parser.add_argument("--show", required=True, metavar="DATA", help="glyphs, fashion, or a folder")
    parser.add_argument("--out", default=None, help="where to write the PNG (default: DATA.png)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    path = arguments.out or f"{Path(arguments.show).name}.png"
    try:
        if Path(path).suffix != ".png" or Path(path).is_dir():
            raise ValueError(f"--out {path}: wanted the name of a PNG")
        contact_sheet(build(arguments.show), path, seed=arguments.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
