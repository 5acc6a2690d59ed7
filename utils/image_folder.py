"""Read a folder of captioned images: which files, and which captions.

Two conventions, also in sub-folders: a .txt file beside each image, or a metadata table (metadata.jsonl, .csv
or .parquet with the columns file_name and text, as Hugging Face's "imagefolder") for its folder and all
folders below it. No file is passed over silently: what is neither image nor caption is counted and named.
Read next: utils/image_decoding.py (one image), data.CaptionedImages (batches)
"""

import csv
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from utils import distributed
from utils.image_decoding import IMAGE_FORMATS
from utils.messages import print_message, printable

METADATA_TABLES = "metadata.jsonl", "metadata.csv", "metadata.parquet"
# what operating systems, browsers of files and git put into folders, in lower case
SYSTEM_NAMES = {".ds_store", "thumbs.db", "desktop.ini", ".gitattributes", ".gitignore"}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}    # and all with a dot
# a larger file is not hashed as a whole but at its start, middle and end, which any other compressed image
# changes; of very large uncompressed images this may miss that some pixels in between were repainted
HASH_WHOLE_BYTES = 2 ** 20
HASH_PART_BYTES = 2 ** 18


def name_some(names, max_n=10):
    rest = f" and {len(names) - max_n} more" if len(names) > max_n else ""
    return ", ".join(printable(name) for name in names[:max_n]) + rest


# ------------------------------------------------------------------------------------------------------ files

def allowed_roots(folder):
    """The folders that the files of `folder` may lie in, after links are resolved: the folder itself and, for
    a snapshot of the Hugging Face hub or a folder inside one, the blobs that its links lead to."""
    root = folder.resolve()
    snapshots = [path.parent for path in (root, *root.parents) if path.parent.name == "snapshots"]
    return [root, *((path.parent / "blobs").resolve() for path in snapshots)]    # perhaps on another disk


def check_inside(folder, paths):
    """ValueError if one of the paths leads out of their folder, by its name or by a link."""
    roots = allowed_roots(folder)
    for path in paths:
        try:
            resolved = path.resolve()
            is_inside = any(resolved.is_relative_to(root) for root in roots)
        except (OSError, RuntimeError, ValueError):    # a loop of links, or a name that no file can have
            is_inside = False
        if not is_inside:
            raise ValueError(f"{printable(path)[:200]} lies outside {printable(folder)}, or is no possible "
                             "name: a folder may contain and list its own files only")


def is_system_file(name):
    """Whether a file is the operating system's or git's. '._a.png' holds macOS's attributes of a.png."""
    return name.startswith("._") or name.lower() in SYSTEM_NAMES


def is_system_folder(name):
    """Whether a folder inside a data folder is the operating system's, a file server's or a tool's: a waste
    bin, small copies of the images, git."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def scan_folder(folder):
    """-> sorted paths of all files in a folder and its sub-folders, sorted paths of links to folders. Such
    links are not followed. System files and folders are ignored. OSError if a folder cannot be listed."""
    def fail(error):
        raise error

    files, links = [], []
    for place, dir_names, file_names in os.walk(folder, onerror=fail):
        dir_names[:] = [name for name in dir_names if not is_system_folder(name)]
        links += [path for path in (Path(place, name) for name in dir_names) if path.is_symlink()]
        files += [Path(place, name) for name in file_names if not is_system_file(name)]
    return sorted(files), sorted(links)


def image_suffixes():
    """The file name suffixes of IMAGE_FORMATS, and .mpo: a JPEG of several images."""
    from PIL import Image
    known = Image.registered_extensions()
    return {suffix for suffix, name in known.items() if name in IMAGE_FORMATS} | {".mpo"}


def list_images(folder):
    """-> paths and captions of all images in a folder. ValueError with a sentence to show. Prints one line if
    files are left out."""
    folder = Path(folder)
    files, links = scan_folder(folder)
    tables = top_tables(files)
    check_inside(folder, tables)
    paths, captions = [], []
    for table in tables:
        for file_name, text in read_metadata_table(table):
            paths.append(table.parent / file_name)
            captions.append(text.strip())
    if tables and not paths:
        raise ValueError(f"no images in {printable(folder)}: {printable(tables[0])} lists none")
    used = {os.path.abspath(path) for path in (*tables, *paths)}

    table_dirs = {table.parent for table in tables}
    suffixes = image_suffixes()
    images = [path for path in files
              if path.suffix.lower() in suffixes and table_dirs.isdisjoint(path.parents)]
    caption_files = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    uncaptioned = [path for path in images if path.with_suffix("") not in caption_files]
    if uncaptioned:
        first = uncaptioned[0].relative_to(folder)
        raise ValueError(f"{len(uncaptioned)} image(s) in {printable(folder)} have no caption, first "
                         f"{printable(first)}: write one in {printable(first.with_suffix('.txt'))}, or list "
                         "all in metadata.jsonl")
    for path in images:
        caption_file = caption_files[path.with_suffix("")]
        check_inside(folder, [caption_file])
        paths.append(path)
        captions.append(read_caption(caption_file))
        used |= {os.path.abspath(path), os.path.abspath(caption_file)}

    unused = [path for path in files if os.path.abspath(path) not in used]
    check_listing(folder, paths, captions, left_out_names(folder, unused, links))
    return paths, captions


def check_listing(folder, paths, captions, left_out):
    """ValueError if there is no image, a path leads out of the folder or a caption is no text. Prints what is
    left out."""
    found = f": {name_some(left_out)}" if left_out else ""
    if not paths:
        raise ValueError(f"no images in {printable(folder)}: wanted some ({', '.join(IMAGE_FORMATS)}) with a "
                         f".txt beside each, or metadata.jsonl; found {len(left_out)} other file(s){found}")
    check_inside(folder, paths)
    for path, text in zip(paths, captions):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{printable(path)}: its caption holds half of a surrogate pair; save it as "
                             "UTF-8") from None
    print_left_out(folder, left_out, f"images ({', '.join(IMAGE_FORMATS)}), not captions of images, or not "
                   "in the table")


def print_left_out(folder, names, wanted):
    """One line that names the files of a folder which are not used, because they are not `wanted`."""
    if names and distributed.get_rank() == 0:
        print_message(f"left out: {len(names)} file(s) in {printable(folder)} that are not {wanted}: "
                      f"{name_some(names)}")


def left_out_names(folder, files, links):
    """Paths below a folder, and links to folders, which are not followed -> their names for a message."""
    names = [str(path.relative_to(folder)) for path in files]
    return names + [f"{path.relative_to(folder)}/ (a link to a folder)" for path in links]


def file_hash(path):
    """SHA-256 of a file's size and content (see HASH_WHOLE_BYTES), "" if it cannot be read."""
    try:
        if not path.is_file():                     # a pipe would wait for a writer
            return ""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            parts = [(0, size)]
            if size > HASH_WHOLE_BYTES:
                starts = 0, (size - HASH_PART_BYTES) // 2, size - HASH_PART_BYTES
                parts = [(start, HASH_PART_BYTES) for start in starts]
            digest = hashlib.sha256(str(size).encode())
            for start, length in parts:
                file.seek(start)
                digest.update(file.read(length))
    except OSError:
        return ""
    return digest.hexdigest()


