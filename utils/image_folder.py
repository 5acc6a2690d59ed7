"""Read a folder of captioned images: which files, which captions, and each image as a square uint8 tensor.

Two conventions, also in sub-folders: a .txt file beside each image, or a metadata table (metadata.jsonl, .csv
or .parquet with the columns file_name and text, as Hugging Face's "imagefolder") for its folder and all
folders below it. No file is passed over silently: what is neither image nor caption is counted and named.

Transparent images are composed onto a white background before they are resized. Of an animation the first
frame is read. EXIF orientation is applied; the rest of the EXIF data is not looked at.
Read next: data.FolderDataset, which makes batches of this.
"""

import csv
import hashlib
import json
import os
import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from utils import distributed
from utils.messages import print_message, printable

IMAGE_FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"    # no PostScript: it is a program
METADATA_TABLES = "metadata.jsonl", "metadata.csv", "metadata.parquet"
MAX_PIXELS = 10 ** 8
BACKGROUND = "white"                                           # behind transparent pixels
# what operating systems, browsers of files and git put into folders, in lower case
SYSTEM_NAMES = {".ds_store", "__macosx", "thumbs.db", "desktop.ini", ".git", ".gitattributes", ".gitignore",
                ".cache", ".ipynb_checkpoints"}


def name_some(names, max_n=10):
    rest = f" and {len(names) - max_n} more" if len(names) > max_n else ""
    return ", ".join(printable(name) for name in names[:max_n]) + rest


# ------------------------------------------------------------------------------------------------------ files

def allowed_roots(folder):
    """The folders that the files of `folder` may lie in, after links are resolved: the folder itself and, for
    a snapshot of the Hugging Face hub or a folder inside one, the blobs that its links lead to."""
    root = folder.resolve()
    snapshots = [path.parent for path in (root, *root.parents) if path.parent.name == "snapshots"]
    return [root, *(path.parent / "blobs" for path in snapshots)]


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
    """Whether a file or a folder is the operating system's or git's. '._a.png' holds macOS's attributes of
    a.png."""
    return name.startswith("._") or name.lower() in SYSTEM_NAMES


def scan_folder(folder):
    """-> sorted paths of all files in a folder and its sub-folders, sorted paths of links to folders. Such
    links are not followed. System files are ignored. OSError if a folder cannot be listed."""
    def fail(error):
        raise error

    files, links = [], []
    for place, dir_names, file_names in os.walk(folder, onerror=fail):
        dir_names[:] = [name for name in dir_names if not is_system_file(name)]
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

    left_out = [str(path.relative_to(folder)) for path in files if os.path.abspath(path) not in used]
    left_out += [f"{path.relative_to(folder)}/ (a link to a folder)" for path in links]
    check_listing(folder, paths, captions, left_out)
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
    if left_out and distributed.get_rank() == 0:
        print_message(f"left out: {len(left_out)} file(s) in {printable(folder)} that are not images "
                      f"({', '.join(IMAGE_FORMATS)}), not captions of images, or not in the table{found}")


def fingerprint(folder, paths, captions):
    """16 hex digits that identify a data set: SHA-256 over the relative paths, file sizes (bytes, -1 if there
    is no such file) and captions, sorted by path."""
    rows = []
    for path, text in zip(paths, captions):
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        rows.append([Path(os.path.relpath(path, folder)).as_posix(), size, text])
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


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


# ----------------------------------------------------------------------------------------------------- images

