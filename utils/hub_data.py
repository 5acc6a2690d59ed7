"""Images by the library `datasets`: data sets of the Hugging Face hub, folders of parquet or arrow files, and
WebDataset .tar shards.

A small one is a table whose rows are read in any order (TableImages). What is larger than MAP_STYLE_BYTES, or
of unknown size, is read one image after the other (Stream), and no copy of it is made.

    OWNER/NAME  OWNER/NAME@SPLIT  OWNER/NAME:CONFIG@SPLIT  FOLDER  'shards/{000..012}.tar'  'shards/*.tar'

Each may end in #IMAGE,CAPTION, the names of two columns, where these cannot be told from the others.
Read next: utils/captioned_images.py, which makes batches of this
"""

import glob
import hashlib
import importlib.util
import json
import logging
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

from utils import distributed, image_folder
from utils.checkpoint import cache_dir
from utils.image_folder import (
    METADATA_TABLES,
    image_suffixes,
    is_system_file,
    is_system_folder,
    left_out_names,
    name_some,
    print_left_out,
    scan_folder,
)
from utils.messages import BadInput, printable

# The data set of diffusers' text-to-image examples. Sizes: its dataset_infos.json. It states no licence.
DEFAULT_DATASET = {"id": "lambdalabs/naruto-blip-captions", "num_images": 1221, "download": "0.7 GB",
                   "disk": "1.4 GB", "licence": "none stated, the images are from narutopedia.com"}
MAP_STYLE_BYTES = 8 * 2 ** 30          # larger data sets are streamed
SHUFFLE_BUFFER = 1000                  # images of a stream that are in memory, not decoded, and shuffled
CONNECT_TIMEOUT_S = 5
IMAGE_COLUMNS = "image", "jpg", "jpeg", "png", "webp"
CAPTION_COLUMNS = "text", "caption", "prompt", "txt"
TEXT_SUFFIXES = "txt", "text", "json"  # of files in a .tar that must be UTF-8
TABLE_SUFFIXES = ".parquet", ".arrow"
SAVED_NAMES = "dataset_dict.json", "dataset_info.json", "state.json"    # beside tables, by save_to_disk
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?(?:@([\w.-]+))?")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Source(NamedTuple):
    """What a name of a data set means."""
    name: str                          # as typed
    kind: str                          # hub, folder (of tables) or shards (.tar)
    location: str                      # a hub id, a folder, or for shards also a pattern of file names
    config: str | None = None          # of a hub data set that has several
    split: str | None = None
    columns: tuple = ()                # image and caption, if the name gives them


def parse_source(name):
    """-> Source, or None for what this library is not needed for: a folder of image files, and names that
    are no data set. Opens no file."""
    if Path(name).is_dir():
        kind = kind_of_folder(name)
        return None if kind is None else Source(name, kind, name)
    base, _, columns = name.partition("#")
    columns = tuple(columns.split(",")) if columns else ()
    if columns and len(columns) != 2:
        raise ValueError(f"--data {printable(name)}: wanted two columns after #, IMAGE,CAPTION")
    if columns and Path(base).is_dir():
        source = parse_source(base)
        return None if source is None else source._replace(name=name, columns=columns)
    if base.endswith(".tar"):
        return Source(name, "shards", base, columns=columns)
    match = HUB_NAME.fullmatch(base)
    return match and Source(name, "hub", *match.groups(), columns)


def kind_of_folder(folder):
    """shards or folder if it holds .tar files, or tables with their images, but no image file; else None."""
    suffixes, found = image_suffixes(), set()
    for _, dir_names, file_names in os.walk(folder):
        dir_names[:] = [name for name in dir_names if not is_system_folder(name)]
        for name in file_names:
            suffix = Path(name).suffix.lower()
            if suffix in suffixes and not is_system_file(name):
                return None
            if name not in METADATA_TABLES and not is_system_file(name):
                found.add(suffix)
    if ".tar" in found:
        return "shards"
    return "folder" if found & set(TABLE_SUFFIXES) else None


def is_built_in(name):
    """Whether a name is that of a data set of this project, which comes before a folder of that name."""
    return name in ("glyphs", "fashion") or name.startswith("glyphs:")


def folder_name(path):
    """The short name of the data in a folder, file or hub data set; never that of a built-in data set, which
    has networks in weights/ and numbers in results/."""
    name = Path(path).resolve().name or "folder"       # the root of a file system has no name
    return f"folder-{name}" if is_built_in(name) else name


