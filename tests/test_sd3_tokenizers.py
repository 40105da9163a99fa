"""CLIP's and T5's tokenizers against transformers, id for id; placeholders and their slots; damaged files."""

import json
import random
import re
import shutil
import sys
import time
import unicodedata

import pytest
import torch

from tinyflow.errors import InputError
from tinyflow.sd3.tokenizers import ClipTokenizer, T5Tokenizer

tokenizers, transformers, _ = map(pytest.importorskip, ("tokenizers", "transformers", "diffusers"))

PADS = {"<|endoftext|>": 49407, "!": 0}                          # CLIP-L, CLIP-G
DOG = {"[V]": "dog"}
WORDS = re.split("[ \n]", """a an the of on in with photo painting dog Dog's teddy bear beach snow
sunset photorealistic 8k UHD 35mm f/1.8 [V] sks (masterpiece:1.2) it's we've I'll they'd DON'T you're
o'clock 'm 'S ''s 's's rock'n'roll wow! !! !!! ...,,, --- #tag @me e-mail a_b 3.14159 2024 ½ Ⅷ ² İstanbul
ISPARTA ı ΣΊΣΥΦΟΣ ΑΣ ß ẞ ﬁne ﬃ ǅ Ǆ Å Å é é Ω ſ K naïve São Zürich co\u00adop a\u200bb a\ufeffb
\u2066x\u2069 \u202eabc 日本語の犬 개 犬が浜辺に 안녕하세요 สวัสดี हिन्दी தமிழ் עִבְרִית السَّلَامُ
সুন্দর ქართული ႠႡ Ꭰꭰ ⴀ ᏸ Привет ՀԱՅ አማርኛ བོད 𝔘𝔫𝔦 𐐀𐐨 𞤀𞤢 👩‍👩‍👧‍👦 🏳️‍🌈 🐕‍🦺 👍🏽 🇺🇦 ❤️ ☃ 1️⃣
e\u0323\u0301\u0302 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞ <|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|ENDOFTEXT|>!!
!<|StartOfText|> <|endof text|> </w> \x00 \x1c \x1f \x7f \x9f \\ " ` ´ ’s ‘m “q” « ¡ ¿ ~~~ ^^ $9.99 €5
50% & < > = + * / | { }""")
SPACES = [" "] * 12 + ["", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\x1d", "\x85", "\xa0",
                       "\u1680", "\u2003", "\u2028", "\u3000", "\u180e"]


def character_pools() -> list[list[str]]:
    """Characters by kind. Marks and compositions are old ones: transformers composes by Unicode 9."""
    category, old = unicodedata.category, unicodedata.ucd_3_2_0.category
    characters = [chr(n) for n in range(0x110000) if category(chr(n)) not in ("Cn", "Cs")]
    composed = [c for c in characters if old(c) != "Cn" and unicodedata.decomposition(c)]
    ascii_ones = [chr(n) for n in range(128)]
    marks = [c for c in characters if category(c)[0] == "M" and old(c) != "Cn"]
    others = [c for c in characters if category(c)[0] != "M"]
    return [others, marks, composed, [unicodedata.normalize("NFD", c) for c in composed], ascii_ones]


def hostile_prompts(count: int, seed: int = 0) -> list[str]:
    rng, pools = random.Random(seed), character_pools()
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = ["", " ", "\n \t", "\x00", "dog " * 200, "!" * 1000, "é" * 3000, "<|endoftext|>" * 100,
               "".join(rng.choice(letters) for _ in range(5000))]
    while len(prompts) < count:
        if rng.random() < 0.6:
            count_words = rng.choice([1, 3, 8, 15, 60])
            prompts.append("".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(count_words)))
        else:
            prompts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 30))))
    return prompts


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from tests.public import write_clip_tokenizer
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder):
    return ClipTokenizer(clip_folder, pad=49407)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A small Unigram tokenizer.json, built as T5's is. Its settings to cut and to pad must not matter."""
    words = ["▁a", "▁the", "▁on", "▁and", "▁dog", "▁te", "dd", "y", "▁be", "ar", "▁beach", "▁photo", "graph",
             "ing", "s", "▁1", "▁"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -3.0) for word in words)]
    vocabulary += [(character, -6.0) for character in "abcdefghijklmnopqrstuvwxyz0123456789.,'![]é⁄"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()         # changes how many characters there are
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()])
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    folder = tmp_path_factory.mktemp("t5")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("pad, count", [("<|endoftext|>", 10_000), ("!", 2_000)])
def test_clip_is_transformers_id_for_id(clip_folder, pad, count):
    prompts = hostile_prompts(count)
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder, pad_token=pad)
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True,
                      return_tensors="pt").input_ids
    ids, slots, phrases = ClipTokenizer(clip_folder, PADS[pad])(prompts)
    wrong = [(prompts[n], ids[n].tolist(), expected[n].tolist())
             for n in (ids != expected).any(dim=1).nonzero().flatten()]
    assert not wrong, (len(wrong), wrong[0])
    assert ids.shape == (count, 77) and ids.dtype == torch.long and not slots.any() and not phrases.any()


