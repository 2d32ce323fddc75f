"""Text that a stranger or a model wrote, and other foreign values, made fit to be shown."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any

# Control characters but newline and tab, lone surrogates, and the marks that turn the direction of
# writing: a terminal obeys the first, UTF-8 has no bytes for the second, and the last show a text
# in another order than it has.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""`text` with control, direction and half characters as escapes: "\x1b", "\u202e".

    Newlines and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, length: int = 400) -> str:
    """`text` without control characters and newlines, its middle left out if it is long."""
    joined = printable(" ".join(text.split()))
    half = (length - 5) // 2
    return joined if len(joined) <= length else f"{joined[:half]} ... {joined[-half:]}"


class _Brief(reprlib.Repr):
    def __init__(self, length: int):
        super().__init__()
        self.maxstring = self.maxother = length

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out numbers of more than 4,300 digits.
        if x.bit_length() > 10_000:
            return f"<a number of {int(x.bit_length() * math.log10(2)) + 1:,} digits>"
        return super().repr_int(x, level)


def brief(value: Any, length: int = 60) -> str:
    """The `repr` of a value of any size in few characters; `length` bounds that of a string."""
    return _Brief(length).repr(value)


def nearest(name: str, known: Iterable[str], *, most: int | None = None) -> str:
    """The end of an error about an unknown `name`: " Did you mean ...?", or all known names.

    More than `most` names are not listed.
    """
    known = list(known)
    if close := difflib.get_close_matches(str(name), known, n=1):
        return f" Did you mean {close[0]!r}?"
    listed = bool(known) and (most is None or len(known) <= most)
    return f" There are: {', '.join(sorted(known))}." if listed else ""


def hint(name: str, known: Iterable[str]) -> str:
    """`nearest` for the keys of a reward, which may take none, and for the names in a module."""
    known = list(known)
    return nearest(name, known, most=20) if known else " It takes none."
