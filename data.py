"""Images with captions: glyphs (rendered on the fly), Fashion-MNIST, a folder of your own, a hub data set.

A dataset has `attributes` (name -> classes), `vocab` (words of its captions), `split_sizes` and
sample_batch(n, generator, split) -> Batch with images in [-1, 1]; your own images also have training_batch,
which counts epochs (utils/captioned_images.py). Glyphs are the default: 32x32 colour images of letters,
digits and pictograms in matplotlib's fonts, so nothing is downloaded and there is no last image. Captions
omit attributes at random, as real captions do. Every shape has one foreground colour that it never has in the
training split; these (shape, foreground) pairs are the split `held_out`.

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
import re
import textwrap
import urllib.request
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import aspect_buckets, distributed, hub_data, image_folder
from utils.batch import Batch, check_split
from utils.captioned_images import CaptionedImages, StreamedImages
from utils.checkpoint import atomic_write, cache_dir
from utils.failures import clear_exit, start_program
from utils.glyph_fonts import LETTERS, PICTOGRAMS, glyph_mask, shape_name
from utils.messages import print_message, printable
from utils.shuffling import shuffled_forever

DEFAULT_HUB_DATASET = hub_data.DEFAULT_DATASET["id"]    # of large models
DEFAULT_RESOLUTION = 32       # height and width in pixels of glyphs and Fashion-MNIST


# ----------------------------------------------------------------------------------------------------- glyphs

COLOURS = {"black": (.04, .04, .06), "white": (.97, .97, .95), "red": (.86, .10, .12),
           "orange": (.98, .55, .08), "yellow": (.99, .88, .20), "green": (.08, .58, .22),
           "blue": (.10, .30, .86), "purple": (.55, .14, .66)}
FONT_FAMILIES = {  # family -> the fonts of its four styles: regular, bold, italic, bold italic
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "roman": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "typewriter": ("cmtt10",)}    # matplotlib has only the regular style of Computer Modern typewriter


class Glyphs:
    """Captioned images without end, whose attributes are known exactly. The fonts are outlines: at another
    resolution the same images are drawn, with the captions and the random numbers of those of 32 pixels.
    families: letters and digits in fonts of these FONT_FAMILIES only (default: everything)."""
    name = "glyphs"
    split_sizes = {"train": None, "test": None, "held_out": None}    # None: no last image
    has_fixed_captions = False    # all_captions is not a list of every caption, but contains every word

    def __init__(self, resolution=DEFAULT_RESOLUTION, families=None):
        self.resolution = resolution
        self.fingerprint = "glyphs" if families is None else f"glyphs:{','.join(sorted(families))}"
        characters = LETTERS + PICTOGRAMS
        self.shapes = [shape_name(c) for c in characters]
        self.attributes = {"shape": self.shapes, "foreground": list(COLOURS), "background": list(COLOURS),
                           "family": list(FONT_FAMILIES), "weight": ["regular", "bold"],
                           "slant": ["upright", "italic"]}
        font_cuts = [(family, i % 2, i // 2, font) for family, fonts in enumerate(FONT_FAMILIES.values())
                     for i, font in enumerate(fonts)]    # (family, is bold, is italic, font)
        variants, self.outlines = [], []    # outlines: (font, character) of each variant
        for shape, c in enumerate(characters):
            for *cut, font in font_cuts if c.isascii() else [(-1, -1, -1, "DejaVuSans")]:
                variants.append((shape, *cut))
                self.outlines.append((font, c))
        self.masks = None    # of larger images they would fill the memory: drawn for each image
        if resolution == DEFAULT_RESOLUTION:
            self.masks = self.draw_masks(range(len(variants)))    # (V, 64, 64)
        self.variants = torch.tensor(variants)    # (V, 4): shape, family, bold, italic; -1: none
        self.palette = torch.tensor(list(COLOURS.values()))       # (8, 3)
        # a letter is 2.4 times as likely as a pictogram, whatever the number of its fonts
        num_variants = torch.bincount(self.variants[:, 0])[self.variants[:, 0]].float()
        is_pictogram = self.variants[:, 1] < 0
        self.sampling_weights = is_pictogram.float() + ~is_pictogram * 2.4 / num_variants    # (V,)
        if families is not None:
            chosen = torch.tensor([list(FONT_FAMILIES).index(family) for family in families])
            self.sampling_weights = self.sampling_weights * torch.isin(self.variants[:, 1], chosen)
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

    def draw_masks(self, variants):
        """Indices of n variants -> their coverage (n, 2R, 2R) uint8."""
        px = 2 * self.resolution
        oversampling = max(1, 256 // px)
        masks = [glyph_mask(*self.outlines[i], px, oversampling) for i in variants]
        return (torch.stack(masks) * 255).round().byte()

    def transformed_coverage(self, masks, affine):
        """Masks (n, 2R, 2R) uint8 moved by affine (n, 2, 3), averaged over 2x2 pixels -> (n, 1, R, R)."""
        px = masks.shape[-1]
        grid = F.affine_grid(affine, (len(masks), 1, px, px), align_corners=False)
        return F.avg_pool2d(F.grid_sample(masks[:, None] / 255., grid, align_corners=False), 2)

    def render(self, variant, foreground, background, generator=None):
        """Three index tensors (n,) -> images (n, 3, R, R) in [-1, 1]: masks moved, rotated and scaled at
        random, averaged over 2x2 pixels, then coloured."""
        n = len(variant)
        u = torch.rand(n, 4, generator=generator) * 2 - 1
        angle = u[:, 0] * .09    # +-5 degrees
        scale = 1 + u[:, 1] * .07
        cos = angle.cos() / scale
        sin = angle.sin() / scale
        affine = torch.stack([torch.stack([cos, -sin, u[:, 2] * .11], 1),    # shift by +-1.8 pixels of 32
                              torch.stack([sin, cos, u[:, 3] * .11], 1)], 1)    # (n, 2, 3)
        if self.masks is not None:
            coverage = self.transformed_coverage(self.masks[variant], affine)
        else:    # one at a time: the masks of a batch would fill the memory
            coverage = torch.cat([self.transformed_coverage(self.draw_masks([i]), affine[k:k + 1])
                                  for k, i in enumerate(variant.tolist())])
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


# ------------------------------------------------------------------------------------------ data sets by name

def glyph_families(name):
    """The font families in 'glyphs:FAMILY,FAMILY'; None for 'glyphs'. ValueError for unknown ones."""
    if name == "glyphs":
        return None
    families = name.partition(":")[2].split(",")
    unknown = [family for family in families if family not in FONT_FAMILIES]
    if unknown:
        raise ValueError(f"no font family '{printable(unknown[0])}' in '{printable(name)}': wanted some of "
                         f"{', '.join(FONT_FAMILIES)}, separated by commas")
    return families


def dataset_name(name, resumed_run=None):
    """The name under which weights/ knows a data set; ValueError or OSError if there is no such data set, as
    far as can be told without a network. resumed_run: what is resumed, if its data may have been moved."""
    if name.startswith("glyphs:"):
        glyph_families(name)
        return "glyphs"
    if name in ("glyphs", "fashion"):
        return name
    source = hub_data.parse_source(name) if name else None
    if source is None and (name == "" or not Path(name).is_dir()):
        hint = f"; if the data of {resumed_run} was moved, add --data with its new place"
        raise FileNotFoundError(f"no data set '{printable(name)}': wanted glyphs, fashion, a folder of "
                                "images, a hub data set (OWNER/NAME or OWNER/NAME@SPLIT), or .tar shards"
                                + (hint if resumed_run else ""))
    if source is not None:
        hub_data.check_library(name)
        if source.kind == "hub":
            return name
        if source.kind == "shards":
            hub_data.list_shards(source)
        name = name if Path(name).exists() else name.partition("#")[0]
    return hub_data.folder_name(name)


def build_dataset(name, resolution=DEFAULT_RESOLUTION, random_flip=False, random_crop=False,
                  bucket_multiple=None):
    """A data set by its name, whose images get resolution x resolution pixels: 'glyphs', 'glyphs:FAMILIES',
    'fashion', a folder, a hub data set, or .tar shards. random_flip, random_crop: augment what training_batch
    returns. bucket_multiple: its images get the shapes of aspect-ratio buckets, whose sides are multiples of
    this.
    ValueError or OSError with a sentence to show."""
    if hub_data.is_built_in(name):
        if random_flip or random_crop:
            option = "--random-flip" if random_flip else "--random-crop"
            raise ValueError(f"{option} is for folders and hub data sets: the captions of {name} would not "
                             "fit its images any more")
        if bucket_multiple:
            raise ValueError(f"--aspect-buckets is for folders and hub data sets: all images of {name} are "
                             "squares")
        return Fashion() if name == "fashion" else Glyphs(resolution, glyph_families(name))
    short_name = dataset_name(name)
    if name == DEFAULT_HUB_DATASET and distributed.get_rank() == 0:
        print_message(default_dataset_message())
    source = hub_data.parse_source(name)
    source = image_folder.ImageFolder(name) if source is None else hub_data.open_source(source)
    is_stream = isinstance(source, hub_data.Stream)
    if bucket_multiple:
        dataset_cls = aspect_buckets.BucketedStream if is_stream else aspect_buckets.BucketedImages
        return dataset_cls(short_name, source, resolution, bucket_multiple, random_flip, random_crop)
    dataset_cls = StreamedImages if is_stream else CaptionedImages
    return dataset_cls(short_name, source, resolution, random_flip, random_crop)


def training_dataset(run_config, model):
    """The data set of a run, at the resolution of its model."""
    bucket_multiple = model.size_multiple if run_config["aspect_buckets"] else None
    dataset = build_dataset(run_config["data"], model.resolution, run_config["random_flip"],
                            run_config["random_crop"], bucket_multiple)
    if run_config["cache_latents"] and not isinstance(dataset, CaptionedImages):
        raise ValueError("--cache-latents is for images that come again in every epoch: those of "
                         f"{dataset.name} are streamed or drawn; leave the option out")
    return dataset


def default_dataset_message():
    """The sentence that announces the default data set of large models."""
    default = hub_data.DEFAULT_DATASET
    return (f"data: {default['id']}, {default['num_images']:,} captioned images, {default['download']} to "
            f"download once and {default['disk']} on disk, in {hub_data.cache_folder()}; licence: "
            f"{default['licence']}; --data names another")


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
        axis.set_title("\n".join(textwrap.wrap(text, 20)), fontsize=7.5, y=-.1, va="top", parse_math=False)
    figure.subplots_adjust(.01, .05, .99, .99, .08, .5)
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=100, format="png")


def preview(args):
    """Write the contact sheet that the command line asks for. ValueError or OSError with a sentence."""
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: wanted 0 to 2^63 - 1")
    name = dataset_name(args.preview)
    path = Path(args.output or re.sub(r"[*?{}\[\]#:]+", "_", Path(name).name) + ".png")
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {printable(path)}: wanted a file name ending in .png, in a folder that "
                         "exists")
    if not args.output and path.exists() and Path(args.preview).is_dir():    # it may be one of the images
        raise ValueError(f"{printable(path)} exists already: --output names another file, or this one to "
                         "replace it")
    contact_sheet(build_dataset(args.preview), path, seed=args.seed)
    print_message(f"wrote {printable(path)}")
    if Path(args.preview).is_dir() and path.resolve().is_relative_to(Path(args.preview).resolve()):
        print_message("it lies in the data folder, where it will be taken for one of the images: move it")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a contact sheet of a data set: images and captions.")
    parser.add_argument("--preview", required=True, metavar="DATA",
                        help="glyphs, fashion, a folder, a hub data set, or .tar shards")
    parser.add_argument("--output", help="the PNG to write (default: the data set's name + .png)")
    parser.add_argument("--seed", type=int, default=0, help="which images")
    args = parser.parse_args(argv)
    with clear_exit(parser, "data.py"):
        preview(args)


if __name__ == "__main__":
    start_program()
    main()
