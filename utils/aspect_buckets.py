"""Aspect-ratio buckets: images are trained at a shape near their own instead of being cut to squares.

A bucket is a shape of about resolution^2 pixels. An image belongs to the one whose ratio is nearest to its
own; it is resized until it covers that shape, and what sticks out is cut off. All images of a micro-batch, in
all processes, belong to one bucket: tensors have one shape, and no process waits for one with a larger shape.
Read next: utils/captioned_images.py
"""

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import islice

import torch

from utils import distributed
from utils.captioned_images import CaptionedImages, StreamedImages
from utils.image_decoding import image_size
from utils.messages import BadInput
from utils.shuffling import EpochOrder, permutation

MAX_RATIO = 2                 # of the longer side to the shorter one
MIN_AREA = .9                 # of a bucket, relative to the square


def bucket_shapes(resolution, multiple):
    """-> [(height, width)], from wide to tall, whose sides are multiples of `multiple`. None has more pixels
    than the square: a batch of it needs no more memory. BadInput if the square is the only one."""
    area, shapes = resolution ** 2, set()
    for short in range(multiple, resolution + 1, multiple):
        long = min(area // short, MAX_RATIO * short) // multiple * multiple
        if short * long >= MIN_AREA * area:
            shapes |= {(short, long), (long, short)}
    if len(shapes) == 1:
        raise BadInput(f"--aspect-buckets: at {resolution} pixels there is only the square, since sides are "
                       f"multiples of {multiple}: wanted a larger --resolution, {4 * multiple} or more")
    return sorted(shapes)


def nearest_bucket(size, shapes):
    """The number of the shape whose ratio is nearest to that of (height, width), of the square if the size is
    not known (0)."""
    ratio = math.log(size[0] / size[1]) if min(size) > 0 else 0.
    distances = [abs(ratio - math.log(height / width)) for height, width in shapes]
    return distances.index(min(distances))


def shape_name(shape):
    """(height, width) -> WIDTHxHEIGHT."""
    return f"{shape[1]}x{shape[0]}"


class BucketOrder:
    """Which images are trained together. A group is what all processes take in one micro-batch.

    Every bucket has an order of its own (EpochOrder), from which its groups are cut one after the other. What
    does not fill a group at the end of an epoch is the beginning of the bucket's next group, in the next
    epoch. The groups that an epoch completes come in random order. All follows from the seed and the number
    of the group, so a resumed run continues where it was."""

    def __init__(self, bucket_of_row, num_buckets):
        self.rows = [[] for _ in range(num_buckets)]
        for row, bucket in enumerate(bucket_of_row):
            self.rows[bucket].append(row)
        self.orders = [EpochOrder(len(rows)) for rows in self.rows]
        self.plan = lru_cache(2)(self.make_plan)

    def num_groups(self, bucket, epoch, size):
        """How many groups of this size a bucket completes before an epoch."""
        return epoch * len(self.rows[bucket]) // size

    def num_all_groups(self, epoch, size):
        return sum(self.num_groups(bucket, epoch, size) for bucket in range(len(self.rows)))

    def make_plan(self, epoch, size, seed):
        """The groups that are completed in an epoch, in their order: [(bucket, position of its first image in
        the bucket's order)]."""
        groups = [(bucket, size * number) for bucket in range(len(self.rows))
                  for number in range(self.num_groups(bucket, epoch, size),
                                      self.num_groups(bucket, epoch + 1, size))]
        return [groups[i] for i in permutation(len(groups), seed, "buckets", epoch).tolist()]

    def group(self, number, size, seed):
        """-> the bucket of a group, and the rows of its images."""
        num_images = sum(len(rows) for rows in self.rows)
        # a bucket holds back less than a group, so the group has been completed by this epoch
        last_epoch = (number + 1 + len(self.rows)) * size // num_images + 1
        epoch = bisect_right(range(last_epoch + 1), number, key=lambda e: self.num_all_groups(e, size)) - 1
        bucket, position = self.plan(epoch, size, seed)[number - self.num_all_groups(epoch, size)]
        places = self.orders[bucket].rows(position, size, (seed, "bucket", bucket))
        return bucket, [self.rows[bucket][place] for place in places]


class BucketedImages(CaptionedImages):
    """CaptionedImages whose training batches have the shapes of buckets; samples for other purposes are
    squares. A bucket with fewer images than a group fills it over several epochs."""
    has_own_positions = True
    keeps_images = False

    def __init__(self, name, source, resolution, multiple, random_flip=False, random_crop=False):
        """multiple: of which the sides of an image are."""
        self.shapes = bucket_shapes(resolution, multiple)
        super().__init__(name, source, resolution, random_flip, random_crop)
        self.bucket_of_row = [nearest_bucket(size, self.shapes) for size in self.image_sizes()]
        self.bucket_order = BucketOrder(self.bucket_of_row, len(self.shapes))

    def image_sizes(self):
        """[(height, width)] of all images, 0 for those that cannot be opened. Each process opens its share;
        with 100,000 images on a network disk this takes minutes."""
        rank, world_size, size = distributed.get_rank(), distributed.get_world_size(), len(self.captions)
        sizes = torch.zeros(size, 2)
        own_rows = range(rank, size, world_size)
        for row, own_size in zip(own_rows, self.reader.pool.map(self.image_size, own_rows)):
            sizes[row] = torch.tensor(own_size)
        sizes = sizes.to(distributed.get_device())
        distributed.all_reduce_sum_([sizes])
        return sizes.tolist()

    def image_size(self, row):
        try:
            return image_size(self.source.open(row))
        except Exception:              # as of decoders; it is named when it is trained
            return 0, 0

    def training_rows(self, position, n, seed):
        bucket, rows = self.bucket_order.group(position // n, n * distributed.get_world_size(), seed)
        first = n * distributed.get_rank()
        return rows[first:first + n], self.shapes[bucket]

    def shape_of_row(self, row):
        return self.shapes[self.bucket_of_row[row]]

    def rows_of_shape(self, shape):
        return self.bucket_order.rows[self.shapes.index(shape)]

    @property
    def bucket_summary(self):
        """The shapes and their shares of the images, for example '512x512: 61 %, 640x384: 39 %'."""
        counts = sorted(((len(rows), shape_name(shape)) for rows, shape in
                         zip(self.bucket_order.rows, self.shapes) if rows), reverse=True)
        return ", ".join(f"{name}: {100 * count / len(self.captions):.2g} %" for count, name in counts)


class BucketedStream(StreamedImages):
    """StreamedImages whose training batches have the shapes of buckets. An image waits, not decoded, until
    its bucket has a group. Every process reads the whole stream and decodes its share of each group: so all
    have the same groups without asking each other."""

    def __init__(self, name, source, resolution, multiple, random_flip=False, random_crop=False):
        self.shapes = bucket_shapes(resolution, multiple)
        super().__init__(name, source, resolution, random_flip, random_crop)

    def shape_of(self, open_fn):
        """The shape of the bucket of an image; the square if it cannot be opened."""
        try:
            size = image_size(open_fn())
        except Exception:
            size = 0, 0
        return self.shapes[nearest_bucket(size, self.shapes)]

    def iter_groups(self, size, seed):
        """Yields (shape, records of a group) without end, each when its last image arrives."""
        waiting = {shape: [] for shape in self.shapes}
        for record in self.source.iter_records(seed, self.source.shuffle_buffer):
            shape = self.shape_of(record[0])
            waiting[shape].append(record)
            if len(waiting[shape]) == size:
                yield shape, waiting[shape]
                waiting[shape] = []

    def training_records(self, position, n, seed):
        if self.records is None or position != self.next_position:
            groups = self.iter_groups(n * distributed.get_world_size(), seed)
            self.records = islice(groups, position // n, None)
        shape, records = next(self.records)
        first = n * distributed.get_rank()
        return records[first:first + n], shape

    @property
    def bucket_summary(self):
        return f"{', '.join(map(shape_name, self.shapes))}; their shares are not known in advance"
