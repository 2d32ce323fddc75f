"""Every method with what it should converge to, for the tests and for the table."""

import dataclasses
from collections.abc import Callable

import numpy as np

from align_jax.exact import fixed_points
from align_jax.exact.fixed_points import pair_minimizer
from align_jax.exact.language import Array, World, normalized
from align_jax.losses import preference
from align_jax.models.transformer import Transformer
from align_jax.training.step import Batch, LossFunction
from tests.exact import losses
from tests.exact.training import Batches, Run, policy_of, random_transformer, trained

FLIP_RATE = 0.2


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train, and the law it should end with.

    Attributes:
      claim: what the paper says it converges to.
      limit: what it converges to here, in words.
      build: world -> loss, batch, refresh.
      law: world -> `[P,N]` that law.
    """

    name: str
    claim: str
    limit: str
    build: Callable[[World], tuple[LossFunction, Batch, Batches | None]]
    law: Callable[[World], Array]
    run: Run


@dataclasses.dataclass(frozen=True)
class Landing:
    policy: Array
    law: Array


def land(method: Method, world: World, *, seed: int = 0, start: Transformer | None = None):
    loss, batch, refresh = method.build(world)
    start = start or random_transformer(seed)
    model = trained(loss, start, batch, method.run, refresh)
    return Landing(policy_of(model, world.language), method.law(world))


def optimum(world: World) -> Array:
    return world.optimum


OPTIMUM, NONE = "the optimum", "none"
COMPARISONS = Run(steps=400, learning_rate=1e-3)
SLOW_COMPARISONS = Run(steps=800, learning_rate=1e-3)
KTO = Run(steps=4000, learning_rate=3e-4)
# At 1e-3 rounding decides: of ten starts that differ by 1e-6 of themselves two lost a response on
# the way and ended .1 nats from where the others did. PPO's four epochs want less than 5e-4.
GRADIENTS = Run(steps=800, learning_rate=3e-4)
PPO = Run(steps=1200, learning_rate=3e-4)


def plain(world: World) -> float:
    return world.beta


def per_token(world: World) -> float:
    """beta on nats per symbol: `world.beta` for the longest responses, more for shorter ones."""
    return world.beta * world.language.max_length


def stiff(world: World) -> float:
    """f-DPO's beta. Where pi / ref is large, f' is flat: at `world.beta` training takes forever."""
    return 4 * world.beta


def one(world: World) -> float:
    return 1.0


def _trainer(name: str, beta=plain, *, flip_rate: float = 0.0, **options: float | str):
    return lambda world: (
        losses.trainer_loss(name, beta(world), **options),
        losses.preference_batch(world, flip_rate),
        None,
    )


def library(name: str, **fixed: float):
    """The pair loss `name` of the library for `pair_minimizer`, which passes lengths too."""
    function = getattr(preference, name)
    return lambda world: lambda *a: function(*a[:4], beta=world.beta, **fixed)


def _minimized(make_loss, *, flip_rate: float = 0.0):
    return lambda world: pair_minimizer(world, make_loss(world), flip_rate)


def simpo(gamma: float):
    def make(world):
        return lambda c, r, rc, rr, lc, lr: preference.simpo_loss(
            c / lc, r / lr, beta=per_token(world), gamma=gamma
        )

    return make


def cpo(world):
    return lambda c, r, rc, rr, lc, lr: preference.cpo_loss(c, r, beta=world.beta)


def normalized_dpo(world):
    return lambda c, r, rc, rr, lc, lr: preference.length_normalized_dpo_loss(
        c, r, rc, rr, lc, lr, beta=per_token(world)
    )


def f_dpo(divergence: str):
    def make(world):
        return lambda *a: preference.f_dpo_loss(*a[:4], divergence=divergence, beta=stiff(world))

    return make


def slic(world):
    return lambda c, r, rc, rr, lc, lr: preference.slic_loss(c, r, delta=1.0) - c / lc


def orpo(world):
    return lambda c, r, rc, rr, lc, lr: preference.orpo_loss(c / lc, r / lr) - c / lc


def _kto(flip_rate: float):
    return lambda world: (losses.kto(world), losses.kto_batch(world, flip_rate), None)


MAJORITY = "only what the majority prefers"

PREFERENCE = [
    Method("DPO", OPTIMUM, OPTIMUM, _trainer("dpo"), optimum, COMPARISONS),
    Method(
        "DPO, 20% of labels flipped", NONE, "nearest to flipped labels",
        _trainer("dpo", flip_rate=FLIP_RATE),
        _minimized(library("dpo_loss"), flip_rate=FLIP_RATE), COMPARISONS,
    ),
    Method(
        "conservative DPO, 20% flipped", NONE, "flips counted twice, not undone",
        _trainer("dpo", flip_rate=FLIP_RATE, label_smoothing=FLIP_RATE),
        _minimized(library("dpo_loss", label_smoothing=FLIP_RATE), flip_rate=FLIP_RATE),
        COMPARISONS,
    ),
    Method(
        "robust DPO, 20% flipped", OPTIMUM, OPTIMUM,
        _trainer("robust_dpo", flip_rate=FLIP_RATE, label_smoothing=FLIP_RATE), optimum,
        COMPARISONS,
    ),
    Method(
        "IPO", "ref x exp(win rate / beta)", "ref x exp(win rate / beta)",
        _trainer("ipo"), fixed_points.ipo, COMPARISONS,
    ),
    Method(
        "f-DPO, forward KL", "f-divergence optimum", "ref x 4 beta / (c - r)",
        _trainer("f_dpo", stiff, divergence="forward_kl"),
        lambda w: fixed_points.f_divergence(w, "forward_kl", stiff(w)), SLOW_COMPARISONS,
    ),
    Method(
        "f-DPO, Jensen-Shannon", "f-divergence optimum", "that at 4 beta",
        _trainer("f_dpo", stiff, divergence="jensen_shannon"),
        lambda w: fixed_points.f_divergence(w, "jensen_shannon", stiff(w)), SLOW_COMPARISONS,
    ),
    Method(
        "length-normalised DPO", NONE, "ref x exp(length (r / 3 beta + c))",
        _trainer("length_normalized_dpo", per_token),
        lambda w: fixed_points.tilted_by_length(w, w.reference), COMPARISONS,
    ),
    Method(
        "CPO (contrastive term)", "the optimum for a uniform reference", "exp(r / beta) / Z",
        _trainer("cpo", sft_weight=0.0), lambda w: normalized(w.reward / w.beta), COMPARISONS,
    ),
    Method(
        "SimPO, gamma = 0", NONE, "exp(length (r / 3 beta + c))",
        _trainer("simpo", per_token, gamma=0.0),
        lambda w: fixed_points.tilted_by_length(w, np.zeros_like(w.reward)), COMPARISONS,
    ),
    Method(
        "SimPO, gamma = 1", NONE, "its loss's minimum",
        _trainer("simpo", per_token, gamma=1.0),
        _minimized(simpo(1.0)), COMPARISONS,
    ),
    Method("ORPO, lambda = 1", NONE, "its loss's minimum", _trainer("orpo", one), _minimized(orpo),
           COMPARISONS),
    Method("SLiC, delta = 1, lambda = 1", NONE, "its loss's minimum", _trainer("slic", one),
           _minimized(slic), COMPARISONS),
    Method("EXO, hard labels, smoothing 0.1", "the optimum (soft labels)", "its loss's minimum",
           _trainer("exo", label_smoothing=0.1),
           _minimized(library("exo_loss", label_smoothing=0.1)), COMPARISONS),
    Method("NCA, hard pairs", "the optimum (soft labels)", "its loss's minimum", _trainer("nca"),
           _minimized(library("nca_loss")), COMPARISONS),
    Method("SPPO, one round, hard labels", "about IPO's", "its loss's minimum", _trainer("sppo"),
           _minimized(library("sppo_loss")), COMPARISONS),
    Method("RSO hinge", NONE, "its loss's minimum", _trainer("rso_hinge"),
           _minimized(library("rso_hinge_loss")), COMPARISONS),
    Method("KTO", MAJORITY, "responses below win rate 1/2 vanish", _kto(0.0), fixed_points.kto,
           KTO),
    Method("KTO, 20% flipped", MAJORITY, "the same", _kto(FLIP_RATE), fixed_points.kto, KTO),
]  # fmt: skip


def _reinforce(world: World):
    return losses.reinforce(world), losses.policy_batch(world), None


def _group(advantage: str, **fields):
    return lambda world: (
        losses.group_of_two(world, advantage=advantage, **fields),
        losses.policy_batch(world),
        None,
    )


def _in_the_loss(estimator: str, **fields):
    return _group("grpo", kl={"placement": "loss", "estimator": estimator}, **fields)


def _ppo(every: int):
    def build(world):
        # Renewed before the first step: of the right shapes is enough.
        batch = losses.policy_batch(world)
        empty = {"old_log_probs": batch["reference"], "advantages": batch["reference"]}
        return losses.ppo(world), batch | empty, losses.ppo_refresh(world, every)

    return build


def _in_loss(estimator: str, *, scale: bool, price: float):
    return lambda world: fixed_points.kl_in_loss(
        world,
        fixed_points.grpo_utility(world, scale=scale),
        estimator=estimator,
        price=price * world.beta,
    )


POLICY_GRADIENT = [
    Method("REINFORCE", OPTIMUM, OPTIMUM, _reinforce, optimum, GRADIENTS),
    Method("RLOO, K = 2", OPTIMUM, OPTIMUM, _group("rloo", loss="reinforce"), optimum, GRADIENTS),
    Method("PPO, 4 epochs, exact critic, GAE 0.95", OPTIMUM, OPTIMUM, _ppo(4), optimum, PPO),
    Method("GRPO without std, KL in the reward", OPTIMUM, OPTIMUM,
           _group("grpo", scale_rewards=False), optimum, GRADIENTS),
    Method("GRPO without std, KL in the reward, per-length mean", OPTIMUM, OPTIMUM,
           _group("grpo", scale_rewards=False, aggregation="grpo"), optimum, GRADIENTS),
    Method("GRPO with std, KL in the reward, K = 2", OPTIMUM, OPTIMUM + " (all advantages 0)",
           _group("grpo"), optimum, Run(4000, 1e-3)),
    Method("GRPO without std, k2 in the loss, K = 2", OPTIMUM, "ref exp(Q / 2 beta) by symbol",
           _in_the_loss("k2", scale_rewards=False), _in_loss("k2", scale=False, price=1.0),
           GRADIENTS),
    Method("GRPO without std, k3 in the loss, K = 2", OPTIMUM, "2 beta ref / (c - Q) by symbol",
           _in_the_loss("k3", scale_rewards=False), _in_loss("k3", scale=False, price=1.0),
           GRADIENTS),
    Method("GRPO (paper: std, k3 in the loss), K = 2", OPTIMUM, "beta ref / (c - Q'), "
           "Q' of win minus loss rate / sqrt 2", _in_the_loss("k3"),
           _in_loss("k3", scale=True, price=1.0), GRADIENTS),
    Method("GRPO without std, k1 in the loss, K = 2", OPTIMUM,
           "no penalty at all: the best response", _in_the_loss("k1", scale_rewards=False),
           fixed_points.best_response, GRADIENTS),
]  # fmt: skip
ALL = {method.name: method for method in PREFERENCE + POLICY_GRADIENT}
