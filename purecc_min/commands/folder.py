"""A folder of 3 to 5 reference pictures, read as a ConceptSet (concept.py).

Texts come from a `.txt` or `.caption` file beside each picture, from `metadata.jsonl` (file_name, text), or
from a CSV with the columns of the released PureCC (COLUMNS). Without any of them the texts are "a [V] <class
word>" and its base. A given text is the COMPLETE one. A picture that says where the concept is may lie beside
each (`1.mask.png` beside `1.jpg`): only what is white in it counts in L_CC. Texts and masks are matched to
pictures by the files' names, whatever their case. What was taken, and what was not, is said in one line.
"""

import copy
import csv
import io
import json
import re
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from purecc_min.concept import STYLE_WORD, TOKEN, ConceptSet, Reference, base_text
from tinyflow.disk import read_text
from tinyflow.errors import InputError, shown
from tinyflow.files import ordinary_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")      # that people bring; no other is opened
CAPTIONS, TABLE = (".txt", ".caption"), "metadata.jsonl"
COLUMNS = ("image_path", "prompt", "target_prompt", "base_prompt", "instance_word")
SMALLEST, LARGEST = 16, 9000                     # pixels on a side that a reference picture may have
MOST = 100                                       # pictures
MASK = re.compile(r"(.+)[._-]mask(?:label)?", re.IGNORECASE)         # the stem of a mask's file
LIKE_MASK = re.compile(r"(?<![a-z])mask(?![a-z])", re.IGNORECASE)
RANGES = (255, 1023, 4095, 16383, 65535)         # of 8, 10, 12, 14 and 16 bits
UPRIGHT, ORIENTATION = 1, 0x0112                 # of a camera's EXIF data
Rows = dict[str, dict[str, str]]                 # same(file name) of a picture -> column -> text


class Contents(NamedTuple):
    """What lies in a folder, by what it is for."""
    pictures: list[Path]
    masks: dict[str, Path]                       # same(stem) of a picture -> its mask
    captions: list[Path]
    tables: list[Path]
    others: list[Path]                           # not used


def same(name: str) -> str:
    """A file's name as it is compared: in one case and in one Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def load_concept(folder: str | Path, class_word: str | None, size: int, variants: int = 1, seed: int = 0,
                 alpha_as_mask: bool = False) -> ConceptSet:
    """Reads a folder of pictures and texts.

    Args:
        class_word: an ordinary word close to the concept; may be left out if the CSV has instance_word.
        size: pictures become size x size pixels.
        variants: of each picture: itself, then random crops and flips of it, drawn from `seed`.
        alpha_as_mask: whether what is opaque in a picture is its mask.
    Raises: InputError for a missing or empty folder, an unreadable picture, a complete text without [V], or
        a base text with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    found = look_through(folder)
    if alpha_as_mask and found.masks:
        raise InputError(f"{folder}: --alpha-as-mask, and there are masks already; leave one of them out")
    if alpha_as_mask:
        found = found._replace(masks={same(path.stem): path for path in found.pictures})
    rows, source, unused = read_rows(folder, found)
    class_word = one_class_word(folder, class_word, rows)

    references, converted, rng = [], [], np.random.default_rng(seed)
    for path in found.pictures:
        if rows and same(path.name) not in rows:
            raise InputError(f"{path}: this picture has no text, though others in the folder do")
        complete, base, target = three_texts(path, rows.get(same(path.name), {}), class_word)
        pictures, white, changes = read_picture(path, found.masks.get(same(path.stem)), size, variants, rng)
        references.append(Reference(path.name, pictures, complete, base, target, white))
        if changes:
            converted.append(f"{path.name}: {', '.join(changes)}")
    taken = f"{len(references)} picture{'s' * (len(references) > 1)}, texts from {source}"
    if found.masks:
        taken += f", {len(found.masks)} masks: only what is white in them counts in L_CC"
    unused += [f"{path.name}/" if path.is_dir() else path.name for path in found.others]
    taken += f"; not used: {', '.join(map(shown, unused))}" if unused else ""
    return ConceptSet(class_word, references, [taken, *converted])


