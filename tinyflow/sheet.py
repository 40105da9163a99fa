"""Contact sheets: rows of small pictures with labels, in one image to look at."""

import textwrap
from typing import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAGE, INK, FAINT = (250, 248, 243), (52, 46, 60), (126, 118, 132)
MARGIN, HEADING, GAP, LINE = 190, 76, 8, 18      # pixels: labels, headings, the space between, a note


def sheet(rows: list[tuple[str, list[np.ndarray]]], headings: list[tuple[int, list[str]]],
          side: int = 128, notes: Sequence[str] = ()) -> Image.Image:
    """Draws the sheet.

    Args:
        rows: (label, pictures), from top to bottom; the pictures are uint8 [H, W, 3] of any size.
        headings: (row, texts), a line of texts above that row, one for each of its pictures.
        side: pixels a side of each picture on the sheet.
        notes: sentences below the last row.
    """
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    headed = dict(headings)
    columns = max(len(pictures) for _, pictures in rows)
    width = MARGIN + columns * (side + GAP) + GAP
    below = [textwrap.fill(note, (width - 2 * GAP) // 7) for note in notes]
    lines = sum(note.count("\n") + 1 for note in below)
    height = len(rows) * (side + GAP) + len(headed) * HEADING + 2 * GAP + lines * LINE
    page = Image.new("RGB", (width, height), PAGE)
    pen, y = ImageDraw.Draw(page), GAP
    for number, (label, pictures) in enumerate(rows):
        if number in headed:
            y += HEADING
            for n, text in enumerate(headed[number]):
                pen.multiline_text((MARGIN + n * (side + GAP), y - 6), textwrap.fill(text, 19 * side // 128),
                                   FAINT, small, anchor="ld", spacing=2)
        pen.multiline_text((2 * GAP, y + side / 2), textwrap.fill(label, 20),
                           INK, font, anchor="lm", spacing=3)
        for n, picture in enumerate(pictures):
            resampling = Image.NEAREST if len(picture) <= side else Image.LANCZOS    # small: sharp squares
            shown = Image.fromarray(picture).resize((side, side), resampling)
            page.paste(shown, (MARGIN + n * (side + GAP), y))
        y += side + GAP
    pen.multiline_text((2 * GAP, y), "\n".join(below), INK, small, spacing=LINE - 13)
    return page
