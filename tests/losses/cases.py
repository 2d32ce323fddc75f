"""The table of all losses that `test_every_loss.py` tests: how to call each of them, and where.

A row names what each array argument must get as its gradient, and which of them the mask hides.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from align_jax.losses import distillation, policy_gradient, preference, ranking

B, T, K, V = 4, 5, 4, 6


@dataclasses.dataclass(frozen=True)
class Arg:
    """An array argument: how to draw it, and what gradient it must get."""

    name: str
    draw: Callable[[np.random.Generator], np.ndarray]
    # "yes", "stopped" (exactly 0 although the value depends on it) or "none" (not a float input).
    gradient: str = "yes"
    masked: bool = False
    extremes: tuple[float, float] = (-1e4, 1e4)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A row: a function, its arguments and hyperparameters."""

    function: Callable
    args: tuple[Arg, ...]
    hyper: dict = dataclasses.field(default_factory=dict)
    # For losses with a stop-gradient inside: (args at which it is frozen, *args) -> value.
    surrogate: Callable | None = None

    def __call__(self, *values):
        return self.function(*values, **self.hyper)

    def draw(self, seed=0):
        rng = np.random.default_rng(seed)
        return [arg.draw(rng) for arg in self.args]

    def __str__(self):
        variant = ",".join(
            f"{k}={v}" for k, v in self.hyper.items() if not isinstance(v, np.ndarray)
        )
        return f"{self.function.__name__}({variant})"


def normal(*shape, scale=1.0):
    return lambda rng: scale * rng.normal(size=shape)


def log_p(*shape):
    return lambda rng: -rng.gamma(2.0, size=shape)


def uniform(*shape):
    return lambda rng: rng.uniform(0.1, 0.9, size=shape)


def mask_bt(rng):
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    return mask.astype(np.int32)


def top_log_probs(rng):
    logits = rng.normal(size=(B, T, V))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.sort(-log_probs, axis=-1)[..., :3]


def top_ids(rng):
    return np.argsort(rng.normal(size=(B, T, V)), axis=-1)[..., :3].astype(np.int32)


LOGPS = (
    Arg("chosen_logps", log_p(B)),
    Arg("rejected_logps", log_p(B)),
    Arg("ref_chosen_logps", log_p(B), "stopped"),
    Arg("ref_rejected_logps", log_p(B), "stopped"),
)
SINGLE = (
    Arg("logps", log_p(B)),
    Arg("ref_logps", log_p(B), "stopped"),
    Arg("desirable", lambda rng: np.array([True, False, True, False]), "none"),
)
LENGTHS = tuple(
    Arg(f"{side}_lengths", lambda rng: rng.integers(1, 9, size=B), "none")
    for side in ("chosen", "rejected")
)
MASK = Arg("mask", mask_bt, "none")
RANKS = Arg("ranks", lambda rng: np.argsort(rng.normal(size=(B, K)), axis=-1), "none")
TIED = Arg("ranks", lambda rng: rng.integers(0, 3, size=(B, K)), "none")
TOKENS = (
    Arg("log_probs", log_p(B, T)),
    Arg("old_log_probs", log_p(B, T), "stopped"),
    Arg("advantages", normal(B, T), "stopped"),
)


def masked(*args):
    return tuple(dataclasses.replace(arg, masked=True) for arg in args)


def cispo_surrogate(at, log_probs, old_log_probs, advantages):
    ratio = jnp.clip(jnp.exp(at[0] - old_log_probs), 0.0, 5.0)
    return -ratio * advantages * log_probs


def gspo_surrogate(at, log_probs, old_log_probs, advantages, mask):
    lengths = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    ratio = jnp.exp(((at[0] - old_log_probs) * mask).sum(-1, keepdims=True) / lengths)
    ratio = ratio * jnp.exp(log_probs - at[0])
    clipped = jnp.clip(ratio, 1 - 0.1, 1 + 0.3)
    return -jnp.minimum(ratio * advantages, clipped * advantages) * mask


