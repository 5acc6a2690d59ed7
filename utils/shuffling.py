"""The order in which the images of a data set come: all of them once before any of them again.

Read next: data.py"""

import hashlib
from functools import lru_cache

import torch


def shuffled_forever(size, generator):
    """Yields row numbers without end; every row comes once before any comes again."""
    while True:
        # few of them are used in most cases, so the permutation is turned into numbers in parts
        for rows in torch.randperm(size, generator=generator).split(256):
            yield from rows.tolist()


def permutation(size, *tags):
    """A permutation of 0 to size - 1 that follows from the tags."""
    digest = hashlib.sha256(repr(tags).encode()).digest()
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8])))


class EpochOrder:
    """One permutation of the rows for each epoch of a run. Position p of the run is in epoch p // size.

    The row at a position follows from the seed and the position alone, so processes and micro-batches that
    have different positions have different images, and a resumed run continues where it was. A permutation is
    drawn once for its epoch and kept, 8 bytes a row, together with that of the epoch before: a batch may lie
    across the border."""

    def __init__(self, size):
        self.size = size
        self.permutation = lru_cache(2)(lambda seed, epoch: permutation(size, seed, "epoch", epoch))

    def rows(self, position, n, seed):
        """The rows at the positions from `position` to `position + n` - 1, a list."""
        places = [divmod(i, self.size) for i in range(position, position + n)]
        return [int(self.permutation(seed, epoch)[index]) for epoch, index in places]
