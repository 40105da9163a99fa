"""Makes a deck of slides from a lesson: one HTML file, which needs no network and no other file.

A slide is a Markdown cell with the tag "slide" in the lesson's source; it comes into neither notebook.

    ![what it shows](last)                      the last picture that the solved notebook shows before it
    ![what it shows](../diagrams/name.svg)      a drawing
    ???                                         what stands below it are the speaker's notes

So a deck never shows a plot that the lesson does not compute. Without notes of its own a slide has the
lesson's paragraphs since the slide before, and, under a picture, those that follow it in the lesson. If there
are none, it has the next ones. A slide that names [V], as its picture may, shows the references of the
concepts that its tags name, by default those of the course's robot; the tag "no-references" says that its
picture shows them.
`python -m tutorials.build` writes the decks; slides_template.html is the empty one.

A lesson's plots are drawn twice: for the notebook, and by `enlarged` for the slide, with large letters.
"""

import base64
import html
import io
import re
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from PIL import Image

PAGE = Path(__file__).with_name("slides_template.html")
CONCEPT = "checked_robot"                        # the course's [V]
WIDE, HIGH, LETTERS = 1130, 430, 15              # px: room for a picture at 1280 x 720, and its least letters
IN_KERNEL = ["--IPKernelApp.exec_lines=import sys; sys.path.insert(0, '../..')",      # of a lesson's kernel
             "--IPKernelApp.exec_lines=from tutorials import slides; slides.draw_twice()"]


def draw_twice() -> None:
    """From now on figures come as SVG, too. It runs in the kernel of a lesson."""
    import matplotlib_inline.backend_inline      # noqa: F401, I001  (its import removes formatters)
    from IPython import get_ipython
    from matplotlib.figure import Figure

    get_ipython().display_formatter.formatters["image/svg+xml"].for_type(Figure, enlarged)


def enlarged(figure) -> str:
    """A figure as SVG. No letter is smaller than LETTERS on a slide; the figure stays as it was."""
    from matplotlib import rc_context
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

    size, engine, file = figure.get_size_inches().copy(), figure.get_layout_engine(), io.StringIO()
    images = {image: image.get_interpolation() for image in figure.findobj(AxesImage)}
    for image in images:
        image.set_interpolation("none")          # SVG keeps the pixels of a picture as they are
    figure.draw_without_rendering()              # only now there are ticks, and their labels
    letters = {text: text.get_fontsize() for text in figure.findobj(Text)}
    try:
        if len(figure.axes) > 8:                 # a sheet of pictures keeps its layout, which takes long
            figure.set_layout_engine("none")
        for wider in (1, 1.3, 1.7, 2.2, 3, 4):    # until the texts have room
            width = min(size[0] * wider, max(size[0], size[1] * WIDE / HIGH))
            figure.set_size_inches(width, size[1])
            for _ in range(2):                   # larger letters take room, so that all becomes smaller
                box = figure.get_tightbbox()
                scale = min(WIDE / box.width, HIGH / box.height) / 72                # px a point
                for text, points in letters.items():
                    text.set_fontsize(max(points, least(text.get_text()) / scale))
            if width < size[0] * wider or not overlapping(figure):
                break
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "slides"}):
            figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=.05, facecolor="none",
                           metadata={"Date": None})
        return file.getvalue()
    finally:
        figure.set_size_inches(size)
        figure.set_layout_engine(engine)
        for text, points in letters.items():
            text.set_fontsize(points)
        for image, how in images.items():
            image.set_interpolation(how)


def least(text: str) -> float:
    """The least letters of a text, in px. A formula's indices are smaller than the rest of it, by .7."""
    return LETTERS / .7 if re.search(r"\$.*[_^]", text) else LETTERS


def overlapping(figure) -> bool:
    """Whether two texts of a figure touch."""
    from matplotlib.text import Text
    boxes = [text.get_window_extent().padded(5) for text in figure.findobj(Text)
             if text.get_visible() and text.get_text()]
    return any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def mathml(text: str, options: dict) -> str:
    made = convert(text, display="block" if options["display_mode"] else "inline")
    if "\\" in made:
        raise ValueError(f"the slides know no such command: {text}")
    return made.replace('<mi mathvariant="double-struck">E</mi>', "<mi>&#x1D53C;</mi>")  # browsers want it so


def formula(text: str, options: dict) -> str:
    """A formula in the notes: as LaTeX where it cannot be drawn."""
    try:
        return mathml(text, options)
    except Exception:                            # latex2mathml has errors of its own for what it cannot read
        return f"<code>{html.escape(text)}</code>"


MARKDOWN, NOTES = (MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=renderer)
                   for renderer in (mathml, formula))


