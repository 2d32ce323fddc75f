"""The pictures of a report, as PNG bytes: training curves, reward histogram, reward against KL."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from align_jax.evaluation import statistics

BASE, BEST, TRAINED = "#6f7680", "#c96f1e", "#1f6fb2"
_GRID = {"color": "#e4e6e9", "linewidth": 0.8}
INK = "#30343a"

# Panels of the training curves: title, {metric: (label, color)}, value of no learning.
_PANELS = (
    ("Loss", {"loss": ("", TRAINED)}, None),
    ("Accuracy of the {reward}", {"rewards/accuracies": ("", TRAINED)}, 0.5),
    ("Margin of the {reward}", {"rewards/margins": ("", TRAINED)}, 0.0),
    (
        "{reward}",
        {"rewards/chosen": ("chosen", TRAINED), "rewards/rejected": ("rejected", BEST)},
        0.0,
    ),
    (
        "Log-probability of a response (nats)",
        {"logps/chosen": ("chosen", TRAINED), "logps/rejected": ("rejected", BEST)},
        None,
    ),
    ("Mean score of the completions", {"objective/scores": ("", TRAINED)}, None),
    ("KL to the reference (nats)", {"objective/kl": ("", TRAINED)}, 0.0),
    ("Entropy of a token (nats)", {"policy/entropy_avg": ("", TRAINED)}, None),
    ("Norm of the gradient", {"grad_norm": ("", TRAINED)}, None),
)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of this size in inches and the list of its axes, in the style of all reports."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.04)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#a9afb6")
        axis.tick_params(colors=INK, labelsize=9)
        axis.grid(**_GRID)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def _legend_above(figure) -> None:
    # Outside the axes, where it can hide no point.
    figure.legend(loc="outside upper left", ncols=3, fontsize=9, frameon=False)


def as_png(figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) values, over as many as there are at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def training_curves(
    curves: Sequence[Mapping[str, float]], *, reward: str = "implicit reward"
) -> bytes | None:
    """Metrics over steps, a panel for each known one in the rows; None if there is none."""
    present = [panel for panel in _PANELS if any(key in row for row in curves for key in panel[1])]
    if not present:
        return None
    columns = min(3, len(present))
    rows = math.ceil(len(present) / columns)
    figure, axes = new_figure(3.7 * columns, 2.6 * rows, rows, columns)
    for axis, (title, metrics, neutral) in zip(axes, present):
        for key, (label, color) in metrics.items():
            points = [(row["step"], row[key]) for row in curves if key in row]
            if not points:
                continue
            step, value = np.array(points, np.float64).T
            many = len(points) > 40
            axis.plot(step, value, color=color, linewidth=1.5, alpha=0.3 if many else 1)
            if many:
                mean = _running_mean(value, 2 * (len(points) // 40) + 1)
                axis.plot(step, mean, color=color, linewidth=1.8)
            # An invisible line carries the name, so that the legend shows the full colour.
            axis.plot([], [], color=color, label=label or None)
        if neutral is not None:
            axis.axhline(neutral, color=BASE, linewidth=1, linestyle=(0, (2, 2)))
        title = title.format(reward=reward)
        axis.set_title(title[0].upper() + title[1:], fontsize=10, color=INK, loc="left")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if len(metrics) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(present) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(present) - columns) : len(present)]:
        axis.set_xlabel("step", fontsize=9, color=INK)
    return as_png(figure)


def reward_histogram(rewards: Mapping[str, np.ndarray]) -> bytes:
    """Rewards of base, best of 4 and trained as shares of samples; dotted lines at the means."""
    figure, (axis,) = new_figure(7.4, 3.6)
    pooled = np.concatenate([np.ravel(values) for values in rewards.values()])
    low, high = float(pooled.min()), float(pooled.max())
    edges = np.linspace(low, high if high > low else low + 1, 22)
    styles = {
        "base": ("base", BASE, dict(histtype="stepfilled", alpha=0.35)),
        "best_of_4": ("best of 4", BEST, dict(histtype="step", linewidth=1.6)),
        "trained": ("trained", TRAINED, dict(histtype="step", linewidth=2)),
    }
    for key, (label, color, style) in styles.items():
        if key not in rewards:
            continue
        values = np.ravel(rewards[key])
        weights = np.full(len(values), 1 / len(values))
        axis.hist(values, edges, weights=weights, color=color, label=label, **style)
        axis.axvline(values.mean(), color=color, linewidth=1.4, linestyle=(0, (1, 1.5)))
    axis.set_xlabel("reward", fontsize=9, color=INK)
    axis.set_ylabel("share of samples", fontsize=9, color=INK)
    _legend_above(figure)
    return as_png(figure)


def reward_against_kl(
    base_rewards: np.ndarray, trained: Mapping[str, float], *, largest_n: int = 16
) -> bytes:
    """Mean reward against sequence KL: best of n of the base pool at its KL bound, and trained.

    base_rewards [P, M]; trained: reward_mean, reward_ci95 and kl as in summary.json.
    """
    figure, (axis,) = new_figure(7.4, 3.8)
    counts = np.arange(1, min(largest_n, np.shape(base_rewards)[1]) + 1)
    kl = [statistics.best_of_n_kl_bound(int(n)) for n in counts]
    mean = [statistics.best_of_n(base_rewards, int(n)).mean() for n in counts]
    axis.plot(kl, mean, color=BEST, marker="o", markersize=3.5, linewidth=1.6, label="best of n")
    for n, x, y in zip(counts, kl, mean):
        if n in (2, 4, 8, 16):
            place = dict(textcoords="offset points", xytext=(6, -11))
            axis.annotate(f"n={n}", (x, y), fontsize=8, color=BEST, **place)
    axis.plot(0, mean[0], marker="o", markersize=7, color=BASE, linestyle="none", label="base")
    interval = trained["reward_ci95"]
    axis.errorbar(
        trained["kl"],
        trained["reward_mean"],
        yerr=interval if math.isfinite(interval) else None,
        fmt="D",
        markersize=7,
        capsize=4,
        color=TRAINED,
        label="trained, 95 % interval",
    )
    axis.set_xlabel("KL to the base, nats (best of n: its upper bound)", fontsize=9, color=INK)
    axis.set_ylabel("mean reward", fontsize=9, color=INK)
    _legend_above(figure)
    return as_png(figure)
