"""Text encodings of captions, computed once per text encoder and kept on disk.

The text encoders of Stable Diffusion are frozen, so a caption's encoding never changes, and without the
encoders a GPU has room for more images. The cache is a folder for each set of encoders; its name is a hash of
everything that an encoding depends on (`text_encoding_hash`), so two models share a folder only if they would
compute the same encodings. It holds safetensors files of many captions each, in fp16. A file is written once,
under a name of its own, so processes need no locks.
Read next: models/stable_diffusion.py"""

import hashlib
import importlib.metadata
import json
import tempfile
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from utils.checkpoint import cache_dir
from utils.messages import BadInput

MEMORY_BYTES = 2 ** 30                 # encodings held in memory; the others are read from disk again
DISK_BYTES = 20 * 2 ** 30              # if a data set has more, every batch is encoded when it is needed
FILE_BYTES = 2 ** 28
FORMAT_VERSION = 2                     # to be raised when models/stable_diffusion.py encodes differently
LIBRARIES = ("diffusers", "transformers", "tokenizers")
# where a component was loaded from, and by which version it was saved: no encoding depends on these
IGNORED_CONFIG_KEYS = ("transformers_version", "name_or_path", "is_local", "local_files_only")


class PromptCache:
    """{caption: {key: tensor in fp16}}, in memory and on disk. Whole numbers keep their type."""
    content = "text encodings"         # in messages

    def __init__(self, name):
        """name: hash of what the encodings depend on."""
        self.name = name
        self.on_disk = True            # False: new encodings are kept in memory only
        self.in_memory = {}
        self.rows = {}                 # digest of a caption -> (file, row)
        self.known_files = set()

    @property
    def folder(self):
        return cache_dir() / "adversarial-diffusion" / self.name

    def digest(self, caption):
        """The name of a caption in the files. ValueError if it is not valid Unicode."""
        try:
            return hashlib.sha256(caption.encode()).digest()[:16]
        except UnicodeEncodeError:
            raise BadInput(f"a caption holds half a character: {ascii(caption[:60])}") from None

    def read_new_files(self):
        """Index the files that have been written since the last time, by any process. Damaged ones are
        deleted: their captions will be encoded again."""
        from safetensors import SafetensorError, safe_open
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.known_files):
            self.known_files.add(path)
            try:
                with safe_open(path, "pt") as file:
                    digests = file.get_tensor("digests").numpy()
            except (SafetensorError, OSError):
                with suppress(OSError):
                    path.unlink()
                continue
            self.rows |= {row.tobytes(): (path, i) for i, row in enumerate(digests)}

    def store(self, captions, encodings):
        """encodings: {key: (B, ...)}, for B captions -> one new file. OSError if the cache folder cannot be
        written to."""
        from safetensors.torch import save
        # fp16 holds 65504; public text encoders stay below 1000
        encodings = {key: value.detach().cpu().clamp(-65504, 65504).half().contiguous()
                     if value.is_floating_point() else value for key, value in encodings.items()}
        items = [{key: value[i].clone() for key, value in encodings.items()} for i in range(len(captions))]
        for caption, item in zip(captions, items):
            self.remember(caption, item)
        if not self.on_disk:
            return
        digests = torch.tensor([list(self.digest(caption)) for caption in captions], dtype=torch.uint8)
        checksums = torch.tensor([checksum(item) for item in items])
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        tmp_path = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # safetensors' save_file would ignore the umask
            tmp_path.write_bytes(save({"digests": digests, "checksums": checksums, **encodings}))
            tmp_path.replace(path)
        except OSError as error:
            raise OSError(f"cannot write {self.content} to {self.folder} ({error.strerror or error}): free "
                          "some space there, or set XDG_CACHE_HOME to another folder") from None
        finally:
            with suppress(OSError):
                tmp_path.unlink(missing_ok=True)

    def remember(self, caption, encoding):
        encoding_bytes = sum(value.nbytes for value in encoding.values())
        if len(self.in_memory) * encoding_bytes > MEMORY_BYTES:
            oldest = next(iter(self.in_memory))
            del self.in_memory[oldest]
        self.in_memory[caption] = encoding

    def load(self, caption):
        """-> {key: tensor in fp16}, or None if there is no encoding or a damaged one."""
        from safetensors import SafetensorError, safe_open
        if caption in self.in_memory:
            return self.in_memory[caption]
        digest = self.digest(caption)
        if digest not in self.rows:
            self.read_new_files()
        path, row = self.rows.get(digest, (None, None))
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                encoding = {key: file.get_slice(key)[row] for key in file.keys()  # noqa: SIM118
                            if key not in ("digests", "checksums")}
                is_intact = file.get_slice("checksums")[row] == checksum(encoding)
        except (SafetensorError, OSError):
            is_intact = False
        if not is_intact:
            del self.rows[digest]
            return None
        self.remember(caption, encoding)
        return encoding


def checksum(encoding):
    """CRC-32 of {key: tensor}."""
    value = 0
    for key in sorted(encoding):
        value = zlib.crc32(encoding[key].contiguous().numpy(), value)
    return value


def text_encoding_hash(pipe, denoiser_name, network_config):
    """A name for everything that the encoding of a caption depends on -> 32 hexadecimal digits.

    pipe: a diffusers pipeline whose tokenizers have not been called yet, since a call leaves its truncation
    and padding in them. Covers the weights and configs of the text encoders, the tokenizers' files, the
    pipeline's class and settings (SDXL's force_zeros_for_empty_prompt), the libraries, and of the network's
    config the width of the zeros that stand for SD3's T5 where it is missing. About 1 s per GB and core."""
    # diffusers stores a component as (library, class); everything else is a setting of the pipeline
    settings = {key: value for key, value in pipe.config.items()
                if not key.startswith("_") and not isinstance(value, (list, tuple))}
    content = {"format": FORMAT_VERSION, "denoiser": denoiser_name, "pipeline": type(pipe).__name__,
               "settings": settings, "joint_attention_dim": network_config.get("joint_attention_dim"),
               "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES}}
    for name, component in pipe.components.items():
        if component is None:
            continue
        if name.startswith("text_encoder"):
            content[name] = [type(component).__name__, portable_config(component.config.to_dict()),
                             weights_hash(component)]
        elif name.startswith("tokenizer"):
            content[name] = [type(component).__name__, tokenizer_hash(component)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def portable_config(config):
    """A config without the keys that tell where it came from."""
    return {key: value for key, value in config.items()
            if not key.startswith("_") and key not in IGNORED_CONFIG_KEYS}


def tensor_hash(tensor):
    """SHA-256 of shape, type and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_hash(module):
    """SHA-256 of all weights and buffers of a module. Threads help: hashing releases Python's lock."""
    state = module.state_dict()
    names = sorted(state)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(tensor_hash, [state[name] for name in names]))
    return hashlib.sha256(json.dumps([names, hashes]).encode()).hexdigest()


def tokenizer_hash(tokenizer):
    """SHA-256 of the files that a tokenizer consists of."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            content = path.read_bytes()
            if path.name == "tokenizer_config.json":
                content = json.dumps(portable_config(json.loads(content)), sort_keys=True).encode()
            digest.update(json.dumps([path.name, len(content)]).encode())
            digest.update(content)
    return digest.hexdigest()
