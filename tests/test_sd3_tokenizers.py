"""CLIP's and T5's tokenizers against transformers: ids, and the slots and phrases of [V]; damaged files."""

import random
import re
import shutil
import sys
import unicodedata
from functools import cache

import pytest
import torch

from tinyflow.errors import InputError
from tinyflow.phrase import write_stand_ins
from tinyflow.sd3.tokenizers import ClipTokenizer, T5Tokenizer

tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))

PADS = {"CLIP-L": (49407, "<|endoftext|>"), "CLIP-G": (0, "!")}
DOG, ROBOT, TWO = {"[V]": "dog"}, {"[V]": "robot"}, {"[V1]": "dog", "[V2]": "bear"}
CONTROLS = re.compile("[\x1c-\x1f]")             # white space for Python, signs for CLIP
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


@cache
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
def clip_folder(sd3):
    return sd3[0] / "tokenizer"


@pytest.fixture(scope="session")
def t5_folder(sd3):
    return sd3[0] / "tokenizer_3"


@pytest.fixture(scope="session")
def newer_t5(t5_folder, tmp_path_factory):
    """T5 as newer libraries write it: a token holds the space before its word."""
    tokenizer = tokenizers.Tokenizer.from_file(str(t5_folder / "tokenizer.json"))
    parts, spaces, folder = tokenizers.normalizers, tokenizers.Regex(" {2,}"), tmp_path_factory.mktemp("t5")
    tokenizer.normalizer = parts.Sequence([parts.NFKC(), parts.Strip(left=False), parts.Replace(spaces, "▁")])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session", params=["CLIP-L", "CLIP-G", "T5", "newer T5"])
def both(request, clip_folder, t5_folder, newer_t5):
    """One of the three tokenizers, ours and theirs; T5 in both forms in which it is written."""
    if request.param.endswith("T5"):
        folder = t5_folder if request.param == "T5" else newer_t5
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<pad>")
        return T5Tokenizer(folder), theirs
    pad, token = PADS[request.param]
    theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder, pad_token=token)
    return ClipTokenizer(clip_folder, pad), theirs


def their_ids(theirs, texts: list[str], length: int) -> torch.Tensor:
    return theirs(texts, padding="max_length", max_length=length, truncation=True,
                  return_tensors="pt").input_ids


def test_ids_are_those_of_transformers(both):
    ours, theirs = both
    prompts = hostile_prompts(10_000 if ours.pad == 49407 else 1_500)
    ids, slots, phrases = ours(prompts)
    expected = their_ids(theirs, prompts, ours.length)
    wrong = [(prompts[n], ids[n].tolist(), expected[n].tolist())
             for n in (ids != expected).any(dim=1).nonzero().flatten()]
    assert not wrong, (len(wrong), wrong[0])
    assert ids.shape == (len(prompts), ours.length) and not slots.any() and not phrases.any()


def test_other_forms_of_clips_files_are_read_alike(clip_folder, tmp_path):
    """Merges without a version line; and the one file that newer libraries save, once refused."""
    texts, split, whole = ["a photorealistic dog's 3 hats!"], tmp_path / "split", tmp_path / "whole"
    shutil.copytree(clip_folder, split)
    merges = (split / "merges.txt").read_text(encoding="utf-8").partition("\n")[2]
    (split / "merges.txt").write_text(merges, encoding="utf-8")
    transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(whole)
    for name in ("vocab.json", "merges.txt"):
        (whole / name).unlink(missing_ok=True)
    usual = ClipTokenizer(clip_folder, 49407)(texts).ids
    assert all(torch.equal(ClipTokenizer(folder, 49407)(texts).ids, usual) for folder in (split, whole))


