"""The report of a reward model: one HTML page, its pictures, and summary.json."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_jax.evaluation.figures import (
    BASE,
    BEST,
    INK,
    TRAINED,
    as_png,
    new_figure,
    training_curves,
)
from align_jax.evaluation.report import (
    html_figure,
    html_page,
    html_table,
    plain,
    write_files,
)

_CAPTION = (
    "Top left: how often the model is right against how sure it is, in bins of confidence "
    "max(p, 1 - p) with p = sigmoid(r_chosen - r_rejected); on the dotted line it is right as "
    "often as it says. Top right: accuracy against the difference of the two rewards, an eighth of "
    "the pairs a point; dotted: what sigmoid promises. Bars: 95 % intervals (Wilson), which take "
    "pairs as independent. Below: rewards of chosen and rejected responses, and accuracy by "
    "strength of the preference (in rankings: by the difference of the ranks)."
)


def calibration_figure(summary: Mapping[str, Any], chosen: np.ndarray, rejected: np.ndarray):
    """Reliability, accuracy by difference, rewards, and accuracy by strength if known: PNG bytes.

    `summary` as of `calibration.calibrate`; rewards `[N]`.
    """
    figure, axes = new_figure(9.2, 6.6, 2, 2)
    reliability, by_difference, rewards, by_strength = axes
    reliability.plot([0.5, 1], [0.5, 1], **_PROMISE)
    _points(reliability, summary["reliability"], "confidence")
    _label(reliability, "Reliability", "confidence", "share right")
    rows = summary["by_difference"]
    grid = np.linspace(0, max(row["difference"] for row in rows), 100)
    by_difference.plot(grid, 1 / (1 + np.exp(-grid)), **_PROMISE)
    _points(by_difference, rows, "difference")
    _label(by_difference, "Accuracy by difference", "difference of the rewards", "share right")
    pooled = np.concatenate([chosen, rejected])
    low, high = float(pooled.min()), float(pooled.max())
    edges = np.linspace(low, high if high > low else low + 1, 26)
    for name, values, color in (("chosen", chosen, TRAINED), ("rejected", rejected, BEST)):
        weights = np.full(len(values), 1 / len(values))
        style = {"histtype": "stepfilled", "alpha": 0.4, "color": color, "label": name}
        rewards.hist(values, edges, weights=weights, **style)
        rewards.axvline(np.mean(values), color=color, linewidth=1.4, linestyle=(0, (1, 1.5)))
    rewards.legend(fontsize=8, frameon=False)
    _label(rewards, "Rewards", "reward (log-odds)", "share of responses")
    strengths = summary.get("by_strength")
    if strengths:
        places = range(len(strengths))
        _points(by_strength, [{**row, "at": i} for i, row in enumerate(strengths.values())], "at")
        by_strength.set_xticks(
            places, [f"{name}\n{row['pairs']} pairs" for name, row in strengths.items()]
        )
        by_strength.axhline(0.5, **_PROMISE)
        _label(by_strength, "Accuracy by strength", "", "share right")
    else:
        by_strength.set_visible(False)
    return as_png(figure)


_PROMISE = {"color": BASE, "linewidth": 1, "linestyle": (0, (2, 2))}


def _points(axis, rows: Sequence[Mapping], x: str) -> None:
    y = np.array([row["accuracy"] for row in rows])
    low, high = np.array([row["accuracy_ci95"] for row in rows]).T
    axis.errorbar(
        [row[x] for row in rows],
        y,
        # Rounding may leave a bound on the wrong side of the point.
        yerr=np.maximum([y - low, high - y], 0),
        fmt="o",
        markersize=4.5,
        capsize=3,
        linewidth=1.4,
        color=TRAINED,
    )


def _label(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)


def format_calibration(summary: Mapping[str, Any]) -> str:
    """The numbers that matter for a terminal of 80 columns, in ASCII."""
    chance = summary["ece_if_calibrated"]
    lines = [f"{summary['pairs']} held-out pairs of {summary['prompts']} prompts"]
    lines += [
        f"{name:<9}{summary[key]:.3f}  [{summary[key + '_ci95'][0]:.3f}, "
        f"{summary[key + '_ci95'][1]:.3f}]"
        for name, key in _MEASURES
    ]
    lines.append(
        f"(95 % intervals by prompt; a calibrated model's ECE on as many pairs: "
        f"{chance['mean']:.3f})"
    )
    if "ensemble" in summary:
        lines += [f"members: {one}" for one in _of_members(summary["ensemble"])]
    return "\n".join(lines)


def _of_members(ensemble: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{share:.3f}" for share in ensemble["accuracy"])
    return [
        f"accuracy {shares}",
        f"disagreement {ensemble['disagreement']:.3f} nats a pair (standard deviation)",
    ]


_MEASURES = (("accuracy", "accuracy"), ("ECE", "ece"), ("Brier", "brier"), ("nats", "nll"))


def write_calibration_report(
    directory: str | os.PathLike,
    *,
    title: str,
    summary: Mapping[str, Any],
    chosen: np.ndarray,
    rejected: np.ndarray,
    curves: Sequence[Mapping[str, float]] = (),
) -> Path:
    """Writes index.html, calibration.png, curves.png and summary.json; returns the page.

    summary: of `calibration.calibrate`; `ensemble`, of several members their `accuracy` and
      `disagreement`, nats; what else there is (`config`) is listed.
    curves: rows of metrics.jsonl. A report that is there survives a failure.
    """
    picture = calibration_figure(summary, chosen, rejected)
    pictures = {"calibration.png": picture}
    figure = html_figure(picture, "Calibration", _CAPTION)
    sections = [("Result", _results(summary)), ("Calibration", figure)]
    trained = training_curves(curves, reward="reward")
    if trained is not None:
        pictures["curves.png"] = trained
        caption = "Per optimizer step, on training batches. Dotted: the value at no preference."
        sections.append(("Training", html_figure(trained, "Training", caption)))
    summary = plain(summary)
    listing = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = html_page(title, [*sections, ("All numbers", _listing(listing))])
    return write_files(directory, page, listing, pictures)


def _results(summary: Mapping[str, Any]) -> str:
    rows = [
        ("", [name, f"{summary[key]:.3f}", "{:.3f} – {:.3f}".format(*summary[f"{key}_ci95"])])
        for name, key in _MEASURES
    ]
    chance = summary["ece_if_calibrated"]
    caption = (
        f"{summary['pairs']} held-out pairs of {summary['prompts']} prompts; 95 % bootstrap "
        "intervals by prompt. Brier: mean of (1 - p)²; nats: mean of -log p. A model that is right "
        "exactly as often as it says would have, on as many pairs, an ECE of "
        f"{chance['mean']:.3f} by chance (95 % of the time below {chance['quantile_95']:.3f})."
    )
    if "ensemble" in summary:
        caption += f" The members: {'; '.join(_of_members(summary['ensemble']))}."
    table = html_table(("", "value", "95 % interval"), rows, "narrow")
    return f'{table}\n<p class="caption">{caption}</p>'


def _listing(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"<pre>{escaped}</pre>"
