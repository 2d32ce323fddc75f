"""Records: single ones through `parse_record`, with the field that the message must name."""

import math

import pytest

from align_jax.data.records import parse_record
from align_jax.data.sources import load_records
from tests.hostile.rows import rows

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "completions": ["a", "b"]}
SFT = {"prompt": "p", "completion": "a"}
LABELLED = {"prompt": "p", "completion": "a", "label": True}


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


USER = chat(("user", "p"))
ONCE = chat(("user", "p"), ("assistant", "a"))

# Kind, record, what the message must name beside the place.
RECORDS = [
    # Records that are none.
    ("sft", None, ("NoneType", "an object")),
    ("sft", [], ("list", "an object")),
    ("sft", "text", ("str", "an object")),
    ("sft", math.nan, ("float", "an object")),
    ("sft", 10**5000, ("int", "an object")),
    ("sft", {}, ("no fields",)),
    ("sft", {"text": None}, ("none of messages",)),
    ("sft", {1: "a"}, ("a field's name",)),
    ("wrong", SFT, ("'wrong'",)),
    # Wrong types.
    ("sft", SFT | {"completion": 10**5000}, ("'completion'", "expected a string")),
    ("sft", SFT | {"completion": 4}, ("'completion'", "int 4")),
    ("sft", SFT | {"completion": True}, ("'completion'", "bool True")),
    ("sft", SFT | {"completion": b"a"}, ("'completion'", "bytes")),
    ("sft", SFT | {"completion": {"a": 1}}, ("'completion'", "dict")),
    ("sft", SFT | {"prompt": math.nan}, ("'prompt'", "float nan")),
    ("sft", SFT | {"prompt": ["a"]}, ("'prompt[0]'", "'role' and 'content'")),
    ("sft", {"text": ["a"]}, ("'text'", "expected a string")),
    ("sft", {"text": " \n\t"}, ("'text'", "text to learn from")),
    ("sft", {"messages": {}}, ("'messages'", "dict")),
    ("sft", {"messages": []}, ("'messages'", "not empty")),
    ("sft", {"messages": [[]]}, ("'messages[0]'", "list")),
    ("sft", {"messages": chat(("user", "p"), ("assistant", 3))}, ("'messages[1].content'",)),
    ("sft", {"messages": chat(("user", "p"), ("assistant", None))}, ("'content' is missing",)),
    ("sft", {"messages": chat((10**5000, "p"))}, ("'messages[0].role'",)),
    ("sft", {"messages": chat((["user"], "p"))}, ("'messages[0].role'",)),
    ("sft", {"messages": chat(({}, "p"))}, ("'messages[0].role'",)),
    ("sft", {"messages": chat(("human", "p"))}, ("'messages[0].role'", "'user'")),
    ("sft", {"messages": chat(("assistant", "a"))}, ("'messages'", "the user or the system")),
    ("sft", {"messages": chat(("user", "p"))}, ("'messages'", "assistant")),
    ("sft", {"messages": ONCE} | SFT, ("'messages'", "'completion'")),
    # Unicode that is no text.
    ("sft", SFT | {"completion": "a\ud800"}, ("'completion'", r"\ud800", "character 2")),
    ("sft", SFT | {"prompt": "\udfff p"}, ("'prompt'", r"\udfff", "character 1")),
    ("sft", {"text": "\udc80" * 9}, ("'text'", r"\udc80")),
    ("sft", {"messages": chat(("user", "\ud800"), ("assistant", "a"))}, ("'messages[0].content'",)),
    ("sft", {"\udc80": 1}, (r"\udc80",)),
    ("preference", PAIR | {"strength": "\ud800"}, ("'strength'", r"\ud800")),
    ("prompt", {"prompt": "p", "answer": "\ud800"}, ("'answer'", r"\ud800")),
    ("ranked", RANKED | {"completions": ["a", "\ud800"], "ranks": [0, 1]}, ("'completions[1]'",)),
    # Numbers.
    ("preference", PAIR | {"margin": 10**400}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": 10**5000}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": -(10**400)}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": math.nan}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": -math.inf}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": "1"}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"margin": True}, ("'margin'", "a finite number")),
    ("preference", PAIR | {"strength": math.inf}, ("'strength'", "a finite number")),
    ("preference", PAIR | {"strength": 10**400}, ("'strength'", "a finite number")),
    ("prompt", {"prompt": "p", "answer": 10**5000}, ("'answer'", "a finite number")),
    ("prompt", {"prompt": "p", "answer": 10**400}, ("'answer'", "a finite number")),
    ("prompt", {"prompt": "p", "answer": math.nan}, ("'answer'", "a finite number")),
    ("prompt", {"prompt": "p", "answer": False}, ("'answer'", "a string or a number")),
    ("prompt", {"prompt": "p", "answer": []}, ("'answer'", "a string or a number")),
    ("prompt", {"prompt": "p", "safety": 1}, ("'safety'", "true or false")),
    ("prompt", {"prompt": "  "}, ("'prompt'", "text to continue")),
    ("prompt", {"prompt": ONCE}, ("'prompt'", "'assistant'")),
    ("labelled", LABELLED | {"label": 1}, ("'label'", "true or false")),
    ("labelled", LABELLED | {"label": "true"}, ("'label'", "true or false")),
    ("labelled", LABELLED | {"label": math.nan}, ("'label'", "true or false")),
    # Comparisons that compare nothing.
    ("preference", PAIR | {"rejected": "a"}, ("'chosen'", "'rejected'", "same")),
    (
        "preference",
        {"chosen": ONCE, "rejected": ONCE},
        ("'chosen'", "'rejected'", "same"),
    ),
    (
        "preference",
        {"prompt": USER, "chosen": "a", "rejected": chat(("assistant", "a"))},
        ("'rejected'", "same"),
    ),
    (
        "preference",
        {name: "\n\nHuman: p\n\nAssistant: a" for name in ("chosen", "rejected")},
        ("'chosen'", "'rejected'", "same"),
    ),
    ("ranked", RANKED | {"ranks": [1, 1]}, ("'ranks'", "all the same")),
    ("ranked", RANKED | {"completions": ["a"] * 3, "ranks": [0] * 3}, ("'ranks'", "all the same")),
    ("ranked", RANKED | {"ranks": [0, -1]}, ("'ranks'", "from 0")),
    ("ranked", RANKED | {"ranks": [0, 10**5000]}, ("'ranks'",)),
    ("ranked", RANKED | {"ranks": [0, 2**40]}, ("'ranks'",)),
    ("ranked", RANKED | {"ranks": [0, 1.0]}, ("'ranks'", "integers")),
    ("ranked", RANKED | {"ranks": [0, None]}, ("'ranks'", "integers")),
    ("ranked", RANKED | {"ranks": "01"}, ("'ranks'", "integers")),
    ("ranked", RANKED | {"ranks": [0, 1, 2]}, ("'ranks'", "2 ranks")),
    ("ranked", RANKED | {"best": 2}, ("'best'", "0 to 1")),
    ("ranked", RANKED | {"best": -1}, ("'best'", "0 to 1")),
    ("ranked", RANKED | {"best": 10**5000}, ("'best'", "0 to 1")),
    ("ranked", RANKED | {"best": True}, ("'best'", "0 to 1")),
    ("ranked", RANKED | {"completions": ["a"], "ranks": [0]}, ("'completions'", "two or more")),
    ("ranked", RANKED | {"completions": "ab", "ranks": [0, 1]}, ("'completions'", "list")),
    # Two prompts, or none.
    ("preference", PAIR | {"prompt": 3}, ("'prompt'", "int 3")),
    ("preference", {"chosen": "a", "rejected": "b"}, ("'prompt'", "'chosen'")),
    (
        "preference",
        {"chosen": ONCE, "rejected": chat(("user", "q"), ("assistant", "b"))},
        ("different prompts",),
    ),
]


@rows("kind, record, names", RECORDS)
def test_a_bad_record(refused, kind, record, names):
    place = () if kind == "wrong" else ("data.jsonl:17",)
    refused(lambda: parse_record(record, kind=kind, where="data.jsonl:17"), *place, *names)


def deep(depth):
    value = "a"
    for _ in range(depth):
        value = [value]
    return value


def test_deep_nesting_and_loops(refused):
    loop = []
    loop.append(loop)
    for value in (deep(100_000), loop):
        record = {"prompt": value, "completion": "a"}
        refused(
            lambda record=record: parse_record(record, kind="sft", where="x:1"),
            "x:1: ",
            "'prompt[0]'",
        )


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (PAIR | {"rejected": "a"}, "preference"),
        (RANKED | {"ranks": [3, 3]}, "ranked"),
        (PAIR | {"margin": 10**400}, "preference"),
    ],
)
def test_a_comparison_of_nothing_can_be_left_out(write_lines, record, kind):
    good = PAIR if kind == "preference" else RANKED | {"ranks": [0, 1]}
    path = write_lines([good, record, good])
    assert len(load_records(path, kind=kind, invalid="drop")) == 2
