"""A custom set: 3 to 5 reference pictures of a new concept, each with its three texts.

    COMPLETE "a [V] robot in the desert"     BASE "a robot in the desert"     TARGET "[V] robot"

Texts come from a `.txt` file beside each picture, from `metadata.jsonl` (file_name, text), or from a CSV with the released PureCC's columns
(image_path, prompt, target_prompt, base_prompt, instance_word). Without any of them the texts are "a [V] <class word>" and its
base. A given text is the COMPLETE one; BASE is it without [V]. Pictures and texts stay paired by their file's name. Read next: train.py.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from purecc_min.branch import TOKEN
from tinyflow.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST, LARGEST = 16, 9000                     # pixels on a side that a reference picture may have


@dataclass(frozen=True)
class Reference:
    id: str                                      # the file's name
    pictures: np.ndarray                         # uint8 [V, S, S, 3]: the picture, then random crops and flips of it
    complete: str
    base: str
    target: str

    @property
    def picture(self) -> np.ndarray:
        """uint8 [S, S, 3], the picture itself."""
        return self.pictures[0]


@dataclass(frozen=True)
class ConceptSet:
    class_word: str
    references: list[Reference]
    notes: list[str]                             # one line for each picture that had to be converted


def read_picture(path: Path, size: int, variants: int, rng: np.random.Generator) -> tuple[np.ndarray, str | None]:
    """A picture file as uint8 RGB [variants, size, size, 3], and a note if it had to be converted. Raises InputError.

    The first variant is the picture, centre-cropped to a square; the others are random squares of it, half of them mirrored.
    """
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST or max(image.size) > LARGEST:
                raise InputError(f"{path}: the picture is {image.width} x {image.height}; sides must be {SMALLEST} to {LARGEST} pixels")
            done = ["the first frame of an animation"] if getattr(image, "is_animated", False) else []
            image.load()
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
                done.append("turned upright")
            if image.mode != "RGB":
                done.append(f"converted from {image.mode} to RGB")
                image = to_rgb(image)
            squares = [ImageOps.fit(image, (size, size), Image.BOX if min(image.size) % size == 0 else Image.LANCZOS)]
            squares += [random_square(image, size, rng) for _ in range(variants - 1)]
    except InputError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = "it is not a picture" if isinstance(error, UnidentifiedImageError) else f"it cannot be read ({error})"
        raise InputError(f"{path}: {reason}; replace it or take it out of the folder") from None
    return np.stack([np.asarray(square) for square in squares]), f"{path.name}: {', '.join(done)}" if done else None


def random_square(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square at a random place, four fifths of the shorter side or larger, mirrored every other time."""
    side = min(image.size) * rng.uniform(0.8, 1.0)
    left, top = (rng.uniform(0, length - side) for length in image.size)
    square = image.resize((size, size), Image.LANCZOS, box=(left, top, left + side, top + side))
    return ImageOps.mirror(square) if rng.random() < 0.5 else square


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency lies on white, 16-bit grey is scaled."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_rows(folder: Path) -> dict[str, dict[str, str]]:
    """File name -> its texts, from metadata.jsonl or a CSV in the folder; empty if there is neither. Raises InputError."""
    rows = {}
    if (table := folder / "metadata.jsonl").exists():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[Path(row["file_name"]).name] = {"prompt": row["text"]}
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"{table}, line {number}: needs JSON with file_name and text") from None
        return rows
    for table in sorted(folder.glob("*.csv"))[:1]:
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not row.get("image_path") or not row.get("prompt"):
                    raise InputError(f"{table}: needs the columns image_path and prompt, filled in every row")
                rows[Path(row["image_path"]).name] = {key: value.strip() for key, value in row.items() if key and value}
    return rows


def without_token(text: str) -> str:
    return " ".join(text.replace(TOKEN, " ").split())


def load_concept(folder: str | Path, class_word: str | None, size: int, variants: int = 1, seed: int = 0) -> ConceptSet:
    """Reads a folder of pictures and texts.

    Args:
        class_word: an ordinary word close to the concept; may be left out if the CSV has instance_word.
        size: pictures become size x size. variants: of each picture, by random crops and flips drawn from `seed`; 1 is the picture alone.
    Raises: InputError for a missing or empty folder, an unreadable picture, a complete text without [V] or a base text with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    rows = read_rows(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: there is no picture in this folder ({', '.join(SUFFIXES)})")
    if absent := sorted(rows.keys() - {path.name for path in paths}):
        raise InputError(f"{folder}: the captions name {absent[0]}, which is not in the folder")
    class_word = class_word or next((row["instance_word"] for row in rows.values() if "instance_word" in row), None)
    if not class_word:
        raise InputError(f"{folder}: say what kind of thing [V] is, for example --class-word robot")

    references, notes, rng = [], [], np.random.default_rng(seed)
    for path in paths:
        row, sidecar = rows.get(path.name, {}), path.with_suffix(".txt")
        if not row and sidecar.exists():
            row = {"prompt": sidecar.read_text(encoding="utf-8").strip()}
        if not row and (rows or any(p.with_suffix(".txt").exists() for p in paths)):
            raise InputError(f"{path}: this picture has no text, though others in the folder do")
        complete = " ".join(row.get("prompt", f"a {TOKEN} {class_word}").replace("[v]", TOKEN).split())
        base = " ".join(row.get("base_prompt", without_token(complete)).split())
        target = " ".join(row.get("target_prompt", f"{TOKEN} {class_word}").replace("[v]", TOKEN).split())
        for kind, text in (("complete", complete), ("target", target)):
            if TOKEN not in text:
                raise InputError(f"{path}: the {kind} text {text!r} has no {TOKEN}; write it before the class word, as in 'a {TOKEN} {class_word}'")
        if TOKEN.lower() in base.lower():
            raise InputError(f"{path}: the base text {base!r} has {TOKEN} in it; it must describe the picture without the concept's name")
        pictures, note = read_picture(path, size, variants, rng)
        references.append(Reference(path.name, pictures, complete, base, target))
        notes += [note] if note else []
    return ConceptSet(class_word, references, notes)