def inline(svg: str, alt: str, number: int) -> str:
    """An SVG as a part of a page. Its names become its own, and the same in every build, by numbers."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    names = {name: f"p{number}-{k}" for k, name in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'(\bid="|url\(#|href="#)([^")]+)', lambda found: found[1] + names[found[2]],
                 svg[svg.index("<svg"):])
    said = alt or "A picture. It says: " + ", ".join(re.findall(r"<(?:text|tspan)[^>]*>([^<]*\w[^<]*)<", svg))
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|role|aria-label|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{said if not alt else html.escape(alt)}">{rest.strip()}'


def pixels(png: str, alt: str) -> str:
    return f'<img src="data:image/png;base64,{"".join(png.split())}" alt="{html.escape(alt)}" />'


@cache
def references(name: str, token: str = "[V]") -> str:
    """A concept's references in a row, with its name."""
    from purecc_min.measure.toy import CONCEPTS
    pictures = []
    for reference in CONCEPTS[name].references().references:
        file = io.BytesIO()
        Image.fromarray(reference.picture.squeeze()).save(file, "PNG")
        pictures.append(pixels(base64.b64encode(file.getvalue()).decode(), "a reference"))
    said = f"{token}, {name.replace('_', ' ')}:"
    return f'<div class="references"><span>{said}</span>{"".join(pictures)}</div>'


def paragraphs(cell) -> str:
    """What a lesson's cell says, without its exercises and their hints."""
    said = re.sub(r"<details><summary>Hint.*?</details>", "", cell.source, flags=re.DOTALL)
    return said.split("### Exercise")[0].strip() if cell.cell_type == "markdown" else ""


def following(cells: list, n: int) -> tuple[int, str]:
    """The place of the next slide after cell n, or of the text that stands before it; and that text."""
    for place in range(n + 1, len(cells)):
        if "slide" in cells[place].metadata.get("tags", []):
            return place, ""
        if text := paragraphs(cells[place]):
            return place, text
    return len(cells), ""


def deck(notebook, title: str) -> tuple[str, int]:
    """The deck of an executed notebook whose slide cells are still in it, and the number of its slides.

    The pictures that were drawn for it, as SVG, are taken out of the notebook.
    Raises: ValueError for a slide that wants a picture where there was none, and for a formula that
    latex2mathml does not know.
    """
    last, slides, lesson, told = None, [], [], {}
    for n, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                last = data.pop("image/svg+xml", None), data["image/png"]
        tags = cell.metadata.get("tags", [])
        if "slide" not in tags:
            lesson.append(paragraphs(cell)[told.get(n, 0):])
            continue
        text, _, notes = cell.source.partition("\n???\n")
        place, after = following(notebook.cells, n)
        if not notes:
            said, rest = "\n\n".join(lesson), ""
            if place == n + 1 < len(notebook.cells) and not after:           # a slide, about a later part
                said, _, rest = said.partition(notebook.cells[place].source.splitlines()[0])
            about = re.split("^## ", after, maxsplit=1, flags=re.MULTILINE)[0] if "](" in text else ""
            lesson, told[place] = [rest], len(about)         # what one slide says, the next does not
            notes = f"{said}\n\n{about}".strip() or after
        slides.append(slide(text, notes, tags, last, len(slides) + 1))
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("TITLE", html.escape(title)).replace("SLIDES", "\n".join(slides))
    return page, len(slides)


def slide(text: str, notes: str, tags: list[str], last: tuple[str | None, str] | None, number: int) -> str:
    """The HTML of one slide. last: the last picture as SVG, if it was drawn for slides, and as PNG."""
    heading = text.strip().splitlines()[0].strip("# ")

    def picture(found: re.Match) -> str:
        source, alt = found[1], html.unescape(found[2])
        if source.endswith(".svg"):
            return inline((PAGE.parent / "slides" / source).read_text(encoding="utf-8"), alt, number)
        if last is None:
            raise ValueError(f"there is no picture before the slide {heading!r}")
        return inline(last[0], alt, number) if last[0] else pixels(last[1], alt or heading)

    made = re.sub(r'<img src="(last|[^"]*\.svg)" alt="([^"]*)" />', picture, MARKDOWN.render(text))
    made = re.sub(r"<p>(<svg.*?</svg>|<img [^>]*>)</p>", r"<figure>\1</figure>", made, flags=re.DOTALL)
    if re.search(r"\[V\d?\]", made) and "no-references" not in tags:
        names = [tag for tag in tags if tag != "slide"] or [CONCEPT]
        tokens = [f"[V{n}]" for n in range(1, 1 + len(names))] if len(names) > 1 else ["[V]"]
        made += "".join(map(references, names, tokens))
    return f"<section>\n{made}<aside>{NOTES.render(notes)}</aside></section>"