def test_a_word_of_10_000_letters_takes_seconds_and_a_longer_one_is_an_error(clip, clip_folder):
    rng = random.Random(1)
    words = ["".join(rng.choice("aeiourstlngdhp") for _ in range(10_000)), "ha" * 5_000]
    start = time.monotonic()
    ids = clip(words).ids
    assert time.monotonic() - start < 20
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    assert torch.equal(ids, theirs(words, max_length=77, truncation=True, return_tensors="pt").input_ids)
    with pytest.raises(InputError, match="a word of 10001 letters"):
        clip(["x" * 10_001])


def test_a_folder_saved_by_a_newer_library_has_all_in_one_file(clip, clip_folder, tmp_path):
    """It lacks vocab.json and merges.txt, and once was refused for that."""
    transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    texts = ["a photorealistic dog's 3 hats!"]
    assert torch.equal(ClipTokenizer(tmp_path, 49407)(texts)[0], clip(texts)[0])
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(InputError, match="tokenizer.json: not CLIP's tokenizer"):
        ClipTokenizer(tmp_path, 49407)


def test_merges_without_a_version_line_are_read_alike(clip, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").partition("\n")[2]
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    texts = ["a photorealistic dog"]
    assert torch.equal(ClipTokenizer(tmp_path, 49407)(texts)[0], clip(texts)[0])


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "T5TokenizerFast"])
def test_t5_is_transformers_id_for_id(t5_folder, name):
    """T5TokenizerFast reads only pieces and scores, so it is compared on texts that need no normalizer."""
    settings = dict(extra_ids=0) if name == "T5TokenizerFast" else dict(eos_token="</s>", pad_token="<pad>")
    theirs = getattr(transformers, name).from_pretrained(t5_folder, **settings)
    prompts = ["", " ", "a dog on the beach", "a  teddy bear,\nphotographing!", "dog </s> dog", "x" * 900,
               "zebra 日本 dog " * 100]
    prompts += hostile_prompts(500) if name == "PreTrainedTokenizerFast" else []
    for length in (256, 12):
        expected = theirs(prompts, padding="max_length", max_length=length, truncation=True,
                          return_tensors="pt").input_ids
        ids, slots, phrases = T5Tokenizer(t5_folder, length)(prompts)
        assert torch.equal(ids, expected) and not slots.any() and not phrases.any()
        assert ids[0].tolist() == [1] + [0] * (length - 1) and ids[5, -1] == 1


