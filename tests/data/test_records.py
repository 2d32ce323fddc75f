import re

import pytest

from align_jax.data.records import parse_record
from align_jax.errors import DataError

WHERE = "pairs.jsonl:17"


def message(role, content):
    return {"role": role, "content": content}


def parse(raw, kind):
    record = parse_record(raw, kind=kind, where=WHERE)
    assert record.pop("where") == WHERE
    return record


USER = [message("user", "hi")]
ANSWER = [message("assistant", "hello")]
VALID = [
    ("sft", {"text": "once upon a time"}),
    ("sft", {"messages": USER + ANSWER}),
    ("sft", {"prompt": "a", "completion": "b"}),
    ("sft", {"prompt": USER, "completion": ANSWER}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}),
    ("preference", {"prompt": USER, "chosen": ANSWER, "rejected": [message("assistant", "no")]}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "strength": "slightly"}),
    ("ranked", {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 0, 1]}),
    ("labelled", {"prompt": "a", "completion": "b", "label": False}),
    ("prompt", {"prompt": "a"}),
    ("prompt", {"prompt": USER}),
    ("prompt", {"prompt": "a", "answer": "so 4\n#### 4", "safety": True}),
    ("prompt", {"prompt": USER, "answer": 10**30, "safety": False}),
    ("prompt", {"prompt": "a", "answer": 0.1}),
]


@pytest.mark.parametrize(("kind", "raw"), VALID)
def test_valid_records_keep_their_fields(kind, raw):
    assert parse(raw, kind) == raw


def test_the_place_of_the_best_is_a_ranking():
    raw = {"prompt": "a", "completions": ["b", "c", "d"], "best": 1}
    ranked = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 0, 1]}
    assert parse(raw, "ranked") == ranked
    with pytest.raises(DataError, match="'ranks' and .*'best': keep the one"):
        parse(raw | ranked, "ranked")
    for wrong in (3, -1, "b", True):
        with pytest.raises(DataError, match="field 'best': .*the place of the best, 0 to 2"):
            parse(raw | {"best": wrong}, "ranked")


def test_foreign_and_null_fields_are_left_out():
    raw = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": None, "prompt_id": 3}
    assert parse(raw, "preference") == {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("answer", True, "a string or a number"),
        ("answer", ["4"], "a string or a number"),
        ("answer", float("nan"), "a finite number"),
        ("answer", float("inf"), "a finite number"),
        ("safety", 1, "true or false"),
        ("safety", "yes", "true or false"),
    ],
)
def test_what_rewards_look_at_is_checked(field, value, expected):
    with pytest.raises(DataError, match=f"pairs.jsonl:17: field '{field}': .*{expected}"):
        parse({"prompt": "a", field: value}, "prompt")
    assert parse({"prompt": "a", field: None}, "prompt") == {"prompt": "a"}


def test_a_misspelt_answer_is_not_ignored():
    with pytest.raises(DataError, match="unknown field 'answers'; did you mean 'answer'"):
        parse({"prompt": "a", "answers": 4}, "prompt")
    assert parse({"prompt": "a", "completion": "b", "answer": 4}, "sft") == {
        "prompt": "a",
        "completion": "b",
    }


def test_dialogues_split_at_the_last_assistant_turn():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    record = parse({"chosen": start + " so", "rejected": start + " no"}, "preference")
    assert record == {"prompt": start, "chosen": " so", "rejected": " no"}


def test_dialogues_with_different_prompts_are_refused():
    chosen = "\n\nHuman: hi\n\nAssistant: a"
    for rejected in ("\n\nHuman: ho\n\nAssistant: a", chosen + "\n\nHuman: b\n\nAssistant: c"):
        with pytest.raises(DataError, match="pairs.jsonl:17.*'chosen' and 'rejected'.*different"):
            parse({"chosen": chosen, "rejected": rejected}, "preference")


def test_text_that_is_no_dialogue_needs_a_prompt():
    with pytest.raises(DataError, match="no 'prompt'.*'chosen'.*Assistant"):
        parse({"chosen": "good", "rejected": "bad"}, "preference")


def test_implicit_prompts_in_messages_are_split():
    prompt = [message("system", "s"), *USER, *ANSWER, message("user", "more")]
    good, bad = [message("assistant", "a")], [message("assistant", "b")]
    expected = {"prompt": prompt, "chosen": good, "rejected": bad}
    assert parse({"chosen": prompt + good, "rejected": prompt + bad}, "preference") == expected
    # With the prompt beside the conversations, as a string or as messages.
    raw = {"prompt": "more", "chosen": prompt + good, "rejected": prompt + bad}
    assert parse(raw, "preference") == expected
    assert parse({**raw, "prompt": prompt}, "preference") == expected
    with pytest.raises(DataError, match="different prompts.*from message 1 on"):
        parse({"chosen": prompt + good, "rejected": prompt[:1] + USER[:0] + bad}, "preference")


def test_a_string_answer_to_messages_becomes_a_message():
    raw = {"prompt": USER, "chosen": "a", "rejected": "b"}
    assert parse(raw, "preference")["chosen"] == [message("assistant", "a")]