def look_through(folder: Path) -> Contents:
    """Every file of a folder, by what it is for. Hidden files are passed over.

    Raises: InputError if there is no picture, if there are too many, and if a mask or a picture stands alone.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    stems, masks = {same(path.stem) for path in images}, {}
    for path in images:
        named = MASK.fullmatch(path.stem)
        if named and (same(named[1]) in stems or path.stem.lower().endswith(".mask")):
            if same(named[1]) in masks:
                raise InputError(f"{path}: {shown(named[1])} has another mask, {masks[same(named[1])].name}")
            masks[same(named[1])] = path
    pictures = [path for path in images if path not in masks.values()]
    captions = [path for path in paths if path.suffix.lower() in CAPTIONS]
    tables = [path for path in paths if same(path.name) == TABLE or path.suffix.lower() == ".csv"]
    others = [path for path in paths if path not in (*images, *captions, *tables)]
    if not pictures:
        inside = [path for path in others if path.is_dir()
                  and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())]
        hint = f"; there are some in {shown(inside[0].name)}" if inside else ""
        raise InputError(f"{folder}: there is no picture in this folder ({', '.join(SUFFIXES)}){hint}")
    stray = [path for path in pictures if LIKE_MASK.search(path.stem)]
    if stray and len(stray) < len(pictures):
        raise InputError(f"{stray[0]}: this looks like a mask, and no picture has its name; call it as "
                         "1.mask.png for 1.jpg, or take it out of the folder")
    twice = [path for path in pictures if sum(same(path.stem) == same(other.stem) for other in pictures) > 1]
    if twice:
        raise InputError(f"{twice[0]}: another picture has this name, too; rename one of them")
    if len(pictures) > MOST:
        raise InputError(f"{folder}: {len(pictures)} pictures; a concept is learned from 3 to 5, and from "
                         f"{MOST} at most")
    bare = [path for path in pictures if masks and same(path.stem) not in masks]
    if bare:
        raise InputError(f"{bare[0]}: this picture has no mask, though others in the folder do; give it "
                         f"{bare[0].stem}.mask.png")
    alone = sorted(masks.keys() - {same(path.stem) for path in pictures})
    if alone:
        raise InputError(f"{masks[alone[0]]}: a mask of no picture; there is no {shown(alone[0])} beside it")
    return Contents(pictures, masks, captions, tables, others)


# ------------------------------------------------------------------------------------------------------ texts
def one_class_word(folder: Path, given: str | None, rows: dict[str, dict[str, str]]) -> str:
    """The class word: the given one, or the CSV's. Raises InputError if there is none, or more than one."""
    words = {" ".join(row["instance_word"].split()) for row in rows.values() if "instance_word" in row}
    words |= {" ".join(given.split())} if given is not None else set()
    if not words - {""}:
        raise InputError(f"{folder}: say what kind of thing [V] is, for example --class-word robot")
    if len(words) > 1:
        raise InputError(f"{folder}: --class-word and the instance_word of the CSV must be one word, and "
                         f"here are {', '.join(map(shown, sorted(words)))}")
    return words.pop()


def read_rows(folder: Path, found: Contents) -> tuple[Rows, str, list[str]]:
    """The pictures' texts, where they are from in words, and what was not used of it.

    Raises: InputError for texts in two places, or of no picture.
    """
    sources = [*found.tables, *found.captions[:1]]
    if len(sources) > 1:
        raise InputError(f"{folder}: there are texts in {shown(sources[0].name)} and in "
                         f"{shown(sources[1].name)}; keep one of them")
    if not sources:
        return {}, "the class word alone", []
    if found.captions:
        return read_captions(found)
    table, names = sources[0], {same(path.name): path for path in found.pictures}
    rows, unused = read_csv(table) if table.suffix.lower() == ".csv" else read_jsonl(table)
    absent = sorted(rows.keys() - names.keys())
    if not rows:
        raise InputError(f"{table}: there is no text in it; write one for each picture, or take it away")
    if absent:
        raise InputError(f"{table}: the captions name {shown(absent[0])}, which is not in the folder")
    return rows, table.name, unused


