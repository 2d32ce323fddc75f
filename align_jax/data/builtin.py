"""Made data, the same on every machine: neutral review openings, tiny sets with a plain rule, sums.

The openings are for controlled sentiment generation (DPO, arXiv:2305.18290, section 6.1; Ziegler et
al., arXiv:1909.08593): they stop in mid-sentence where an opinion follows, and score exactly 0 with
VADER, so that all sentiment is the model's own. Hence no "thriller" and no "comedy": both have a
score.
"""

from __future__ import annotations

import itertools
import string
from typing import Any

from align_jax.data.loader import permutation
from align_jax.errors import DataError
from align_jax.text import brief

_SLOTS = {
    "genre": ("western", "musical", "drama", "mystery", "biopic", "remake", "sequel", "cartoon"),
    "companion": ("my brother", "my sister", "my roommate", "a neighbour", "my cousin"),
    "day": ("on Friday", "on Sunday", "on Monday", "last night", "last week", "yesterday"),
    "aspect": ("acting", "plot", "soundtrack", "dialogue", "pacing", "ending", "script", "cast"),
}
# No template of one split has the wording of one in the other: held-out scores measure more than
# remembered sentences.
TEMPLATES = {
    "train": (
        "I watched the new {genre} with {companion}, and the {aspect} was",
        "We saw a {genre} {day}, and the {aspect} was",
        "I just finished this {genre}, and the {aspect} felt",
        "After two hours of the {genre}, I found the {aspect}",
        "In my opinion, the {aspect} of this {genre} was",
        "My review of the {genre} I saw {day}: the {aspect} was",
        "I took {companion} to a {genre}, and we thought the {aspect} was",
        "There was a {genre} on television {day}, and its {aspect} was",
    ),
    "held_out": (
        "From the first scene of this {genre}, the {aspect} seemed",
        "Leaving the theatre {day}, I told {companion} that the {aspect} was",
        "As for the {genre} that we streamed {day}, it was",
        "What I remember of that {genre} is the {aspect}, which was",
        "When {companion} asks me about the {genre}, I say it was",
        "Halfway through the {genre}, I noticed that the {aspect} was",
    ),
}


def review_openings(split: str, count: int, seed: int = 0) -> list[str]:
    """Returns `count` distinct openings of film reviews, 6 to 14 words each.

    `split` is `train` or `held_out`; the splits share no template. With one seed, a larger count
    begins with the openings of a smaller one; every template is used equally often while it lasts.
    Raises DataError for another split, or a count that the grammar cannot give.
    """
    if split not in TEMPLATES:
        raise DataError(f"review_openings has no split {brief(split)}: expected train or held_out")
    columns = []
    for number, template in enumerate(TEMPLATES[split]):
        openings = _fill(template)
        columns.append([openings[i] for i in permutation(len(openings), seed, number)])
    mixed = [one for turn in itertools.zip_longest(*columns) for one in turn if one is not None]
    if not 1 <= count <= len(mixed):
        raise DataError(
            f"review_openings({split!r}) holds {len(mixed)} openings; {count} were asked for"
        )
    return mixed[:count]


def _fill(template: str) -> list[str]:
    slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    choices = itertools.product(*(_SLOTS[slot] for slot in slots))
    return [template.format(**dict(zip(slots, values, strict=True))) for values in choices]


def load_builtin(name: str, split: str | None = None) -> list[dict[str, Any]]:
    """Returns the raw records of the built-in data set `name`.

    Raises DataError for a name or a split that is not there.
    """
    if name == "review_openings":
        openings = review_openings(split or "train", 256)
        return [{"prompt": opening} for opening in openings]
    if name == "arithmetic":
        return arithmetic(split or "train")
    if name not in _TINY:
        raise DataError(f"no built-in data set {brief(name)}: expected one of {', '.join(NAMES)}")
    if split not in (None, "train"):
        raise DataError(f"builtin:{name} has no split {brief(split)}: expected train")
    return [_TINY[name](int(number)) for number in permutation(128, 0)]


def arithmetic(split: str) -> list[dict[str, Any]]:
    """Sums of two numbers from 1 to 22 with their answers: {"prompt": "7 + 12 =", "answer": 19}.

    189 for `train`, 64 for `held_out`; no two are of the same numbers, so a held-out sum is not a
    trained one in the other order. Raises DataError for another split.
    """
    if split not in ("train", "held_out"):
        raise DataError(f"arithmetic has no split {brief(split)}: expected train or held_out")
    pairs = list(itertools.combinations_with_replacement(range(1, 23), 2))
    mixed = [pairs[i] for i in permutation(len(pairs), 0)]
    # Every other one with the larger number first.
    mixed = [(b, a) if number % 2 else (a, b) for number, (a, b) in enumerate(mixed)]
    chosen = mixed[:189] if split == "train" else mixed[189:]
    return [{"prompt": f"{a} + {b} =", "answer": a + b} for a, b in chosen]


def _tiny_sft(number: int) -> dict[str, Any]:
    pair = _tiny_preference(number)
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def _tiny_preference(number: int) -> dict[str, Any]:
    """Chosen counts up from the prompt's number, rejected counts down; both are as long."""
    start, steps = 20 + number // 2, 3 + number % 2
    up = [str(start + step) for step in range(1, steps + 1)]
    down = [str(start - step) for step in range(1, steps + 1)]
    return {
        "prompt": f"Count {steps} from {start}:",
        "chosen": " " + " ".join(up),
        "rejected": " " + " ".join(down),
    }


def _tiny_chat(number: int) -> dict[str, Any]:
    """The same pairs as conversations; every other one has an earlier turn."""
    pair = _tiny_preference(number)
    prompt = [{"role": "user", "content": pair["prompt"]}]
    if number % 2:
        before = _tiny_preference((number + 64) % 128)
        prompt = [
            {"role": "user", "content": before["prompt"]},
            {"role": "assistant", "content": before["chosen"].strip()},
            *prompt,
        ]
    answers = {
        name: [{"role": "assistant", "content": pair[name].strip()}]
        for name in ("chosen", "rejected")
    }
    return {"prompt": prompt, **answers}


def _tiny_ranked(number: int) -> dict[str, Any]:
    """Two to four answers in any order: each question mark at its end makes one worse."""
    pair = _tiny_preference(number)
    order = permutation(2 + number % 3, 1, number).tolist()
    completions = [pair["chosen"] + "?" * rank for rank in order]
    return {"prompt": pair["prompt"], "completions": completions, "ranks": order}


_TINY = {
    "tiny_sft": _tiny_sft,
    "tiny_preferences": _tiny_preference,
    "tiny_chat_preferences": _tiny_chat,
    "tiny_ranked": _tiny_ranked,
}
NAMES = (*_TINY, "arithmetic", "review_openings")
