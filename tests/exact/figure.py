"""The picture of the table: reward against KL, the exact frontier and where each method lands."""

import io
from collections.abc import Mapping

import numpy as np

from align_jax.exact.language import Array, World, best_of_n, expectation, kl

INK, BLUE, ORANGE, RED, GREY = "#30343a", "#1f6fb2", "#c96f1e", "#b0202e", "#6f7680"

# The methods that land elsewhere than the optimum: their labels, and where those stand.
LABELS = {
    "length-normalised DPO": ("length-normalised DPO", 0.12, 1.06),
    "EXO, hard labels, smoothing 0.1": ("EXO", 0.52, 1.13),
    "f-DPO, Jensen-Shannon": ("f-DPO, Jensen-Shannon", 0.0, 0.96),
    "DPO, 20% of labels flipped": ("DPO, 20% flipped", 0.0, 0.86),
    "NCA, hard pairs": ("NCA", 0.03, 0.73),
    "RSO hinge": ("RSO hinge", 0.88, 0.9),
    "GRPO without std, k2 in the loss, K = 2": ("GRPO, k2 in the loss", 0.75, 0.78),
    "GRPO without std, k3 in the loss, K = 2": ("GRPO, k3 in the loss", 0.75, 0.69),
    "ORPO, lambda = 1": ("ORPO", 0.75, 0.555),
    "GRPO (paper: std, k3 in the loss), K = 2": ("GRPO as in its paper", 0.75, 0.49),
    "conservative DPO, 20% flipped": ("conservative DPO, 20% flipped", 0.5, 0.43),
    "f-DPO, forward KL": ("f-DPO, forward KL", 0.5, 0.35),
    "IPO": ("IPO and SPPO", 0.5, 0.27),
    "SLiC, delta = 1, lambda = 1": ("SLiC", 0.92, 0.62),
    "SimPO, gamma = 0": ("SimPO, gamma = 0", 1.08, 0.97),
    "SimPO, gamma = 1": ("SimPO, gamma = 1", 1.68, 1.27),
    "CPO (contrastive term)": ("CPO", 1.68, 1.19),
    "KTO": ("KTO, flipped or not", 1.68, 1.11),
}
RIGHT = 2.7


def frontier(world: World, policies: Mapping[str, Array]) -> bytes:
    """PNG of mean reward against mean KL to the reference, over prompts."""
    from matplotlib.figure import Figure

    def point(law):
        return kl(law, world.reference).mean(), expectation(law, world.reward).mean()

    def optimum(beta):
        return World(world.language, world.reference, world.reward, beta).optimum

    figure = Figure(figsize=(9, 5.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.grid(color="#eceef0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.plot(
        *np.transpose([point(optimum(beta)) for beta in np.geomspace(0.05, 100, 200)]),
        color=INK, linewidth=1.5, label="exact frontier: the optimum at every beta",
    )  # fmt: skip
    best = {n: point(best_of_n(world.reference, world.reward, n)) for n in (1, 2, 4, 8, 16, 32)}
    axis.plot(
        *np.transpose(list(best.values())), "s--",
        color=ORANGE, markersize=4, linewidth=0.8, label="best of n",
    )  # fmt: skip
    for n, place in best.items():
        axis.annotate(
            f"n = {n}", place, xytext=(5, -9), textcoords="offset points", fontsize=8, color=ORANGE
        )
    arrived = [name for name, policy in policies.items() if world.distance(policy) < 5e-3]
    axis.plot(
        *point(world.optimum), "*", color=RED, markersize=16, zorder=4, linestyle="none",
        label=f"the optimum at beta = {world.beta:g}",
    )  # fmt: skip
    axis.annotate(
        "\n".join(arrived), point(world.optimum), xytext=(0.02, 1.7), va="top", fontsize=8,
        color=RED, arrowprops={"arrowstyle": "-", "color": RED, "linewidth": 0.6, "shrinkB": 8},
    )  # fmt: skip
    elsewhere = {name: point(policy) for name, policy in policies.items() if name not in arrived}
    axis.plot(
        *np.transpose(list(elsewhere.values())), "o",
        color=BLUE, markersize=5, zorder=3, label=f"trained with beta = {world.beta:g}",
    )  # fmt: skip
    for name, place in elsewhere.items():
        if name in LABELS:
            text, *there = LABELS[name]
            axis.annotate(
                text, place, xytext=there, va="center", fontsize=8, color=INK,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 1},
            )  # fmt: skip
        elif place[0] > RIGHT:
            axis.annotate(
                f"{name}:\n{place[0]:.1f} nats", (RIGHT, place[1]), xytext=(RIGHT - 0.12, place[1]),
                va="center", ha="right", fontsize=8, color=INK,
                arrowprops={"arrowstyle": "->", "color": BLUE},
            )  # fmt: skip
    axis.set(
        xlabel="KL to the reference (nats, mean over prompts)", ylabel="reward", xlim=(-0.05, RIGHT)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
