"""Errors for people: what was wrong, where, and what to do. Anything that a user can cause raises InputError.

Read next: terminal.py, where a command turns it into one line.
"""


class InputError(ValueError):
    """Something that the user gave cannot be used. The message says what, where, and what to do."""


def shown(text: str, most: int = 60) -> str:
    """What a user wrote, in quotes; the middle of a long text is left out."""
    text = str(text)
    return repr(text if len(text) <= most else f"{text[:most - 15]} ... {text[-10:]}")


def listing(items: list[str], most: int = 6) -> str:
    """Many complaints on one line: the first few, in order, and how many more there are."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(sorted(items)[:most]) + more
