"""Decode one image file, or its bytes, into a square uint8 tensor.

Transparent images are composed onto a white background before they are resized. Of an animation the first
frame is read. EXIF orientation is applied; the rest of the EXIF data is not looked at. A JPEG that is far
larger than the square is decoded at 1/2, 1/4 or 1/8 of its size (Pillow's draft mode).
Read next: utils/image_folder.py, utils/hub_data.py, which find the images
"""

import re
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from utils.messages import BadInput, is_out_of_memory, print_message, printable

IMAGE_FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"    # no PostScript: it is a program
MAX_PIXELS = 10 ** 8
BACKGROUND = "white"                                           # behind transparent pixels
CENTRE = (.5, .5)
HEADER_BYTES = 2 ** 17                                         # usually hold the size of an image


class ImageReader:
    """Reads images by several threads. One that cannot be read is named and left out; more than 1 % of these
    are an error."""

    def __init__(self, resolution, num_images=None):
        """num_images: how many there are, None if that is not known."""
        self.resolution, self.num_images = resolution, num_images
        self.num_read = 0              # with repetitions
        self.unreadable = set()        # their names
        self.pool = ThreadPoolExecutor(8)

    def read(self, open_fn, name, crop=CENTRE, flip=False, shape=None):
        """load_image of what open_fn() returns, or None if the image cannot be read. name: for messages."""
        self.num_read += 1
        try:
            return load_image(open_fn(), self.resolution, crop, flip, shape)
        except Exception as error:     # image decoders raise exceptions of any type for a damaged file
            if is_out_of_memory(error):
                raise
            self.unreadable.add(name)
            short_name = printable(name)[-200:]
            reason = printable(str(error).split(": '")[0] or type(error).__name__)[:100]
            num_images = self.num_images or self.num_read
            if len(self.unreadable) > .01 * (self.num_images or max(self.num_read, 1000)):
                raise BadInput(f"cannot read the image {short_name} ({reason}): {len(self.unreadable)} of "
                               f"{num_images} images are broken; repair or remove them") from None
            print_message(f"left out: {short_name} cannot be read ({reason}); {len(self.unreadable)} so far")
            return None


def draw_augmentation(n, generator, random_flip, random_crop):
    """-> n pairs (crop, flip), the arguments of load_image. What is switched off draws no random number."""
    flips, crops = [False] * n, [CENTRE] * n
    if random_flip:
        flips = (torch.rand(n, generator=generator) < .5).tolist()
    if random_crop:
        crops = [tuple(position) for position in torch.rand(n, 2, generator=generator).tolist()]
    return list(zip(crops, flips))


def open_image(source):
    """A path, or the bytes of a file -> PIL image that is not decoded yet, and its EXIF block if it is a
    JPEG."""
    from PIL import Image, UnidentifiedImageError
    if isinstance(source, Path) and not source.is_file():
        raise OSError("there is no such file")
    file, exif = hide_jpeg_exif(source)
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(IMAGE_FORMATS)}, or damaged") from None
    return image, exif


def image_size(source):
    """-> (height, width) of an image as it is shown, without decoding it. Of a file only the beginning is
    read, unless its format keeps its directory at the end. Raises whatever a decoder raises."""
    if isinstance(source, Path) and source.is_file():
        with source.open("rb") as file, suppress(Exception):
            return image_size(file.read(HEADER_BYTES))
    image, exif = open_image(source)
    with image:
        (width, height), orientation = image.size, None
        if image.format == "TIFF":     # newer Pillows have exchanged the sides of image.size already
            width, height = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
            orientation = image.tag_v2.get(ORIENTATION_TAG)
        orientation = orientation or find_orientation(image.info, exif)
        return (width, height) if orientation in TRANSPOSED else (height, width)


def load_image(source, resolution, crop=CENTRE, flip=False, shape=None):
    """-> image (3, resolution, resolution) uint8 and micro_cond (4,): height and width of the image; rows and
    columns of the resized image that were cut off above and on the left. Raises whatever a decoder raises.

    source: a path, or the bytes of a file. crop: which square to cut: (x, y) from 0, left or top, to 1.
    flip: mirror the image first, left and right. shape: (height, width) in place of the square."""
    from PIL import Image, ImageOps
    height, width = shape or (resolution, resolution)
    image, exif = open_image(source)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("it has more than 100 million pixels")
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per pixel")
        if image.format == "PNG" and "transparency" in image.info:
            image.info["transparency"] = png_transparent_color(image)
        image.getexif = Image.Exif      # so that load() parses no EXIF directory of a TIFF: it may be broken
        orientation = image.tag_v2.get(ORIENTATION_TAG) if image.format == "TIFF" else None
        is_jpeg, full_size = image.format == "JPEG", image.size
        draft_jpeg(image, max(height, width))
        image.load()
        orientation = orientation or find_orientation(image.info, exif)
        image = apply_orientation(to_rgb(image), orientation)
    if flip:
        image = ImageOps.mirror(image)
    w, h = image.size
    if is_jpeg:
        w, h = reversed(full_size) if orientation in TRANSPOSED else full_size
    scale = max(width / w, height / h)
    left = int((w * scale - width) * crop[0])
    top = int((h * scale - height) * crop[1])
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=crop)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor([h, w, top, left])


def draft_jpeg(image, resolution):
    """Let a JPEG be decoded at a fraction of its size, with a shorter side of 2 * resolution pixels at least:
    resizing averages over the rest. Other formats are left alone."""
    if image.format == "JPEG":
        scale = 2 * resolution / min(image.size)
        image.draft(None, tuple(round(side * scale) for side in image.size))


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

ORIENTATION_TAG, WIDTH_TAG, HEIGHT_TAG = 274, 256, 257
TRANSPOSED = 5, 6, 7, 8                                    # orientations that swap height and width
JPEG_START = b"\xff\xd8\xff"
JPEG_EXIF = re.compile(rb"(?s)(\xff\xe1..)Exif\0\0")       # marker and length, name of the block
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9])""")    # attribute or element
EXIF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}    # type -> code of struct


def hide_jpeg_exif(source):
    """A path or bytes -> what to open instead, and the bytes from the EXIF block on (None without one).
    Pillow parses the EXIF block when it opens a JPEG and refuses some, so the block's name is overwritten.
    Of several blocks, the first one with an orientation counts."""
    data = source
    if isinstance(source, Path):
        with source.open("rb") as file:
            if file.read(3) != JPEG_START:
                return source, None
            file.seek(0)
            data = file.read()
    if not data.startswith(JPEG_START):
        return BytesIO(data), None
    blocks = [data[match.end():match.end() + 2 ** 16] for match in JPEG_EXIF.finditer(data)]
    with_orientation = [block for block in blocks if parse_exif_orientation(block) is not None]
    exif = next(iter([*with_orientation, *blocks]), None)
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
    match = XMP_ORIENTATION.search(xmp) if isinstance(xmp, bytes) else None
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
                return struct.unpack_from(f"{order}{EXIF_INTEGERS[kind]}", exif, start + 8)[0]
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