def read_captions(found: Contents) -> tuple[Rows, str, list[str]]:
    """One text a file: `1.txt`, `1.caption` or `1.png.txt` for 1.png. Raises as `read_rows` does."""
    rows, used = {}, []
    for caption in found.captions:
        for path in found.pictures:
            if same(caption.stem) in (same(path.stem), same(path.name)):
                if same(path.name) in rows:
                    raise InputError(f"{caption}: {shown(path.name)} has a text in another file already")
                rows[same(path.name)] = {"prompt": read_text(caption)}
                used.append(caption)
    if not used:
        raise InputError(f"{found.captions[0]}: a text of no picture; name it after its picture, or take it "
                         "out of the folder")
    kinds = sorted({caption.suffix.lower() for caption in used})
    return rows, " and ".join(kinds), [path.name for path in found.captions if path not in used]


def enter(rows: Rows, table: Path, number: int, name: str, row: dict[str, str]) -> None:
    """Adds a picture's texts. Raises InputError if it has some already, or if one of them is no text."""
    if not all(isinstance(text, str) for text in (name, *row.values())):
        raise InputError(f"{table}, line {number}: the file's name and its texts must be texts, in quotes")
    name = same(name.replace("\\", "/").rpartition("/")[2])
    if name in rows:
        raise InputError(f"{table}, line {number}: {shown(name)} has its texts in an earlier line already")
    rows[name] = row


def read_jsonl(table: Path) -> tuple[Rows, list[str]]:
    rows, others = {}, set()
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{table}, line {number}: needs JSON with file_name and text") from None
        enter(rows, table, number, name, {"prompt": text})
        others |= row.keys() - {"file_name", "text"}
    return rows, [f"{name} of {table.name}" for name in sorted(others)]


def read_csv(table: Path) -> tuple[Rows, list[str]]:
    rows, lines = {}, csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True)
    try:
        columns = lines.fieldnames or ()
        if len(set(columns)) < len(columns):
            raise InputError(f"{table}: two columns have one name; keep one of them")
        for row in lines:
            if None in row:
                raise InputError(f"{table}, line {lines.line_num}: more fields than there are columns; put a "
                                 "text that holds a comma into quotes")
            if not row.get("image_path") or not row.get("prompt"):
                raise InputError(f"{table}: needs the columns image_path and prompt, filled in every row")
            texts = {key: text for key, text in row.items() if key in COLUMNS and text}
            enter(rows, table, lines.line_num, row["image_path"], texts)
    except csv.Error as error:
        raise InputError(f"{table}, line {lines.line_num}: not a readable CSV ({error})") from None
    others = [name for name in lines.fieldnames or () if name not in COLUMNS]
    return rows, [f"column {name} of {table.name}" for name in others]


def three_texts(path: Path, row: dict[str, str], class_word: str) -> tuple[str, str, str]:
    """The complete, base and target text of a picture.

    What the row does not say follows from what it says.
    """
    def given(column: str, default: str) -> str:
        return " ".join(row.get(column, default).split())

    if class_word.lower() == STYLE_WORD and "prompt" not in row:
        raise InputError(f"{path}: a style needs a text for each picture, such as '{TOKEN} red ball on the "
                         "beach'")
    complete = given("prompt", f"a {TOKEN} {class_word}").replace("[v]", TOKEN)
    target = given("target_prompt", f"{TOKEN} {class_word}").replace("[v]", TOKEN)
    base = given("base_prompt", base_text(complete))
    advice = f"write it before the class word, as in 'a {TOKEN} {class_word}'"
    for kind, text in (("complete", complete), ("target", target)):
        if TOKEN not in text:
            raise InputError(f"{path}: the {kind} text {shown(text)} has no {TOKEN}; {advice}")
        after = text.partition(TOKEN)[2].lower()
        if class_word.lower() != STYLE_WORD and class_word.lower() not in after:
            raise InputError(f"{path}: in the {kind} text {shown(text)} no {shown(class_word)} follows "
                             f"{TOKEN}; {advice}")
    if TOKEN.lower() in base.lower():
        raise InputError(f"{path}: the base text {shown(base)} has {TOKEN} in it; it must describe the "
                         "picture without the concept's name")
    return complete, base, target


