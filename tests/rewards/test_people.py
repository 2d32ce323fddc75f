import json

import numpy as np
import pytest

from align_jax.errors import DataError, RewardError
from align_jax.rewards.base import checked_probabilities
from align_jax.rewards.people import PeopleJudge, WaitingForLabels

RECORDS = [
    {"prompt": "How?"},
    {"prompt": [{"role": "user", "content": "Wh\u00e4t?\u2028"}]},
    {"prompt": "How?"},
    {"prompt": "How?"},
]
FIRST = ["so", "\u00e9\n", "so", "so"]
SECOND = ["not so", "no", "not so", "never"]


@pytest.fixture
def judge(tmp_path):
    return PeopleJudge(tmp_path / "comparisons" / "round_0")


@pytest.fixture
def ids(judge):
    with pytest.raises(WaitingForLabels):
        judge(RECORDS, FIRST, SECOND)
    return [pair["id"] for pair in read(judge.pairs)]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(judge, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    judge.labels.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def label(id, preferred, **more):
    return {"id": id, "preferred": preferred, **more}


def ask(judge):
    return checked_probabilities(judge, RECORDS, FIRST, SECOND)


def test_pairs_go_out_and_the_run_waits_until_labels_are_in(judge):
    with pytest.raises(WaitingForLabels) as waiting:
        ask(judge)
    message = str(waiting.value)
    assert f"3 of 3 pairs in {judge.pairs} have no label in {judge.labels}" in message
    assert "start the same command again" in message
    pairs = read(judge.pairs)  # the pair that is asked twice is shown once
    assert [pair["first"] for pair in pairs] == ["so", "\u00e9\n", "so"]
    assert [pair["second"] for pair in pairs] == ["not so", "no", "never"]
    assert pairs[1]["prompt"] == "User: Wh\u00e4t?\u2028"
    assert [one.name for one in judge.pairs.parent.iterdir()] == ["pairs.jsonl"]
    # The message shows a line that can be copied.
    example = message[message.index('{"id"') : message.index("}") + 1]
    assert json.loads(example) == label(pairs[0]["id"], "first")

    before = judge.pairs.read_bytes()
    write(judge, [label(pairs[1]["id"], "second"), label(pairs[0]["id"], None)])
    with pytest.raises(WaitingForLabels, match=f"2 of 3 pairs.*the first: {pairs[0]['id']}"):
        ask(judge)
    assert judge.pairs.read_bytes() == before

    # A copy of the pairs, filled in, in any order, with notes.
    filled = zip(pairs, ("first", "tie", "second"))
    write(judge, [{**pair, "preferred": p, "note": "x"} for pair, p in filled][::-1])
    answers = ask(PeopleJudge(judge.pairs.parent))
    assert answers.dtype == np.float32 and answers.tolist() == [1.0, 0.5, 1.0, 0.0]


def test_the_same_label_twice_is_one_label(judge, ids):
    write(judge, [label(ids[0], "first"), *(label(id, "first") for id in ids)])
    assert ask(judge).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"preferred": "first"}, "a label needs the 'id' of its pair"),
        ([1], "found \\[1\\], a list, expected an object with named fields"),
        ({"id": 3, "preferred": "first"}, "a label needs the 'id'"),
        ({"id": "0123", "preferred": "first"}, "there is no pair '0123' in .*pairs.jsonl"),
        ("ID0", "there is no pair .* Did you mean"),
        ({"preferred": "frist"}, "'preferred': found 'frist', expected 'first', 'second' or 'tie'"),
        ({"preferred": 1}, "'preferred': found 1"),
        ({"preferred": ["first"]}, "'preferred': found"),
        ({"preferred": "second"}, "is labelled 'second' here and otherwise at .*labels.jsonl:1"),
    ],
)
def test_a_wrong_label_names_file_and_line(judge, ids, row, message):
    if row == "ID0":
        row = label(ids[0][:-1], "first")
    elif isinstance(row, dict) and "preferred" in row and row["preferred"] != "first":
        row = {"id": ids[0], **row}
    write(judge, [label(ids[0], "first"), label(ids[1], "tie"), row, label(ids[2], "tie")])
    with pytest.raises((RewardError, DataError), match=f"labels.jsonl:3: .*{message}") as caught:
        ask(judge)
    assert not isinstance(caught.value, WaitingForLabels)


def test_a_broken_line_is_a_data_error(judge, ids):
    write(judge, [label(ids[0], "first"), '{"id": "'])
    with pytest.raises(DataError, match="labels.jsonl:2: broken JSON"):
        ask(judge)


def test_other_pairs_in_the_same_directory_are_refused(judge, ids):
    with pytest.raises(RewardError, match="pairs.jsonl holds other pairs") as caught:
        judge(RECORDS, FIRST, ["not so", "no", "not so", "ever"])
    assert not isinstance(caught.value, WaitingForLabels)
    assert [pair["id"] for pair in read(judge.pairs)] == ids


def test_nothing_half_written_is_left(judge, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RewardError, match="pairs.jsonl cannot be written: disk full"):
        ask(judge)
    assert list(judge.pairs.parent.iterdir()) == []
