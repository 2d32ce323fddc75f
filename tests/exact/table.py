"""`python -m tests.exact.table`: every method against the known truth, into docs/results.md.

Writes what stands between the markers in docs/results.md, and docs/exact_frontier.png. Takes about
a quarter of an hour; `--only=TEXT` runs the methods whose name contains TEXT, and prints.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.exact import gradients, others
from tests.exact.fixed_points import MINIMAX_CLASSES, cyclic_preferences, exploitability
from tests.exact.language import (
    World,
    best_of_n,
    expectation,
    kl,
    normalized,
    rejection_sampling,
)
from tests.exact.methods import ALL, POLICY_GRADIENT, PREFERENCE, Landing, Method, land
from tests.exact.training import Run, make_world

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- exact: begin -->", "<!-- exact: end -->"
LONGER = ("DPO", "REINFORCE", "RLOO, K = 2", "PPO, 4 epochs, exact critic, GAE 0.95")


def nats(x: float) -> str:
    if not np.isfinite(x):
        return "infinite"
    return "0" if abs(x) < 1e-12 else f"{x:.3f}" if x >= 0.01 else f"{x:.1e}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def distances(world: World, landing: Landing) -> list[str]:
    """KL(limit || policy), KL(pi* || limit), KL(pi* || policy) of the worst prompt."""
    own = limit = "-"
    if landing.law is not None:
        lost = np.isneginf(landing.law).any()
        own = nats(kl(landing.law, landing.policy).max())
        limit = "infinite" if lost else nats(kl(world.optimum, landing.law).max())
    return [own, limit, nats(world.distance(landing.policy))]


def run_methods(world: World, methods: list[Method]) -> tuple[list[list[str]], dict[str, Landing]]:
    rows, landings = [], {}
    for method in methods:
        begin = time.perf_counter()
        landings[method.name] = landing = land(method, world)
        rows.append(
            [method.name, method.claim, method.limit, *distances(world, landing),
             str(method.run.steps)]
        )  # fmt: skip
        print(" | ".join(rows[-1]), f"| {time.perf_counter() - begin:.0f} s", flush=True)
    return rows, landings


METHOD_HEADER = [
    "method", "paper's claim", "limit here", "limit to policy", "optimum to limit",
    "optimum to policy", "steps",
]  # fmt: skip


def reward_section(world: World) -> str:
    rows = []
    for name in others.SET_LOSSES:
        tables = others.fit_reward(world, name, transformer=False, run=Run(2000, 3e-2))
        model = others.fit_reward(world, name, transformer=True, run=Run(600, 1e-3))
        row = [name, "yes" if name in others.RECOVERING else "no"]
        for fitted in (tables, model):
            error, distance = others.reward_distance(world, fitted)
            row += [nats(error), nats(distance)]
        rows.append(row)
        print(" | ".join(row), flush=True)
    header = ["loss", "recovers the reward", "table: largest error", "its optimum, nats",
              "`ScalarModel`: largest error", "its optimum, nats"]  # fmt: skip
    return markdown(header, rows)


def sampling_section(world: World) -> str:
    rows = []
    for n in (1, 2, 4, 16, 64):
        law = best_of_n(world.reference, world.reward, n)
        bound = np.log(n) - (n - 1) / n
        rows.append([f"best of {n}", nats(kl(law, world.reference).max()), nats(bound),
                     f"{expectation(law, world.reward).mean():.3f}",
                     nats(world.distance(law))])  # fmt: skip
    for name, below in (("at the largest reward", 0.0), ("1 below the largest reward", 1.0)):
        law, kept = rejection_sampling(world, world.reward.max(-1) - below)
        rows.append([f"rejection sampling, ceiling {name} (keeps {kept.mean():.0%})",
                     nats(kl(law, world.reference).max()), "-",
                     f"{expectation(law, world.reward).mean():.3f}",
                     nats(world.distance(law))])  # fmt: skip
    header = ["law", "KL to the reference", "log n - (n - 1) / n", "mean reward",
              "optimum to law"]  # fmt: skip
    return markdown(header, rows)


def other_section(world: World) -> str:
    rows = []
    for k in (1, 2, 3):
        loss, distance = others.distil(world, k, Run(600, 1e-3))
        rows.append([f"top-{k} distillation of 4 symbols", f"loss {loss:.1e}",
                     f"KL(teacher to student) {nats(distance)} nats"])  # fmt: skip
    preferences, first = cyclic_preferences(world)

    def cycle(name, policy):
        shares = np.array([policy[first == c].sum() for c in range(4)])
        rows.append([name, f"exploitability {nats(exploitability(policy, preferences))}",
                     f"{np.abs(shares - MINIMAX_CLASSES).sum() / 2:.1e} in total variation from "
                     "the minimax mixture (3, 2, 4) / 9"])  # fmt: skip

    last, average = others.play_cycle(world, Run(1500, 1e-3, "constant"), price=0.0, every=10**9)
    cycle("SPO alone, last policy", last)
    cycle("SPO alone, mixture of all policies", average)
    last, _ = others.play_cycle(world, Run(1500, 1e-3), price=0.2, every=50)
    cycle("SPO, KL 0.2 to its policy of at most 50 steps ago, last policy", last)
    reward = others.fit_cycle(world, Run(1000, 3e-2))
    for beta in (1.0, 0.1, 0.01):
        policy = np.exp(normalized(world.reference[0] + reward / beta))
        cycle(f"Bradley-Terry reward, optimal policy at beta = {beta:g}", policy)
    for target in (0.1, 0.3):
        held, coefficient, policy = others.hold_kl(world, target, Run(700, 1e-3))
        there = World(world.language, world.reference, world.reward, coefficient)
        rows.append([f"adaptive KL, target {target:g} nats", f"holds {held:.4f} nats",
                     f"{nats(there.distance(policy))} nats from the optimum at its last "
                     f"coefficient {coefficient:.3f}"])  # fmt: skip
    for row in rows:
        print(" | ".join(row), flush=True)
    return markdown(["what", "result", "against the truth"], rows)


def gradient_section() -> str:
    rows = [[name, nats(bias)] for name, bias in gradients.biases().items()]
    return markdown(["expected gradient of", "relative bias"], rows)


def frontier_plot(world: World, landings: dict[str, Landing]) -> bytes:
    """Mean reward against mean KL: the exact frontier, best of n, and where each method lands."""
    import io

    from matplotlib.figure import Figure

    def point(law):
        return kl(law, world.reference).mean(), expectation(law, world.reward).mean()

    figure = Figure(figsize=(7.2, 4.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    betas = np.geomspace(0.2, 50, 120)
    frontier = [
        point(World(world.language, world.reference, world.reward, b).optimum) for b in betas
    ]
    axis.plot(*np.transpose(frontier), color="#30343a", linewidth=1.2, label="exact frontier")
    best = [point(best_of_n(world.reference, world.reward, n)) for n in (1, 2, 4, 8, 16, 32)]
    axis.plot(*np.transpose(best), "s", color="#c96f1e", markersize=4, label="best of 1 to 32")
    axis.plot(*point(world.optimum), "*", color="#b0202e", markersize=14,
              label=f"optimum at beta = {world.beta:g}")  # fmt: skip
    shown = {"IPO", "SimPO, gamma = 0", "CPO (contrastive term)", "ORPO, lambda = 1",
             "SLiC, delta = 1, lambda = 1", "NCA, hard pairs", "DPO, 20% of labels flipped",
             "GRPO (paper: std, k3 in the loss), K = 2",
             "GRPO without std, k2 in the loss, K = 2",
             "length-normalised DPO"}  # fmt: skip
    for name, landing in landings.items():
        x, y = point(landing.policy)
        near = name not in shown
        if x > 2.2:
            continue
        axis.plot(x, y, "o", color="#1f6fb2", markersize=3 if near else 5)
        if not near:
            axis.annotate(name.split(",")[0], (x, y), fontsize=7, xytext=(5, -8),
                          textcoords="offset points", color="#30343a")  # fmt: skip
    axis.set_xlabel("KL to the reference (nats)")
    axis.set_ylabel("reward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as out:
        out.write(content)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def replace_section(path: Path, section: str) -> None:
    """Puts `section` between the markers, or at the end of a file that has none."""
    text = path.read_text() if path.exists() else "# Results\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    write(path, f"{before}{BEGIN}\n{section}\n{END}{rest.split(END, 1)[1]}".encode())


TEMPLATE = """## What each method converges to