# --------------------------------------------------------------------------------------------------- pictures
def read_picture(path: Path, mask: Path | None, size: int, variants: int,
                 rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """A picture file as uint8 RGB [variants, size, size, 3], its mask, and what had to be converted.

    The first variant is the picture, centre-cropped to a square; the others are random squares of it, half
    of them mirrored. The mask, uint8 [variants, size, size], is cut in the same way.
    Raises: InputError.
    """
    same_rng = copy.deepcopy(rng)
    image, converted = open_picture(path)
    pictures = squares_of(image, size, variants, rng)
    if mask is None:
        return pictures, None, converted
    white = opacity_of(mask) if mask == path else open_picture(mask, paper="black")[0]
    if white.size != image.size:
        raise InputError(f"{mask}: the mask has {white.width} x {white.height} pixels and its picture "
                         f"{image.width} x {image.height}")
    masks = squares_of(white.convert("L"), size, variants, same_rng)
    seen = masks.any((1, 2))
    if not seen[0]:
        raise InputError(f"{mask}: the mask is black all over the middle square, which is what is learned "
                         "from; paint white what [V] is")
    pictures[~seen], masks[~seen] = pictures[0], masks[0]        # squares that lie beside the concept
    return pictures, masks, converted


def open_picture(path: Path, paper: str = "white") -> tuple[Image.Image, list[str]]:
    """A picture file as an upright RGB image, and what had to be converted. Raises InputError.

    paper: what shows through where the picture is transparent.
    """
    ordinary_file(path)                          # a pipe would be waited for
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=known) as image:
            if image.mode == "F":
                raise InputError(f"{path}: its pixels are fractions, whose range nobody knows; save it with "
                                 "8 bits a channel")
            if min(image.size) < SMALLEST or max(image.size) > LARGEST:
                raise InputError(f"{path}: the picture is {image.width} x {image.height}; "
                                 f"sides must be {SMALLEST} to {LARGEST} pixels")
            converted = ["the first frame of an animation"] if getattr(image, "is_animated", False) else []
            image.load()
            if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
                image = ImageOps.exif_transpose(image)
                converted.append("turned upright")
            if image.mode != "RGB":
                converted.append(f"converted from {image.mode} to RGB")
            rgb = to_rgb(image, paper)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: it is not a picture that can be read; save it as PNG or JPEG, or take "
                         "it out of the folder") from None
    except Exception as error:                   # a decoder may raise anything
        raise InputError(f"{path}: it cannot be read ({error}); replace it or take it out of the "
                         "folder") from None
    if paper == "white" and all(low == high for low, high in rgb.getextrema()):
        raise InputError(f"{path}: all of it is one colour; there is nothing to learn from it")
    return rgb, converted


def opacity_of(path: Path) -> Image.Image:
    """Where a picture is opaque, in white. Raises InputError if it is opaque all over."""
    with Image.open(path) as image:
        opacity = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    if opacity.getextrema()[0] == 255:
        raise InputError(f"{path}: nothing in it is transparent, so it is no mask of its own")
    return opacity


def squares_of(image: Image.Image, size: int, variants: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [variants, size, size, ...]: the middle of the image, then random squares of it."""
    method = Image.BOX if min(image.size) % size == 0 else Image.LANCZOS
    squares = [ImageOps.fit(image, (size, size), method)]
    squares += [random_square(image, size, rng) for _ in range(variants - 1)]
    return np.stack([np.asarray(square) for square in squares])


def random_square(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square at a random place, four fifths of the shorter side or larger, mirrored every other time."""
    side = min(image.size) * rng.uniform(0.8, 1.0)
    left, top = (rng.uniform(0, length - side) for length in image.size)
    square = image.resize((size, size), Image.LANCZOS, box=(left, top, left + side, top + side))
    return ImageOps.mirror(square) if rng.random() < 0.5 else square


def to_rgb(image: Image.Image, paper: str) -> Image.Image:
    """Any mode to RGB. Transparency is laid on paper; more than 8 bits are scaled by the range they need."""
    if image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.float64)
        most = next((most for most in RANGES if numbers.max() <= most), numbers.max())
        image = Image.fromarray((numbers * 255 / most).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, paper), image).convert("RGB")
    return image.convert("RGB")
