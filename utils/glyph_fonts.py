"""The shapes of the glyphs data set: characters of matplotlib's fonts, their names and their outlines.

Read next: data.Glyphs"""

import unicodedata

import numpy as np
import torch
import torch.nn.functional as F

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PICTOGRAMS = (
    "☀☁☂☃☄★☆☇☈☎☐☑☒☔☕☘☚☜☝☞☟☠☢☣☤☥☦☧☨☩☪☮☯☸☹☺☻☽☾♀♂♃♄♅♆♇♈♉♊♋♌♍♎♏♐♑♒♓♔♕♖♗♘♙♚♛♜♝♞♟♠♡♢♣♤♥♦♧♨♩♪♫♬♭♮♯"
    "♲♿⚀⚁⚂⚃⚄⚅⚐⚑⚒⚓⚔⚖⚗⚘⚙⚛⚜⚠⚡⚱⛀⛁⛂⛃✂✆✇✈✉✌✍✏✒✓✗✙✚✠✡✦✧✪✯✱✶✹✿❀❄❅❇❖❢❣❦❧←↑→↓↔↕↖↗↘↙↰↱↲↳↺↻⇄⇅⇐⇑⇒⇓⇦⇧⇨⇩"
    "■□▣▦▲△▶▷▼▽◀◁◈◉○●◐◑◒◓◢◣◤◥◫◬⌂⌘⌨⏏⬟⬡⬢😀😇😈😉😎😐😗😠😢😮😴😷😸🙀")
# Unicode calls outlined symbols white and filled ones black; in captions these words would mean colours
PLAIN_WORDS = {"black": "solid", "white": "hollow", "heavy": "thick"}
STOPWORDS = {"sign", "symbol", "suit", "universal", "fill"}


def shape_name(character):
    """The name in a caption: 'letter g', 'capital letter g', 'digit seven', 'hollow chess knight'."""
    words = unicodedata.name(character).lower().replace("-", " ").split()
    if character.isascii():
        return {"small": "letter ", "capital": "capital letter "}.get(words[1], "digit ") + words[-1]
    return " ".join(PLAIN_WORDS.get(word, word) for word in words if word not in STOPWORDS)


def glyph_mask(font, character, px=64, oversampling=4):
    """The coverage of a glyph, (px, px) in [0, 1]. Letters keep their font size, so 'c' differs from 'C';
    pictograms fill the image. For anti-aliasing the glyph is rendered `oversampling` times too large and
    averaged; a large one is smooth as the font library draws it."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font, LoadFlags
    canvas_px = oversampling * px
    font_face = FT2Font(f"{get_data_path()}/fonts/ttf/{font}.ttf")
    font_face.set_size(canvas_px * (.80 if character.isascii() else 1.1), 72)
    font_face.set_text(character, 0, flags=LoadFlags.NO_HINTING)
    font_face.draw_glyphs_to_bitmap(antialiased=True)
    coverage = np.asarray(font_face.get_image(), dtype=np.float32) / 255
    rows = np.flatnonzero(coverage.any(1))
    columns = np.flatnonzero(coverage.any(0))
    coverage = torch.from_numpy(coverage[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])[None, None]
    fill_scale = .775 * canvas_px / max(coverage.shape[-2:])
    scale = min(1., fill_scale) if character.isascii() else fill_scale
    coverage = F.interpolate(coverage, scale_factor=scale, mode="bilinear", antialias=True)
    height, width = coverage.shape[-2:]
    top = (canvas_px - height) // 2
    left = (canvas_px - width) // 2
    canvas = F.pad(coverage, (left, canvas_px - left - width, top, canvas_px - top - height))
    return F.avg_pool2d(canvas, oversampling)[0, 0].clamp(0, 1)    # (px, px)
