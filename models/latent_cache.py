"""Latents of training images, computed once and kept on disk (--cache-latents).

What is kept are the moments of the VAE's distribution, mean and log variance in fp16, and a latent is drawn
from them when it is trained, as models.stable_diffusion.encode does. With --random-flip each image has two
entries. The files are those of prompt_cache.py: a folder for each hash of what the latents depend on.
Read next: utils/captioned_images.py, which makes batches of them"""

import hashlib
import importlib.metadata
import json
import shutil
from functools import partial

import torch
from tqdm import tqdm

from models.prompt_cache import PromptCache, portable_config, weights_hash
from utils import distributed, precision
from utils.image_decoding import CENTRE
from utils.messages import BadInput

IMAGES_PER_FILE = 256
FORMAT_VERSION = 1                     # to be raised when images are resized or encoded differently


class LatentCache(PromptCache):
    """{name of an image, flipped or not: {"moments": (2C, h, w), "micro_cond": (4,)}}."""
    content = "latents"

    def digest(self, name):
        """The name of an entry in the files. It holds a file's name, which need not be valid Unicode."""
        return hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:16]


def latent_hash(model, dataset):
    """A name for everything that the moments of an image depend on -> 32 hexadecimal digits: the VAE's
    weights, config and precision, the images, their shapes, and the libraries that resize and encode."""
    content = {"format": FORMAT_VERSION, "vae": weights_hash(model.vae),
               "config": portable_config(dict(model.vae.config)),
               "precision": str(precision.compute_dtype(model.precision)),
               "images": dataset.fingerprint, "resolution": dataset.resolution,
               "buckets": getattr(dataset, "shapes", None),
               "libraries": {name: importlib.metadata.version(name) for name in ("diffusers", "pillow")}}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def entry_name(dataset, row, flip):
    return f"{dataset.source.describe(row)} {'flipped' if flip else ''}"


@torch.no_grad()
def cache_latents(model, dataset, needs_images):
    """Compute the latents that are not in the cache yet, each process its share; from then on the batches of
    dataset.training_batch hold moments, and images only where needs_images."""
    cache = LatentCache(latent_hash(model, dataset))
    flips = (False, True) if dataset.random_flip else (False,)
    entries = [(row, flip) for row in range(len(dataset.captions)) for flip in flips]
    own = entries[distributed.get_rank()::distributed.get_world_size()]
    missing = [entry for entry in own if cache.load(entry_name(dataset, *entry)) is None]
    check_space(cache, model, len(missing) * distributed.get_world_size())
    if distributed.get_rank() == 0:
        print(f"{len(entries):,} latents are kept in {cache.folder}; {len(own) - len(missing):,} of this "
              f"process's {len(own):,} are there")
    missing.sort(key=lambda entry: dataset.shape_of_row(entry[0]) or ())      # a file has one shape
    for start in tqdm(range(0, len(missing), IMAGES_PER_FILE), "latents", disable=len(missing) < 1000):
        encode_entries(model, dataset, cache, missing[start:start + IMAGES_PER_FILE])
    distributed.barrier()
    dataset.use_latents(lambda row, flip: cache.load(entry_name(dataset, row, flip)), needs_images)


def check_space(cache, model, num_missing):
    """BadInput if the disk has no room for so many latents."""
    channels, height, width = model.latent_shape
    wanted = num_missing * 2 * channels * height * width * 2 / 2 ** 30
    folder = next(path for path in (cache.folder, *cache.folder.parents) if path.exists())
    found = shutil.disk_usage(folder).free / 2 ** 30
    if wanted > found:
        raise BadInput(f"--cache-latents: {num_missing:,} latents want {wanted:.1f} GiB in {cache.folder}, "
                       f"{found:.1f} are free: leave the option out, or set XDG_CACHE_HOME to another folder")


def encode_entries(model, dataset, cache, entries):
    """Read and encode images and write a file for each of their shapes. What cannot be read is left out."""
    load = partial(dataset.load_image, crop=CENTRE)
    items = dataset.reader.pool.map(
        lambda entry: load(entry[0], flip=entry[1], shape=dataset.shape_of_row(entry[0])), entries)
    by_shape = {}
    for entry, item in zip(entries, items):
        if item is None:
            continue
        image, micro_cond = item
        image = image[None].float() / 127.5 - 1
        with model.autocast():
            moments = model.encode_moments(image.to(distributed.get_device()))
        row = entry_name(dataset, *entry), moments.cpu(), micro_cond
        by_shape.setdefault(moments.shape, []).append(row)
    for rows in by_shape.values():
        names, moments, micro_conds = zip(*rows)
        cache.store(names, {"moments": torch.cat(moments), "micro_cond": torch.stack(micro_conds)})