Written by `python -m tests.exact.table`. A language of {symbols} symbols and EOS, strings of up to
{length} symbols, {prompts} prompts: {count} responses each, all enumerated. The reference is a
random Transformer of this project, the reward of every response an independent normal number,
beta = {beta}. So the optimum pi* = ref exp(r / beta) / Z is known, {far} nats from the reference.
A Transformer is trained from the reference with `training.make_train_step`; batches are exact
expectations: all pairs with the probabilities of their labels (comparisons equally often), or all
responses with their probabilities. Distances are in nats, of the worst prompt: `limit to policy`
is KL(limit || trained policy), whether the method reaches its limit; `optimum to limit` is
KL(pi* || limit), whether the limit is the optimum.

{preference}

Policy gradients. Their limits where the KL is in the loss: the penalty's gradient stops at its own
symbol, so that a prefix pays nothing for where it leads (Q is the mean reward after a symbol, under
the policy); k3's expected gradient is that of KL(ref || pi); k1's is 0; and the factor (K - 1) / K
of a mean that includes the sample itself makes beta dearer by K / (K - 1). With the KL in the
reward all advantages are 0 at the optimum, whatever the scaling.

{policy_gradient}

The same on strings of up to 4 symbols, {longer_count} responses:

{longer}

![Reward against KL: the exact frontier and where each method lands](exact_frontier.png)

