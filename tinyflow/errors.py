"""InputError is an error that the user can correct. terminal.py prints its message on one line."""


class InputError(ValueError):
    """The message says what is wrong, where, and what to do."""


def shown(text: object, most: int = 60) -> str:
    """What a user wrote, in quotes; the middle of a long text is left out."""
    text = str(text)
    return repr(text if len(text) <= most else f"{text[:most - 15]} ... {text[-10:]}")


def listing(messages: list[str], most: int = 6) -> str:
    """Joins the first few messages, sorted, and says how many more there are."""
    more = f"; and {len(messages) - most} more" if len(messages) > most else ""
    return "; ".join(sorted(messages)[:most]) + more
