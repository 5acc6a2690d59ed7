"""Images with captions: glyphs (rendered on the fly), Fashion-MNIST, or a folder of your own.

A dataset has `attributes` (name -> classes), `vocab` (words of its captions), `split_sizes` and
sample_batch(n, generator, split) -> Batch with images in [-1, 1]. Glyphs are the default: 32x32 colour images
of letters, digits and pictograms in the fonts that matplotlib ships, so nothing is downloaded and there is no
last image. Captions omit attributes at random, as real captions do. Every shape has one foreground colour
that it never has in the training split; these (shape, foreground) pairs are the split `held_out`.

Look at them:  python data.py --preview glyphs          Read next: models/tiny.py
"""

import signal
import sys

if __name__ == "__main__":    # the imports take seconds: Ctrl-C ends them without a traceback, too
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import argparse
import gzip
import hashlib
import http.client
import textwrap
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

from utils import image_folder
from utils.checkpoint import atomic_write, cache_dir
from utils.messages import BadInput, print_message, printable

DEFAULT_HUB_DATASET = "lambdalabs/naruto-blip-captions"    # of large models
DEFAULT_RESOLUTION = 32       # height and width in pixels of glyphs and Fashion-MNIST
CACHE_BYTES = 2 ** 30         # a folder's images are kept in memory if they are smaller than this


@dataclass
class Batch:
    """Images and all that is known about them."""
    image: torch.Tensor                         # (B, 3, H, W) in [-1, 1]
    caption: list                               # B strings
    attributes: torch.Tensor                    # (B, A) class of each attribute, -1 where an image has none
    mentioned: torch.Tensor                     # (B, A) bool: the caption states the attribute
    # (B, 4): height and width of the original image in pixels, then rows and columns of the resized image
    # that were cut off above and on the left
    micro_cond: torch.Tensor | None = None
    # for draws that all micro-batches of a step share; None: torch's global generator
    generator: torch.Generator | None = None

    def __getitem__(self, rows):
        """rows: a slice."""
        micro_cond = None if self.micro_cond is None else self.micro_cond[rows]
        return Batch(self.image[rows], self.caption[rows], self.attributes[rows], self.mentioned[rows],
                     micro_cond, self.generator)

    def to(self, device, resolution=None):
        """The images on a device, resized to the model's resolution (bicubic) if they have another."""
        image = self.image.to(device)
        if resolution and resolution != image.shape[-1]:
            image = F.interpolate(image, (resolution, resolution), mode="bicubic", antialias=True)
            image = image.clamp(-1, 1)
        return Batch(image, self.caption, self.attributes, self.mentioned, self.micro_cond, self.generator)


# ----------------------------------------------------------------------------------------------------- glyphs

COLOURS = {"black": (.04, .04, .06), "white": (.97, .97, .95), "red": (.86, .10, .12),
           "orange": (.98, .55, .08), "yellow": (.99, .88, .20), "green": (.08, .58, .22),
           "blue": (.10, .30, .86), "purple": (.55, .14, .66)}
FONT_FAMILIES = {  # family -> the fonts of its four styles: regular, bold, italic, bold italic
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "roman": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "typewriter": ("cmtt10",)}    # matplotlib has only the regular style of Computer Modern typewriter
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PICTOGRAMS = (
    "☀☁☂☃☄★☆☇☈☎☐☑☒☔☕☘☚☜☝☞☟☠☢☣☤☥☦☧☨☩☪☮☯☸☹☺☻☽☾♀♂♃♄♅♆♇♈♉♊♋♌♍♎♏♐♑♒♓♔♕♖♗♘♙♚♛♜♝♞♟♠♡♢♣♤♥♦♧♨♩♪♫♬♭♮♯"
    "♲♿⚀⚁⚂⚃⚄⚅⚐⚑⚒⚓⚔⚖⚗⚘⚙⚛⚜⚠⚡⚱⛀⛁⛂⛃✂✆✇✈✉✌✍✏✒✓✗✙✚✠✡✦✧✪✯✱✶✹✿❀❄❅❇❖❢❣❦❧←↑→↓↔↕↖↗↘↙↰↱↲↳↺↻⇄⇅⇐⇑⇒⇓⇦⇧⇨⇩"
    "■□▣▦▲△▶▷▼▽◀◁◈◉○●◐◑◒◓◢◣◤◥◫◬⌂⌘⌨⏏⬟⬡⬢😀😇😈😉😎😐😗😠😢😮😴😷😸🙀")