Reward models, on comparisons with their exact probabilities. `its optimum` is KL(pi* || the policy
that is optimal for the fitted reward). Errors are largest for the worst responses, which
comparisons hardly tell apart.

{rewards}

Expected gradients, enumerated over all groups of samples in float64, against the gradient of
E r - beta KL unless said otherwise.

{gradients}

Laws of samplers.

{sampling}

Teachers, cycles, controllers. Exploitability is by how much the best reply wins: 0 only for the
minimax mixture.

{others}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="run the methods whose name contains this, and print")
    only = parser.parse_args().only
    world = make_world()
    if only:
        run_methods(world, [m for m in ALL.values() if only in m.name])
        return
    preference, landings = run_methods(world, PREFERENCE)
    policy_gradient, more = run_methods(world, POLICY_GRADIENT)
    long_world = make_world(max_length=4)
    longer, _ = run_methods(long_world, [ALL[name] for name in LONGER])
    section = TEMPLATE.format(
        symbols=world.language.num_symbols,
        length=world.language.max_length,
        prompts=len(world.language.prompts),
        count=len(world.language.responses),
        longer_count=len(long_world.language.responses),
        beta=world.beta,
        far=nats(world.distance(world.reference)),
        preference=markdown(METHOD_HEADER, preference),
        policy_gradient=markdown(METHOD_HEADER, policy_gradient),
        longer=markdown(METHOD_HEADER, longer),
        rewards=reward_section(world),
        gradients=gradient_section(),
        sampling=sampling_section(world),
        others=other_section(world),
    )
    write(DOCS / "exact_frontier.png", frontier_plot(world, landings | more))
    replace_section(DOCS / "results.md", section)


if __name__ == "__main__":
    main()
