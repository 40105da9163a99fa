"""Which tokens of CLIP-L, CLIP-G and T5 belong to the phrase of [V], by the offsets of transformers."""

import random
import re

import pytest
import torch

from tests.test_sd3_tokenizers import PADS, clip_folder, hostile_prompts, t5_folder  # noqa: F401 (fixtures)
from tinyflow.errors import InputError
from tinyflow.phrase import write_stand_ins
from tinyflow.sd3.tokenizers import ClipTokenizer, T5Tokenizer

tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))

DOG, ROBOT = {"[V]": "dog"}, {"[V]": "robot"}
TWO = {"[V1]": "dog", "[V2]": "bear"}
CONTROLS = re.compile("[\x1c-\x1f]")             # white space for Python, signs for CLIP


@pytest.fixture(scope="session")
def t5_metaspace(t5_folder, tmp_path_factory):  # noqa: F811
    """T5 as newer libraries write it: a token holds the space before its word."""
    tokenizer = tokenizers.Tokenizer.from_file(str(t5_folder / "tokenizer.json"))
    parts, spaces, folder = tokenizers.normalizers, tokenizers.Regex(" {2,}"), tmp_path_factory.mktemp("t5")
    tokenizer.normalizer = parts.Sequence([parts.NFKC(), parts.Strip(left=False), parts.Replace(spaces, "▁")])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session", params=["CLIP-L", "CLIP-G", "T5", "newer T5"])
def both(request, clip_folder, t5_folder, t5_metaspace):  # noqa: F811
    """One of the three tokenizers, ours and theirs; T5 in both forms in which it is written."""
    if request.param.endswith("T5"):
        folder = t5_folder if request.param == "T5" else t5_metaspace
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<pad>")
        return T5Tokenizer(folder), theirs
    pad = {"CLIP-L": "<|endoftext|>", "CLIP-G": "!"}[request.param]
    return (ClipTokenizer(clip_folder, PADS[pad]),
            transformers.CLIPTokenizer.from_pretrained(clip_folder, pad_token=pad))


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


def their_ids(theirs, texts: list[str], length: int) -> torch.Tensor:
    return theirs(texts, padding="max_length", max_length=length, truncation=True,
                  return_tensors="pt").input_ids


def read_marks(marked: str) -> tuple[str, list[tuple[int, int, int]]]:
    """A written text without its marks, and what these mark: "‹1the first phrase› ‹2the second›"."""
    text, spans = "", []
    for part in re.split("(‹[12][^›]*›)", marked):
        if part.startswith("‹"):
            spans.append((int(part[1]), len(text), len(text) + len(part) - 3))
            part = part[2:-1]
        text += part
    return text, spans


# ------------------------------------------------------------------------------------------- marked by hand
LONG = "the beach " * 200
MARKED = [                                       # text, stand-ins, and the written text with its phrases
    ("a [V] dog on a beach", DOG, "a ‹1dog dog on a beach›"),
    ("a [V] robot on the left and a small one", ROBOT, "a ‹1robot robot on the left› and a small one"),
    ("[V]", {"[V]": "teddy bear"}, "‹1teddy bear›"),
    ("the big [V] bear and a bear", {"[V]": "teddy bear"}, "the big ‹1teddy bear bear› and a bear"),
    ("a [V] toy on snow and a dog", {"[V]": "salt and pepper mill"},
     "a ‹1salt and pepper mill toy on snow› and a dog"),
    ("the [V]'s ball, a dog's", DOG, "the ‹1dog's ball›, a dog's"),
    ("the [V] sits. A dog; a [V]; ([V])!", DOG, "the ‹1dog sits›. A dog; a ‹1dog›; (‹1dog)!›"),
    ("a [V] robot with blue checks, a hat and one eye on the left and a robot", ROBOT,
     "a ‹1robot robot with blue checks, a hat and one eye on the left› and a robot"),
    ("{a [V] robot on the left} and a robot", ROBOT, "‹1a robot robot on the left› and a robot"),
    ("a big {[V]} robot on snow", ROBOT, "a big ‹1robot› robot on snow"),
    ("snow, {a big red [V], and a hat, }a dog", DOG, "snow, ‹1a big red dog, and a hat, ›a dog"),
    ("{ a [V] } dog { [V] dog}", DOG, "‹1 a dog › dog ‹1 dog dog›"),
    ("a [V1] dog and a [V2] bear, a dog", TWO, "a ‹1dog dog› and a ‹2bear bear›, a dog"),
    ("a [V2] bear [V1] dog beside a bear", TWO, "a ‹2bear bear ›‹1dog dog› beside a bear"),
    ("{a [V1] dog} on {a [V2] bear} and snow", TWO, "‹1a dog dog› on ‹2a bear bear› and snow"),
    ("½ ﬁne é \u2003 a [V] café Ω\u0301 e\u0323\u0301 on\n the beach, é", DOG,
     "½ ﬁne é \u2003 a ‹1dog café Ω\u0301 e\u0323\u0301 on\n the beach›, é"),
    ("日本語 {の [V] 犬} が 浜辺に", DOG, "日本語 ‹1の dog 犬› が 浜辺に"),
    ("👩‍👩‍👧‍👦 İs [V] 🐕‍🦺 ❤️; 👍🏽", {"[V]": "é🐕 dog"}, "👩‍👩‍👧‍👦 İs ‹1é🐕 dog 🐕‍🦺 ❤️›; 👍🏽"),
    ("wow!! !!! a [V] dog!! now!, wow!", DOG, "wow!! !!! a ‹1dog dog!! now!›, wow!"),
    ("<|endoftext|> [V] a <|endoftext|>, </s>", DOG, "<|endoftext|> ‹1dog a <|endoftext|>›, </s>"),
    (f"a [V] dog on {LONG}", DOG, f"a ‹1dog dog on {LONG}›"),            # cut inside its phrase
    (f"{{a [V] dog on {LONG}}} and a dog", DOG, f"‹1a dog dog on {LONG}› and a dog")]
