"""Contact sheets: rows of small pictures with labels, as one image."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, TEXT, FAINT = (250, 248, 243), (52, 46, 60), (126, 118, 132)


def enlarge(picture: np.ndarray, side: int) -> Image.Image:
    """uint8 [H, W, 3] at a larger size, its pixels kept square."""
    return Image.fromarray(picture).resize((side, side), Image.NEAREST if picture.shape[0] <= side else Image.LANCZOS)


def sheet(rows: list[tuple[str, list[np.ndarray]]], headings: list[tuple[int, list[str]]], side: int = 128, gap: int = 8) -> Image.Image:
    """One image.

    Args:
        rows: (label, pictures). headings: (row, texts), a line of texts above that row's pictures, one a picture.
    """
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    margin, heading_height = 190, 58
    columns = max(len(pictures) for _, pictures in rows)
    headed = dict(headings)
    width = margin + columns * (side + gap) + gap
    height = len(rows) * (side + gap) + len(headed) * heading_height + 2 * gap
    page = Image.new("RGB", (width, height), PAPER)
    pen, y = ImageDraw.Draw(page), gap
    for number, (label, pictures) in enumerate(rows):
        if number in headed:
            for n, text in enumerate(headed[number]):
                lines = "\n".join(textwrap.wrap(text, 20 * side // 128))
                pen.multiline_text((margin + n * (side + gap), y + heading_height - 6), lines, FAINT, small, anchor="ld", spacing=2)
            y += heading_height
        pen.multiline_text((gap * 2, y + side / 2), "\n".join(textwrap.wrap(label, 20)), TEXT, font, anchor="lm", spacing=3)
        for n, picture in enumerate(pictures):
            page.paste(enlarge(picture, side), (margin + n * (side + gap), y))
        y += side + gap
    return page
