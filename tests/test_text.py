"""Foreign text and values as they are shown."""

import pytest

from align_jax.text import brief, one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \N{GREEK SMALL LETTER ALPHA}, \N{GRINNING FACE}", None),
        ("lines\nand\ttabs", None),
        ("\N{FAMILY}\u200d\N{WOMAN} \u05d0\u05d1", None),  # a joiner, and letters from the right
        ("\x1b[2J\x00\x07\x7f", r"\x1b[2J\x00\x07\x7f"),
        ("over\rwritten", r"over\rwritten"),
        ("\x85\x9b31m", r"\x85\x9b31m"),
        ("user\u202etxt.exe\u2066", r"user\u202etxt.exe\u2066"),
        ("\u061c\u200e\u200f", r"\u061c\u200e\u200f"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text, shown):
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode("utf-8")


def test_values_of_any_size_are_shown_in_few_characters():
    assert brief("a" * 10**7) == f"'{'a' * 27}...{'a' * 28}'"
    assert brief(10**5000) == "<a number of 5,001 digits>"
    assert "5,001 digits" in brief([10**5000])
    assert len(brief({str(i): [i] * 99 for i in range(999)})) < 200
    loop = []
    loop.append(loop)
    assert len(brief(loop)) < 50
    assert brief("\x1b\ud800\u202e") == r"'\x1b\ud800\u202e'"


def test_a_message_of_a_library_becomes_one_line():
    assert one_line("first\n  second\x1b[0m\tthird") == r"first second\x1b[0m third"
    assert len(one_line("a" * 10**6)) <= 400 and " ... " in one_line("a" * 10**6)