STYLES = [                                       # in these, [V] and [V2] are styles
    ("a cat, in [V] style", {"[V]": "a"}, "‹1a cat, in a style›"),
    ("a [V1] dog on a beach, in [V2] style", {"[V1]": "dog", "[V2]": "a"},
     "‹2a ›‹1dog dog on a beach›‹2, in a style›"),
    ("snow in [V2] style and {the [V1] dog} at night", {"[V1]": "dog", "[V2]": "a"},
     "‹2snow in a style and ›‹1the dog dog›‹2 at night›"),
    ("a dog {in [V] style} on a beach", {"[V]": "a"}, "a dog ‹1in a style› on a beach")]


@pytest.mark.parametrize("text, stand_ins, marked", [*MARKED, *STYLES])
def test_the_tokens_of_a_phrase_are_those_that_transformers_offsets_say(both, text, stand_ins, marked):
    """A token belongs to a phrase if it holds one of its characters. Ids are those of the written text."""
    ours, theirs = both
    styles = ("[V]", "[V2]") if (text, stand_ins, marked) in STYLES else ()
    written, spans = read_marks(marked)
    ids, slots, phrases = ours([text], stand_ins, styles)
    assert torch.equal(ids, their_ids(theirs, [written], ours.length))
    assert phrases[0].tolist() == their_phrases(theirs, written, spans, ours.length)
    assert phrases.dtype == torch.long and (phrases[slots > 0] == slots[slots > 0]).all()
    assert slots[0].unique().tolist() == phrases[0].unique().tolist() == [0, *{n for n, _, _ in spans}]


def test_no_special_token_and_no_padding_is_in_a_phrase(both):
    """Not even in that of a style, which is all words, nor in a text without [V] or of [V] alone."""
    ours, theirs = both
    texts = ["a dog, in [V] style", "[V]", "in [V] style, " + "a dog " * 300, "a dog", ""]
    ids, _, phrases = ours(texts, {"[V]": "a"}, ("[V]",))
    for n, text in enumerate(texts):
        words = len(theirs(text.replace("[V]", "a"), add_special_tokens=False, verbose=False).input_ids)
        first = int(isinstance(ours, ClipTokenizer))             # after CLIP's start token
        stop = min(first + words, ours.length - 1)
        expected = [place for place in range(first, stop) if "[V]" in text]
        assert phrases[n].nonzero().flatten().tolist() == expected, text
        assert ids[n, stop] == ours.end and (ids[n, stop + 1:] == ours.pad).all()


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


# --------------------------------------------------------------------------------------------------- braces
def test_braces_in_texts_that_name_no_placeholder_are_ordinary_characters(both):
    """Also beside a class word that is only looked for, since it stands for itself."""
    ours, theirs = both
    prompts = [prompt for prompt in hostile_prompts(1500, seed=7) if "[V]" not in prompt]
    assert sum("{" in prompt or "}" in prompt for prompt in prompts) > 100
    dogs = ["{", "}{", "a {dog} on {{the}} beach", "{dog", "{} dog } {a {b} c}", "{ [v] } [V2] {", "dog}"]
    for texts in (prompts, dogs):
        expected = their_ids(theirs, texts, ours.length)
        for ids, slots, phrases in (ours(texts), ours(texts, {"[V]": "teddy bear", "<x>": "cat"})):
            assert torch.equal(ids, expected) and not slots.any() and not phrases.any()
    named = ours(dogs, {"dog": "dog"})
    assert torch.equal(named.ids, expected)
    assert named.slots.any(1).tolist() == ["dog" in text for text in dogs]


# ------------------------------------------------------------------------------------- CLIP-L beside CLIP-G
def test_clip_gs_positions_are_clip_ls_unless_exclamation_marks_meet_other_signs(clip_folder):  # noqa: F811
    """The text stream takes CLIP-L's; CLIP-G reads each "!" alone: behind "!!" it is a token further."""
    clip_l, clip_g = (ClipTokenizer(clip_folder, pad) for pad in PADS.values())

    def places(text, stand_ins=DOG):
        return [[(part[0] > 0).nonzero().flatten().tolist() for part in tokenizer([text], stand_ins)[1:]]
                for tokenizer in (clip_l, clip_g)]

    for text, stand_ins, _ in MARKED:
        of_l, of_g = places(text, stand_ins)
        assert (of_l == of_g) == ("!!" not in text and ")!" not in text), text
    assert places("wow! a [V] dog! now!") == [[[4], [4, 5, 6, 7, 8]]] * 2
    assert places("wow!! a [V] dog on snow") == [[[4], [4, 5, 6, 7]], [[5], [5, 6, 7, 8]]]
