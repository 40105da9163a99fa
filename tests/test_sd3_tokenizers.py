"""CLIP's and T5's tokenizers against transformers, id for id; placeholders and their slots; damaged files."""

import random
import re
import shutil
import sys
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


def test_other_forms_of_clips_files_are_read_alike(clip, clip_folder, tmp_path):
    """Merges without a version line; and the one file that newer libraries save, once refused."""
    texts, split, whole = ["a photorealistic dog's 3 hats!"], tmp_path / "split", tmp_path / "whole"
    shutil.copytree(clip_folder, split)
    merges = (split / "merges.txt").read_text(encoding="utf-8").partition("\n")[2]
    (split / "merges.txt").write_text(merges, encoding="utf-8")
    transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(whole)
    for name in ("vocab.json", "merges.txt"):
        (whole / name).unlink(missing_ok=True)
    for folder in (split, whole):
        assert torch.equal(ClipTokenizer(folder, 49407)(texts).ids, clip(texts).ids)
    (whole / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(InputError, match="tokenizer.json: not a readable tokenizer"):
        ClipTokenizer(whole, 49407)


def test_t5_is_transformers_id_for_id(t5_folder):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(t5_folder, pad_token="<pad>")
    prompts = ["", " ", "a dog on the beach", "a  teddy bear,\nphotographing!", "dog </s> dog", "x" * 900,
               "zebra 日本 dog " * 100, *hostile_prompts(500)]
    for length in (256, 12):
        expected = theirs(prompts, padding="max_length", max_length=length, truncation=True,
                          return_tensors="pt").input_ids
        ids, slots, phrases = T5Tokenizer(t5_folder, length)(prompts)
        assert torch.equal(ids, expected) and not slots.any() and not phrases.any()


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
    ("vocab.json", None, "vocab.json: there is no such file"),
    ("merges.txt", None, "merges.txt: there is no such file"),
    ("vocab.json", b'{"!": 0, "', "vocab.json: damaged; download it again"),
    ("vocab.json", b'{"!": "0"}', "do not fit each other"),
    ("merges.txt", b"#version: 0.2\ni n\nt h\n", "do not fit each other"),
    ("merges.txt", b"\x80", "not a text in UTF-8"),
    ("tokenizer.json", None, "tokenizer.json: there is no such file"),
    ("tokenizer.json", b'{"version": "1.0"', "not a readable tokenizer"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "not T5's tokenizer")])
def test_damaged_files_are_one_line(clip_folder, t5_folder, tmp_path, name, content, message):
    of_t5 = name == "tokenizer.json"
    shutil.copytree(t5_folder if of_t5 else clip_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        T5Tokenizer(tmp_path) if of_t5 else ClipTokenizer(tmp_path, 49407)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
