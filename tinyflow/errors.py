"""Errors for people: what was wrong, where, and what to do. Anything that a user can cause raises InputError.

Read next: terminal.py, where a command turns it into one line.
"""

LINE = 300                                       # characters of an error at most


class InputError(ValueError):
    """Something that the user gave cannot be used. The message says what, where, and what to do."""


# ------------------------------------------------------------------------------------------ what a line shows
def shown(text: str, most: int = 60) -> str:
    """What a user wrote, in quotes; the middle of a long text is left out."""
    text = str(text)
    return repr(text if len(text) <= most else f"{text[:most - 15]} ... {text[-10:]}")


def listing(items: list[str], most: int = 6) -> str:
    """Many complaints on one line: the first few, in order, and how many more there are."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(sorted(items)[:most]) + more


def one_line(message: str) -> str:
    """A message without line breaks. Of a long one the beginning says what is wrong, the end what to do."""
    message = " ".join(message.split())
    return message if len(message) <= LINE else f"{message[:LINE - 115]} ... {message[-110:]}"