def absolute_name(name):
    """The name of a data set that means the same in any folder."""
    if is_built_in(name):
        return name
    source = parse_source(name)
    is_path = Path(name).exists() or (source is not None and source.kind != "hub")
    return str(Path(name).resolve()) if is_path else name


def expand_braces(pattern):
    """'a{08..10}' -> a08, a09, a10."""
    parts = BRACES.split(pattern)      # text, first, last, text, first, last, ..., text
    ranges = [[f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
              for first, last in zip(parts[1::3], parts[2::3])]
    texts = parts[::3]
    return ["".join([texts[0], *(number + text for number, text in zip(numbers, texts[1:]))])
            for numbers in product(*ranges)]


def list_shards(source):
    """-> sorted paths of the .tar files that a pattern means. BadInput if there is none, or if one of those
    that braces name is missing."""
    if Path(source.location).is_dir():
        files, _ = scan_folder(source.location)
        shards = sorted(os.path.abspath(path) for path in files if path.suffix.lower() == ".tar")
        if not shards:
            raise BadInput(f"--data {printable(source.name)}: there is no .tar file in this folder")
        return shards
    paths = []
    for pattern in expand_braces(source.location):
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise BadInput(f"--data {printable(source.name)}: there is no file {printable(pattern)}")
        paths += [os.path.abspath(path) for path in found]
    return paths


def check_shard(path):
    """BadInput if a .tar has no samples, a text that is not UTF-8, or samples of different files. OSError if
    it cannot be read."""
    suffixes = {}                      # name of a sample -> the suffixes of its files
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                sample, _, suffix = name.lower().partition(".")
                if not member.isfile() or not sample or not suffix:
                    continue
                suffixes.setdefault((folder, sample), set()).add(suffix)
                if suffix.split(".")[-1] in TEXT_SUFFIXES:
                    check_utf8(tar.extractfile(member).read(), f"{member.name} in {path}")
    except tarfile.TarError as error:
        raise OSError(f"{path}: {error}") from None
    kinds = sorted({" and ".join(sorted(found)) for found in suffixes.values()})
    if not kinds:
        raise BadInput(f"{printable(path)} has no samples: wanted files like 0001.jpg and 0001.txt")
    if len(kinds) > 1:
        raise BadInput(f"the samples of {printable(path)} differ: some are {printable(kinds[0])}, others "
                       f"{printable(kinds[1])}; wanted the same files for each, like 0001.jpg and 0001.txt")


def check_utf8(content, name):
    try:
        content.decode()
    except UnicodeDecodeError:
        raise BadInput(f"{printable(name)} is not UTF-8: save it as UTF-8") from None


# ------------------------------------------------------------------------------------------ the library

def check_library(name):
    """ValueError if the library is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"--data {printable(name)} needs the library datasets: pip install datasets")


def cache_folder():
    """Where the hub's libraries keep what they download."""
    return Path(os.environ.get("HF_HOME") or cache_dir() / "huggingface")


def is_hub_reachable():
    """Whether the hub answers, through the proxy if there is one. Its libraries themselves try for half a
    minute before they give up."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except Exception:                  # each transport has exceptions of its own
        return False
    return True


def hub_size_and_version(hub_id):
    """-> bytes of all files of a hub data set, None if that is not known, and its version."""
    from huggingface_hub import HfApi
    info = HfApi().dataset_info(hub_id, files_metadata=True, timeout=2 * CONNECT_TIMEOUT_S)
    sizes = [file.size for file in info.siblings or []]
    return (None if None in sizes else sum(sizes)), info.sha


def load_hub(datasets, source):
    """-> a table or a stream, and the version. Without a network, a table that is in the cache."""
    size, version = None, None
    is_online = is_hub_reachable()
    if is_online:
        size, version = hub_size_and_version(source.location)
    else:
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    is_stream = is_online and (size is None or size > MAP_STYLE_BYTES)
    try:
        found = datasets.load_dataset(source.location, source.config, revision=version, streaming=is_stream)
    except Exception:                  # of the library, of huggingface_hub or of its transport
        if is_online:
            raise
        raise BadInput(f"--data {printable(source.name)}: there is no such folder here, it is not in "
                       f"{cache_folder()}, and the hub, which may have it, does not answer: check the "
                       "network, or name a folder of images, or glyphs") from None
    return found, version


def load_local(datasets, source):
    """A folder of tables, or shards -> a table or a stream, and a hash of its files' names and contents."""
    is_folder = Path(source.location).is_dir()
    files, links = scan_folder(source.location) if is_folder else ([], [])
    paths = list_shards(source) if source.kind == "shards" else sorted(map(str, files))
    suffixes = TABLE_SUFFIXES if source.kind == "folder" else (".tar",)
    unused = [path for path in files if path.suffix.lower() not in suffixes and path.name not in SAVED_NAMES]
    print_left_out(source.location, left_out_names(source.location, unused, links), f"{suffixes[0]} files")
    sizes = [os.path.getsize(path) for path in paths]
    names = [os.path.basename(path) for path in paths]
    hashes = image_folder.file_hashes([Path(path) for path in paths])
    version = hashlib.sha256(json.dumps([names, hashes]).encode()).hexdigest()[:16]
    is_stream = sum(sizes) > MAP_STYLE_BYTES
    if source.kind == "shards":
        return load_shards(datasets, paths, is_stream), version
    if {"dataset_dict.json", "state.json"} & set(names):    # written by save_to_disk
        return datasets.load_from_disk(source.location), version
    return datasets.load_dataset(source.location, streaming=is_stream), version


def load_shards(datasets, paths, is_stream):
    """The .tar files `paths` -> a table or a stream. BadInput that names the shard if one is malformed: the
    library's own messages do not."""
    data_files = {"train": [glob.escape(path) for path in paths]}
    try:
        return datasets.load_dataset("webdataset", data_files=data_files, streaming=is_stream)
    except Exception:                  # of the library, tarfile or the disk
        for path in paths:
            check_shard(path)
        raise


def choose_split(found, source):
    """A data set, or a dictionary of its splits -> the split `train`, the only one, or the one requested."""
    if not isinstance(found, dict):
        if source.split:
            raise BadInput(f"--data {printable(source.name)} has no splits: leave out @{source.split}")
        return found
    split = source.split or ("train" if "train" in found else next(iter(found)))
    if split not in found or (not source.split and split != "train" and len(found) > 1):
        raise BadInput(f"--data {printable(source.name)} has the splits {name_some(list(found))}: add one of "
                       f"them, like {source.location}@{next(iter(found))}")
    return found[split]


def open_source(source):
    """-> TableImages or Stream. ValueError or OSError with a sentence to show."""
    check_library(source.name)
    import datasets
    datasets.logging.set_verbosity(logging.CRITICAL)    # its errors become the sentence below
    if distributed.get_rank() > 0:
        datasets.disable_progress_bars()
    try:
        load_fn = load_hub if source.kind == "hub" else load_local
        found, version = load_fn(datasets, source)
        dataset = choose_split(found, source)
        image_column, caption_column = find_columns(datasets, dataset.features or {}, source)
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except BadInput:
        raise
    except Exception as error:         # of the library, pyarrow, the hub, tarfile or the disk
        reason = printable(str(error).strip().split("\n")[0])[:200]
        hint = "complete or repair it"
        if source.kind == "hub":
            hint = (f"there is no such folder here; on the hub, see https://huggingface.co/datasets/"
                    f"{source.location}: does it exist, does it want a login (`hf auth login`), has it "
                    "several configurations (OWNER/NAME:CONFIG)?")
        raise OSError(f"cannot load the data set {printable(source.name)} ({type(error).__name__}: "
                      f"{reason}); {hint}") from None
    image_class = TableImages if isinstance(dataset, datasets.Dataset) else Stream
    return image_class(dataset, image_column, caption_column, source.name, version)


# ------------------------------------------------------------------------------------------ columns and rows

def find_columns(datasets, features, source):
    """-> the name of the image column, and the path to the captions: (column,) or (column, field). By the
    types and the usual names; BadInput if none fits or several do."""
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    texts = {(name,): kind for name, kind in features.items()}
    texts |= {(name, field): kind for name, fields in features.items() if isinstance(fields, dict)
              for field, kind in fields.items()}
    texts = [path for path, kind in texts.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if source.columns:
        image, caption = source.columns
        caption = tuple(caption.split("."))
        if image not in images or caption not in texts:
            raise BadInput(f"--data {printable(source.name)}: wanted an image column and a text column after "
                           f"#; the images are in {name_some(images) or 'no column'}, the texts in "
                           f"{name_some(['.'.join(path) for path in texts]) or 'no column'}")
        return image, caption
    usual_images = [name for name in images if name.lower() in IMAGE_COLUMNS]
    usual_texts = [path for path in texts if path[-1].lower() in CAPTION_COLUMNS]
    top_texts = [path for path in usual_texts if len(path) == 1]
    other_texts = [path for path in texts if len(path) == 1 and not path[0].startswith("__")]
    found_images = images if len(images) == 1 else usual_images
    found_texts = top_texts or usual_texts or other_texts
    for kind, found, columns in (("image", found_images, images),
                                 ("caption", found_texts, [".".join(path) for path in texts])):
        if len(found) != 1:
            reason = f"cannot tell its {kind}s: they" if columns else f"has no {kind}s: these"
            among = f"; found {name_some(columns)}" if columns else ""
            usual = "of the type Image" if kind == "image" else f"called {', '.join(CAPTION_COLUMNS)}"
            raise BadInput(f"--data {printable(source.name)} {reason} are wanted in one column "
                           f"{usual}{among}; add the names of both, like NAME#image,text, or take another "
                           "data set")
    return found_images[0], found_texts[0]


def read_bytes(value):
    """A cell of an image column -> what image_decoding.load_image opens: bytes or a path."""
    if not value or (value.get("bytes") is None and not value.get("path")):
        raise ValueError("it has no image")
    if value.get("bytes") is not None:
        return value["bytes"]
    if "://" in value["path"]:
        import fsspec
        with fsspec.open(value["path"]) as file:
            return file.read()
    return Path(value["path"])


def image_hash(cell):
    """SHA-256 of an image in an arrow column; of one outside the table that of its file, or its address."""
    if cell.is_valid and cell["bytes"].is_valid:
        return hashlib.sha256(cell["bytes"].as_buffer()).hexdigest()
    path = cell["path"].as_py() if cell.is_valid else None
    return image_folder.file_hash(Path(path)) or path if path else ""


class TableImages:
    """The rows of a table, as captioned_images.CaptionedImages wants them."""

    def __init__(self, table, image_column, caption_column, name, version):
        from pyarrow.compute import struct_field
        if not len(table):
            raise BadInput(f"--data {printable(name)} has no images")
        self.name = name
        self.image_column, self.images = image_column, table.select_columns([image_column])
        columns = table.with_format("arrow")[:]        # mapped from the disk, not in memory
        captions = columns[caption_column[0]]
        for field in caption_column[1:]:
            captions = struct_field(captions, field)
        self.captions = [(text or "").strip() for text in captions.to_pylist()]
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(image_hash, columns[image_column]))
        content = json.dumps([self.captions, hashes])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def open(self, row):
        """-> the bytes of an image file, or its path."""
        return read_bytes(self.images[row][self.image_column])

    def describe(self, row):
        """-> the name of an image in a message."""
        return f"number {row} of {self.name}"


def get_caption(row, path):
    """The text at a path of a row, "" where there is none."""
    for name in path:
        row = row and row[name]
    return (row or "").strip()


class Stream:
    """The images of a stream, as captioned_images.StreamedImages wants them."""
    shuffle_buffer = SHUFFLE_BUFFER

    def __init__(self, stream, image_column, caption_column, name, version):
        self.stream, self.name = stream, name
        self.image_column, self.caption_column = image_column, caption_column
        self.fingerprint = str(version)

    def iter_records(self, seed, buffer_size, only_this_rank=False):
        """Yields (function that opens the image, its name, its caption) without end; every epoch has another
        order. only_this_rank: processes get parts of the stream without a common image."""
        from datasets.distributed import split_dataset_by_node
        stream = self.stream.shuffle(seed=seed, buffer_size=buffer_size)
        if only_this_rank:
            stream = split_dataset_by_node(stream, distributed.get_rank(), distributed.get_world_size())
        for epoch in count():
            stream.set_epoch(epoch)
            number = -1
            for number, row in enumerate(self.read_rows(stream)):
                value = row[self.image_column]
                name = (value or {}).get("path") or f"number {number} of epoch {epoch}"
                yield (lambda value=value: read_bytes(value), f"{name} of {self.name}",
                       get_caption(row, self.caption_column))
            if number < 0:
                raise BadInput(f"--data {printable(self.name)} has no images for this process")

    def read_rows(self, stream):
        """BadInput if the stream breaks off."""
        try:
            yield from stream
        except Exception as error:     # of the library, the hub's transport or tarfile
            reason = printable(str(error).strip().split("\n")[0])[:200]
            raise BadInput(f"cannot read on in the data set {printable(self.name)} ({type(error).__name__}: "
                           f"{reason})") from None
