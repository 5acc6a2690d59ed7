"""Data sets of your own images: in any order (CaptionedImages) or one after the other (StreamedImages).

Both have `training_batch`, which gives the images at a position of a run: in an epoch every image comes once
before any comes again, in all processes together, and a resumed run continues where it was.
Read next: utils/image_folder.py, utils/hub_data.py, the sources of the images; utils/aspect_buckets.py
"""

from itertools import islice

import torch

from utils.batch import Batch, check_split
from utils.image_decoding import CENTRE, ImageReader, draw_augmentation
from utils.messages import BadInput
from utils.shuffling import EpochOrder, shuffled_forever

CACHE_BYTES = 2 ** 30         # images are kept in memory if they are smaller than this


class CaptionedImages:
    """Images of a folder, a hub data set or small .tar shards, in any order. Squares are cut from the middle,
    or anywhere with random_crop; transparent images get a white background. Images that fit into CACHE_BYTES
    are kept in memory; otherwise they are read when they are sampled. Every split is the whole set. The one
    attribute is the caption: which of all captions belongs to this image?"""
    has_fixed_captions = True
    has_own_positions = False    # a position counts the images of all processes
    keeps_images = True
    load_latent = None           # set by use_latents

    def __init__(self, name, source, resolution, random_flip=False, random_crop=False):
        """source: an ImageFolder or a TableImages. random_flip, random_crop: of training images."""
        self.name, self.source, self.resolution = name, source, resolution
        self.random_flip, self.random_crop = random_flip, random_crop
        self.captions, self.fingerprint = source.captions, source.fingerprint
        size = len(self.captions)
        self.split_sizes = {"train": size, "test": size}
        self.vocab = sorted({word for text in self.captions for word in text.lower().split()})
        self.all_captions = sorted(set(self.captions))
        self.attributes = {"caption": self.all_captions}
        index = {text: i for i, text in enumerate(self.all_captions)}
        self.labels = torch.tensor([index[text] for text in self.captions])
        self.epoch_order = EpochOrder(size)
        self.reader = ImageReader(resolution, size)
        self.image_cache = None
        if self.keeps_images and size * 3 * resolution ** 2 < CACHE_BYTES and not random_crop:
            self.image_cache = list(self.reader.pool.map(self.read_image, range(size)))

    def read_image(self, row, crop=CENTRE, flip=False, shape=None):
        """-> image (3, R, R) uint8 and micro_cond (4,), or None if the image cannot be read. shape: (height,
        width) in place of the square."""
        return self.reader.read(lambda: self.source.open(row), self.source.describe(row), crop, flip, shape)

    def load_image(self, row, crop=CENTRE, flip=False, shape=None):
        """The same, from the memory if it is there."""
        if self.image_cache is None:
            return self.read_image(row, crop, flip, shape)
        if flip and self.image_cache[row]:
            image, micro_cond = self.image_cache[row]
            return image.flip(-1), micro_cond    # the square in the middle stays where it is
        return self.image_cache[row]

    def training_batch(self, position, n, seed, generator):
        """The n images at a position of a run: its images before this batch, in all processes. Within an
        epoch all are different. seed: of the run. generator: draws crops, flips, and what replaces an image
        that cannot be read."""
        rows, shape = self.training_rows(position, n, seed)
        augmentation = draw_augmentation(n, generator, self.random_flip, self.random_crop)
        if self.load_latent is not None:
            flips = [flip for _, flip in augmentation]
            return self.latent_batch([self.load_entry(row, flip, shape) or self.other_entry(shape, generator)
                                      for row, flip in zip(rows, flips)])
        items = self.reader.pool.map(lambda row, args: self.load_image(row, *args, shape), rows, augmentation)
        loaded = [(row, *item) if item else self.load_next(self.readable_rows(generator), 1, shape)[0]
                  for row, item in zip(rows, list(items))]
        return self.make_batch(loaded)

    def use_latents(self, load_latent, needs_images):
        """Let training_batch return latents. load_latent(row, flip) -> {"moments", "micro_cond"}, or None
        for an image that could not be read. needs_images: return the images as well."""
        self.load_latent, self.needs_images = load_latent, needs_images

    def load_entry(self, row, flip, shape):
        """-> row, latent, image (None if not needed); None if the image cannot be read."""
        latent, item = self.load_latent(row, flip), None
        if latent is not None and self.needs_images:
            item = self.load_image(row, CENTRE, flip, shape)
        if latent is None or self.needs_images and item is None:
            return None
        return row, latent, item and item[0]

    def other_entry(self, shape, generator):
        """A random image of the same shape in place of one that cannot be read."""
        rows = self.rows_of_shape(shape)
        for i in torch.randperm(len(rows), generator=generator).tolist():
            entry = self.load_entry(rows[i], False, shape)
            if entry is not None:
                return entry
        raise BadInput(f"no image of {self.name} with the shape {shape or 'square'} has a latent: repair or "
                       "remove them, and start again")

    def latent_batch(self, entries):
        rows, latents, images = zip(*entries)
        pixels = torch.stack(images).float() / 127.5 - 1 if self.needs_images else None
        moments, micro_cond = (torch.stack([latent[key] for latent in latents])
                               for key in ("moments", "micro_cond"))
        return Batch(pixels, [self.captions[row] for row in rows], self.labels[list(rows), None],
                     torch.ones(len(rows), 1, dtype=torch.bool), micro_cond, moments=moments.float())

    def shape_of_row(self, row):
        """(height, width) of a training image, None for the square."""

    def rows_of_shape(self, shape):
        """The rows whose training images have this shape."""
        return range(len(self.captions))

    def training_rows(self, position, n, seed):
        """-> the rows of training_batch, and the (height, width) of its images, None for the square."""
        return self.epoch_order.rows(position, n, seed), None

    def sample_batch(self, n, generator=None, split="train"):
        """n images, all different as long as the set has n."""
        return next(self.iter_batches(n, n, generator, split))

    def iter_batches(self, n, max_batch, generator=None, split="train"):
        """The images of sample_batch(n), in batches of max_batch; the last one may be smaller. They need not
        fit into memory together."""
        check_split(split, self.split_sizes)
        row_iter = self.readable_rows(generator)
        for start in range(0, n, max_batch):
            yield self.make_batch(self.load_next(row_iter, min(max_batch, n - start)))

    def readable_rows(self, generator):
        return (row for row in shuffled_forever(len(self.captions), generator)
                if self.source.describe(row) not in self.reader.unreadable)

    def load_next(self, row_iter, n, shape=None):
        """-> n times (row, image, micro_cond). An image that cannot be read is replaced by the next one."""
        loaded = []
        while len(loaded) < n:
            rows = list(islice(row_iter, n - len(loaded)))
            items = self.reader.pool.map(lambda row: self.load_image(row, shape=shape), rows)
            loaded += [(row, *item) for row, item in zip(rows, items) if item]
        return loaded

    def make_batch(self, loaded):
        rows, images, micro_conds = zip(*loaded)
        return Batch(torch.stack(images).float() / 127.5 - 1, [self.captions[row] for row in rows],
                     self.labels[list(rows), None], torch.ones(len(rows), 1, dtype=torch.bool),
                     torch.stack(micro_conds))


