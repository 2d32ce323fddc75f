"""Preference pairs with a known truth: a model's own continuations of review openings, by VADER.

    python benchmarks/sentiment_pairs.py --to=runs/sentiment_pairs

writes train.jsonl (2,000 pairs) and held_out.jsonl (500) for experiments/reward_model.py: the best
against the worst of 4 samples by VADER on the continuation alone; a group that ties is left out. An
opening gets another group of 4 once all of them had one. The held-out openings come from templates
that the training openings do not use. 15 minutes on 2 idle cores.
"""

import argparse
import bisect
import itertools
import json
from pathlib import Path

import jax

from align_jax.data.builtin import review_openings
from align_jax.files import write_file
from align_jax.generation import generate
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.progress import progress
from align_jax.rewards.rules import vader_sentiment

SAMPLES = 4
BATCH = 40  # openings decoded together
OPENINGS = {"train": 1000, "held_out": 500}
STRENGTHS = (0.5, 1.0)  # differences of the score from which a preference has strength 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", required=True, help="directory to write to")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--train_pairs", type=int, default=2000)
    parser.add_argument("--held_out_pairs", type=int, default=500)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.to)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    for fold, split in enumerate(("train", "held_out")):
        wanted = getattr(arguments, f"{split}_pairs")
        key = jax.random.fold_in(jax.random.key(arguments.seed), fold)
        pairs = make_pairs(model, tokenizer, split, wanted, arguments, key)
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        write_file(folder / f"{split}.jsonl", lines.encode("utf-8"))
        print(f"{folder / split}.jsonl: {len(pairs)} pairs")


def make_pairs(model, tokenizer, split, wanted, arguments, key) -> list[dict]:
    """The first `wanted` pairs, opening by opening, in as many rounds as that takes."""
    openings = review_openings(split, OPENINGS[split], seed=arguments.seed)
    starts = range(0, len(openings), BATCH)
    pairs: list[dict] = []
    with progress(description=split, total=wanted, unit="pair") as bar:
        for number in itertools.count():
            opening, round_ = starts[number % len(starts)], number // len(starts)
            batch = openings[opening : opening + BATCH]
            draw = jax.random.fold_in(jax.random.fold_in(key, round_), opening)
            texts = _continue(model, tokenizer, batch, arguments, draw)
            before = len(pairs)
            for prompt, group in zip(batch, _groups(texts)):
                pairs += _pair(prompt, group)
            bar.update(min(len(pairs), wanted) - before)
            if len(pairs) >= wanted:
                return pairs[:wanted]


def _groups(texts: list[str]) -> list[list[str]]:
    return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]


def _continue(model, tokenizer, openings, arguments, key) -> list[str]:
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in openings]
    drawn = generate(
        model,
        prompts,
        key=key,
        max_new_tokens=arguments.max_new_tokens,
        stop_tokens=(tokenizer.eos_token_id,),
        samples_per_prompt=SAMPLES,
    )
    tokens, mask, _ = jax.device_get(drawn)
    return [
        tokenizer.decode(row[kept > 0].tolist(), skip_special_tokens=True)
        for row, kept in zip(tokens, mask)
    ]


def _pair(opening: str, texts: list[str]) -> list[dict]:
    scores = vader_sentiment(texts).tolist()
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        return []
    strength = 1 + bisect.bisect_right(STRENGTHS, scores[best] - scores[worst])
    return [
        {
            "prompt": opening,
            "chosen": texts[best],
            "rejected": texts[worst],
            "strength": strength,
        }
    ]


if __name__ == "__main__":
    main()