CASES = [
    # ranking
    *(
        Case(
            ranking.bradley_terry_loss,
            (Arg("chosen_rewards", normal(B)), Arg("rejected_rewards", normal(B))),
            hyper,
        )
        for hyper in (
            {},
            {"margin": 0.7, "label_smoothing": 0.1, "center_coefficient": 0.01},
        )
    ),
    Case(
        ranking.best_of_k_loss,
        (
            Arg("rewards", normal(B, K)),
            Arg("best", lambda rng: rng.integers(0, K, size=B).astype(np.int32), "none"),
        ),
    ),
    *(
        Case(function, (Arg("rewards", normal(B, K)), ranks))
        for function in (ranking.all_pairs_loss, ranking.plackett_luce_loss)
        for ranks in (RANKS, TIED)
    ),
    Case(
        ranking.process_reward_loss,
        (
            *masked(
                Arg("rewards", normal(B, T)),
                Arg("labels", uniform(B, T), extremes=(0.0, 1.0)),
            ),
            MASK,
        ),
    ),
    Case(
        ranking.minimax_winner,
        (Arg("preferences", uniform(B, 3, 3), "stopped", extremes=(0.0, 1.0)),),
    ),
    # preference
    *(
        Case(getattr(preference, f"{name}_loss"), LOGPS, {"beta": 0.3, **hyper})
        for name, hyper in [
            ("dpo", {}),
            ("dpo", {"label_smoothing": 0.2, "margin": 0.5}),
            ("ipo", {}),
            ("robust_dpo", {"label_smoothing": 0.2}),
            ("exo", {"label_smoothing": 0.05}),
            ("nca", {}),
            ("bco", {"delta": 0.4}),
            ("sppo", {}),
            ("sppo", {"win_probability": 0.8}),
            ("apo_zero", {}),
            ("apo_down", {}),
            ("discopop", {}),
            ("discopop", {"tau": 2.0}),
            ("aot", {}),
            ("aot_unpaired", {}),
            ("rso_hinge", {}),
            ("f_dpo", {"divergence": "reverse_kl"}),
            ("f_dpo", {"divergence": "forward_kl"}),
            ("f_dpo", {"divergence": "jensen_shannon"}),
            ("f_dpo", {"divergence": "alpha", "alpha": 0.3}),
        ]
    ),
    Case(preference.length_normalized_dpo_loss, LOGPS + LENGTHS),
    Case(
        preference.wpo_loss,
        (
            *LOGPS,
            Arg("chosen_weights", uniform(B), "stopped"),
            Arg("rejected_weights", uniform(B), "stopped"),
        ),
    ),
    Case(
        preference.wpo_weights,
        (
            *masked(
                Arg("token_log_probs", log_p(B, T), "stopped"),
                Arg("log_sum_squared_probs", log_p(B, T), "stopped"),
            ),
            MASK,
        ),
    ),
    Case(preference.bco_unpaired_loss, SINGLE, {"beta": 0.3, "delta": 0.4}),
    Case(
        preference.kto_loss,
        (*SINGLE, Arg("kl", uniform(B), "stopped")),
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    *(
        Case(function, LOGPS[:2], hyper)
        for function, hyper in [
            (preference.slic_loss, {"delta": 1.0}),
            (preference.cpo_loss, {"beta": 0.3}),
            (preference.simpo_loss, {"beta": 2.0, "gamma": 0.5}),
        ]
    ),
    Case(
        preference.orpo_loss,
        (Arg("chosen_avg_logps", log_p(B)), Arg("rejected_avg_logps", log_p(B))),
    ),
    Case(
        preference.ld_dpo_log_probs,
        (
            Arg("chosen_token_log_probs", log_p(B, T)),
            Arg("rejected_token_log_probs", log_p(B, T + 2)),
            Arg("chosen_mask", mask_bt, "none"),
            Arg("rejected_mask", lambda rng: np.tile([0, 1, 1, 1, 0, 0, 0], (B, 1)), "none"),
        ),
        {"alpha": 0.4},
    ),
    # policy_gradient
    Case(policy_gradient.reinforce_loss, (TOKENS[0], TOKENS[2])),
    Case(
        policy_gradient.reinforce_loss,
        (TOKENS[0], dataclasses.replace(TOKENS[2], draw=normal(B, 1))),
    ),
    *(
        Case(policy_gradient.ppo_clip_loss, TOKENS, hyper)
        for hyper in ({}, {"clip_range_high": 0.5, "dual_clip": 3.0})
    ),
    Case(policy_gradient.gspo_ratio, (*masked(*TOKENS[:2]), MASK)),
    Case(
        policy_gradient.gspo_loss,
        (*masked(*TOKENS), MASK),
        {"clip_range": 0.1, "clip_range_high": 0.3},
        gspo_surrogate,
    ),
    Case(policy_gradient.cispo_loss, TOKENS, {}, cispo_surrogate),
    Case(
        policy_gradient.truncated_importance_weights,
        (
            Arg("log_probs", log_p(B, T), "stopped"),
            Arg("sampler_log_probs", log_p(B, T), "stopped"),
        ),
    ),
    Case(
        policy_gradient.clipped_value_loss,
        (
            Arg("values", normal(B, T)),
            Arg("old_values", normal(B, T), "stopped"),
            Arg("returns", normal(B, T), "stopped"),
        ),
    ),
    Case(policy_gradient.ptx_loss, (*masked(TOKENS[0]), MASK)),
    Case(
        policy_gradient.entropy_bonus,
        (*masked(Arg("logits", normal(B, T, V))), MASK),
        {"coefficient": 0.5},
    ),
    *(
        Case(
            policy_gradient.aggregate_token_losses,
            (*masked(Arg("token_losses", normal(B, T))), MASK),
            hyper,
        )
        for hyper in (
            {"method": "grpo"},
            {"method": "dr_grpo", "max_length": 7},
            {"method": "dapo"},
        )
    ),
    *(
        Case(
            policy_gradient.kl_estimate,
            (Arg("log_probs", log_p(B, T)), Arg("ref_log_probs", log_p(B, T), "stopped")),
            {"estimator": estimator},
        )
        for estimator in ("k1", "k2", "k3")
    ),
    Case(
        policy_gradient.kl_shaped_rewards,
        (
            Arg("scores", normal(B)),
            *masked(Arg("log_probs", log_p(B, T)), Arg("ref_log_probs", log_p(B, T))),
            MASK,
        ),
        {"kl_coefficient": 0.2},
    ),
    Case(
        policy_gradient.gae,
        (*masked(Arg("rewards", normal(B, T)), Arg("values", normal(B, T))), MASK),
        {"discount": 0.9, "lambda_": 0.8},
    ),
    Case(policy_gradient.rloo_advantages, (Arg("rewards", normal(B, K)),)),
    *(
        Case(policy_gradient.grpo_advantages, (Arg("rewards", normal(B, K)),), {"scale": scale})
        for scale in (True, False)
    ),
    Case(
        policy_gradient.spo_rewards,
        (Arg("preferences", uniform(B, K, K), extremes=(0.0, 1.0)),),
    ),
    *(
        Case(
            policy_gradient.whiten,
            (*masked(Arg("x", normal(B, T))), MASK),
            {"shift_mean": shift_mean},
        )
        for shift_mean in (True, False)
    ),
    Case(
        policy_gradient.adaptive_kl_update,
        (
            Arg("coefficient", uniform(B)),
            Arg("kl", lambda rng: np.array([5.4, 6.1, 6.9, 20.0])),
        ),
        {"target": 6.0, "horizon": 100, "batch_size": 16},
    ),
    # distillation
    Case(
        distillation.top_k_kl_loss,
        (
            Arg("student_logits", normal(B, T, V)),
            Arg("teacher_top_log_probs", top_log_probs, "stopped", extremes=(-1e4, 0.0)),
            Arg("teacher_top_ids", top_ids, "none"),
        ),
    ),
    *(
        Case(
            distillation.generalized_jsd_loss,
            (
                Arg("student_logits", normal(B, T, V)),
                Arg("teacher_logits", normal(B, T, V), "stopped"),
            ),
            {"beta": beta},
        )
        for beta in (0.0, 0.3, 1.0)
    ),
]
