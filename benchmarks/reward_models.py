"""Reward models of SmolLM2 on pairs whose truth is known, and on Anthropic's red-teaming pairs.

    python benchmarks/reward_models.py --workdir=runs/reward_models --hh=harmless.jsonl.gz

`vader`: 2,000 pairs of benchmarks/sentiment_pairs.py, tested on its 500 of other openings. `hh`:
the pairs of the file but for its last 300, which test it, and those whose sides answer different
prompts. One epoch each. Both are runs of experiments/reward_model.py; what is finished is not run
again, and what was stopped goes on. Writes a section of docs/results.md and the pictures of both
reports. An hour on 2 cores, the pairs included.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from results import ROOT, train, write_section

from align_jax.data.sources import load_records

SECTION = """## Reward models on real text

`python benchmarks/reward_models.py --workdir=runs/reward_models --hh=harmless.jsonl.gz`: SmolLM2
with a scalar head, pairwise loss, one epoch, seed 0. Brackets are 95 % intervals, bootstrapped over
prompts. The last column is the ECE that a perfectly calibrated model with these confidences would
show on as many pairs, on average: what is left to sampling.

| pairs | trained on | tested on | accuracy | ECE | Brier | nats a pair | ECE if calibrated |
|---|---|---|---|---|---|---|---|
{rows}

VADER's pairs are best against worst of four samples of SmolLM2 on one opening; the tested ones have
openings from other templates:

![Reliability of the reward model on VADER's pairs](reward_model_vader.png)

Anthropic's harmless pairs (Bai et al. 2022) are two answers in one red-teaming dialogue:

![Reliability of the reward model on red-teaming pairs](reward_model_hh.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--hh", required=True, type=Path, help="Anthropic's pairs, 1,800")
    parser.add_argument("--pairs", type=Path, help="of sentiment_pairs.py; made if not given")
    arguments = parser.parse_args()
    folder, pairs = arguments.workdir.resolve(), arguments.pairs
    if pairs is not None:
        pairs = pairs.resolve()
    else:
        pairs = folder / "pairs"
        if not (pairs / "held_out.jsonl").exists():
            script = str(ROOT / "benchmarks" / "sentiment_pairs.py")
            subprocess.run([sys.executable, script, f"--to={pairs}"], check=True, cwd=ROOT)
    settings = {
        "vader": {
            "data.source": pairs / "train.jsonl",
            "data.eval_source": pairs / "held_out.jsonl",
            "data.max_length": 64,
        },
        "hh": {
            "data.source": arguments.hh.resolve(),
            "data.invalid": "drop",
            "held_out": 300,
            "optimizer.learning_rate": 5e-5,
        },
    }
    rows = []
    for name, fields in settings.items():
        overrides = [f"--config.{key}={value}" for key, value in fields.items()]
        run = folder / name
        config = ROOT / "experiments" / "reward_model.py"
        train(config, run, ["--config.checkpoint_every=25", *overrides])
        found = json.loads((run / "finished.json").read_text())["eval"]
        records = load_records(
            str(fields["data.source"]),
            kind="preference",
            invalid=fields.get("data.invalid", "error"),
        )
        rows.append(_row(name, len(records) - fields.get("held_out", 0), found))
        picture = ROOT / "docs" / f"reward_model_{name}.png"
        shutil.copy(run / "report" / "calibration.png", picture)
    print("\n".join(rows))
    write_section("reward models", SECTION.format(rows="\n".join(rows)))


def _row(name: str, trained_on: int, found: dict) -> str:
    def value(key: str) -> str:
        low, high = found[f"{key}_ci95"]
        return f"{found[key]:.3f} ({low:.3f} to {high:.3f})"

    cells = [
        name,
        f"{trained_on:,}",
        f"{found['pairs']}",
        *map(value, ("accuracy", "ece", "brier", "nll")),
    ]
    return "| " + " | ".join([*cells, f"{found['ece_if_calibrated']['mean']:.3f}"]) + " |"


if __name__ == "__main__":
    main()
