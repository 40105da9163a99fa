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


def without_texts(folder):
    for file in folder.glob("*.txt"):
        file.unlink()


def refused(folder, message, class_word="fish"):
    with pytest.raises(InputError, match=message) as caught:
        load_concept(folder, class_word, 32)
    assert "\n" not in str(caught.value)


def test_sidecar_texts_are_the_complete_ones_and_base_and_target_follow(folder):
    concept = load_concept(folder, "fish", 32)
    assert [(r.id, r.complete, r.base, r.target) for r in concept.references][1] == (
        "1.png", "a [V] fish, picture 1", "a fish, picture 1", "[V] fish")
    assert all(r.picture.shape == (32, 32, 3) and r.picture.dtype == np.uint8 for r in concept.references)
    assert concept.notes == ["3 pictures, texts from .txt"]
    without_texts(folder)
    first = load_concept(folder, "fish", 32).references[0]
    assert (first.complete, first.base, first.target) == ("a [V] fish", "a fish", "[V] fish")


def test_metadata_jsonl_pairs_by_file_name_whatever_the_order(folder):
    without_texts(folder)
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"a [V] fish number {n}"}) for n in (2, 0, 1)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    references = load_concept(folder, "fish", 32).references
    assert [r.complete[-1] + r.id[0] for r in references] == ["00", "11", "22"]


def test_the_released_csv_is_read_with_its_own_base_and_target(folder):
    without_texts(folder)
    rows = ["image_path,prompt,target_prompt,base_prompt,instance_word"]
    rows += [f"data/{n}.png,a [v] fish at night {n},[v] fish,a fish at night,fish" for n in (1, 0, 2)]
    (folder / "train.csv").write_text("\n".join(rows))
    concept = load_concept(folder, None, 32)
    assert concept.class_word == "fish"
    last = concept.references[2]
    assert (last.complete, last.base) == ("a [V] fish at night 2", "a fish at night")


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "L", "P", "1", "I;16", "LA"])
def test_unusual_modes_are_converted_with_one_line_that_says_so(folder, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((40, 40), 32896, np.uint16) + np.arange(40, dtype=np.uint16))
        picture.putpixel((0, 0), 65535)
    else:
        picture = Image.new("RGB", (40, 40), (128, 128, 128))
        picture.paste((140, 140, 140), (0, 0, 8, 8))         # a picture of one colour is refused
        picture = picture.convert(mode)
    name = "1.jpg" if mode == "CMYK" else "1.png"
    (folder / "1.png").unlink()
    picture.save(folder / name)
    if mode == "1":
        picture.putpixel((20, 20), 255)
    picture.save(folder / name)
    concept = load_concept(folder, "fish", 32)
    assert len(concept.notes) == 2 and concept.notes[1].startswith(f"{name}: converted from")
    if mode != "1":
        assert abs(int(concept.references[1].picture.mean()) - 128) <= 2


def test_transparency_lies_on_white(folder):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.save(folder / "1.png")
    refused(folder, "1.png: all of it is one colour")        # as are white drawings on nothing
    clear.paste((0, 0, 0, 255), (18, 18, 22, 22))
    clear.save(folder / "1.png")
    assert load_concept(folder, "fish", 32).references[1].picture[0, 0].min() == 255


def test_exif_rotation_and_animation(folder):
    tall = Image.new("RGB", (60, 60), "red")
    tall.paste("blue", (30, 0, 60, 60))                          # red on the left: on top once it is turned
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(folder / "1.jpg", exif=exif)
    (folder / "1.png").unlink()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].putpixel((0, 0), (255, 255, 255))
    frames[0].save(folder / "2.gif", save_all=True, append_images=frames[1:])
    (folder / "2.png").unlink()
    concept = load_concept(folder, "fish", 32)
    notes, turned = concept.notes, concept.references[1].picture
    assert turned[2, :, 0].min() > 200 and turned[-2, :, 2].min() > 200
    assert notes[1] == "1.jpg: turned upright" and "2.gif: the first frame of an animation" in notes[2]


@pytest.mark.parametrize("file, text, message", [
    ("1.txt", "a fish at night", r"1.png: the complete text 'a fish at night' has no \[V\].*before"),
    ("1.caption", "a [V] fish", "'1.png' has a text in another file already"),
    ("metadata.jsonl", '{"file_name": "9.png", "text": "a [V] fish"}', "the captions name '9.png'"),
    ("metadata.jsonl", '{"file_name": "1.png", "text": "a [V] fish"}', "0.png: this picture has no text"),
    ("metadata.jsonl", '{"file_name": "1.png"}\nnot json', "metadata.jsonl, line 1"),
    ("train.csv", "image_path;prompt\n0.png;a [V] fish\n", "needs the columns"),
    ("train.csv", "image_path,prompt\n0.png,a [V] fish,red\n", "train.csv, line 2: more fields"),
    ("train.csv", "image_path,prompt,base_prompt\n0.png,a [V] fish,a [v] fish\n", r"base text.*has \[V\]"),
    ("train.csv", "", "there is no text in it"),
])
def test_texts_that_cannot_be_used(folder, file, text, message):
    if file in ("metadata.jsonl", "train.csv"):
        without_texts(folder)
    (folder / file).write_text(text)
    refused(folder, message)


