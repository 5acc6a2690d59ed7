"""Sentences for the user: the exception that carries one, and text that any terminal can show."""

import sys

# how torch, CUDA's libraries, oneDNN and the operating system say it, in lower case
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory",
                       "not enough memory", "_status_alloc_failed", "std::bad_alloc",
                       "unable to allocate shared memory", "could not create a memory object")


class BadInput(ValueError):
    """Something the user can mend: an image, a caption, a cached file. Its text is a sentence to show. Other
    exceptions during training are faults of a program and keep their traceback."""


def is_out_of_memory(error):
    """Whether an exception says so: Python has a kind of its own, torch and its libraries have a text."""
    text = str(error).lower()
    is_told = isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_TEXTS)
    return is_told or isinstance(error, MemoryError)


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
