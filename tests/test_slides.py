"""The decks: what slides.py makes of a lesson, and, in a real browser, that a class can read every slide."""

import io
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.browser import chromium, in_browser, needs_browser
from tutorials.build import DECK_0, FOLDER
from tutorials.slides import HIGH, WIDE, deck, enlarged, inline

DECKS = sorted((FOLDER / "slides").glob("*.html"))
SVG = '<?xml version="1.0"?>\n<svg width="9pt" viewBox="0 0 9 9"><metadata>x</metadata>' \
      '<clipPath id="a"/><g clip-path="url(#a)"><text>loss</text></g></svg>'


def slide(text: str, *tags: str):
    return new_markdown_cell(text, metadata={"tags": ["slide", *tags]})


def drawn(png: str, **more: str):
    data = {"image/png": png, **{f"image/{kind}+xml": text for kind, text in more.items()}}
    return new_code_cell("", outputs=[new_output("display_data", data)])


def sections(*cells) -> list[str]:
    page, count = deck(new_notebook(cells=list(cells)), "")
    found = re.findall("<section>(.*?)</section>", page, re.DOTALL)
    assert len(found) == count
    return found


def test_a_deck_shows_the_pictures_that_the_lesson_made():
    cells = [slide("# One, $x_0$"), drawn("AA"), drawn("BB"), slide("![](last)\n\n*two*")]
    page, count = deck(new_notebook(cells=cells), "a < b")
    assert count == 2 == page.count("<section>") and "a &lt; b" in page
    assert "<msub><mi>x</mi><mn>0</mn></msub>" in page and "<em>two</em>" in page
    assert "base64,BB" in page and "base64,AA" not in page
    with pytest.raises(ValueError, match="no picture before the slide"):
        deck(new_notebook(cells=[slide("![](last)")]), "")
    with pytest.raises(ValueError, match="no such command"):
        deck(new_notebook(cells=[slide("$\\arg\\min x$")]), "")


def test_a_picture_that_was_drawn_for_the_slide_is_a_part_of_the_page():
    cell = drawn("AA", svg=SVG)
    one, two, three = sections(cell, slide("![A & B](last)"), slide("![](last)"),
                               slide("![Arrows](../diagrams/idea.svg)"))
    assert 'role="img" aria-label="A &amp; B"' in one and "AA" not in one and "metadata" not in one
    assert 'id="p1-0"' in one and "url(#p1-0)" in one and 'id="p2-0"' in two        # each has its own names
    assert 'aria-label="A picture. It says: loss"' in two
    assert 'aria-label="Arrows"' in three and "v_PureCC" in three
    assert list(cell.outputs[0].data) == ["image/png"]           # the notebook keeps the other one


def test_notes_are_the_slides_own_or_the_lessons_paragraphs():
    text = "A *crowd* walks.\n\n### Exercise 1.1 ★\n\nWrite it."
    first, second = new_markdown_cell(text), new_markdown_cell(text)
    own, others, none = sections(first, slide("# One\n???\nSay it."), second, new_code_cell("x = 1"),
                                 slide("# Two"), slide("# Three"))
    assert "<aside><p>Say it.</p>" in own and "crowd" not in own
    assert "<aside><p>A <em>crowd</em> walks.</p>" in others and "Write it" not in others
    assert "<aside></aside>" in none
    about, last, questions = sections(
        drawn("AA"), slide("# A plot\n\n![](last)"), new_markdown_cell("It shows this.\n\n## Next\n\nThen."),
        new_markdown_cell("## Questions\n\nAnswers."), slide("## Next"), slide("## Questions"))
    assert "It shows this." in about and "Then." not in about            # what follows a picture is about it
    assert "Then." in last and "Answers" not in last and "this" not in last and "Answers." in questions
    assert "<code>\\arg\\min x</code>" in sections(slide("# One\n???\n$\\arg\\min x$"))[0]


def test_references_stand_wherever_a_slide_names_v():
    names = [re.findall(r"<span>\[V\d?\], (.*?):</span>", section) for section in sections(
        slide("# A [V] robot"), slide("# Another robot"), slide("# [V1]", "dotted_house", "drawn_chalk"),
        slide("# [V] again", "no-references"), slide("# Notes alone\n???\nof [V]"))]
    assert names == [["checked robot"], [], ["dotted house", "drawn chalk"], [], []]
    assert sections(slide("# A [V] robot"))[0].count("<img") == 4


def a_sheet(rows: int):
    figure, axes = plt.subplots(rows, 6, figsize=(8.4, 1.4 * rows), squeeze=False, layout="compressed")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], title="a small [V]\nrobot")
        axis.imshow(np.zeros((8, 8, 3)), interpolation="nearest")
    axes[0, 0].plot([0, 7], [0, 7], label="a line")
    axes[0, 0].legend(fontsize=5)
    axes[0, 1].set(xticks=[1, 6], xlabel="$t_0$")
    return figure


