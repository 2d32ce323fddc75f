"""`python -m tests.exact.table`: every method against the known truth, into docs/results.md.

Writes what stands between the markers in docs/results.md, and docs/exact_frontier.png. Takes about
ten minutes of two idle cores; `--only=TEXT` runs the methods whose name contains TEXT, and prints.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from align_jax.exact.fixed_points import MINIMAX_CLASSES, cyclic_preferences, exploitability
from align_jax.exact.language import (
    World,
    best_of_n,
    expectation,
    kl,
    normalized,
    rejection_sampling,
)
from tests.exact import figure, gradients, others
from tests.exact.methods import ALL, POLICY_GRADIENT, PREFERENCE, Landing, Method, land
from tests.exact.training import Run, make_world

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- exact: begin -->", "<!-- exact: end -->"
LONGER = {
    "DPO": Run(250, 1e-3),
    "IPO": Run(250, 1e-3),
    "REINFORCE": Run(400, 5e-4),
    "RLOO, K = 2": Run(400, 5e-4),
    "PPO, 4 epochs, exact critic, GAE 0.95": Run(600, 5e-4),
}
LONGER_BETA = 1.0


def nats(x: float) -> str:
    if not np.isfinite(x):
        return "infinite"
    return "0" if x == 0 else "< 1e-8" if x < 1e-8 else f"{x:.3f}" if x >= 0.01 else f"{x:.1e}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def distances(world: World, landing: Landing) -> list[str]:
    """KL(limit || policy), KL(pi* || limit), KL(pi* || policy) of the worst prompt."""
    lost = np.isneginf(landing.law).any()
    limit = "infinite" if lost else nats(kl(world.optimum, landing.law).max())
    own = nats(kl(landing.law, landing.policy).max())
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
    many = 20_000
    law = best_of_n(np.full((1, many), -np.log(many)), np.arange(float(many))[None], 4)
    rows.append([f"best of 4 when {many:,} responses are equally likely",
                 nats(kl(law, np.full((1, many), -np.log(many))).max()),
                 nats(np.log(4) - 3 / 4), "-", "-"])  # fmt: skip
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
        rows.append([f"top-{k} distillation of 4 symbols", f"loss {nats(max(loss, 0.0))}",
                     f"KL(teacher to student) {nats(distance)} nats"])  # fmt: skip
    preferences, first = cyclic_preferences(world)

    def cycle(name, policy):
        shares = np.array([policy[first == c].sum() for c in range(4)])
        rows.append([name, f"exploitability {nats(exploitability(policy, preferences))}",
                     f"{nats(np.abs(shares - MINIMAX_CLASSES).sum() / 2)} in total variation from "
                     "the minimax mixture (3, 2, 4) / 9"])  # fmt: skip

    last, average = others.play_cycle(world, Run(1500, 1e-3, "constant"), price=0.0, every=10**9)
    cycle("SPO alone, last policy", last)
    cycle("SPO alone, mixture of all policies", average)
    last, _ = others.play_cycle(world, Run(1500, 1e-3), price=0.2, every=50)
    cycle("SPO, KL 0.2 to its policy of at most 50 steps ago, last policy", last)
    reward = others.fit_cycle(world, Run(1000, 3e-2))
    tilted = [
        np.exp(normalized(world.reference[0] + reward / beta))
        for beta in (*np.geomspace(1e-3, 1e3, 400), 0.01)
    ]
    best = min(tilted, key=lambda policy: exploitability(policy, preferences))
    cycle("Bradley-Terry reward, optimal policy at its best beta", best)
    cycle("Bradley-Terry reward, optimal policy at beta = 0.01", tilted[-1])
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

`python -m tests.exact.table` writes this section and its picture; this time it took {minutes:.0f}
minutes of CPU time. The fast half is in the tests (`tests/exact/`).

A language of {symbols} symbols and EOS, strings of up to {length} symbols, {prompts} prompts:
{count} responses each, all enumerated. The reference is a random Transformer of this project, the
reward of every response an independent normal number, beta = {beta}. So the optimum
pi* = ref exp(r / beta) / Z is known, and the reference is {far} nats from it (in the worst prompt,
as all distances here).

A Transformer starts from the reference and is trained by the project's own train step
(`training.step`) on the trainers' own losses (`algorithms.preference.preference_loss`, and
`estimate_advantages` and `make_objective` of `algorithms.policy_gradient.objective`): the code that
trains SmolLM2. Batches are exact expectations: all pairs, equally often, with the probabilities of
their Bradley-Terry labels, or all responses (or groups of them) with their probabilities. Three
distances: `limit to policy` is KL(limit || trained policy), whether the method reaches its limit;
`optimum to limit` is KL(pi* || limit), whether its limit is the optimum; `optimum to policy` is
KL(pi* || trained policy). Limits without a formula are minimised apart from the training, by L-BFGS
in float64 with one free logit per response.

![Reward against KL: the exact frontier and where each method lands](exact_frontier.png)

### From comparisons

{preference}

IPO's win rate is against a uniformly drawn response. Length-normalised losses have 3 beta, on nats
per symbol. ORPO and SLiC include their likelihood term, of the chosen response, per symbol. Hinges
have kinks, where minimisers agree to about 1e-3. The papers of EXO and NCA promise the optimum for
labels that are shares or rewards; hard labels lead elsewhere. Symmetric flips do not move KTO: they
scale its gradient. (At a learning rate of 1e-3 it lost a response early, and was 0.5 nats from its
limit after 4,000 steps.)

### Policy gradients

{policy_gradient}

Where the KL is in the loss, the penalty's gradient stops at its own symbol, so that a prefix pays
nothing for where it leads (Q is the mean reward after a symbol, under the policy); k3's expected
gradient is that of KL(ref || pi), k1's is 0; and a group's mean that includes the sample itself
makes beta dearer by K / (K - 1). With the KL in the reward all advantages are 0 at the optimum,
divided by a standard deviation or not; but divided, they do not shrink on the way there, and the
last stretch is slow. (The learning rate is 3e-4. At 1e-3 most runs of REINFORCE and RLOO end
closer, 2e-5 nats from the optimum, but of ten whose starts differ by 1e-6 of themselves two lost a
response on the way and ended .1 nats from it.)

### Longer strings

Up to 4 symbols, {longer_count} responses, beta = {longer_beta}:

{longer}

At beta = 0.5 the policy gradients get stuck for long here: what an early step made rare is seldom
sampled, and comes back slowly. (At a learning rate of 1e-3 REINFORCE ended 8e-5 nats from the
optimum after 800 steps, PPO 6e-4 after 1,200; RLOO 7e-3 after 800 steps and 6e-3 after 1,600.)

### Reward models

On comparisons with their exact probabilities; a table has one free number per response, a
`ScalarModel` is the Transformer with a scalar head. `its optimum` is KL(pi* || the policy that is
optimal for the fitted reward).

{rewards}

### Gradients

Expected gradients of what is sampled, enumerated over all groups of samples in float64, against the
gradient of -(E r - beta KL) unless the name says otherwise. The relative bias is
|expected - exact| / |exact|.

{gradients}

### Samplers

{sampling}

### Teachers, cycles, controllers

Exploitability is by how much the best reply wins beyond 1/2: 0 only for the minimax mixture.

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
    long_world = make_world(max_length=4, beta=LONGER_BETA)
    longer, _ = run_methods(
        long_world, [dataclasses.replace(ALL[name], run=run) for name, run in LONGER.items()]
    )
    section = TEMPLATE.format(
        symbols=world.language.num_symbols,
        length=world.language.max_length,
        prompts=len(world.language.prompts),
        count=len(world.language.responses),
        longer_count=len(long_world.language.responses),
        longer_beta=LONGER_BETA,
        beta=world.beta,
        far=nats(world.distance(world.reference)),
        preference=markdown(METHOD_HEADER, preference),
        policy_gradient=markdown(METHOD_HEADER, policy_gradient),
        longer=markdown(METHOD_HEADER, longer),
        rewards=reward_section(world),
        gradients=gradient_section(),
        sampling=sampling_section(world),
        others=other_section(world),
        minutes=time.process_time() / 60,
    )
    policies = {name: landing.policy for name, landing in (landings | more).items()}
    write(DOCS / "exact_frontier.png", figure.frontier(world, policies))
    replace_section(DOCS / "results.md", section)


if __name__ == "__main__":
    main()