INVALID = [
    ("sft", ["text"], "found list"),
    ("sft", {"text": 3}, "'text'.*int 3.*a string"),
    ("sft", {"text": "  "}, "'text'.*text to learn from"),
    ("sft", {"text": "a", "messages": USER + ANSWER}, "has 'messages' and 'text'.*keep the one"),
    ("sft", {"txt": "a"}, "none of.*did you mean 'txt' as 'text'"),
    ("sft", {"instruction": "a", "output": "b"}, "'instruction' as 'prompt'.*'output' as"),
    ("sft", {"prompt": "a"}, "field 'completion' is missing"),
    ("sft", {"prompt": "a", "complation": "b"}, "did you mean 'complation' as 'completion'"),
    ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "kind 'preference'"),
    ("sft", {"prompt": "a", "completion": ANSWER}, "'completion'.*list.*a string, since 'prompt'"),
    ("sft", {"prompt": USER + ANSWER, "completion": "b"}, "'prompt'.*last message.*assistant"),
    ("sft", {"messages": []}, "'messages'.*not empty"),
    ("sft", {"messages": USER}, "roles are user;.*last from the assistant"),
    ("sft", {"messages": ANSWER}, "the first from the user"),
    ("sft", {"messages": ["hi"]}, r"'messages\[0\]'.*str 'hi'.*'role'"),
    ("sft", {"messages": [{"from": "human", "value": "a"}]}, "'from' as 'role'"),
    ("sft", {"messages": [{"role": "user", "text": "a"}]}, "'text' as 'content'"),
    ("sft", {"messages": [message("human", "a")]}, r"\[0\].role'.*'human'.*did you mean 'user'"),
    ("sft", {"messages": [message("asistant", "a")]}, "did you mean 'assistant'"),
    ("sft", {"messages": [message("user", ["a"])]}, r"\[0\].content'.*list.*a string"),
    ("preference", {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ("preference", {"prompt": "a", "chosn": "b", "rejected": "c"}, "'chosn' as 'chosen'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected'.*int 3"),
    ("preference", {"prompt": 1, "chosen": "b", "rejected": "c"}, "'prompt'.*int 1"),
    ("preference", {"promt": "a", "chosen": "b", "rejected": "c"}, "'promt'.*'prompt'"),
    ("preference", {"chosen": "b", "rejected": ANSWER}, "'rejected'.*same type as 'chosen'"),
    (
        "preference",
        {"chosen": ANSWER, "rejected": [message("assistant", "no")]},
        "'chosen' is no whole conversation",
    ),
    ("preference", {"prompt": "x", "chosen": USER + ANSWER, "rejected": ANSWER}, "'chosen'.*a str"),
    (
        "preference",
        {"prompt": USER, "chosen": USER, "rejected": USER},
        "'chosen'.*role 'assistant'",
    ),
    ("ranked", {"prompt": "a", "completions": ["b"], "ranks": [0]}, "two or more"),
    ("ranked", {"prompt": "a", "completions": ["b", 1], "ranks": [0, 1]}, r"'completions\[1\]'"),
    ("ranked", {"prompt": "a", "completions": ["b", "c"], "ranks": [0]}, "'ranks'.*2 ranks"),
    ("ranked", {"prompt": "a", "completions": ["b", "c"], "ranks": [0, True]}, "of integers"),
    ("ranked", {"prompt": "a", "replies": ["b", "c"], "ranks": [0, 1]}, "'replies' as 'compl"),
    ("labelled", {"prompt": "a", "completion": "b", "label": 1}, "'label'.*int 1.*true or false"),
    ("labelled", {"prompt": "a", "completion": "b", "lable": True}, "'lable' as 'label'"),
    (
        "sft",
        {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "'tool_calls' are not rendered",
    ),
    ("prompt", {"prompt": ""}, "'prompt'.*text to continue"),
    ("prompt", {"question": "b"}, "'question' as 'prompt'"),
    ("prompt", {}, "'prompt' is missing.*no fields"),
    ("pairs", {"prompt": "a"}, "unknown kind of record 'pairs'"),
]


@pytest.mark.parametrize(("kind", "raw", "expected"), INVALID)
def test_invalid_records_are_explained(kind, raw, expected):
    with pytest.raises(DataError) as caught:
        parse(raw, kind)
    text = str(caught.value)
    assert re.search(expected, text), text
    assert kind == "pairs" or text.startswith(WHERE + ": ")
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize("margin", [True, "2", float("nan"), float("inf")])
def test_margins_are_finite_numbers(margin):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="'margin'.*a finite number"):
        parse({**pair, "margin": margin}, "preference")
    with pytest.raises(DataError, match="unknown field 'margins'; did you mean 'margin'"):
        parse({**pair, "margins": 1.0}, "preference")


def test_long_values_are_shown_short():
    raw = {"prompt": "a", "completion": ["x" * 10_000], "label": True}
    with pytest.raises(DataError) as caught:
        parse(raw, "labelled")
    assert len(str(caught.value)) < 300