def load_image(path, resolution):
    """-> image (3, resolution, resolution) uint8, cut from the middle, and micro_cond (4,): height and width
    of the image; rows and columns of the resized image that were cut off above and on the left. Raises
    whatever a decoder raises."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    if not path.is_file():
        raise OSError("there is no such file")
    file, exif = hide_jpeg_exif(path)
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(IMAGE_FORMATS)}, or damaged") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("it has more than 100 million pixels")
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per pixel")
        if image.format == "PNG" and "transparency" in image.info:
            image.info["transparency"] = png_transparent_color(image)
        image.getexif = Image.Exif      # so that load() parses no EXIF directory of a TIFF: it may be broken
        orientation = image.tag_v2.get(ORIENTATION_TAG) if image.format == "TIFF" else None
        image.load()
        image = apply_orientation(to_rgb(image), orientation or find_orientation(image.info, exif))
    w, h = image.size
    scale = resolution / min(w, h)
    top, left = (int((side * scale - resolution) / 2) for side in (h, w))
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor([h, w, top, left])


def to_rgb(image):
    """A PIL image of any mode -> RGB, transparent parts composed onto BACKGROUND. image.info["transparency"]
    is the colour that is transparent, at the depth of the pixels (of a palette: indices or alphas)."""
    from PIL import Image
    color = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)                     # (H, W) uint16; convert() would clip at 255
        opaque = None if color is None else pixels != color
        rgb = Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    elif image.mode in ("1", "L", "RGB") and color is not None:
        gray_or_rgb = image.copy() if image.mode == "RGB" else image.convert("L")
        gray_or_rgb.info.clear()
        pixels = np.asarray(gray_or_rgb).reshape(image.height, image.width, -1)
        opaque = (pixels != color).any(-1)             # (H, W)
        rgb = gray_or_rgb.convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        background = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(background, rgba).convert("RGB")
    else:
        return image.convert("RGB")
    if opaque is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(opaque))


def png_transparent_color(image):
    """The colour that a tRNS chunk declares transparent, scaled as Pillow scales the pixels of a PNG that is
    not loaded yet. Pillow drops the low byte of 16-bit colour, so there the high bytes decide."""
    color = image.info["transparency"]
    if image.mode not in ("L", "RGB"):                 # "1", "I;16" and palettes are right as they are
        return color
    rawmode = image.tile[0].args
    if image.mode == "RGB":
        return tuple(value >> 8 if rawmode == "RGB;16B" else value & 255 for value in color)
    bits = {"L;2": 2, "L;4": 4}.get(rawmode, 8)
    max_value = 2 ** bits - 1
    return (color & max_value) * 255 // max_value


# ------------------------------------------------------------------------------------------------ orientation

ORIENTATION_TAG = 274
JPEG_EXIF = re.compile(rb"(?s)(\xff\xe1..)Exif\0\0")       # marker and length, name of the block


def hide_jpeg_exif(path):
    """-> what to open instead of the path, and the bytes from the EXIF block on (None without one). Pillow
    parses the EXIF block when it opens a JPEG and refuses some, so the block's name is overwritten."""
    with path.open("rb") as file:
        if file.read(3) != b"\xff\xd8\xff":
            return path, None
        file.seek(0)
        data = file.read()
    match = JPEG_EXIF.search(data)
    exif = None if match is None else data[match.end():match.end() + 2 ** 16]
    return BytesIO(JPEG_EXIF.sub(rb"\1------", data)), exif


def find_orientation(info, exif=None):
    """The orientation in an image's metadata: EXIF, EXIF as text in a PNG (ImageMagick), or XMP. 1 (upright)
    if there is none or it cannot be read."""
    exif = exif or info.get("exif") or b""
    if not exif and isinstance(info.get("Raw profile type exif"), str):
        digits = "".join(info["Raw profile type exif"].split("\n")[3:])
        try:
            exif = bytes.fromhex(digits)
        except ValueError:
            exif = b""
    orientation = parse_exif_orientation(exif)
    if orientation is not None:
        return orientation
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
    return int(match[1]) if match else 1


def parse_exif_orientation(exif):
    """The orientation in the first directory of an EXIF block, or None. Only this entry is read, so damage
    elsewhere does not matter."""
    exif = re.sub(rb"^(Exif\0\0)+", b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        offset, = struct.unpack_from(f"{order}I", exif, 4)
        num_entries, = struct.unpack_from(f"{order}H", exif, offset)
        for i in range(num_entries):
            start = offset + 2 + 12 * i
            tag, kind = struct.unpack_from(f"{order}HH", exif, start)
            if tag == ORIENTATION_TAG:
                code = {1: "B", 3: "H", 4: "I"}[kind]  # byte, short, long
                return struct.unpack_from(f"{order}{code}", exif, start + 8)[0]
    except (struct.error, KeyError):                   # no EXIF, cut off, or a value of another type
        pass
    return None


def apply_orientation(image, orientation):
    """Rotate and flip a PIL image as its EXIF orientation (1 to 8) asks; anything else changes nothing."""
    from PIL.Image import Transpose
    methods = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
               5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
               8: Transpose.ROTATE_90}
    method = methods.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)