# Unicode calls outlined symbols white and filled ones black; in captions these words would mean colours
PLAIN_WORDS = {"black": "solid", "white": "hollow", "heavy": "thick"}
STOPWORDS = {"sign", "symbol", "suit", "universal", "fill"}


def shape_name(character):
    """The name in a caption: 'letter g', 'capital letter g', 'digit seven', 'hollow chess knight'."""
    words = unicodedata.name(character).lower().replace("-", " ").split()
    if character.isascii():
        return {"small": "letter ", "capital": "capital letter "}.get(words[1], "digit ") + words[-1]
    return " ".join(PLAIN_WORDS.get(word, word) for word in words if word not in STOPWORDS)


def glyph_mask(font, character, px=64):
    """The coverage of a glyph, (px, px) in [0, 1]. Letters keep their font size, so 'c' differs from 'C';
    pictograms fill the image. For anti-aliasing the glyph is rendered four times too large and averaged."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font, LoadFlags
    font_face = FT2Font(f"{get_data_path()}/fonts/ttf/{font}.ttf")
    font_face.set_size(4 * px * (.80 if character.isascii() else 1.1), 72)
    font_face.set_text(character, 0, flags=LoadFlags.NO_HINTING)
    font_face.draw_glyphs_to_bitmap(antialiased=True)
    coverage = np.asarray(font_face.get_image(), dtype=np.float32) / 255
    rows = np.flatnonzero(coverage.any(1))
    columns = np.flatnonzero(coverage.any(0))
    coverage = torch.from_numpy(coverage[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])[None, None]
    fill_scale = 3.1 * px / max(coverage.shape[-2:])
    scale = min(1., fill_scale) if character.isascii() else fill_scale
    coverage = F.interpolate(coverage, scale_factor=scale, mode="bilinear", antialias=True)
    height, width = coverage.shape[-2:]
    top = (4 * px - height) // 2
    left = (4 * px - width) // 2
    canvas = F.pad(coverage, (left, 4 * px - left - width, top, 4 * px - top - height))
    return F.avg_pool2d(canvas, 4)[0, 0].clamp(0, 1)    # (px, px)


class Glyphs:
    """Captioned images without end, whose attributes are known exactly."""
    name = "glyphs"
    fingerprint = "glyphs"
    split_sizes = {"train": None, "test": None, "held_out": None}    # None: no last image
    has_fixed_captions = False    # all_captions is not a list of every caption, but contains every word

    def __init__(self):
        characters = LETTERS + PICTOGRAMS
        self.shapes = [shape_name(c) for c in characters]
        self.attributes = {"shape": self.shapes, "foreground": list(COLOURS), "background": list(COLOURS),
                           "family": list(FONT_FAMILIES), "weight": ["regular", "bold"],
                           "slant": ["upright", "italic"]}
        font_cuts = [(family, i % 2, i // 2, font) for family, fonts in enumerate(FONT_FAMILIES.values())
                     for i, font in enumerate(fonts)]    # (family, is bold, is italic, font)
        masks, variants = [], []
        for shape, c in enumerate(characters):
            for *cut, font in font_cuts if c.isascii() else [(-1, -1, -1, "DejaVuSans")]:
                variants.append((shape, *cut))
                masks.append(glyph_mask(font, c))
        self.masks = (torch.stack(masks) * 255).round().byte()    # (V, 64, 64)
        self.variants = torch.tensor(variants)    # (V, 4): shape, family, bold, italic; -1: none
        self.palette = torch.tensor(list(COLOURS.values()))       # (8, 3)
        # a letter is 2.4 times as likely as a pictogram, whatever the number of its fonts
        num_variants = torch.bincount(self.variants[:, 0])[self.variants[:, 0]].float()
        is_pictogram = self.variants[:, 1] < 0
        self.sampling_weights = is_pictogram.float() + ~is_pictogram * 2.4 / num_variants    # (V,)
        all_words = [*self.shapes, *COLOURS, *FONT_FAMILIES, "a an on background bold italic"]
        self.vocab = sorted({word for text in all_words for word in text.split()})
        self.all_captions = self.vocab

    def sample_batch(self, n, generator=None, split="train"):
        """n new images. 'train' and 'test' have the same (shape, foreground) pairs, 'held_out' the others."""
        check_split(split, self.split_sizes)
        variant = torch.multinomial(self.sampling_weights, n, replacement=True, generator=generator)
        shape, family, bold, italic = self.variants[variant].T
        held_out_foreground = -shape % 8    # the one colour that this shape never has in training
        offset = torch.randint(1, 8, (n,), generator=generator)
        foreground = held_out_foreground if split == "held_out" else (held_out_foreground + offset) % 8
        offset = torch.randint(1, 8, (n,), generator=generator)
        background = (foreground + offset) % 8    # never the foreground's colour
        attributes = torch.stack([shape, foreground, background, family, bold, italic], 1)    # (n, 6)
        keep = torch.rand(n, 6, generator=generator) < .75    # a caption omits a quarter of the attributes
        keep[:, 0] = True
        keep[:, 1] |= split == "held_out"    # the unseen combination must be requested
        mentioned = keep & (attributes >= 0)
        mentioned[:, 4:] &= attributes[:, 4:] > 0    # captions do not say 'regular' or 'upright'
        image = self.render(variant, foreground, background, generator)
        captions = [self.make_caption(*row) for row in zip(attributes.tolist(), mentioned.tolist())]
        return Batch(image, captions, attributes, mentioned)

    def render(self, variant, foreground, background, generator=None):
        """Three index tensors (n,) -> images (n, 3, 32, 32) in [-1, 1]: masks moved, rotated and scaled at
        random, averaged over 2x2 pixels, then coloured."""
        n = len(variant)
        u = torch.rand(n, 4, generator=generator) * 2 - 1
        angle = u[:, 0] * .09    # +-5 degrees
        scale = 1 + u[:, 1] * .07
        cos = angle.cos() / scale
        sin = angle.sin() / scale
        affine = torch.stack([torch.stack([cos, -sin, u[:, 2] * .11], 1),    # shift by +-1.8 pixels
                              torch.stack([sin, cos, u[:, 3] * .11], 1)], 1)    # (n, 2, 3)
        grid = F.affine_grid(affine, (n, 1, 64, 64), align_corners=False)
        masks = F.grid_sample(self.masks[variant, None] / 255., grid, align_corners=False)
        coverage = F.avg_pool2d(masks, 2)    # (n, 1, 32, 32)
        color_jitter = torch.randn(2, n, 3, generator=generator) * .025
        foreground, background = ((self.palette[index] + jitter).clamp(0, 1)[:, :, None, None]
                                  for index, jitter in zip((foreground, background), color_jitter))
        return (foreground * coverage + background * (1 - coverage)) * 2 - 1

    def make_caption(self, attributes, mentioned):
        """Six classes and six bools of one image -> 'a red bold serif letter g on a yellow background', with
        the mentioned attributes only."""
        shape, foreground, background, family, bold, italic = attributes
        colours = list(COLOURS)
        words = []
        if mentioned[1]:
            words.append(colours[foreground])
        if mentioned[4]:
            words.append("bold")
        if mentioned[5]:
            words.append("italic")
        if mentioned[3]:
            words.append(list(FONT_FAMILIES)[family])
        text = with_article(" ".join([*words, self.shapes[shape]]))
        if not mentioned[2]:
            return text
        colour = colours[background]
        return f"{text} on {colour}" if shape % 2 else f"{text} on {with_article(colour)} background"


def with_article(text):
    return ("an " if text[0] in "aeiou" else "a ") + text


def check_split(split, split_sizes):
    if split not in split_sizes:
        raise ValueError(f"this data set has the splits {', '.join(split_sizes)}; '{split}' is none of them")


def shuffled_forever(size, generator):
    """Yields row numbers without end; every row comes once before any comes again."""
    while True:
        # few of them are used in most cases, so the permutation is turned into numbers in parts
        for rows in torch.randperm(size, generator=generator).split(256):
            yield from rows.tolist()


# ---------------------------------------------------------------------------------------------- Fashion-MNIST

FASHION = ["t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot"]
FASHION_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
FASHION_MD5 = {  # of the unpacked files: mirrors pack them differently
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"}

def unpack_fashion(packed, name):
    """gzip bytes -> content. OSError if they are damaged."""
    try:
        content = gzip.decompress(packed)
    except (EOFError, zlib.error) as error:
        raise OSError(f"{name}.gz is damaged ({error})") from None
    if hashlib.md5(content).hexdigest() != FASHION_MD5[name]:
        raise OSError(f"{name}.gz has a wrong checksum")
    return content


def fashion_bytes(name):
    """The content of one idx file: from the cache, from Debian's package, or downloaded into the cache."""
    cache = cache_dir() / "fashion-mnist"
    for folder in (cache, Path("/usr/share/datasets/fashion-mnist")):
        try:
            return unpack_fashion((folder / f"{name}.gz").read_bytes(), name)
        except OSError:    # it is not here or damaged: try the next place
            continue
    try:
        with urllib.request.urlopen(f"{FASHION_URL}{name}.gz", timeout=20) as reply:
            packed = reply.read()
        content = unpack_fashion(packed, name)
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST not found: no good {name}.gz in {cache}, none from Debian's package (apt install "
            f"dataset-fashion-mnist), and the download failed ({error}); put the four .gz there") from None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache / f"{name}.gz") as tmp_path:
            tmp_path.write_bytes(packed)
    except OSError as error:    # a read-only home: works without a cache, but downloads every time
        print_message(f"cannot write {cache} ({error}): Fashion-MNIST will be downloaded again next time")
    return content


