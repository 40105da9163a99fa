"""Folders of references: texts of every kind, odd pictures, masks. bad_files.py has what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from purecc_min.commands.folder import load_concept, random_square
from purecc_min.concept import base_text
from tinyflow.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Three pictures of a user's own, with sidecar texts."""
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"a [V] fish, picture {n}\n")
    return tmp_path


@pytest.fixture
def bare(folder):
    """The same without texts."""
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


def load(folder, class_word="fish", **options):
    return load_concept(folder, class_word, 32, **options)


def refused(folder, message, class_word="fish", **options):
    with pytest.raises(InputError, match=message) as caught:
        load(folder, class_word, **options)
    assert "\n" not in str(caught.value)


def test_sidecar_texts_are_the_complete_ones_and_base_and_target_follow(folder):
    concept = load(folder)
    assert [(r.id, r.complete, r.base, r.target) for r in concept.references][1] == (
        "1.png", "a [V] fish, picture 1", "a fish, picture 1", "[V] fish")
    assert all(r.picture.shape == (32, 32, 3) and r.picture.dtype == np.uint8 for r in concept.references)
    assert concept.notes == ["3 pictures, texts from .txt"]
    (folder / "1.txt").write_text("[V] big fish at night")
    assert load(folder, "A").references[1].complete == "[V] big fish at night"       # a style, and a capital


def test_without_texts_there_is_the_class_word(bare):
    first = load(bare).references[0]
    assert (first.complete, first.base, first.target) == ("a [V] fish", "a fish", "[V] fish")
    refused(bare, "--class-word", class_word=None)


def test_metadata_jsonl_pairs_by_file_name_whatever_the_order(bare):
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"a [V] fish number {n}"}) for n in (2, 0, 1)]
    (bare / "metadata.jsonl").write_text("\n".join(lines))
    assert [r.complete[-1] + r.id[0] for r in load(bare).references] == ["00", "11", "22"]


def test_the_released_csv_is_read_with_its_own_base_and_target_and_loses_nothing_in_silence(bare):
    rows = ["image_path,prompt,target_prompt,base_prompt,instance_word,base_promt"]
    rows += [f"data/{n}.png,a [v] fish at night {n},[v] fish,a fish at night,fish,red" for n in (1, 0, 2)]
    (bare / "train.csv").write_text("\n".join(rows))
    concept = load(bare, None)
    assert concept.class_word == "fish" and "not used: 'column base_promt of train.csv'" in concept.notes[0]
    last = concept.references[2]
    assert (last.complete, last.base) == ("a [V] fish at night 2", "a fish at night")


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "L", "P", "1", "I;16", "LA"])
def test_unusual_modes_are_converted_with_one_line_that_says_so(folder, mode):
    picture = Image.new("RGB", (40, 40), (128, 128, 128))
    picture.paste((140, 140, 140), (0, 0, 8, 8))             # a picture of one colour is refused
    if mode == "I;16":
        wide = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        wide[0, 0] = 65535
        picture = Image.fromarray(wide)
    (folder / "1.png").unlink()
    name = "1.jpg" if mode == "CMYK" else "1.png"
    picture.convert(mode).save(folder / name)
    concept = load(folder)
    assert len(concept.notes) == 2 and concept.notes[1].startswith(f"{name}: converted from")
    if mode != "1":
        assert abs(int(concept.references[1].picture.mean()) - 128) <= 2


def test_transparency_lies_on_white_or_is_the_mask_if_that_is_asked_for(folder):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.save(folder / "1.png")
    refused(folder, "1.png: all of it is one colour")        # as are white drawings on nothing
    clear.paste((0, 0, 0, 255), (15, 15, 25, 25))
    for n in range(3):
        clear.save(folder / f"{n}.png")
    assert load(folder).references[1].picture[0, 0].min() == 255
    masks = [r.masks for r in load(folder, alpha_as_mask=True).references]
    assert all(mask[0, 16, 16] == 255 and mask[0, 0, 0] == 0 for mask in masks)
    Image.new("RGB", (48, 64), "red").save(folder / "1.png")
    refused(folder, "one colour|nothing in it is transparent", alpha_as_mask=True)