def test_what_a_user_supplied_is_used_or_named(folder):
    """Texts with nearly right names were passed over, and all pictures were then "a [V] fish"."""
    (folder / "0.txt").rename(folder / "0.TXT")
    (folder / "1.txt").rename(folder / "1.caption")
    (folder / "2.txt").rename(folder / "2.PNG.txt")
    (folder / "5.heic").write_text("")
    (folder / "9.txt").write_text("a [V] fish")
    (folder / "old").mkdir()
    concept = load_concept(folder, "fish", 32)
    assert [r.complete for r in concept.references] == [f"a [V] fish, picture {n}" for n in range(3)]
    assert concept.notes == ["3 pictures, texts from .caption and .txt; not used: '9.txt', '5.heic', 'old/'"]
    (folder / "train.csv").write_text("image_path,prompt\n0.png,a [V] fish\n")
    refused(folder, "texts in 'train.csv' and in '0.TXT'")


@pytest.mark.parametrize("name", ["{}.MASK.PNG", "{}-masklabel.png", "{}_mask.png"])
def test_masks_are_known_by_the_names_that_other_programs_give_them(folder, name):
    """They became reference pictures, and after 200 steps [V] was a white rectangle."""
    for n in range(3):
        white = Image.new("L", (48, 64))
        white.paste(255, (10, 20, 38, 48))
        white.save(folder / name.format(n))
    concept = load_concept(folder, "fish", 32)
    assert len(concept.references) == 3 and all(r.masks is not None for r in concept.references)
    white.save(folder / "1.mask.png")
    refused(folder, "'1' has another mask")


def test_texts_of_no_picture_are_refused(folder):
    for n in range(3):
        (folder / f"{n}.txt").rename(folder / f"picture {n}.txt")
    refused(folder, "picture 0.txt: a text of no picture")


def test_a_csv_loses_nothing_in_silence(folder):
    without_texts(folder)
    lines = [f"{n}.png,a [V] fish,red" for n in range(3)]
    (folder / "train.csv").write_text("\n".join(["image_path,prompt,base_promt", *lines]))
    assert "not used: 'column base_promt of train.csv'" in load_concept(folder, "fish", 32).notes[0]


def test_a_picture_in_a_folder_below_is_pointed_to(folder, tmp_path):
    below = tmp_path / "all" / "photos"
    below.mkdir(parents=True)
    (folder / "0.png").rename(below / "0.png")
    refused(tmp_path / "all", "there are some in 'photos'")


def test_numbers_of_12_bits_are_no_dark_picture(folder):
    """They were read as 16 bits: nearly black."""
    Image.fromarray(np.linspace(0, 4000, 1600).reshape(40, 40).astype(np.uint16)).save(folder / "1.png")
    assert load_concept(folder, "fish", 32).references[1].picture.max() > 230


def test_what_is_opaque_is_the_mask_if_that_is_asked_for(folder):
    for n in range(3):
        picture = Image.open(folder / f"{n}.png")
        alpha = Image.new("L", picture.size)
        alpha.paste(255, (10, 20, 34, 44))
        picture.putalpha(alpha)
        picture.save(folder / f"{n}.png")
    masks = [r.masks for r in load_concept(folder, "fish", 48, alpha_as_mask=True).references]
    assert all(mask[0, 24, 24] == 255 and mask[0, 0, 0] == 0 for mask in masks)
    Image.new("RGB", (48, 64), "red").save(folder / "1.png")
    with pytest.raises(InputError, match="one colour|nothing in it is transparent"):
        load_concept(folder, "fish", 48, alpha_as_mask=True)


def test_a_class_word_is_needed_and_a_style_may_be_written_with_a_capital(folder):
    (folder / "1.txt").write_text("[V] big fish at night")
    assert load_concept(folder, "A", 32).references[1].complete == "[V] big fish at night"
    refused(folder, "--class-word", class_word=None)


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
    ("a dog on a beach, in [V] style", "a dog on a beach"),
    ("a dog, in the style of [V]", "a dog"),
    ("a cat in [V] house", "a cat in house"),
    ("In [V] style, a cat", "a cat"),
    ("a robot called [V], in the desert", "a robot called, in the desert"),
])
def test_the_base_text_of_a_style_loses_the_whole_phrase(complete, base):
    """", in style" was once left behind: the text still asked for a style."""
    assert base_text(complete) == base