class Fashion:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 + 10,000 grey images, padded to 32x32."""
    name = "fashion"
    fingerprint = "fashion"
    has_fixed_captions = True    # all_captions is a list of every caption
    attributes = {"class": FASHION}
    split_sizes = {"train": 60000, "test": 10000}

    def __init__(self):
        self.images, self.labels = {}, {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            pixels = np.frombuffer(fashion_bytes(f"{stem}-images-idx3-ubyte"), np.uint8, offset=16)
            labels = np.frombuffer(fashion_bytes(f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8)
            self.images[split] = F.pad(torch.from_numpy(pixels.copy()).view(-1, 28, 28), (2, 2, 2, 2))
            self.labels[split] = torch.from_numpy(labels.astype(np.int64))
        self.all_captions = [f"a photo of {with_article(c)}" for c in FASHION]
        self.vocab = sorted({word for text in self.all_captions for word in text.split()})

    def sample_batch(self, n, generator=None, split="train"):
        """n images of a split, all different as long as the split has n; other batches may repeat them."""
        check_split(split, self.split_sizes)
        rows = torch.tensor(list(islice(shuffled_forever(self.split_sizes[split], generator), n)))
        image = self.images[split][rows, None].float() / 127.5 - 1    # (n, 1, 32, 32)
        label = self.labels[split][rows]
        captions = [self.all_captions[k] for k in label.tolist()]
        return Batch(image.expand(-1, 3, -1, -1), captions, label[:, None],
                     torch.ones(len(label), 1, dtype=torch.bool))

    def iter_batches(self, n, max_batch, generator=None, split="train"):
        """The images of sample_batch(n), in batches of max_batch; the last one may be smaller."""
        batch = self.sample_batch(n, generator, split)
        return (batch[start:start + max_batch] for start in range(0, n, max_batch))


# -------------------------------------------------------------------------------------------- your own folder

class FolderDataset:
    """A folder of captioned images, with its sub-folders: a .txt beside each image, or metadata.jsonl, .csv
    or .parquet with file_name and text (utils/image_folder.py). Squares are cut from the middle; transparent
    images get a white background. Images that fit into CACHE_BYTES are kept in memory; otherwise they are
    read when they are sampled, by several threads. An image that cannot be read is named and left out; more
    than 1 % of these are an error. Every split is the whole folder. The one attribute is the caption: which
    of all captions belongs to this image?"""
    has_fixed_captions = True

    def __init__(self, folder, resolution=DEFAULT_RESOLUTION):
        self.resolution = resolution
        self.name = dataset_name(folder)
        self.paths, self.captions = image_folder.list_images(folder)
        self.fingerprint = image_folder.fingerprint(folder, self.paths, self.captions)
        self.split_sizes = {"train": len(self.paths), "test": len(self.paths)}
        self.vocab = sorted({word for text in self.captions for word in text.lower().split()})
        self.all_captions = sorted(set(self.captions))
        self.attributes = {"caption": self.all_captions}
        index = {text: i for i, text in enumerate(self.all_captions)}
        self.labels = torch.tensor([index[text] for text in self.captions])
        self.unreadable = set()
        self.pool = ThreadPoolExecutor(8)
        self.image_cache = None
        if len(self.paths) * 3 * resolution ** 2 < CACHE_BYTES:
            self.image_cache = list(self.pool.map(self.load_image, range(len(self.paths))))

    def load_image(self, row):
        """-> image (3, R, R) uint8 and micro_cond (4,), or None if the image cannot be read."""
        path = self.paths[row]
        try:
            return image_folder.load_image(path, self.resolution)
        except Exception as error:    # image decoders raise exceptions of any type for a damaged file
            self.unreadable.add(row)
            name = printable(path)[-200:]
            reason = printable(str(error).split(": '")[0] or type(error).__name__)[:100]
            if len(self.unreadable) > .01 * len(self.paths):
                raise BadInput(f"cannot read the image {name} ({reason}): {len(self.unreadable)} of "
                                 f"{len(self.paths)} images are broken; repair or remove them") from None
            print_message(f"left out: {name} cannot be read ({reason}); {len(self.unreadable)} so far")
            return None

    def sample_batch(self, n, generator=None, split="train"):
        """n images, all different as long as the folder has n."""
        return next(self.iter_batches(n, n, generator, split))

    def iter_batches(self, n, max_batch, generator=None, split="train"):
        """The images of sample_batch(n), in batches of max_batch; the last one may be smaller. They need not
        fit into memory together."""
        check_split(split, self.split_sizes)
        row_iter = (row for row in shuffled_forever(self.split_sizes[split], generator)
                    if row not in self.unreadable)
        load_fn = self.image_cache.__getitem__ if self.image_cache else self.load_image
        for start in range(0, n, max_batch):
            size = min(max_batch, n - start)
            loaded = []
            while len(loaded) < size:    # an image that cannot be read is replaced by the next one
                rows = list(islice(row_iter, size - len(loaded)))
                loaded += [(row, *item) for row, item in zip(rows, self.pool.map(load_fn, rows)) if item]
            rows, images, micro_conds = zip(*loaded)
            yield Batch(torch.stack(images).float() / 127.5 - 1, [self.captions[row] for row in rows],
                        self.labels[list(rows), None], torch.ones(size, 1, dtype=torch.bool),
                        torch.stack(micro_conds))


def dataset_name(name):
    """The name under which weights/ knows a data set; FileNotFoundError if there is no such data set."""
    if name in ("glyphs", "fashion"):
        return name
    if name == "" or not Path(name).is_dir():
        raise FileNotFoundError(f"no data set '{printable(name)}': wanted glyphs, fashion, or a folder "
                                "of images")
    return Path(name).resolve().name or "folder"    # the root of a file system has no name


def build_dataset(name, resolution=DEFAULT_RESOLUTION):
    """'glyphs', 'fashion', or the path of a folder, whose images get resolution x resolution pixels.
    ValueError or OSError with a sentence to show."""
    if name == "glyphs":
        return Glyphs()
    if name == "fashion":
        return Fashion()
    dataset_name(name)
    return FolderDataset(name, resolution)


# ---------------------------------------------------------------------------------------------- contact sheet

def contact_sheet(dataset, path, n=96, seed=0, columns=12):
    """Write a PNG of n images with their captions."""
    from matplotlib.figure import Figure
    batch = dataset.sample_batch(n, torch.Generator().manual_seed(seed))
    rows = -(-n // columns)
    figure = Figure(figsize=(1.5 * columns, 2.05 * rows))
    axes = figure.subplots(rows, columns)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, batch.image, batch.caption):
        axis.imshow((image.permute(1, 2, 0) + 1).numpy() / 2, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(text, 22)), fontsize=6.5, y=-.05, va="top", parse_math=False)
    figure.subplots_adjust(0, .04, 1, 1, .08, .42)
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=100, format="png")


def preview(args):
    """Write the contact sheet that the command line asks for. ValueError or OSError with a sentence."""
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: wanted 0 to 2^63 - 1")
    path = Path(args.output or f"{dataset_name(args.preview)}.png")
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {printable(path)}: wanted a file name ending in .png, in a folder that "
                         "exists")
    dataset = build_dataset(args.preview)
    contact_sheet(dataset, path, seed=args.seed)
    print_message(f"wrote {printable(path)}")
    if isinstance(dataset, FolderDataset) and path.resolve().is_relative_to(Path(args.preview).resolve()):
        print_message("it lies in the data folder, where it will be taken for one of the images: move it")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a contact sheet of a data set: images and captions.")
    parser.add_argument("--preview", required=True, metavar="DATA", help="glyphs, fashion, or a folder")
    parser.add_argument("--output", help="the PNG to write (default: the data set's name + .png)")
    parser.add_argument("--seed", type=int, default=0, help="which images")
    args = parser.parse_args(argv)
    try:
        preview(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ndata.py: stopped, no contact sheet was written\n")


if __name__ == "__main__":
    main()