def file_hashes(paths):
    """file_hash of each path. Threads help: reading and hashing release Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(file_hash, paths), "reading files", len(paths), delay=5, leave=False,
                         disable=distributed.get_rank() > 0))


def fingerprint(folder, paths, captions):
    """16 hex digits that identify a data set: SHA-256 over the relative paths, the files' contents and the
    captions, sorted by path."""
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    rows = sorted(zip(names, file_hashes(paths), captions))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- captions

def read_caption(path):
    """The text of a caption file, without the white space around it."""
    try:
        if not path.is_file():
            raise OSError("it is not a regular file")
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"the caption {printable(path)} is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the caption {printable(path)} ({error})") from None


def top_tables(files):
    """The metadata tables among the files: one in a folder, and none below a folder that has one."""
    tables = {}
    for path in files:
        if path.name in METADATA_TABLES:
            tables.setdefault(path.parent, []).append(path)
    return [min(found, key=lambda path: METADATA_TABLES.index(path.name))
            for folder, found in sorted(tables.items()) if tables.keys().isdisjoint(folder.parents)]


def read_metadata_table(table):
    """-> list of (file_name, text). ValueError names the table and the line."""
    read_rows = {".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}[table.suffix]
    pairs = []
    try:
        if not table.is_file():
            raise OSError("it is not a regular file")
        for place, row in read_rows(table):
            file_name = row.get("file_name") if isinstance(row, dict) else None
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(file_name, str) or not isinstance(text, str):
                raise ValueError(f"{printable(table)} {place}: wanted a JSON object (or a row) with the "
                                 "strings file_name and text")
            pairs.append((file_name, text))
    except UnicodeDecodeError:
        raise ValueError(f"{printable(table)} is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {printable(table)} ({error})") from None
    return pairs


def jsonl_rows(table):
    """Yields ("line N", object). Lines end at line breaks only: JSON strings may contain U+2028, U+2029 and
    U+0085, at which str.splitlines splits."""
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{printable(table)} line {number}: wanted JSON with file_name and "
                             "text") from None
        yield f"line {number}", row


def csv_rows(table):
    """Yields ("line N", {column: cell}). N is the line that the row begins in. Quoted line breaks belong to
    their cell. A row with another number of cells than the header is an error."""
    header, line = None, 1
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            place = f"{printable(table)} line {line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"{place}: this is not CSV ({error})") from None
            if header is None and cells:
                header = cells
                if header.count("file_name") != 1 or header.count("text") != 1:
                    raise ValueError(f"{place}: wanted a column file_name and a column text, separated by "
                                     f"commas; found {printable(header)[:100]}")
            elif cells and len(cells) != len(header):
                raise ValueError(f"{place}: wanted {len(header)} fields as in the header, found "
                                 f"{len(cells)}; put a text with commas into double quotes")
            elif cells:
                yield f"line {line}", dict(zip(header, cells))
            line = reader.line_num + 1


def parquet_rows(table):
    """Yields ("row N", {column: value})."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{printable(table)} needs pyarrow: pip install pyarrow, or write "
                         "metadata.jsonl") from None
    try:
        rows = parquet.read_table(table).to_pylist()
    except Exception as error:                         # pyarrow's exceptions have no common base class
        raise ValueError(f"cannot read {printable(table)} ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


class ImageFolder:
    """The images of a folder, as data.CaptionedImages wants them: `captions`, `fingerprint`, and for each row
    what `load_image` opens."""

    def __init__(self, folder):
        self.paths, self.captions = list_images(folder)
        self.fingerprint = fingerprint(folder, self.paths, self.captions)

    def open(self, row):
        """-> the path of an image."""
        return self.paths[row]

    def describe(self, row):
        """-> the name of an image in a message."""
        return str(self.paths[row])
