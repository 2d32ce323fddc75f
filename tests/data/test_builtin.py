import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from align_jax.data.builtin import NAMES, TEMPLATES, review_openings
from align_jax.data.sources import load_records
from align_jax.errors import DataError

SIZES = {"train": 1984, "held_out": 520}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_opening_is_neutral_distinct_and_short(split):
    openings = review_openings(split, SIZES[split])
    analyzer = SentimentIntensityAnalyzer()
    assert len(set(openings)) == len(openings) >= 400 - 200 * (split == "held_out")
    for opening in openings:
        assert analyzer.polarity_scores(opening)["compound"] == 0.0, opening
        assert 6 <= len(opening.split()) <= 14, opening
        assert opening[0].isupper() and opening[-1].isalpha(), opening
    with pytest.raises(DataError, match=f"holds {SIZES[split]} openings; {SIZES[split] + 1}"):
        review_openings(split, SIZES[split] + 1)


def test_the_splits_share_no_template_and_no_opening():
    frames = {
        split: {template.split("{")[0] for template in templates}
        for split, templates in TEMPLATES.items()
    }
    assert not frames["train"] & frames["held_out"]
    train, held_out = (review_openings(split, size) for split, size in SIZES.items())
    # Even the first three words tell the splits apart.
    assert not {tuple(o.split()[:3]) for o in train} & {tuple(o.split()[:3]) for o in held_out}


def test_openings_are_deterministic_and_nested():
    first = review_openings("train", 100)
    assert first == review_openings("train", 100)
    assert first == review_openings("train", 400)[:100]
    assert first != review_openings("train", 100, seed=1)
    # Pinned: an opening that moved between versions would change every published figure.
    assert first[0] == "I watched the new biopic with my brother, and the soundtrack was"
    starts = [opening.split()[:2] for opening in first]
    assert all(starts.count(start) >= 12 for start in starts)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny_sft", "sft"),
        ("tiny_preferences", "preference"),
        ("tiny_chat_preferences", "preference"),
        ("tiny_ranked", "ranked"),
        ("review_openings", "prompt"),
        ("review_openings#held_out", "prompt"),
        ("arithmetic", "prompt"),
        ("arithmetic#held_out", "prompt"),
    ],
)
def test_builtin_sets_load_by_name(name, kind):
    records = load_records(f"builtin:{name}", kind=kind)
    assert 64 <= len(records) <= 256
    assert records[3]["where"] == f"builtin:{name}: row 3"
    assert len({repr(r["prompt"]) for r in records}) == len(records)
    assert load_records(f"builtin:{name}", kind=kind, limit=5) == records[:5]


def test_question_marks_rank():
    records = load_records("builtin:tiny_ranked", kind="ranked")
    assert {len(record["ranks"]) for record in records} == {2, 3, 4}
    for record in records:
        assert [text.count("?") for text in record["completions"]] == record["ranks"]
    assert 20 < sum(record["ranks"][0] == 0 for record in records) < 80


def test_chosen_counts_up_and_rejected_down():
    def numbers(side):
        text = side if isinstance(side, str) else side[-1]["content"]
        return [int(word) for word in text.split()]

    for name in ("tiny_preferences", "tiny_chat_preferences"):
        for record in load_records(f"builtin:{name}", kind="preference"):
            prompt = record["prompt"]
            prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            start = int(prompt.rstrip(":").split()[-1])
            chosen, rejected = numbers(record["chosen"]), numbers(record["rejected"])
            assert chosen == [start + 1 + i for i in range(len(chosen))]
            assert rejected == [start - 1 - i for i in range(len(chosen))]


def test_sums_are_right_distinct_and_held_out_in_either_order():
    splits = {}
    for split, size in (("train", 189), ("held_out", 64)):
        records = load_records(f"builtin:arithmetic#{split}", kind="prompt")
        pairs = [tuple(map(int, r["prompt"].removesuffix(" =").split(" + "))) for r in records]
        assert [sum(pair) for pair in pairs] == [record["answer"] for record in records]
        assert all(1 <= number <= 22 for pair in pairs for number in pair)
        assert any(a < b for a, b in pairs) and any(a > b for a, b in pairs)
        splits[split] = {frozenset(pair) for pair in pairs}
        assert len(splits[split]) == size
    assert not splits["train"] & splits["held_out"]
    # Pinned: published figures hang on it.
    first = load_records("builtin:arithmetic", kind="prompt")[0]
    assert (first["prompt"], first["answer"]) == ("10 + 10 =", 20)


def test_wrong_names_and_splits():
    with pytest.raises(DataError, match="no built-in data set 'tiny'.*" + ", ".join(NAMES)):
        load_records("builtin:tiny", kind="sft")
    with pytest.raises(DataError, match="no split 'test'"):
        load_records("builtin:review_openings#test", kind="prompt")
    with pytest.raises(DataError, match="arithmetic has no split 'test': expected train or held"):
        load_records("builtin:arithmetic#test", kind="prompt")
    with pytest.raises(DataError, match="tiny_sft has no split 'test'"):
        load_records("builtin:tiny_sft#test", kind="sft")
