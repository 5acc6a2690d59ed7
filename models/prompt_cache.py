"""Text encodings of captions, computed once per text encoder and kept on disk.

The text encoders of Stable Diffusion are frozen, so a caption's encoding never changes, and without the
encoders a GPU has room for more images. The cache is a folder for each set of encoders; its name is a hash of
everything that an encoding depends on (`text_encoding_hash`), so two models share a folder only if they would
compute the same encodings.
Read next: models/stable_diffusion.py"""

import hashlib
import importlib.metadata
import json
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from utils.checkpoint import cache_dir
from utils.messages import BadInput

MEMORY_BYTES = 2 ** 30                 # encodings held in memory; the others are read from disk again
FORMAT_VERSION = 1                     # to be raised when models/stable_diffusion.py encodes differently
LIBRARIES = ("diffusers", "transformers", "tokenizers")
# where a component was loaded from, and by which version it was saved: no encoding depends on these
IGNORED_CONFIG_KEYS = ("transformers_version", "name_or_path", "is_local", "local_files_only")


class PromptCache:
    """{caption: {key: tensor}}, in memory and in safetensors files."""

    def __init__(self, name):
        """name: hash of what the encodings depend on."""
        self.name = name
        self.in_memory = {}

    @property
    def folder(self):
        return cache_dir() / "adversarial-diffusion" / self.name

    def path(self, caption):
        """The file of a caption, which need not exist. ValueError if the caption is not valid Unicode."""
        try:
            digest = hashlib.sha256(caption.encode()).hexdigest()
        except UnicodeEncodeError:
            raise BadInput(f"a caption holds half a character: {ascii(caption[:60])}") from None
        return self.folder / f"{digest[:32]}.safetensors"

    def __contains__(self, caption):
        return caption in self.in_memory or self.path(caption).is_file()

    def store(self, caption, encoding):
        """Write an encoding, {key: tensor}. OSError if the cache folder cannot be written to."""
        from safetensors.torch import save
        path = self.path(caption)
        # several processes may store the same caption at once: each writes a file of its own and renames it
        tmp_path = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp_path.write_bytes(save(encoding))  # safetensors' save_file would ignore the umask
            tmp_path.replace(path)
        except OSError as error:
            raise OSError(f"cannot write text encodings to {self.folder} ({error.strerror or error}): free "
                          "some space there, or set XDG_CACHE_HOME to another folder") from None
        finally:
            with suppress(OSError):
                tmp_path.unlink(missing_ok=True)

    def load(self, caption):
        """-> {key: tensor}. ValueError if the file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        if caption in self.in_memory:
            return self.in_memory[caption]
        try:
            encoding = load_file(self.path(caption))
        except SafetensorError:
            raise BadInput(f"{self.path(caption)} is damaged: delete it") from None
        encoding_bytes = sum(value.nbytes for value in encoding.values())
        if len(self.in_memory) * encoding_bytes > MEMORY_BYTES:
            oldest = next(iter(self.in_memory))
            del self.in_memory[oldest]
        self.in_memory[caption] = encoding
        return encoding


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