def saved(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()


def smallest(svg: str, pattern: str = r"font(?:-size)?: ([0-9.]+)px") -> float:
    """The size of the smallest letters on a slide."""
    width, height = map(float, re.search('viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg).groups())
    return min(map(float, re.findall(pattern, svg))) * min(WIDE / width, HIGH / height)


@pytest.mark.parametrize("rows", (1, 5))
def test_a_figure_is_drawn_for_a_slide_with_large_letters_and_stays_as_it_was(rows):
    matplotlib.use("agg")
    figure, before = a_sheet(rows), saved(a_sheet(rows))
    svg, again = enlarged(figure), enlarged(a_sheet(rows))
    assert inline(svg, "", 1) == inline(again, "", 1) and saved(figure) == before
    assert "robot" in svg and "image-rendering" in svg and 14 <= smallest(svg) <= 22
    axis = plt.figure(figsize=(9, 5)).add_subplot()
    axis.set(xlabel="$x_t$", yscale="log", ylim=(.001, 1))
    assert smallest(enlarged(axis.figure)) >= 14             # a formula's indices, and exponents
    plt.close("all")


MEASURE = """
const found = [], seen = part => part.getClientRects().length > 0, box = part => part.getBoundingClientRect();
function letters(node) {                          // of a text node, in px
  const font = parseFloat(getComputedStyle(node.parentElement).fontSize);
  const scale = node.parentElement.getScreenCTM?.();
  return scale ? font * Math.hypot(scale.a, scale.b) : font;
}
function texts(slide) {
  const walker = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT), range = document.createRange();
  const all = [];
  for (let node; (node = walker.nextNode());) {
    range.selectNode(node);
    if (node.textContent.trim() && !node.parentElement.closest("title") && seen(range))
      all.push({ said: node.textContent.trim(), px: letters(node) });
  }
  return all;
}
const outside = part => box(part).top < 0 || box(part).bottom > innerHeight + 1
                        || box(part).right > innerWidth + 1 || part.scrollWidth > part.clientWidth + 2;
const over = (a, b) => box(a).top < box(b).bottom - 3 && box(b).top < box(a).bottom - 3
                       && box(a).left < box(b).right - 3 && box(b).left < box(a).right - 3;
slides.forEach((slide, n) => {
  show(n + 1);
  const parts = [...slide.children].filter(seen), all = texts(slide);
  const pictures = [...slide.querySelectorAll("figure > *")];
  found.push({ heading: slide.querySelector("h1, h2").textContent, texts: all.length,
    small: all.filter(text => text.px < 14), outside: parts.filter(outside).map(part => part.tagName),
    over: parts.flatMap((a, k) => parts.slice(0, k).filter(b => over(a, b)).map(b => a.tagName + b.tagName)),
    pixels: pictures.filter(one => one.tagName === "IMG").length,
    blind: pictures.filter(one => (one.getAttribute("aria-label") || one.alt || "").length < 15).length });
});
report(found);"""


@needs_browser
@pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)
def test_a_class_can_read_every_slide(path, tmp_path):
    """At 1280 x 720: no letter below 14 px, nothing outside the slide or over another; words for pictures."""
    found = in_browser(path.read_text(encoding="utf-8"), MEASURE, tmp_path, 1280, 720)
    assert len(found) >= 8
    for n, one in enumerate(found, 1):
        where = f"{path.stem}, slide {n}, {one['heading']!r}"
        assert one["texts"] and not one["small"], f"{where}: small letters: {one['small'][:3]}"
        assert not one["outside"], f"{where}: there is too much on it: {one['outside']} do not fit"
        assert not one["over"], f"{where}: {one['over']}"
        assert not one["blind"] and not one["pixels"], f"{where}: a picture without words, or of pixels"


@needs_browser
def test_keys_turn_the_pages_and_notes_follow(tmp_path):
    page, _ = deck(new_notebook(cells=[slide(f"# Slide {n}\n???\nNote {n}") for n in range(1, 5)]), "")
    press = """const pages = [], press = key => {
  dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  pages.push(here);
};
const other = document.implementation.createHTMLDocument("");
window.open = () => ({ document: other, addEventListener() {} });
["ArrowDown", "ArrowRight", "PageDown", "ArrowUp", "ArrowLeft", " ", "End", "Home", "n"].forEach(press);
pages.push(other.body.textContent.includes("Note 1") && other.body.textContent.includes("Next: Slide 2"));
press("ArrowDown");
pages.push(other.body.textContent.includes("Note 2"));
report(pages);"""
    assert in_browser(page, press, tmp_path) == [2, 3, 4, 3, 2, 3, 4, 1, 1, True, 2, True]


@needs_browser
def test_a_printed_deck_has_a_page_for_each_slide(tmp_path):
    slides = [slide(f"# {n} of [V]\n\n![A picture](last)\n???\nNote") for n in range(5)]
    page, _ = deck(new_notebook(cells=[drawn("AA", svg=SVG), *slides]), "")
    (tmp_path / "deck.html").write_text(page, encoding="utf-8")
    chromium(tmp_path, f"--print-to-pdf={tmp_path}/deck.pdf", (tmp_path / "deck.html").as_uri())
    pdf = (tmp_path / "deck.pdf").read_bytes()
    sizes = re.findall(rb"/MediaBox\s*\[([^\]]*)\]", pdf)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 5
    assert {tuple(round(float(side)) for side in size.split()) for size in sizes} == {(0, 0, 960, 540)}


def test_deck_0_has_notes_of_its_own_and_every_diagram_is_used_and_can_be_read():
    source = DECK_0.read_text(encoding="utf-8")
    assert 9 <= source.count('"slide"') <= 14 and source.count("# ???\n") == source.count('"slide"')
    assert "![](" not in source and (FOLDER / "slides" / "introduction.html").exists()
    texts = "".join(path.read_text(encoding="utf-8") for path in (FOLDER / "lessons").glob("*.py"))
    for path in (FOLDER / "diagrams").glob("*.svg"):
        assert f"../diagrams/{path.name}" in texts, f"no slide shows {path.name}"
        assert smallest(path.read_text(encoding="utf-8"), 'font-size="([0-9.]+)"') >= 14, path.name
