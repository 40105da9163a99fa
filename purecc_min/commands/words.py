"""`words` lists the words that the tiny model knows, by kind."""

import argparse

from tinyflow.picturebook import world

KINDS = {"things": world.OBJECTS, "colours": world.COLOURS, "sizes": world.SIZES,
         "places": world.PLACES.values(), "backgrounds": world.BACKGROUNDS.values(),
         "markings": world.MARKINGS[1:], "worn": [*list(world.TOPPERS.values())[1:], *world.EYES.values()],
         "lights": [words for words in world.LIGHTS.values() if words],
         "styles": [words for words in world.STYLES.values() if words],
         "between": ["a", "with", "and"]}


def words_command(options: argparse.Namespace) -> None:
    """Prints a line for each kind, and an example."""
    lines = [f"{kind:12s} {', '.join(known)}" for kind, known in KINDS.items()]
    cat = world.Thing("cat", "red", "small", "left", marking="stripes", topper="hat")
    scene = world.Scene((cat, world.Thing("robot", "blue", "big", "right")), "snow", "dusk")
    print("\n".join([*lines, "", f"for example: {world.caption(scene, said=world.ALL_PARTS - {'eyes'})}"]))