def test_exif_rotation_and_animation(folder):
    tall = Image.new("RGB", (60, 60), "red")
    tall.paste("blue", (30, 0, 60, 60))                          # red on the left: on top once it is turned
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(folder / "1.jpg", exif=exif)
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].putpixel((0, 0), (255, 255, 255))
    frames[0].save(folder / "2.gif", save_all=True, append_images=frames[1:])
    for n in (1, 2):
        (folder / f"{n}.png").unlink()
    concept = load(folder)
    notes, turned = concept.notes, concept.references[1].picture
    assert turned[2, :, 0].min() > 200 and turned[-2, :, 2].min() > 200
    assert notes[1] == "1.jpg: turned upright" and "2.gif: the first frame of an animation" in notes[2]


def test_what_a_user_supplied_is_used_or_named(folder):
    """Texts with nearly right names were passed over, and all pictures were then "a [V] fish"."""
    for old, new in (("0.txt", "0.TXT"), ("1.txt", "1.caption"), ("2.txt", "2.PNG.txt")):
        (folder / old).rename(folder / new)
    (folder / "5.heic").write_text("")
    (folder / "9.txt").write_text("a [V] fish")
    (folder / "old").mkdir()
    concept = load(folder)
    assert [r.complete for r in concept.references] == [f"a [V] fish, picture {n}" for n in range(3)]
    assert concept.notes == ["3 pictures, texts from .caption and .txt; not used: '9.txt', '5.heic', 'old/'"]
    (folder / "train.csv").write_text("image_path,prompt\n0.png,a [V] fish\n")
    refused(folder, "texts in 'train.csv' and in '0.TXT'")


def test_texts_of_no_picture_are_refused_and_a_folder_below_is_pointed_to(folder):
    for n in range(3):
        (folder / f"{n}.txt").rename(folder / f"picture {n}.txt")
    refused(folder, "picture 0.txt: a text of no picture")
    (folder / "photos").mkdir()
    for n in range(3):
        (folder / f"{n}.png").rename(folder / "photos" / f"{n}.png")
    refused(folder, "there are some in 'photos'")


@pytest.mark.parametrize("name", ["{}.MASK.PNG", "{}-masklabel.png", "{}_mask.png"])
def test_masks_are_known_by_the_names_that_other_programs_give_them(folder, name):
    """They became reference pictures, and after 200 steps [V] was a white rectangle."""
    for n in range(3):
        white = Image.new("L", (48, 64))
        white.paste(255, (10, 20, 38, 48))
        white.save(folder / name.format(n))
    concept = load(folder)
    assert len(concept.references) == 3 and all(r.masks is not None for r in concept.references)
    white.save(folder / "1.mask.png")
    refused(folder, "'1' has another mask")


def test_numbers_of_12_bits_are_no_dark_picture(folder):
    """They were read as 16 bits: nearly black."""
    Image.fromarray(np.linspace(0, 4000, 1600).reshape(40, 40).astype(np.uint16)).save(folder / "1.png")
    assert load(folder).references[1].picture.max() > 230


def test_random_squares_lie_inside_the_picture_and_every_other_one_is_mirrored():
    """Red on the left, blue on the right, brighter to the bottom: a square tells where it was cut."""
    wide = np.zeros((60, 90, 3), dtype=np.uint8)
    wide[:, :45, 0], wide[:, 45:, 2], wide[:, :, 1] = 200, 200, np.arange(60)[:, None] * 4
    rng, image = np.random.default_rng(0), Image.fromarray(wide)
    squares = np.stack([np.asarray(random_square(image, 30, rng)).astype(int) for _ in range(200)])
    mirrored = squares[:, :, 0, 0].mean(1) < squares[:, :, -1, 0].mean(1)
    assert 70 < mirrored.sum() < 130
    top, bottom = squares[:, 0, 15, 1] / 4, squares[:, -1, 15, 1] / 4    # in rows of the picture
    assert 44 < min(bottom - top) < 50 and 56 < max(bottom - top) < 60 and min(top) < 2 and max(top) > 8


@pytest.mark.parametrize("complete, base", [
    ("a [V] robot in the desert", "a robot in the desert"),
    ("a dog on a beach, in [V] style", "a dog on a beach"), ("a dog, in the style of [V]", "a dog"),
    ("a cat in [V] house", "a cat in house"), ("In [V] style, a cat", "a cat"),
    ("a robot called [V], in the desert", "a robot called, in the desert")])
def test_the_base_text_of_a_style_loses_the_whole_phrase(complete, base):
    """", in style" was once left behind: the text still asked for a style."""
    assert base_text(complete) == base
