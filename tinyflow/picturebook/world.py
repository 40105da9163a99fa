"""The picture-book world: what can be in a picture, and how captions say it.

A `Scene` holds one or two objects (`Thing`), a background, a light and a style; render.py draws it. Some of
what is true about a picture has a name, and a caption may say it or leave it unsaid: object, colour, size,
place, background, marking and its colour, topper, one or two eyes, light, style. The rest has no name. It is
an object's `Identity`, the numbers by which one red cat differs from another, and the member of a family of
lights or styles. Only pictures show these: they are what a concept is made of.

Some combinations are held out of pretraining (`MISSING`, `HELD_BACK`), so that a model can be asked for what
it has never seen. Read next: render.py.
"""

from dataclasses import dataclass, fields, replace
from typing import Iterable

import numpy as np

SIZE = 64                       # pixels on a side of a picture

OBJECTS = ("ball", "robot", "house", "tree", "fish", "cat", "star", "mushroom")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "big")
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BACKGROUNDS = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow", "night": "at night",
               "desert": "in the desert", "room": "in the room"}
MARKINGS = ("plain", "stripes", "checks", "dots")
TOPPERS = {"none": "", "antenna": "an antenna", "hat": "a hat", "crown": "a crown"}
EYES = {2: "two eyes", 1: "one eye"}
LIGHTS = {"day": "", "dusk": "at dusk", "moonlight": "in moonlight", "glow": ""}      # glow has no name
STYLES = {"none": "", "print": "in print", "chalk": "in chalk", "wool": "in wool"}


@dataclass(frozen=True)
class Identity:
    """What no caption says about an object. Each is a number from -1 to 1, and 0 is the middle."""
    hue: float = 0              # of the body: which red it is
    tone: float = 0             # of the body: deep or light
    width: float = 0
    proportion: float = 0       # each object has two of its own, which its function in render.py tells
    detail: float = 0
    eye_size: float = 0
    eye_gap: float = 0          # shows if it has two eyes
    marking_width: float = 0    # these three show if it has a marking
    marking_angle: float = 0
    marking_cover: float = 0    # how much of the body it covers
    topper_height: float = 0    # shows if it wears a topper


TRAITS = tuple(field.name for field in fields(Identity))


@dataclass(frozen=True)
class Thing:
    object: str
    colour: str
    size: str = "big"
    place: str = "middle"
    marking: str = "plain"
    accent: str = "white"       # the colour of the marking
    topper: str = "none"
    eyes: int = 2
    identity: Identity = Identity()


@dataclass(frozen=True)
class Scene:
    """Everything that is true about one picture. `seed` moves clouds, flowers and the objects a little."""
    things: tuple[Thing, ...]   # one, or two: the left one first
    background: str
    light: str = "day"
    light_member: float = 0     # which light of its family, -1 to 1
    style: str = "none"
    style_member: float = 0
    seed: int = 0

    def changed(self, n: int = 0, **traits) -> "Scene":
        """A copy with other traits: of the scene, of its thing n, or of that thing's identity."""
        own = {name: traits.pop(name) for name in list(traits) if name in self.__dataclass_fields__}
        unnamed = {name: traits.pop(name) for name in list(traits) if name in TRAITS}
        identity = replace(traits.pop("identity", self.things[n].identity), **unnamed)
        thing = replace(self.things[n], identity=identity, **traits)
        return replace(self, **{"things": (*self.things[:n], thing, *self.things[n + 1:]), **own})

    def trait(self, name: str, n: int = 0):
        """The value of a trait: of the scene, of its thing n, or of that thing's identity."""
        owners = (self, self.things[n], self.things[n].identity)
        return next(getattr(owner, name) for owner in owners if hasattr(owner, name))


WORN = ("object", "colour", "marking", "accent", "topper", "eyes", "identity")   # what an object is, anywhere


# ------------------------------------------------------------------------------------------------ captions
THING_PARTS = ("size", "colour", "marking", "accent", "topper", "eyes", "place")
SCENE_PARTS = ("background", "light", "style")
ALL_PARTS = frozenset(THING_PARTS + SCENE_PARTS)
PLAIN_PARTS = frozenset({"size", "colour", "place", "background"})


def thing_caption(thing: Thing, said: set[str], noun: str) -> str:
    worn = []
    if thing.marking != "plain" and "marking" in said:
        worn.append(f"{thing.accent} {thing.marking}" if "accent" in said else thing.marking)
    if thing.topper != "none" and "topper" in said:
        worn.append(TOPPERS[thing.topper])
    if "eyes" in said:
        worn.append(EYES[thing.eyes])
    words = ["a", thing.size if "size" in said else "", thing.colour if "colour" in said else "", noun]
    if worn:
        words += ["with", ", ".join(worn[:-1]), "and" if worn[:-1] else "", worn[-1]]
    if "place" in said:
        words.append(PLACES[thing.place])
    return " ".join(filter(None, words))