def test_t5_without_its_package_says_what_to_install(t5_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers$"):
        T5Tokenizer(t5_folder)


# ------------------------------------------------------------------------------------------ slots and phrases
def their_phrases(theirs, text: str, spans: list[tuple[int, int, int]], length: int) -> list[int]:
    """n at each token with a character of the n-th phrase, else 0. A space goes with the word behind it."""
    phrases = [0] * length
    offsets = theirs(text, truncation=True, max_length=length, return_offsets_mapping=True).offset_mapping
    for n, start, stop in spans:
        for place, (first, last) in reversed(list(enumerate(offsets))):
            a_space = first < last and not text[first:last].strip()
            if phrases[place + 1] == n if a_space else text[max(start, first):min(stop, last)].strip():
                phrases[place] = n
    return phrases


def their_slots(theirs, text: str, stops: list[int]) -> list[int]:
    """The last token that holds the last character of each stand-in."""
    offsets = list(enumerate(theirs(text, return_offsets_mapping=True).offset_mapping))
    return [max(n for n, (start, end) in offsets if start < stop <= end) for stop in stops]


def read_marks(marked: str) -> tuple[str, list[tuple[int, int, int]], list[int]]:
    """A written text without its marks, the phrases that these mark, and where stand-ins stop:
    "‹1the first^ phrase› ‹2the second^›".
    """
    text, spans, stops = "", [], []
    for part in re.split("(‹[123]|\\^|›)", marked):
        if part.startswith("‹"):
            spans.append((int(part[1]), len(text), -1))
        elif part == "›":
            spans[-1] = (*spans[-1][:2], len(text))
        elif part == "^":
            stops.append(len(text))
        else:
            text += part
    return text, spans, stops


LONG = "the beach " * 200
MARKED = [                                       # text, stand-ins, and the written text with its marks
    ("[V]", {"[V]": "teddy bear"}, "‹1teddy bear^›"),
    ("a [V] toy on snow and a dog", {"[V]": "salt and pepper mill"},
     "a ‹1salt and pepper mill^ toy on snow› and a dog"),
    ("the [V]'s ball, a dog's", DOG, "the ‹1dog^'s ball›, a dog's"),
    ("the [V] sits. A dog; a [V]; ([V])!", DOG, "the ‹1dog^ sits›. A dog; a ‹1dog^›; (‹1dog^)!›"),
    ("[V], a-[V]-b, [V] [V]", DOG, "‹1dog^›, a-‹1dog^-b›, ‹1dog^ ›‹1dog^›"),
    ("a big {[V]} robot on snow", ROBOT, "a big ‹1robot^› robot on snow"),
    ("snow, {a big red [V], and a hat, }a dog", DOG, "snow, ‹1a big red dog^, and a hat, ›a dog"),
    ("{ a [V] } dog { [V] dog}", DOG, "‹1 a dog^ › dog ‹1 dog^ dog›"),
    ("a [V1] dog and a [V2] bear, a dog", TWO, "a ‹1dog^ dog› and a ‹2bear^ bear›, a dog"),
    ("{a [V1] dog} on {a [V2] bear} and snow", TWO, "‹1a dog^ dog› on ‹2a bear^ bear› and snow"),
    ("a hotdog, dogs, 1dog, dog's: a dog", {"dog": "dog"}, "a hotdog, dogs, 1dog, ‹1dog^'s: a ›‹1dog^›"),
    ("a [V]2, a [V]", {"[V]": "dog", "[V]2": "bear"}, "a ‹2bear^›, a ‹1dog^›"),
    ("teddy bears, a teddy bear", {"teddy": "dog", "teddy bear": "bear"}, "‹1dog^ bears›, a ‹2bear^›"),
    ("[V] dog <x> Dog", {"[V]": "dog", "dog": "cat", "<x>": "é🐕"}, "‹1dog^ ›‹2cat^ ›‹3é🐕^ Dog›"),
    ("½ ﬁne é \u2003 a [V] café Ω\u0301 e\u0323\u0301 on\n the beach, é", DOG,
     "½ ﬁne é \u2003 a ‹1dog^ café Ω\u0301 e\u0323\u0301 on\n the beach›, é"),
    ("日本語 {の [V] 犬} が 浜辺に", DOG, "日本語 ‹1の dog^ 犬› が 浜辺に"),
    ("👩‍👩‍👧‍👦 İs [V] 🐕‍🦺 ❤️; 👍🏽", {"[V]": "é🐕 dog"}, "👩‍👩‍👧‍👦 İs ‹1é🐕 dog^ 🐕‍🦺 ❤️›; 👍🏽"),
    ("wow!! !!! a [V] dog!! now!, wow!", DOG, "wow!! !!! a ‹1dog^ dog!! now!›, wow!"),
    ("\t <|endoftext|> [V] a\n<|endoftext|>, </s>", DOG, "\t <|endoftext|> ‹1dog^ a\n<|endoftext|>›, </s>"),
    ("a [V].", {"[V]": "bear c++"}, "a ‹1bear c++^›."),
    ("a [V]~;`~ dog", {"[V]": "bear c+"}, "a ‹1bear c+^~›;`~ dog"),
    (f"a [V] dog on {LONG}", DOG, f"a ‹1dog^ dog on {LONG}›"),           # cut inside its phrase
    (f"{{a [V] dog on {LONG}}} and a dog", DOG, f"‹1a dog^ dog on {LONG}› and a dog")]
STYLES = [                                       # in these, [V] and [V2] are styles
    ("a cat, in [V] style", {"[V]": "a"}, "‹1a cat, in a^ style›"),
    (f"in [V] style, {LONG}", {"[V]": "a"}, f"‹1in a^ style, {LONG}›"),  # its end token is in no phrase
    ("a [V1] dog on a beach, in [V2] style", {"[V1]": "dog", "[V2]": "a"},
     "‹2a ›‹1dog^ dog on a beach›‹2, in a^ style›"),
    ("snow in [V2] style and {the [V1] dog} at night", {"[V1]": "dog", "[V2]": "a"},
     "‹2snow in a^ style and ›‹1the dog^ dog›‹2 at night›"),
    ("a dog {in [V] style} on a beach", {"[V]": "a"}, "a dog ‹1in a^ style› on a beach")]


@pytest.mark.parametrize("text, stand_ins, marked", [*MARKED, *STYLES])
def test_slots_and_phrases_are_the_tokens_that_transformers_offsets_say(both, text, stand_ins, marked):
    """A token belongs to a phrase if it holds one of its characters. Ids are those of the written text."""
    ours, theirs = both
    styles = ("[V]", "[V2]") if (text, stand_ins, marked) in STYLES else ()
    written, spans, stops = read_marks(marked)
    ids, slots, phrases = ours([text], stand_ins, styles)
    assert torch.equal(ids, their_ids(theirs, [written], ours.length))
    assert slots[0].nonzero().flatten().tolist() == their_slots(theirs, written, stops)
    assert phrases[0].tolist() == their_phrases(theirs, written, spans, ours.length)
    assert (phrases[slots > 0] == slots[slots > 0]).all()


def surrounded(count: int, seed: int) -> list[str]:
    """Hostile prompts on both sides of [V], with braces at the ends of words in every third."""
    rng, texts = random.Random(seed), []
    prompts = [CONTROLS.sub("", re.sub(r"[{}]|\[V\]", "", prompt))
               for prompt in hostile_prompts(2 * count + 9, seed)[9:]]
    for n, (before, after) in enumerate(zip(prompts[::2], prompts[1::2])):
        words, more = before.split(" "), after.split(" ")
        if n % 3 == 0:
            words.insert(rng.randrange(len(words) + 1), "{")
            more.insert(rng.randrange(len(more) + 1), "}")
        texts.append(" ".join([*words, "[V]", *more]))
    return texts


def test_phrases_among_hostile_words_have_the_tokens_of_transformers_offsets(both):
    """CLIP's positions are found by counting bytes, which case, accents and compositions must not upset."""
    ours, theirs = both
    texts, found, stand_ins = surrounded(600, seed=3), 0, {"[V]": "salt and pepper mill"}
    for n, text in enumerate(texts):
        styles = ("[V]",) if n % 5 == 0 else ()
        written = write_stand_ins(text, stand_ins, styles)
        try:
            ids, _, phrases = ours([text], stand_ins, styles)
        except InputError as error:
            assert "is token" in str(error)      # it stands where the text is cut
            continue
        found += 1
        assert phrases[0].tolist() == their_phrases(theirs, written.text, written.phrases, ours.length), text
        assert torch.equal(ids, their_ids(theirs, [written.text], ours.length)), text
    assert found > 400


# ------------------------------------------------------------------------------------------- what is no text
def test_a_placeholder_that_is_cut_off_is_an_error(clip_folder, t5_folder):
    for tokenizer, room in ((ClipTokenizer(clip_folder, 49407), 74), (T5Tokenizer(t5_folder, 77), 75)):
        slots = tokenizer(["a " * room + "[V] dog"], DOG).slots  # CLIP has a start token, too
        assert slots.nonzero().tolist() == [[0, 75]]
        message = r"'\[V\]' in 'a a .{30,60} \.\.\. .*' is token 77, .* cut to 77"
        with pytest.raises(InputError, match=message) as error:
            tokenizer(["a " * (room + 1) + "[V]"], DOG)
        assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_a_text_that_is_cut_is_said_once(clip_folder, capsys):
    """Captions of more than 77 tokens were cut without a word."""
    tokenizer = ClipTokenizer(clip_folder, 49407)
    for _ in range(2):
        tokenizer(["a dog " * 50])
    assert capsys.readouterr().err.count("longer than 77 tokens, and cut there") == 1


def test_half_a_character_is_an_error(both):
    with pytest.raises(InputError, match="lone surrogate"):
        both[0](["a \udcff dog"])


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
