"""Makes a deck of slides from a lesson: one HTML file, which needs no network and no other file.

A slide is a Markdown cell with the tag "slide" in the lesson's source; it comes into neither notebook. The
line `![](last)` in it stands for the last picture that the solved notebook shows before it. So a deck never
shows anything that the lesson does not compute. `python -m tutorials.build` writes the decks; slides.html is
the empty one.
"""

import html
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

PAGE = Path(__file__).with_suffix(".html")


def mathml(text: str, options: dict) -> str:
    made = convert(text, display="block" if options["display_mode"] else "inline")
    if "\\" in made:
        raise ValueError(f"the slides know no such command: {text}")
    return made.replace('<mi mathvariant="double-struck">E</mi>', "<mi>&#x1D53C;</mi>")  # browsers want it so


def deck(notebook, title: str) -> tuple[str, int]:
    """The deck of an executed notebook whose slide cells are still in it, and the number of its slides.

    Raises: ValueError for a slide that wants a picture where there was none, and for a formula that
    latex2mathml does not know.
    """
    markdown = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=mathml)
    picture, slides = None, []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png", picture)
        if "slide" in cell.metadata.get("tags", []):
            text = cell.source
            if "![](last)" in text:
                if picture is None:
                    raise ValueError(f"there is no picture before the slide {text.splitlines()[0]!r}")
                text = text.replace("![](last)", f"![](data:image/png;base64,{''.join(picture.split())})")
            slides.append(f"<section>\n{markdown.render(text)}</section>")
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("TITLE", html.escape(title)).replace("SLIDES", "\n".join(slides))
    return page, len(slides)
