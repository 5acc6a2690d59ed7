"""Sentences for the user: the exception that carries one, and text that any terminal can show."""

import sys


class BadInput(ValueError):
    """Something the user can mend: an image, a caption, a cached file. Its text is a sentence to show. Other
    exceptions during training are faults of a program and keep their traceback."""


def printable(name):
    """A file name for a message: on one line, without control characters and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def format_duration(seconds):
    """'50 seconds', '12 minutes', '6.5 hours', '3.1 days'."""
    for unit, size, limit in (("seconds", 1, 100), ("minutes", 60, 100), ("hours", 3600, 48)):
        if seconds < size * limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"


def print_message(text):
    """print, with \\x.. for the characters that stdout's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
