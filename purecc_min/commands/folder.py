"""A folder of 3 to 5 reference pictures, read as a custom set (concept.py says what that is).

Texts come from a `.txt` file beside each picture, from `metadata.jsonl` (file_name, text), or from a CSV
with the columns of the released PureCC (image_path, prompt, target_prompt, base_prompt, instance_word).
Without any of them the texts are "a [V] <class word>" and its base. A given text is the COMPLETE one. Texts
are matched to pictures by the file's name. A picture that says where the concept is may lie beside each
(`1.mask.png` beside `1.jpg`): only what is white in it counts in L_CC.
"""

import copy
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from purecc_min.concept import TOKEN, ConceptSet, Reference, base_text
from purecc_min.measure.toy import STYLE_WORD
from tinyflow.errors import InputError, shown
from tinyflow.files import ordinary_file, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST, LARGEST = 16, 9000                     # pixels on a side that a reference picture may have
MOST = 100                                       # pictures
MASK = ".mask"                                   # ends the stem of a mask's file
UPRIGHT, ORIENTATION = 1, 0x0112                 # of a camera's EXIF data
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


def load_concept(folder: str | Path, class_word: str | None, size: int, variants: int = 1,
                 seed: int = 0) -> ConceptSet:
    """Reads a folder of pictures and texts.

    Args:
        class_word: an ordinary word close to the concept; may be left out if the CSV has instance_word.
        size: pictures become size x size pixels.
        variants: of each picture: itself, then random crops and flips of it, drawn from `seed`.
    Raises: InputError for a missing or empty folder, an unreadable picture, a complete text without [V], or
        a base text with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    paths, masks = find_pictures(folder)
    rows = read_rows(folder, paths)
    class_word = one_class_word(folder, class_word, rows)

    references, notes, rng = [], [], np.random.default_rng(seed)
    for path in paths:
        if rows and path.name not in rows:
            raise InputError(f"{path}: this picture has no text, though others in the folder do")
        complete, base, target = three_texts(path, rows.get(path.name, {}), class_word)
        pictures, white, converted = read_picture(path, masks.get(path.stem), size, variants, rng)
        references.append(Reference(path.name, pictures, complete, base, target, white))
        if converted:
            notes.append(f"{path.name}: {', '.join(converted)}")
    return ConceptSet(class_word, references, notes)


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


def read_rows(folder: Path, paths: list[Path]) -> dict[str, dict[str, str]]:
    """File name -> its texts, by the columns of the CSV; empty if the folder has none."""
    tables = sorted(folder.glob("*.csv"))
    if (folder / "metadata.jsonl").exists():
        table = folder / "metadata.jsonl"
        rows = read_jsonl(table)
    elif tables:
        table = tables[0]
        rows = read_csv(table)
    else:
        sidecars = {path.name: path.with_suffix(".txt") for path in paths}
        return {name: {"prompt": read_text(sidecar)}
                for name, sidecar in sidecars.items() if sidecar.exists()}
    absent = sorted(rows.keys() - {path.name for path in paths})
    if absent:
        raise InputError(f"{table}: the captions name {shown(absent[0])}, which is not in the folder")
    return rows


def enter(rows: dict[str, dict[str, str]], table: Path, number: int, name: str, row: dict[str, str]) -> None:
    """Adds a picture's texts. Raises InputError if it has some already, or if one of them is no text."""
    if not all(isinstance(text, str) for text in (name, *row.values())):
        raise InputError(f"{table}, line {number}: the file's name and its texts must be texts, in quotes")
    name = name.replace("\\", "/").rpartition("/")[2]
    if name in rows:
        raise InputError(f"{table}, line {number}: {shown(name)} has its texts in an earlier line already")
    rows[name] = row


def read_jsonl(table: Path) -> dict[str, dict[str, str]]:
    rows = {}
    for number, line in enumerate(read_text(table).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{table}, line {number}: needs JSON with file_name and text") from None
        enter(rows, table, number, name, {"prompt": text})
    return rows


def read_csv(table: Path) -> dict[str, dict[str, str]]:
    rows, lines = {}, csv.DictReader(io.StringIO(read_text(table), newline=""))
    try:
        for row in lines:
            if not row.get("image_path") or not row.get("prompt"):
                raise InputError(f"{table}: needs the columns image_path and prompt, filled in every row")
            texts = {key: text for key, text in row.items() if key and text}
            enter(rows, table, lines.line_num, row["image_path"], texts)
    except csv.Error as error:
        raise InputError(f"{table}, line {lines.line_num}: not a readable CSV ({error})") from None
    return rows


def three_texts(path: Path, row: dict[str, str], class_word: str) -> tuple[str, str, str]:
    """The complete, base and target text of a picture.

    What the row does not say follows from what it says.
    """
    def given(column: str, default: str) -> str:
        return " ".join(row.get(column, default).split())

    complete = given("prompt", f"a {TOKEN} {class_word}").replace("[v]", TOKEN)
    target = given("target_prompt", f"{TOKEN} {class_word}").replace("[v]", TOKEN)
    base = given("base_prompt", base_text(complete))
    advice = f"write it before the class word, as in 'a {TOKEN} {class_word}'"
    for kind, text in (("complete", complete), ("target", target)):
        if TOKEN not in text:
            raise InputError(f"{path}: the {kind} text {shown(text)} has no {TOKEN}; {advice}")
        after = text.partition(TOKEN)[2].lower()
        if class_word != STYLE_WORD and class_word.lower() not in after:
            raise InputError(f"{path}: in the {kind} text {shown(text)} no {shown(class_word)} follows "
                             f"{TOKEN}; {advice}")
    if TOKEN.lower() in base.lower():
        raise InputError(f"{path}: the base text {shown(base)} has {TOKEN} in it; it must describe the "
                         "picture without the concept's name")
    return complete, base, target


# --------------------------------------------------------------------------------------------------- pictures
def find_pictures(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The pictures in a folder, and the masks beside them, by the stem of the picture that each is for.

    Raises: InputError if there is no picture, if there are too many, and if a mask or a picture stands alone.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    masks = {path.stem.removesuffix(MASK): path for path in found if path.stem.endswith(MASK)}
    pictures = [path for path in found if not path.stem.endswith(MASK)]
    if not pictures:
        raise InputError(f"{folder}: there is no picture in this folder ({', '.join(SUFFIXES)})")
    if len(pictures) > MOST:
        raise InputError(f"{folder}: {len(pictures)} pictures; a concept is learned from 3 to 5, and from "
                         f"{MOST} at most")
    for path in pictures:
        if masks and path.stem not in masks:
            raise InputError(f"{path}: this picture has no mask, though others in the folder do; give it "
                             f"{path.stem}{MASK}.png")
    alone = sorted(masks.keys() - {path.stem for path in pictures})
    if alone:
        raise InputError(f"{masks[alone[0]]}: a mask of no picture; there is no {shown(alone[0])} beside it")
    return pictures, masks


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
    white = open_picture(mask)[0]
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


def open_picture(path: Path) -> tuple[Image.Image, list[str]]:
    """A picture file as an upright RGB image, and what had to be converted. Raises InputError."""
    ordinary_file(path)                          # a pipe would be waited for
    try:
        with Image.open(path) as image:
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
            return to_rgb(image), converted
    except InputError:
        raise
    except UNREADABLE as error:
        reason = f"it cannot be read ({error})"
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not a picture"
        raise InputError(f"{path}: {reason}; replace it or take it out of the folder") from None


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Transparency is laid on white; 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