class StreamedImages:
    """Images that are read one after the other, from a hub data set or .tar shards too large to copy. They
    are shuffled within a buffer, and the order of the shards is shuffled. Their captions are not known before
    they are read. A position is reached by reading and dropping what is before it: a resumed run reads
    everything again, without decoding it, and then continues with the same images."""
    has_fixed_captions = False
    has_own_positions = True    # a position counts the images of this process
    split_sizes = {"train": None, "test": None}    # None: the size is not known
    all_captions, vocab, attributes = [], [], {}

    def __init__(self, name, source, resolution, random_flip=False, random_crop=False):
        """source: a hub_data.Stream. random_flip, random_crop: of training images."""
        self.name, self.source, self.resolution = name, source, resolution
        self.random_flip, self.random_crop = random_flip, random_crop
        self.fingerprint = source.fingerprint
        self.reader = ImageReader(resolution)
        self.records, self.next_position = None, 0

    def training_batch(self, position, n, seed, generator):
        """The n images at a position of this process's part of the stream. seed, generator: as in
        CaptionedImages."""
        records, shape = self.training_records(position, n, seed)
        self.next_position = position + n
        augmentation = draw_augmentation(n, generator, self.random_flip, self.random_crop)
        loaded = self.load(records, augmentation, shape)
        num_missing = n - len(loaded)    # what cannot be read is replaced, so that positions stay
        if num_missing:
            loaded += self.load_next(self.source.iter_records(draw_seed(generator), 10), num_missing, shape)
        return self.make_batch(loaded)

    def training_records(self, position, n, seed):
        """-> the records of training_batch, and the (height, width) of its images, None for the square."""
        if self.records is None or position != self.next_position:
            part = self.source.iter_records(seed, self.source.shuffle_buffer, only_this_rank=True)
            self.records = islice(part, position, None)
        return list(islice(self.records, n)), None

    def sample_batch(self, n, generator=None, split="train"):
        """n images; the same in every process if the generators are."""
        return next(self.iter_batches(n, n, generator, split))

    def iter_batches(self, n, max_batch, generator=None, split="train"):
        """The images of sample_batch(n), in batches of max_batch; the last one may be smaller."""
        check_split(split, self.split_sizes)
        records = self.source.iter_records(draw_seed(generator), min(10 * n, self.source.shuffle_buffer))
        for start in range(0, n, max_batch):
            yield self.make_batch(self.load_next(records, min(max_batch, n - start)))

    def load(self, records, augmentation, shape=None):
        """[(open_fn, name, caption)] -> those that can be read, [(image, micro_cond, caption)]."""
        items = self.reader.pool.map(lambda record, args: self.reader.read(*record[:2], *args, shape),
                                     records, augmentation)
        return [(*item, caption) for item, (_, _, caption) in zip(items, records) if item]

    def load_next(self, records, n, shape=None):
        loaded = []
        while len(loaded) < n:
            chunk = list(islice(records, n - len(loaded)))
            loaded += self.load(chunk, [(CENTRE, False)] * len(chunk), shape)
        return loaded

    def make_batch(self, loaded):
        images, micro_conds, captions = zip(*loaded)
        no_attributes = torch.zeros(len(images), 0, dtype=torch.long)
        return Batch(torch.stack(images).float() / 127.5 - 1, list(captions), no_attributes,
                     no_attributes.bool(), torch.stack(micro_conds))


def draw_seed(generator):
    return int(torch.randint(2 ** 62, (), generator=generator))
