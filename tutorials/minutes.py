"""How long a lesson takes: its words at reading speed, and the minutes of its exercises by their stars.

A section whose heading ends in "(optional)" is counted apart, with all that stands below it; where the
lesson's own title ends so, the whole lesson is. build.py writes the minutes into the table of README.md.
"""

import re
from pathlib import Path
from typing import NamedTuple

READING = 130                                    # words a minute, of a text that one has to think about
STARS = {1: 5, 2: 12, 3: 25}                     # minutes of an exercise
WORDS = 2500                                     # a lesson has at most
HOURS = 18                                       # and all lessons without what is optional
README = Path(__file__).parent / "README.md"


class Minutes(NamedTuple):
    title: str
    words: int
    core: int
    optional: int


def stars_of(heading: str) -> int:
    """How many stars an exercise has: 2 for "### Exercise 6.2 ★★ · The predictions"; 0 for other headings."""
    found = re.match(r"### Exercise \d+\.\d+ (★+) ", heading)
    return len(found[1]) if found else 0


def minutes(lesson) -> Minutes:
    """What a lesson's Markdown cells take, without those of the slides."""
    texts = [cell.source for cell in lesson.cells
             if cell.cell_type == "markdown" and "slide" not in cell.metadata.get("tags", [])]
    lines = "\n".join(texts).splitlines()
    title = next((line[2:] for line in lines if line.startswith("# ")), "")
    spent, words, level, fenced = {False: 0.0, True: 0.0}, 0, 99, False
    for line in lines:
        fenced ^= line.startswith("```")
        depth = 99 if fenced else len(re.match("#*", line)[0]) or 99
        if depth <= level:                       # the heading of another section ends the optional one
            level = 99
        if depth < 99 and line.endswith("(optional)"):
            level = min(level, depth)
        words += len(line.split())
        spent[level < 99] += len(line.split()) / READING + STARS.get(stars_of(line), 0)
    return Minutes(title, words, round(spent[False]), round(spent[True]))


def with_table(readme: str, found: dict[int, Minutes]) -> str:
    """The README with the titles and minutes of these lessons in its table, and their sums below them."""
    def row(match: re.Match) -> str:
        if not (own := found.get(int(match[1]))):
            return match[0]
        title = own.title.split(" · ", 1)[1].removesuffix(" (optional)")
        return f"| {match[1]}. {title} | {match[2]} | {own.core or ''} | {own.optional or ''} |"

    readme = re.sub(r"^\| (\d+)\. [^|]*\| ([^|]*?) \|.*$", row, readme, flags=re.MULTILINE)
    cells = [line.split("|") for line in readme.splitlines() if re.match(r"\| \d+\. ", line)]
    core, optional = (sum(int(cell[column].strip() or 0) for cell in cells) / 60 for column in (3, 4))
    return re.sub(r"^\| in all \|.*$", f"| in all | | {core:.1f} h | {optional:.1f} h |", readme,
                  flags=re.MULTILINE)
