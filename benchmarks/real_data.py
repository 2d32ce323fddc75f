"""Real data sets in this project's record formats, for the experiments that can use them.

    python benchmarks/real_data.py --from=DATA --to=runs/data

DATA holds oasst_en100/kwise.jsonl.gz (replies of OpenAssistant's trees with their ranks),
llamafactory_demos/dpo_en_demo.jsonl.gz (pairs of answers for helpfulness) and
hh_harmless/pairs.jsonl.gz (Anthropic's red-teaming pairs). Written are

    oasst_demonstrations.jsonl    sft: every prompt with its best reply
    oasst_ranked.jsonl            ranked: every prompt with all replies
    oasst_prompts.jsonl           prompt
    helpful_pairs.jsonl           preference
    hh_prompts.jsonl              prompt: red-teaming dialogues up to the assistant's last turn
    hh_mixture.jsonl              preference: helpful and red-teaming pairs by turns

Trees, and so prompts of one conversation, are never split: the files keep the order of DATA.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from align_jax.data.records import parse_record
from align_jax.errors import DataError
from align_jax.files import write_file

ROLES = {"prompter": "user", "human": "user", "gpt": "assistant"}

Records = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", required=True, dest="source", type=Path)
    parser.add_argument("--to", required=True, type=Path)
    arguments = parser.parse_args()
    files = _oasst(arguments.source / "oasst_en100" / "kwise.jsonl.gz")
    files |= _helpful(arguments.source / "llamafactory_demos" / "dpo_en_demo.jsonl.gz")
    files |= _hh(arguments.source / "hh_harmless" / "pairs.jsonl.gz")
    by_turns = zip(files["helpful_pairs"], files.pop("harmless_pairs"))
    files["hh_mixture"] = [pair for both in by_turns for pair in both]
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        file = arguments.to / f"{name}.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(file, lines.encode("utf-8"))
        print(f"{file}: {len(records)} records")


def _read(file: Path) -> Records:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": ROLES.get(role, role), "content": content}


def _oasst(file: Path) -> dict[str, Records]:
    demonstrations, ranked, prompts = [], [], []
    for record in _read(file):
        prompt = [_message(turn["role"], turn["text"]) for turn in record["messages"]]
        replies = sorted(record["replies"], key=lambda reply: reply["rank"])
        answers = [[_message("assistant", reply["text"])] for reply in replies]
        ranks = [reply["rank"] for reply in replies]
        demonstrations.append({"messages": prompt + answers[0]})
        ranked.append({"prompt": prompt, "completions": answers, "ranks": ranks})
        prompts.append({"prompt": prompt})
    return {
        "oasst_demonstrations": demonstrations,
        "oasst_ranked": ranked,
        "oasst_prompts": prompts,
    }


def _helpful(file: Path) -> dict[str, Records]:
    pairs = []
    for record in _read(file):
        sides = {side: record[side] for side in ("chosen", "rejected")}
        answers = {side: [_message(turn["from"], turn["value"])] for side, turn in sides.items()}
        prompt = [_message(turn["from"], turn["value"]) for turn in record["conversations"]]
        pairs.append({"prompt": prompt, **answers})
    return {"helpful_pairs": pairs}


def _hh(file: Path) -> dict[str, Records]:
    prompts, pairs = [], []
    for number, record in enumerate(_read(file), start=1):
        try:
            pair = parse_record(record, kind="preference", where=f"{file}:{number}")
        except DataError as error:
            print(f"left out: {error}")
            continue
        prompts.append({"prompt": pair["prompt"]})
        pairs.append(record)
    return {"hh_prompts": prompts, "harmless_pairs": pairs}


if __name__ == "__main__":
    main()
