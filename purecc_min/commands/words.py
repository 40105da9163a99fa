"""`words`: what the tiny model's texts can say, by kind."""

from tinyflow.picturebook import world

KINDS = {"things": world.OBJECTS, "colours": world.COLOURS, "sizes": world.SIZES,
         "places": world.PLACE_WORDS.values(), "backgrounds": world.BACKGROUND_WORDS.values()}


def words() -> str:
    """A line for each kind, and an example."""
    lines = [f"{kind:12s} {', '.join(known)}" for kind, known in KINDS.items()]
    scene = world.Scene("robot", "red", "big", "left", "snow")
    return "\n".join([*lines, "", f"for example: {world.caption(scene)}"])
