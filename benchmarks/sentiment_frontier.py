"""Reward against KL of every method on controlled sentiment: one base, one budget, one table.

    python benchmarks/sentiment_frontier.py --workdir=runs/frontier

Each method generates 800 completions of 24 tokens of SmolLM2 to learn from, on the same 200
openings, and is evaluated on the same 40 held-out ones (8 samples each) against the same reward,
VADER, and the same 20 samples of the base on each; best of n is that of these. (At another seed
than 0 DPO's openings are others than those of the online methods.) DPO's pairs are best against
worst of 4; online DPO's likewise, from the current policy. The table and the picture go to
docs/results.md (between its marks) and docs/sentiment_frontier.png; with some of the methods the
table is printed only. Runs that are finished are not run again, so a stopped benchmark goes on. It
takes 3.3 hours of one core, the sum of the times in the table.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
from results import ROOT, train, write_section

from align_jax.algorithms import settings_of
from align_jax.config import load_config
from align_jax.evaluation import figures, statistics
from align_jax.files import write_file
from align_jax.training.workdir import Workdir

ONLINE = ["--config.data.limit=200", "--config.evaluation.base_samples=20"]
# What a run of each method is, beside its KL coefficient; 20 iterations of 40 completions.
METHODS = {
    "PPO": ("ppo.py", []),
    "RLOO": ("rloo.py", []),
    "REINFORCE": ("reinforce.py", []),
    "online DPO": (
        "rloo.py",
        ["--config.loss=dpo", "--config.optimizer.learning_rate=3.5e-5"],
    ),
    "DPO": ("quickstart.py", []),
}
COEFFICIENTS = {
    "PPO": (0.02, 0.1, 0.3),
    "RLOO": (0.02, 0.1, 0.3),
    "REINFORCE": (0.02, 0.1, 0.3),
    "online DPO": (0.1, 0.3, 1.0),
    "DPO": (0.1, 0.3, 1.0),
}
SHARED = ("sample.jsonl", "sample_base.jsonl", "seconds.json")
BEST_OF = (2, 4, 8, 16)
SECTION = """## Reward against KL on a real model

`python benchmarks/sentiment_frontier.py --workdir=runs/frontier`: SmolLM2, VADER, 800 completions
of 24 tokens to learn from for each row, seed {seed}; +- is a 95 % interval over the 40 held-out
openings. The last column is the gain over the base divided by the square root of the KL, along
which Bai et al. 2022 (section 4.3) found rewards to grow linearly.

