"""Decoding an image: transparency, orientation and broken EXIF data, modes and bit depths."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from utils import image_decoding


def test_images_are_uint8_and_in_order(tmp_path):
    pixels = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, micro_cond = image_decoding.load_image(tmp_path / "a.png", 64)
    assert image.dtype == torch.uint8 and (image.permute(1, 2, 0).numpy() == pixels).all()
    assert micro_cond.tolist() == [64, 64, 0, 0]


def png(size, bit_depth, color_type, rows, **chunks):
    """The bytes of a PNG with raw rows and the ancillary chunks, for what Pillow cannot write."""
    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", *size, bit_depth, color_type, 0, 0, 0)
    ancillary = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ancillary + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))


# ----------------------------------------------------------------------------------------------- transparency

SQUARE = np.zeros((64, 64), bool)       # True where the test images are opaque and black
SQUARE[16:48, 16:48] = True
EXPECTED = np.where(SQUARE, 0, 255)     # black on white


def saved(image, name, **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def black_square(mode, hidden):
    """RGBA or LA: an opaque black square, alpha 0 elsewhere. hidden: the colours under alpha 0."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    if hidden == "noise":
        rgba[..., :3] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    rgba[SQUARE] = (0, 0, 0, 255)
    image = Image.fromarray(rgba)
    if mode == "LA":
        return Image.merge("LA", (image.convert("RGB").convert("L"), image.getchannel("A")))
    return image


def palette_image(colors):
    """P: index 0 in the square, 1 elsewhere."""
    image = Image.frombytes("P", (64, 64), np.where(SQUARE, 0, 1).astype(np.uint8).tobytes())
    image.putpalette(colors)
    return image


def raw_rows(bit_depth, inside, outside):
    """Rows of a PNG whose pixels (tuples of samples) are inside in the square and outside elsewhere."""
    rows = []
    for row in SQUARE:
        samples = [value for is_inside in row for value in (inside if is_inside else outside)]
        if bit_depth == 16:
            rows.append(struct.pack(f">{len(samples)}H", *samples))
        else:
            bits = "".join(format(value, f"0{bit_depth}b") for value in samples)
            rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return rows


def associated_alpha(tiff):
    """A TIFF whose tag ExtraSamples says associated (premultiplied) alpha, 1, in place of unassociated, 2."""
    entry = struct.pack("<HHIH", 338, 3, 1, 2)
    assert tiff.count(entry) == 1
    return tiff.replace(entry, struct.pack("<HHIH", 338, 3, 1, 1))