def caption(scene: Scene, nouns: tuple[str, ...] = (),
            said: Iterable[set[str]] | set[str] = PLAIN_PARTS) -> str:
    """The text of a scene. What a thing does not wear is never said.

    nouns: replace the objects' words, such as ("[V] robot",). said: the parts that the text says (THING_PARTS
    and SCENE_PARTS), one set for all objects or one each.
    """
    sets = [set(said)] * 2 if isinstance(said, (set, frozenset)) else list(said)
    nouns = nouns or tuple(thing.object for thing in scene.things)
    words = [" and ".join(map(thing_caption, scene.things, sets, nouns))]
    if "background" in sets[0]:
        words.append(BACKGROUNDS[scene.background])
    words += [LIGHTS[scene.light]] * ("light" in sets[0]) + [STYLES[scene.style]] * ("style" in sets[0])
    return " ".join(filter(None, words))


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as a child would give it, with parts left out. One in ten is empty (the null condition).
    A noun is doubled now and then, as in "a red robot robot": so the model reads a text with a placeholder.
    """
    if rng.random() < .1:
        return ""
    sets = []
    for thing in scene.things:
        said = {part for part in THING_PARTS + SCENE_PARTS if rng.random() > .15}
        if thing.eyes == 2 and rng.random() < .8:
            said.discard("eyes")
        sets.append(said)
    if rng.random() < .06:                                       # nothing but the nouns, as in "a [V] robot"
        sets = [set()] * 2
    nouns = tuple(" ".join([thing.object] * (1 + (rng.random() < .15))) for thing in scene.things)
    text = caption(scene, nouns, sets)
    return text.removeprefix("a ") if rng.random() < .05 else text


def pair_templates() -> list[str]:
    """Texts with {0} and {1} for two things. They say the size of one thing; captions of scenes say both."""
    return [f"a {first}{{0}} on the left and a {second}{{1}} on the right {background}"
            for background in BACKGROUNDS.values()
            for first, second in (("small ", ""), ("", "big "), ("big ", ""), ("", "small "))]


PHRASES = ["a with and", *OBJECTS, *COLOURS, *SIZES, *PLACES.values(), *BACKGROUNDS.values(), *MARKINGS[1:],
           *TOPPERS.values(), *EYES.values(), *LIGHTS.values(), *STYLES.values()]
VOCABULARY = sorted(set(" ".join(PHRASES).split()))              # every word that a caption can hold


# -------------------------------------------------------------------------------------------------- scenes
# What pretraining never shows of an object: a colour, a background, and a marking together with a topper.
MISSING = {"ball": ("purple", "meadow", ("stripes", "crown")), "robot": ("pink", "beach", ("checks", "hat")),
           "house": ("blue", "night", ("dots", "antenna")), "tree": ("white", "room", ("stripes", "hat")),
           "fish": ("red", "desert", ("dots", "crown")), "cat": ("green", "snow", ("stripes", "antenna")),
           "star": ("orange", "beach", ("checks", "antenna")),
           "mushroom": ("yellow", "night", ("dots", "hat"))}
HELD_BACK = (.3, .6)            # members of lights and styles that pretraining never shows


def held_out(scene: Scene) -> bool:
    """Is there a thing in the scene that pretraining never shows so?"""
    for thing in scene.things:
        colour, background, parts = MISSING[thing.object]
        if thing.colour == colour or scene.background == background or (thing.marking, thing.topper) == parts:
            return True
    return False


def pick(options: Iterable, rng: np.random.Generator):
    options = list(options)
    return options[rng.integers(len(options))]


def random_identity(rng: np.random.Generator) -> Identity:
    return Identity(*rng.uniform(-1, 1, len(TRAITS)).tolist())


def random_member(rng: np.random.Generator) -> float:
    """A member of a family of lights or styles that pretraining shows."""
    low, high = HELD_BACK
    member = rng.uniform(-1, 1 - (high - low))
    return float(member if member < low else member + high - low)


def random_thing(place: str, rng: np.random.Generator, parts: bool = True) -> Thing:
    """An individual. With parts, seven in ten have a marking (it is learned last), and half a topper."""
    thing = Thing(pick(OBJECTS, rng), pick(COLOURS, rng), pick(SIZES, rng), place,
                  identity=random_identity(rng))
    if not parts:
        return thing
    return replace(thing, marking=pick(MARKINGS[1:], rng) if rng.random() < .7 else "plain",
                   accent=pick([colour for colour in COLOURS if colour != thing.colour], rng),
                   topper=pick(list(TOPPERS)[1:], rng) if rng.random() < .5 else "none",
                   eyes=1 if rng.random() < .33 else 2)


def random_scene(rng: np.random.Generator, parts: bool = True, pairs: float = .35) -> Scene:
    """Any scene, held-out combinations included.

    parts: whether things may wear parts, and the scene have a light and a style. pairs: the share of scenes
    with two things, one on the left and one on the right.
    """
    places = ("left", "right") if rng.random() < pairs else (pick(PLACES, rng),)
    things = tuple(random_thing(place, rng, parts) for place in places)
    scene = Scene(things, pick(BACKGROUNDS, rng), seed=int(rng.integers(2**31)))
    if not parts:
        return scene
    return replace(scene, light=pick(list(LIGHTS)[1:], rng) if rng.random() < .3 else "day",
                   light_member=random_member(rng),
                   style=pick(list(STYLES)[1:], rng) if rng.random() < .25 else "none",
                   style_member=random_member(rng))


def seen_scene(rng: np.random.Generator, seen: bool = True, **options) -> Scene:
    """A scene from the seen (or, with seen=False, only from the held-out) combinations."""
    scene = random_scene(rng, **options)
    while held_out(scene) == seen:
        scene = random_scene(rng, **options)
    return scene


def any_scene(rng: np.random.Generator, **options) -> Scene:
    """Anything at all: held-out combinations, and all members of lights and styles."""
    light, style = rng.uniform(-1, 1, 2).tolist()
    return random_scene(rng, **options).changed(light_member=light, style_member=style)