def test_t5_without_its_package_says_what_to_install(t5_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers$"):
        T5Tokenizer(t5_folder)


@pytest.fixture(params=["clip", "t5"])
def both(request, clip, t5_folder):
    return clip if request.param == "clip" else T5Tokenizer(t5_folder)


PLACED = [                                       # the third has a "^" where each stand-in stops
    ("a [V] dog on a beach", DOG, "a dog^ dog on a beach"),
    ("[V]", {"[V]": "teddy bear"}, "teddy bear^"),
    ("the [V]'s ball, the [V]. ([V])!", DOG, "the dog^'s ball, the dog^. (dog^)!"),
    ("[V], a-[V]-b, [V] [V]", DOG, "dog^, a-dog^-b, dog^ dog^"),
    ("a hotdog, dogs, 1dog, dog's: a dog", {"dog": "dog"}, "a hotdog, dogs, 1dog, dog^'s: a dog^"),
    ("a [V]2, a [V]", {"[V]": "dog", "[V]2": "bear"}, "a bear^, a dog^"),
    ("teddy bears, a teddy bear", {"teddy": "dog", "teddy bear": "bear"}, "dog^ bears, a bear^"),
    ("[V] dog <x> Dog", {"[V]": "dog", "dog": "cat", "<x>": "é🐕"}, "dog^ cat^ é🐕^ Dog"),
    ("½ ﬁ [V] é", {"[V]": "ﬁne İt"}, "½ ﬁ ﬁne İt^ é"),
    ("\t [V]\n<|endoftext|> Ω\u0301 [V]", DOG, "\t dog^\n<|endoftext|> Ω\u0301 dog^"),
    ("a [V].", {"[V]": "bear c++"}, "a bear c++^."),
    ("a [V]~;`~ dog", {"[V]": "bear c+"}, "a bear c+^~;`~ dog")]


@pytest.mark.parametrize("text, stand_ins, marked", PLACED)
def test_a_placeholder_is_its_stand_in_and_its_slot_the_last_token_of_it(both, clip_folder, t5_folder, text,
                                                                         stand_ins, marked):
    """By the peers' offsets, a slot is the last token that holds the last character of the stand-in."""
    written = marked.replace("^", "")
    ids, slots, _ = both([text], stand_ins)
    assert torch.equal(ids, both([written])[0])
    if isinstance(both, ClipTokenizer):
        theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    else:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(t5_folder)
    offsets = list(enumerate(theirs(written, return_offsets_mapping=True).offset_mapping))
    stops = [match.start() - n for n, match in enumerate(re.finditer(r"\^", marked))]
    expected = [max(n for n, (start, end) in offsets if start < stop <= end) for stop in stops]
    assert slots[0].nonzero().flatten().tolist() == expected


def test_slots_by_hand(clip):
    slots = clip(["a [V] dog on a beach", "dog", "a [V]'s [V]"], DOG).slots
    assert [row.nonzero().flatten().tolist() for row in slots] == [[2], [], [2, 4]]
    ids, slots, _ = clip(["a [V]"], {"[V]": "photorealisticest teddybearish"})
    assert slots.sum() == 1 and ids[0, slots[0].nonzero().item() + 1] == clip.end


@pytest.mark.parametrize("text", [
    "a[V]dog", "a [V]dog", "é[V]", "e\u0301[V]", "1[V]", "[V][V]", "a [V] and x[V]"])
def test_a_glued_placeholder_is_an_error(both, text):
    with pytest.raises(InputError, match=r"'\[V\]' is glued.* as a word of its own$"):
        both([text], DOG)


def test_a_placeholder_that_is_cut_off_is_an_error(both, t5_folder):
    tokenizer, room = both, 74                   # CLIP has a start token
    if isinstance(both, T5Tokenizer):
        tokenizer, room = T5Tokenizer(t5_folder, 77), 75
    slots = tokenizer(["a " * room + "[V] dog"], DOG).slots
    assert slots.nonzero().tolist() == [[0, 75]]
    message = r"'\[V\]' in 'a a .{30,60} \.\.\. .*' is token 77, .* cut to 77"
    with pytest.raises(InputError, match=message) as error:
        tokenizer(["a " * (room + 1) + "[V]"], DOG)
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_a_text_that_is_cut_is_said_once(clip, capsys):
    """Captions of more than 77 tokens were cut without a word."""
    for _ in range(2):
        clip(["a dog " * 50])
    assert capsys.readouterr().err.count("longer than 77 tokens, and cut there") == 1


def test_half_a_character_is_an_error(both):
    with pytest.raises(InputError, match="lone surrogate"):
        both(["a \udcff dog"])


def damage(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name, content, message", [
    ("vocab.json", None, "no vocab.json .* download it too"),
    ("merges.txt", None, "no merges.txt .* download it too"),
    ("vocab.json", b'{"!": 0, "', "vocab.json: not a readable JSON"),
    ("vocab.json", b"[1, 2]", "do not fit each other"),
    ("vocab.json", b"\xff\xfe", "not a text in UTF-8"),
    ("merges.txt", b"#version: 0.2\ni n\nt h\n", "do not fit each other"),
    ("merges.txt", b"\x80", "not a text in UTF-8")])
def test_damaged_clip_files_are_one_line(clip_folder, tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        ClipTokenizer(damage(clip_folder, tmp_path, name, content), 49407)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (None, "no tokenizer.json .* download it too"), (b'{"version": "1.0"', "not a readable tokenizer"),
    (b"\xff", "not a text in UTF-8"),
    (json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).encode(), "not T5's tokenizer")])
def test_a_damaged_t5_file_is_one_line(t5_folder, tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        T5Tokenizer(damage(t5_folder, tmp_path, "tokenizer.json", content))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