![Mean VADER against KL, every method](sentiment_frontier.png)

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = arguments.methods.split(",")
    if unknown := sorted(set(chosen) - set(METHODS)):
        parser.error(f"--methods={','.join(unknown)}: expected some of {', '.join(METHODS)}")
    folder = Path(arguments.workdir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows, pool = [], None
    for method in chosen:
        for coefficient in COEFFICIENTS[method]:
            workdir = folder / f"{method.replace(' ', '_')}_{coefficient}_seed{arguments.seed}"
            summary = _run(method, coefficient, arguments.seed, workdir)
            # One base for all, though DPO's runs draw samples of their own for their reports.
            if pool is None:
                pool = _scores(workdir / "samples" / "sample_base.jsonl", 20)
            samples = _scores(workdir / "samples" / "sample_trained.jsonl", 8)
            trained = summary["trained"] | {"win_rate": statistics.win_rate(samples, pool)[0]}
            slope = (trained["reward_mean"] - pool.mean()) / max(trained["kl"], 1e-6) ** 0.5
            seconds = sum(summary["seconds"].values())
            rows.append((method, coefficient, trained, seconds, slope))
    table = _table(rows, pool)
    print("\n" + table)
    if chosen == list(METHODS):
        write_file(ROOT / "docs" / "sentiment_frontier.png", _picture(rows, pool))
        write_section("frontier", SECTION.format(seed=arguments.seed, table=table))


def _run(method: str, coefficient: float, seed: int, workdir: Path) -> dict:
    config, settings = METHODS[method]
    field = "beta" if method == "DPO" else "kl.coefficient"
    spec = ROOT / "experiments" / config
    overrides = [
        f"--config.seed={seed}",
        f"--config.{field}={coefficient}",
        *settings,
        *([] if method == "DPO" else ONLINE),
    ]
    print(f"\n== {method}, coefficient {coefficient}", flush=True)
    # What the untrained model says is the same in every run of a seed, and DPO's pairs at every
    # beta: a phase whose file is there is not run again.
    kind = "DPO" if method == "DPO" else "online"
    shared = workdir.parent / f"shared_{kind}_seed{seed}"
    if shared.exists() and not workdir.exists():
        Workdir(workdir, settings_of(load_config(str(spec), overrides)))
        _copy(shared, workdir / "samples")
    train(spec, workdir, overrides)
    if not shared.exists():
        _copy(workdir / "samples", shared)
    return json.loads((workdir / "report" / "summary.json").read_text(encoding="utf-8"))


def _copy(source: Path, target: Path) -> None:
    """The shared samples; whole or not there, as a phase takes any file for finished."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir()
    for file in SHARED:
        if (source / file).exists():
            shutil.copy(source / file, partial)
    os.replace(partial, target)


def _scores(file: Path, per_prompt: int) -> np.ndarray:
    lines = file.read_text(encoding="utf-8").splitlines()
    rewards = [json.loads(line)["scores"]["reward"] for line in lines]
    return np.array(rewards).reshape(-1, per_prompt)


def _table(rows: list[tuple], pool: np.ndarray) -> str:
    lines = [
        "| method | KL coefficient | mean VADER | win rate | KL, nats | distinct-2 | seconds | "
        "gain / sqrt(KL) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mean, interval = statistics.mean_ci95(pool)
    lines.append(f"| base | | {mean:.3f} +- {interval:.3f} | .500 | 0 | | | |")
    for n in BEST_OF:
        wins, _ = statistics.best_of_n_win_rate(pool, n)
        bound, best = statistics.best_of_n_kl_bound(n), statistics.best_of_n(pool, n).mean()
        lines.append(f"| best of {n} | | {best:.3f} | {wins:.3f} | at most {bound:.2f} | | | |")
    for method, coefficient, trained, seconds, slope in rows:
        lines.append(
            f"| {method} | {coefficient} | {trained['reward_mean']:.3f} +- "
            f"{trained['reward_ci95']:.3f} | {trained['win_rate']:.3f} | {trained['kl']:.2f} | "
            f"{trained['distinct_2']:.3f} | {seconds:.0f} | "
            f"{slope:.2f} |"
        )
    return "\n".join(lines)


def _picture(rows: list[tuple], pool: np.ndarray) -> bytes:
    figure, (axis,) = figures.new_figure(7.4, 4.6)
    counts = range(1, 17)
    axis.plot(
        [statistics.best_of_n_kl_bound(n) for n in counts],
        [statistics.best_of_n(pool, n).mean() for n in counts],
        color=figures.BASE,
        linewidth=1.4,
        label="best of n (KL: its upper bound)",
    )
    for method, marker in zip(dict.fromkeys(row[0] for row in rows), "osD^v"):
        own = [row for row in rows if row[0] == method]
        axis.errorbar(
            [row[2]["kl"] for row in own],
            [row[2]["reward_mean"] for row in own],
            yerr=[row[2]["reward_ci95"] for row in own],
            fmt=marker,
            markersize=6,
            capsize=3,
            linewidth=1,
            label=method,
        )
    axis.set_xlabel("KL to the base, nats a completion", fontsize=9, color=figures.INK)
    axis.set_ylabel("mean VADER on held-out openings, 95 %", fontsize=9, color=figures.INK)
    axis.legend(fontsize=8, frameon=False)
    return figures.as_png(figure)


if __name__ == "__main__":
    main()