def transparent_files():
    red, black = (255, 0, 0), (0, 0, 0)
    for hidden in ("black", "noise"):
        for mode in ("RGBA", "LA"):
            image = black_square(mode, hidden)
            yield f"{mode}.png, {hidden} hidden", saved(image, "PNG")
            yield f"{mode}.tif, {hidden} hidden", saved(image, "TIFF")
        rgba = black_square("RGBA", hidden)
        yield f"RGBA.webp, {hidden} hidden", saved(rgba, "WEBP", lossless=True, exact=True)
        yield f"RGBA compressed.tif, {hidden} hidden", saved(rgba, "TIFF", compression="tiff_deflate")
        yield f"animated.png, {hidden} hidden", saved(rgba, "PNG", save_all=True, append_images=[rgba])
    yield "premultiplied RGBA.tif", associated_alpha(saved(black_square("RGBA", "black"), "TIFF"))
    yield "premultiplied LA.tif", associated_alpha(saved(black_square("LA", "black"), "TIFF"))
    p = palette_image([*black, *red])
    yield "P.png, one index", saved(p, "PNG", transparency=1)
    yield "P.png, alphas", saved(p, "PNG", transparency=bytes([255, 0]))
    yield "P.gif", saved(p, "GIF", transparency=1)
    yield "animated.gif", saved(p, "GIF", transparency=1, save_all=True, append_images=[p.rotate(90)])
    yield "grey.gif", saved(Image.fromarray(np.where(SQUARE, 0, 99).astype(np.uint8)), "GIF", transparency=99)
    for bits in (1, 2, 4, 8):
        rows = raw_rows(bits, (0,), (1,))
        yield (f"P of {bits} bit.png",
               png((64, 64), bits, 3, rows, PLTE=bytes([*black, *red]), tRNS=bytes([255, 0])))
        top = 2 ** bits - 1
        for outside in {top, max(1, top // 2)}:
            rows = raw_rows(bits, (0,), (outside,))
            yield (f"L of {bits} bit, {outside}.png",
                   png((64, 64), bits, 0, rows, tRNS=struct.pack(">H", outside)))
    for key in (1, 300, 65535):
        rows = raw_rows(16, (0,), (key,))
        yield f"L of 16 bit, {key}.png", png((64, 64), 16, 0, rows, tRNS=struct.pack(">H", key))
    for key in ((255, 0, 0), (1, 2, 3)):
        rows = raw_rows(8, black, key)
        yield f"RGB, {key}.png", png((64, 64), 8, 2, rows, tRNS=struct.pack(">HHH", *key))
    for key in ((65535, 0, 0), (300, 400, 500)):
        rows = raw_rows(16, black, key)
        yield f"RGB of 16 bit, {key}.png", png((64, 64), 16, 2, rows, tRNS=struct.pack(">HHH", *key))
    yield "LA of 16 bit.png", png((64, 64), 16, 4, raw_rows(16, (0, 65535), (777, 0)))
    yield "RGBA of 16 bit.png", png((64, 64), 16, 6, raw_rows(16, (0, 0, 0, 65535), (7, 77, 777, 0)))


TRANSPARENT = dict(transparent_files())


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_files_are_composed_onto_white(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(TRANSPARENT[name])
    image, _ = image_decoding.load_image(path, 64)
    assert image.shape == (3, 64, 64)
    assert (image.numpy() == EXPECTED).all()


def test_transparent_images_of_every_mode_are_composed_onto_white():
    rgba, la = black_square("RGBA", "noise"), black_square("LA", "noise")
    palette_with_alpha = Image.frombytes("P", (64, 64), np.where(SQUARE, 0, 1).astype(np.uint8).tobytes())
    palette_with_alpha.putpalette([0, 0, 0, 255, 9, 99, 199, 0], "RGBA")
    pa = Image.merge("PA", (palette_image([0, 0, 0, 255, 0, 0]), rgba.getchannel("A")))
    one_bit = Image.fromarray(~SQUARE)
    one_bit.info["transparency"] = 255
    sixteen_bit = Image.fromarray(np.where(SQUARE, 0, 4000).astype(np.uint16))
    sixteen_bit.info["transparency"] = 4000
    images = (rgba, la, rgba.convert("RGBa"), la.convert("La"), palette_with_alpha, pa, one_bit, sixteen_bit)
    for image in images:
        before = dict(image.info)
        assert (np.asarray(image_decoding.to_rgb(image)) == EXPECTED[..., None]).all(), image.mode
        assert image.info == before


def test_half_transparent_black_is_grey():
    for mode, pixel in (("RGBA", (0, 0, 0, 128)), ("LA", (0, 128))):
        rgb = np.asarray(image_decoding.to_rgb(Image.new(mode, (8, 8), pixel)))
        assert (abs(rgb.astype(int) - 127) <= 1).all()
    premultiplied = Image.new("RGBA", (8, 8), (200, 100, 0, 128)).convert("RGBa")
    rgb = np.asarray(image_decoding.to_rgb(premultiplied)).astype(int)
    assert (abs(rgb - [227, 177, 127]) <= 2).all()


def test_hidden_colours_do_not_bleed_when_an_image_is_resized(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[SQUARE] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")    # white, on transparent black
    assert (image_decoding.load_image(tmp_path / "a.png", 24)[0] == 255).all()


def test_opaque_images_of_every_mode_keep_their_colours(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"):
        image = rgb.convert(mode)
        assert image_decoding.to_rgb(image).tobytes() == image.convert("RGB").tobytes()
    assert image_decoding.to_rgb(rgb.convert("RGBA")).tobytes() == rgb.tobytes()
    sixteen_bit = Image.fromarray(np.full((8, 8), 257 * 128, np.uint16))
    assert (np.asarray(image_decoding.to_rgb(sixteen_bit)) == 128).all()


# -------------------------------------------------------------------------------------------------- EXIF data

def black_above_white(orientation, name="JPEG"):
    """The file and the EXIF block of a 64x64 image that is black above and white below once its orientation
    is applied."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (0, 0, 64, 32))
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    exif = Image.Exif()
    exif.update({0x10f: "a maker", 0x110: "a model " * 5, 0x11a: 72.0, 0x128: 2, 274: orientation})
    exif.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0x829a: .01})
    image = image.transpose(undo[orientation])
    return saved(image, name, exif=exif), exif.tobytes()


def is_black_above_white(image):
    return (image[:, :28] < 40).all() and (image[:, 36:] > 215).all()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(tmp_path, name):
    for orientation in (3, 6, 8):
        path = tmp_path / "a.img"
        path.write_bytes(black_above_white(orientation, name)[0])
        image, micro_cond = image_decoding.load_image(path, 64)
        assert is_black_above_white(image)
    Image.new("RGB", (40, 60)).save(path, "JPEG", exif=Image.open(path).getexif())
    assert image_decoding.load_image(path, 32)[1].tolist() == [40, 60, 0, 8]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_refuse_no_image(tmp_path, name):
    """Random damage anywhere in the EXIF block. The orientation is applied if the damage lies behind it."""
    good, exif = black_above_white(6, name)
    block = exif[6:]
    start = good.index(block)
    entry = block.index(struct.pack(">HHI", 274, 3, 1))
    rng = random.Random(0)
    path = tmp_path / "a.img"
    for _ in range(300):
        damaged = bytearray(good)
        positions = [rng.randrange(len(block)) for _ in range(rng.choice([1, 2, 8, 60]))]
        for position in positions:
            damaged[start + position] = rng.choice([0, 1, 255, rng.randrange(256)])
        if name == "PNG":
            stop = start + len(block)
            damaged[stop:stop + 4] = struct.pack(">I", zlib.crc32(bytes(damaged[start - 4:stop])))
        path.write_bytes(damaged)
        image, _ = image_decoding.load_image(path, 64)
        if all(position > entry + 12 for position in positions):
            assert is_black_above_white(image)


@pytest.mark.parametrize("exif", [
    b"", b"II*\0", b"II*\0\x08\0\0", b"XX*\0\x08\0\0\0\x01\0", b"II*\0\xff\xff\xff\xff",
    b"II*\0\x08\0\0\0\xff\xff",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x01\0\0\0\x06", b"\0" * 64, bytes(range(256))])
def test_an_exif_block_without_an_orientation_changes_nothing(exif):
    assert image_decoding.parse_exif_orientation(exif) in (None, 1)
    assert image_decoding.find_orientation({"exif": b"Exif\0\0" + exif}) == 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tag, kind, count", [
    (0x11a, 5, 0), (0x11a, 2, 4), (0x829a, 2, 4), (0x110, 11, 1), (0x8769, 4, 1), (0x8825, 4, 1),
    (0x9999, 99, 7), (0x11a, 12, 2 ** 31), (0x10f, 2, 0)])
def test_odd_exif_entries_refuse_no_image(tmp_path, order, tag, kind, count):
    """Entries that Pillow cannot parse when it opens the file, or cannot write again: an empty resolution, a
    text in place of a number, a directory at an impossible offset, an unknown type."""
    entries = [(274, 3, 1, struct.pack(order + "HH", 6, 0)), (tag, kind, count, b"\xff\xff\xff\x0f"),
               (0x128, 3, 1, struct.pack(order + "HH", 2, 0))]
    directory = struct.pack(order + "H", len(entries))
    for *numbers, value in entries:
        directory += struct.pack(order + "HHI", *numbers) + value
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    image = Image.open(io.BytesIO(black_above_white(6)[0]))
    path = tmp_path / "a.jpg"
    image.save(path, exif=b"Exif\0\0" + header + directory + b"\0\0\0\0")
    assert is_black_above_white(image_decoding.load_image(path, 64)[0])


@pytest.mark.parametrize("offset", [2 ** 32 - 1, 7, 12400])
@pytest.mark.parametrize("tag", [0x8769, 0x8825])
def test_a_tiff_with_a_broken_exif_directory_is_read(tmp_path, offset, tag):
    tiff = black_above_white(6, "TIFF")[0]
    model = struct.pack("<HHI", 272, 2, 41)    # an entry that nothing needs
    assert tiff.count(model) == 1
    start = tiff.index(model)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff[:start] + struct.pack("<HHII", tag, 4, 1, offset) + tiff[start + 12:])
    assert is_black_above_white(image_decoding.load_image(path, 64)[0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind, code", [(1, "B"), (3, "H"), (4, "I"), (6, "b"), (8, "h"), (9, "i")])
def test_an_orientation_may_have_any_type_of_integer(order, kind, code):
    value = struct.pack(order + code, 6).ljust(4, b"\0")
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    exif = header + struct.pack(order + "HHHI", 1, 274, kind, 1) + value
    assert image_decoding.parse_exif_orientation(exif) == 6


def test_an_empty_exif_block_does_not_hide_the_next_one(tmp_path):
    jpeg = black_above_white(6)[0]
    assert jpeg.startswith(b"\xff\xd8")
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + b"\xff\xe1\0\x08Exif\0\0" + jpeg[2:])
    assert is_black_above_white(image_decoding.load_image(tmp_path / "a.jpg", 64)[0])


@pytest.mark.parametrize("orientation", [b'="6"', b"='6'", b' = "6"', b">6<", b"> 6 <"])
def test_an_orientation_in_xmp_counts_if_exif_has_none(tmp_path, orientation):
    image = Image.open(io.BytesIO(black_above_white(6)[0]))
    image.info.pop("exif")
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation%s/></x:xmpmeta>" % orientation
    image.save(tmp_path / "a.jpg", xmp=xmp)
    assert is_black_above_white(image_decoding.load_image(tmp_path / "a.jpg", 64)[0])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch, orientation):
    """The result is that of the full decoding, up to rounding, with the size of the whole image."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12, generator=generator), (960, 1280),
                                            mode="bicubic").clamp(0, 1)
    pixels = (noise[0].permute(1, 2, 0) * 255).byte().numpy()
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    sizes, load = [], JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: sizes.append(image.size) or load(image))
    fast, micro_cond = image_decoding.load_image(tmp_path / "a.jpg", 64, (1, .5))
    assert min(min(size) for size in sizes) == 240    # 960 / 4: at least twice the 64 pixels that are wanted
    monkeypatch.setattr(image_decoding, "draft_jpeg", lambda *args: None)
    slow, expected = image_decoding.load_image(tmp_path / "a.jpg", 64, (1, .5))
    assert micro_cond.tolist() == expected.tolist()
    assert expected.tolist() == ([960, 1280, 0, 21] if orientation == 1 else [1280, 960, 10, 0])
    assert (fast.float() - slow.float()).abs().mean() < 1


def test_bytes_are_read_like_a_file(tmp_path):
    for format in ("PNG", "JPEG", "WEBP"):
        path = tmp_path / f"a.{format}"
        Image.new("RGB", (30, 40), (200, 100, 50)).save(path, format)
        image, micro_cond = image_decoding.load_image(path.read_bytes(), 16)
        expected, expected_cond = image_decoding.load_image(path, 16)
        assert torch.equal(image, expected) and torch.equal(micro_cond, expected_cond)
