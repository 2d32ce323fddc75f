"""Losses on preferences: DPO and its relatives, each with the object that a trainer needs.

Unless said otherwise `*_logps` are log-probabilities of whole responses in nats, summed over
response tokens, [B] floats. Every loss is [B], one value per comparison. The docstrings use

    h_w = chosen_logps - ref_chosen_logps
    h_l = rejected_logps - ref_rejected_logps
    h = h_w - h_l

`beta` is the strength of the KL penalty and beta h_w the implicit reward of the chosen response.
The reference gets no gradient. All losses raise TypeError for integer log-probabilities, and
ValueError for unequal shapes or a hyperparameter outside its range.

After each loss stands its `PreferenceLoss`: the values that it reads, its options with their
ranges, and its running state. `LOSSES`, at the end, holds all of them by name.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from align_jax.losses._inputs import (
    Number,
    as_float,
    as_mask,
    bounded_exp,
    is_number,
    log_ratios,
    masked_mean,
    require,
    same_shape_floats,
)
from align_jax.losses._options import Option

__all__ = [
    "LOSSES",
    "Option",
    "PreferenceLoss",
    "Running",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_unpaired_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "f_dpo_loss",
    "ipo_loss",
    "kto_loss",
    "ld_dpo_log_probs",
    "length_normalized_dpo_loss",
    "nca_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "rso_hinge_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_loss",
    "wpo_loss",
    "wpo_weights",
]


# The objects that describe a loss to a trainer.


_BETA = Option("beta", above=0.0)
_SFT_WEIGHT = Option("sft_weight", least=0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Running:
    """State that a loss carries from one optimizer step to the next.

    A trainer starts with `start()`, passes the state to every call of the loss, and after each
    optimizer step replaces it by `update(state, sums, weight)`. The step itself, all of its
    micro-batches included, uses the state from before. Evaluation does not change it. It gets no
    gradient, and is part of the checkpoint.
    """

    # The state before the first step.
    initial: Mapping[str, float]
    # Those of its entries that the loss's function takes as keywords.
    keywords: tuple[str, ...]
    # (values, beta) -> {name: [B]}, without gradient.
    statistics: Callable[[Mapping[str, jax.Array], Number], dict[str, jax.Array]]
    # (state, sums, weight) -> the new state. `sums` holds the statistics, each multiplied by the
    # examples' weights and summed over the whole batch; `weight` is the sum of these weights.
    update: Callable[
        [Mapping[str, jax.Array], Mapping[str, jax.Array], Number], dict[str, jax.Array]
    ]

    def start(self) -> dict[str, jax.Array]:
        """The state before the first step, as float32 scalars."""
        return {name: jnp.float32(value) for name, value in self.initial.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """A loss with everything that a trainer must know of it.

        loss = LOSSES["simpo"]
        loss.check(beta, options)  # before any compute
        loss(values, beta=beta, **options)  # [B]

    The names that `reads` may hold, each a [B] array (`kl` may also be a number):

        chosen, rejected                  sums over response tokens, nats
        chosen_average, rejected_average  means over response tokens, nats per token
        chosen_length, rejected_length    response tokens
        chosen_weight, rejected_weight    `wpo_weights`
        chosen_desensitized, rejected_desensitized
                                          `ld_dpo_log_probs` with the option `alpha`
        response                          of a single labelled response: its sum, nats
        desirable                         its label, 1 if desirable
        kl                                KTO's reference point, nats: the mean log-ratio of
                                          unrelated responses, to other prompts
        unrelated                         one of these responses: its sum, nats
        ref_NAME                          the reference model's NAME, of sums only

    The policy's log-probabilities come first: of `chosen` and `rejected`, or of the `response`.
    """

    name: str
    # Takes the values of `reads` in their order, then `beta` and the options as keywords.
    function: Callable[..., jax.Array]
    reads: tuple[str, ...]
    options: tuple[Option, ...] = ()
    # Default weight of the SFT term, -chosen_average; None if the loss cannot have one.
    sft_weight: float | None = 0.0
    running: Running | None = None

    def __post_init__(self) -> None:
        require(
            not (self.labelled and self.sft_weight is not None),
            f"the loss {self.name!r} has no chosen response, so `sft_weight` must be None",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return any(name.startswith("ref_") for name in self.reads)

    @property
    def labelled(self) -> bool:
        """Whether an example is one response with a label, and not a pair."""
        return "desirable" in self.reads

    @property
    def all_options(self) -> tuple[Option, ...]:
        """`options`, and `sft_weight` where the loss can have an SFT term."""
        return self.options if self.sft_weight is None else (*self.options, _SFT_WEIGHT)

    def __call__(
        self,
        values: Mapping[str, jax.Array],
        *,
        beta: Number,
        running: Mapping[str, jax.Array] | None = None,
        **options: Any,
    ) -> jax.Array:
        """The loss [B], SFT term included.

        Args:
          values: the arrays that `reads` names; with an SFT term also `chosen_average`.
          beta: the strength of the KL penalty, or what takes its place in this loss.
          running: the state of `self.running`; None for the initial one.
          options: `all_options` by name. `sft_weight` is `self.sft_weight` unless given.

        Raises: ValueError for an option that the loss does not have, or for one that it needs.
        """
        self._check_names(options)
        sft_weight = options.pop("sft_weight", self.sft_weight)
        in_values = {option.name for option in self.options if option.in_values}
        keywords = {name: value for name, value in options.items() if name not in in_values}
        if self.running is not None:
            state = self.running.initial if running is None else running
            keywords |= {name: state[name] for name in self.running.keywords}
        loss = self.function(*(values[name] for name in self.reads), beta=beta, **keywords)
        if sft_weight is None or (is_number(sft_weight) and sft_weight == 0):
            return loss
        return loss - sft_weight * values["chosen_average"]

    def rewards(self, values: Mapping[str, jax.Array], *, beta: Number) -> tuple[jax.Array, ...]:
        """Implicit rewards, [B] for each response: (chosen, rejected), or one if `labelled`.

        A reward is `beta` times the log-ratio of policy and reference, or, in a loss without a
        reference, `beta` times the log-probability: per token if the loss reads averages.
        """
        compared = []
        for name in self.reads[: 1 if self.labelled else 2]:
            reference = values[f"ref_{name}"] if self.needs_reference else 0.0
            compared.append(beta * values[name] - beta * stop_gradient(reference))
        return tuple(compared)

    def check(self, beta: float, options: Mapping[str, Any]) -> None:
        """Raises ValueError for a `beta` or options that this loss cannot have."""
        _BETA.check(beta)
        self._check_names(options)
        for option in self.all_options:
            if option.name not in options:
                continue
            if option.only_if is not None:
                other, value = option.only_if
                require(
                    options.get(other) == value,
                    f"`{option.name}` acts only if `{other}` is {value!r}, "
                    f"but `{other}` is {options.get(other)!r}",
                )
            option.check(options[option.name])

    def _check_names(self, options: Mapping[str, Any]) -> None:
        names = [option.name for option in self.all_options]
        for name in options:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                raise ValueError(
                    f"`{name}` is no option of the loss {self.name!r}; it has "
                    f"{', '.join(names) or 'none'}"
                    + (f". Did you mean `{nearest[0]}`?" if nearest else "")
                )
        for option in self.options:
            if option.required and option.name not in options:
                raise ValueError(f"`{option.name}` is missing: the loss {self.name!r} needs it")


_SUMS = ("chosen", "rejected")
_AVERAGES = ("chosen_average", "rejected_average")
_WITH_REFERENCE = (*_SUMS, "ref_chosen", "ref_rejected")
_FLIP_RATE = Option("label_smoothing", least=0.0, below=0.5)


# Losses of h, the difference of the two log-ratios.


def dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    margin: ArrayLike = 0.0,
) -> jax.Array:
    """Bradley-Terry likelihood of the comparison under the policy's implicit reward.

    z = beta h - margin
    loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)

    `label_smoothing` in [0, 0.5) is the probability that a label is flipped (conservative DPO).
    `margin` (a number or [B], in nats) is the offset by which the chosen response should win. ODPO
    sets it to alpha log(score_w - score_l), length-regularised DPO to alpha (|y_l| - |y_w|).

    Rafailov et al. 2023, eq. 7; smoothing: Mitchell 2023 (cDPO); offset: Amini et al. 2024 (ODPO);
    length: Park et al. 2024 (R-DPO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 <= label_smoothing < 0.5, "`label_smoothing` must be in [0, 0.5)")
    z = beta * (h_w - h_l) - margin
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


DPO = PreferenceLoss("dpo", dpo_loss, _WITH_REFERENCE, options=(_FLIP_RATE, Option("margin")))


def length_normalized_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: Number = 5.0,
) -> jax.Array:
    """DPO on log-ratios per token, so that a response earns no reward by its length alone.

    loss = -log sigmoid(beta (h_w / chosen_lengths - h_l / rejected_lengths))

    `*_lengths` are [B] token counts. A response without tokens has log-ratio 0. `beta` multiplies
    nats per token, so its default is larger: it is the one of Tulu 3.

    Lambert et al. 2024 (Tulu 3); Meng et al. 2024 (SimPO), appendix ("DPO w/ LN").
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    h_w = h_w / jnp.maximum(jnp.asarray(chosen_lengths), 1)
    h_l = h_l / jnp.maximum(jnp.asarray(rejected_lengths), 1)
    return -log_sigmoid(beta * (h_w - h_l))


LENGTH_NORMALIZED_DPO = PreferenceLoss(
    "length_normalized_dpo",
    length_normalized_dpo_loss,
    (*_WITH_REFERENCE, "chosen_length", "rejected_length"),
)


def ld_dpo_log_probs(
    chosen_token_log_probs: ArrayLike,
    rejected_token_log_probs: ArrayLike,
    chosen_mask: ArrayLike,
    rejected_mask: ArrayLike,
    *,
    alpha: Number,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities for DPO in which the surplus tokens of the longer response weigh `alpha`.

    With l the number of tokens in the shorter response of the pair,
    log p = sum_{t < l} log pi(y_t) + alpha sum_{t >= l} log pi(y_t)

    Args:
      chosen_token_log_probs, rejected_token_log_probs: [..., T] and [..., T'] nats.
      chosen_mask, rejected_mask: 1 for response tokens, of the same shapes.
      alpha: in [0, 1]; 1 is DPO.

    Returns: ([...], [...]) nats. Call it for the policy and for the reference, and give all four
      sums to `dpo_loss`.
    Raises: TypeError for integer log-probabilities; ValueError for shapes or `alpha`.

    Liu et al. 2024 (LD-DPO).
    """
    chosen = as_float("chosen_token_log_probs", chosen_token_log_probs)
    rejected = as_float("rejected_token_log_probs", rejected_token_log_probs)
    chosen_mask = as_mask(chosen_mask, chosen.shape)
    rejected_mask = as_mask(rejected_mask, rejected.shape)
    if is_number(alpha):
        require(0 <= alpha <= 1, f"`alpha` must be in [0, 1], but is {alpha}")
    public_length = jnp.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))[..., None]

    def desensitized_sum(log_probs, mask):
        weights = jnp.where(jnp.cumsum(mask, -1) <= public_length, 1.0, alpha)
        return (weights * jnp.where(mask, log_probs, 0.0)).sum(-1)

    return desensitized_sum(chosen, chosen_mask), desensitized_sum(rejected, rejected_mask)


LD_DPO = PreferenceLoss(
    "ld_dpo",
    dpo_loss,
    tuple(f"{name}_desensitized" for name in _WITH_REFERENCE),
    options=(Option("alpha", least=0.0, most=1.0, required=True, in_values=True),),
)


def wpo_weights(
    token_log_probs: ArrayLike, log_sum_squared_probs: ArrayLike, mask: ArrayLike
) -> jax.Array:
    """How close to on-policy a response is, per token: about 1 if the policy itself wrote it.

    w = exp(mean over mask of (token_log_probs - log_sum_squared_probs))

    Args:
      token_log_probs: [..., T] log pi(y_t) in nats.
      log_sum_squared_probs: [..., T] log sum_v pi(v)^2. Subtracting it gives a response that the
        policy wrote a weight of about 1.
      mask: [..., T], 1 for response tokens.

    Returns: [...] weights, without gradient; 1 for an empty response.

    Zhou et al. 2024 (WPO), with sampled alignment.
    """
    token_log_probs, log_sum_squared_probs = same_shape_floats(
        token_log_probs=token_log_probs, log_sum_squared_probs=log_sum_squared_probs
    )
    mask = as_mask(mask, token_log_probs.shape)
    weights = bounded_exp(masked_mean(token_log_probs - log_sum_squared_probs, mask))
    return stop_gradient(weights)


def wpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    chosen_weights: ArrayLike,
    rejected_weights: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """DPO in which a pair counts more if the policy could have written both responses.

    loss = min(chosen_weights rejected_weights, 1) (-log sigmoid(beta h))

    The weights ([B], from `wpo_weights`) get no gradient. The bound of 1 is in the authors' code
    and not in their paper. It keeps a single pair from outweighing a batch.

    Zhou et al. 2024 (WPO).
    """
    chosen_weights, rejected_weights = same_shape_floats(
        chosen_weights=chosen_weights, rejected_weights=rejected_weights
    )
    weights = stop_gradient(chosen_weights * rejected_weights)
    loss = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    return jnp.minimum(weights, 1.0) * loss


WPO = PreferenceLoss("wpo", wpo_loss, (*_WITH_REFERENCE, "chosen_weight", "rejected_weight"))


def f_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    divergence: str,
    alpha: float = 0.5,
    beta: Number = 0.1,
) -> jax.Array:
    """DPO for a policy that another divergence than the reverse KL keeps close to its reference.

    loss = -log sigmoid(beta f'(e^h_w) - beta f'(e^h_l)), constants of f' dropped, with f'(u) =
      "reverse_kl"      log u (this is dpo_loss)
      "forward_kl"      -1 / u
      "jensen_shannon"  log(u / (1 + u))
      "alpha"           (1 - u^-alpha) / alpha, 0 < alpha <= 1: the reverse KL as alpha -> 0, the
                        forward KL at alpha = 1

    Past 40 nats an exponential continues as its tangent, so that all values stay finite.

    Wang et al. 2023 (f-DPO), table 1; alpha is the paper's. TRL's newer code writes
    (u^(a-1) - 1) / (a - 1) with a = 1 - alpha.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if divergence == "reverse_kl":
        return -log_sigmoid(beta * (h_w - h_l))
    if divergence == "forward_kl":
        return -log_sigmoid(beta * (bounded_exp(-h_l) - bounded_exp(-h_w)))
    if divergence == "jensen_shannon":
        return -log_sigmoid(beta * (log_sigmoid(h_w) - log_sigmoid(h_l)))
    if divergence == "alpha":
        require(0 < alpha <= 1, f"`alpha` must be in (0, 1], but is {alpha}")
        score = bounded_exp(-alpha * h_l) - bounded_exp(-alpha * h_w)
        return -log_sigmoid(beta * score / alpha)
    raise ValueError(
        "`divergence` must be 'reverse_kl', 'forward_kl', 'jensen_shannon' or 'alpha', "
        f"but is {divergence!r}"
    )


F_DPO = PreferenceLoss(
    "f_dpo",
    f_dpo_loss,
    _WITH_REFERENCE,
    options=(
        Option(
            "divergence",
            str,
            choices=("reverse_kl", "forward_kl", "jensen_shannon", "alpha"),
            required=True,
        ),
        Option("alpha", above=0.0, most=1.0, only_if=("divergence", "alpha")),
    ),
)


def ipo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Squared distance of h to a finite target, so that certain labels do not drive it to infinity.

    loss = (h - 1 / (2 beta))^2, in nats^2

    Azar et al. 2023, eq. 17; its tau is `beta`. Log-probabilities are sums, as in the paper. TRL
    divides them by the length, which is another objective.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (h_w - h_l - 1 / (2 * beta)) ** 2


IPO = PreferenceLoss("ipo", ipo_loss, _WITH_REFERENCE)


def robust_dpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> jax.Array:
    """Unbiased estimate of the DPO loss on clean labels when labels are flipped at a known rate.

    loss = [(1 - label_smoothing) (-log sigmoid(beta h)) + label_smoothing log sigmoid(-beta h)]
           / (1 - 2 label_smoothing)

    `label_smoothing` in [0, 0.5) is the flip rate. The loss of a single pair can be negative. Its
    expectation over flips is the DPO loss.

    Chowdhury et al. 2024 (robust DPO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 <= label_smoothing < 0.5, "`label_smoothing` must be in [0, 0.5)")
    z = beta * (h_w - h_l)
    loss = -(1 - label_smoothing) * log_sigmoid(z) + label_smoothing * log_sigmoid(-z)
    return loss / (1 - 2 * label_smoothing)


ROBUST_DPO = PreferenceLoss("robust_dpo", robust_dpo_loss, _WITH_REFERENCE, options=(_FLIP_RATE,))


def exo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 1e-3,
) -> jax.Array:
    """Reverse KL from the policy's choice between the two responses to the smoothed label.

    q = sigmoid(beta h)
    loss = q (log q - log(1 - label_smoothing)) + (1 - q) (log(1 - q) - log label_smoothing)

    `label_smoothing` is in (0, 0.5). At 0 the label is hard and this KL infinite, so 0 is an error.
    TRL silently replaces it by 1e-3.

    Ji et al. 2024 (EXO), eq. 16.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(label_smoothing):
        require(0 < label_smoothing < 0.5, "`label_smoothing` must be in (0, 0.5)")
    z = beta * (h_w - h_l)
    chosen_term = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-label_smoothing))
    return chosen_term + sigmoid(-z) * (log_sigmoid(-z) - jnp.log(label_smoothing))


EXO = PreferenceLoss(
    "exo",
    exo_loss,
    _WITH_REFERENCE,
    options=(Option("label_smoothing", above=0.0, below=0.5),),
)


def discopop_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    tau: Number = 0.05,
) -> jax.Array:
    """Logistic loss for comparisons that the policy gets wrong, exponential loss for the others.

    z = beta h,  m = sigmoid(z / tau), tau > 0
    loss = (1 - m) (-log sigmoid(z)) + m exp(-z)

    Lu et al. 2024 (DiscoPOP), eq. 5. It is not convex: it is flat around z = 0, as in the paper.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(tau):
        require(tau > 0, f"`tau` must be above 0, but is {tau}")
    z = beta * (h_w - h_l)
    # m exp(-z) in one exponent: m underflows where exp(-z) overflows.
    exponential = bounded_exp(log_sigmoid(z / tau) - z)
    return sigmoid(-z / tau) * -log_sigmoid(z) + exponential


DISCOPOP = PreferenceLoss(
    "discopop", discopop_loss, _WITH_REFERENCE, options=(Option("tau", above=0.0),)
)


def aot_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Stochastic dominance of the policy's preference margins over the reference's.

    loss = -log sigmoid(beta (sort(chosen - rejected) - sort(ref_chosen - ref_rejected)))

    Sorting runs over the last axis, the whole batch: element i belongs to the i-th quantile and not
    to comparison i. Padding examples would count as comparisons, so pass none.

    Melnyk et al. 2024 (AOT), paired, with the logistic loss.
    """
    chosen, rejected, ref_chosen, ref_rejected = same_shape_floats(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    margins = jnp.sort(chosen - rejected, axis=-1)
    ref_margins = jnp.sort(stop_gradient(ref_chosen - ref_rejected), axis=-1)
    return -log_sigmoid(beta * (margins - ref_margins))


AOT = PreferenceLoss("aot", aot_loss, _WITH_REFERENCE)


def aot_unpaired_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Stochastic dominance of chosen over rejected log-ratios, which need not share prompts.

    loss = -log sigmoid(beta (sort(h_w) - sort(h_l)))

    Sorting runs over the last axis, the whole batch: element i belongs to the i-th quantile.

    Melnyk et al. 2024 (AOT), unpaired, with the logistic loss (once TRL's `aot_pair`).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -log_sigmoid(beta * (jnp.sort(h_w, axis=-1) - jnp.sort(h_l, axis=-1)))


AOT_UNPAIRED = PreferenceLoss("aot_unpaired", aot_unpaired_loss, _WITH_REFERENCE)


def rso_hinge_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Hinge on the implicit reward gap: SLiC with log-probabilities relative to the reference.

    loss = max(0, 1 - beta h)

    Liu et al. 2023 (RSO), the hinge-norm loss; its gamma is `beta`.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jax.nn.relu(1 - beta * (h_w - h_l))


RSO_HINGE = PreferenceLoss("rso_hinge", rso_hinge_loss, _WITH_REFERENCE)


# Losses of each response's own log-ratio, so that the chosen response cannot sink as well.


def nca_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Contrasts each response with samples of the reference, which keeps the chosen one likely.

    loss = -log sigmoid(beta h_w) - (log sigmoid(-beta h_w) + log sigmoid(-beta h_l)) / 2

    Chen et al. 2024 (NCA), with K = 2 and a hard preference.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    noise = log_sigmoid(-beta * h_w) + log_sigmoid(-beta * h_l)
    return -log_sigmoid(beta * h_w) - 0.5 * noise


NCA = PreferenceLoss("nca", nca_loss, _WITH_REFERENCE)


def sppo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    win_probability: ArrayLike = 1.0,
) -> jax.Array:
    """Squared distance of each log-ratio to where one step of self-play would put it.

    loss = (h_w - (P - 1/2) / beta)^2 + (h_l + (P - 1/2) / beta)^2, in nats^2

    `win_probability` P (a number or [B]) is the probability that the chosen response beats one of
    the previous policy; the rejected response beats it with probability 1 - P. At 1 the label is
    hard. The step is one of multiplicative weights.

    Wu et al. 2024 (SPPO), eq. 4.7; its eta is 1 / beta.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if is_number(win_probability):
        require(0 <= win_probability <= 1, "`win_probability` must be in [0, 1]")
    target = (stop_gradient(win_probability) - 0.5) / beta
    return (h_w - target) ** 2 + (h_l + target) ** 2


SPPO = PreferenceLoss(
    "sppo",
    sppo_loss,
    _WITH_REFERENCE,
    options=(Option("win_probability", least=0.0, most=1.0),),
)


def apo_zero_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Raises the chosen response and lowers the rejected one.

    It suits chosen responses that are better than the model's own.

    loss = 1 - sigmoid(beta h_w) + sigmoid(beta h_l), in [0, 2]

    D'Oosterlinck et al. 2024 (APO), eq. 7; the 1 that is added keeps the loss positive.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(-beta * h_w) + sigmoid(beta * h_l)


APO_ZERO = PreferenceLoss("apo_zero", apo_zero_loss, _WITH_REFERENCE)


def apo_down_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
) -> jax.Array:
    """Lowers both responses, the rejected one more.

    It suits chosen responses that are worse than the model's own.

    loss = sigmoid(beta h_w) + 1 - sigmoid(beta h), in [0, 2]

    D'Oosterlinck et al. 2024 (APO), eq. 8; the 1 that is added keeps the loss positive.
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(beta * h_w) + sigmoid(-beta * (h_w - h_l))


APO_DOWN = PreferenceLoss("apo_down", apo_down_loss, _WITH_REFERENCE)


def bco_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    beta: Number = 0.1,
    delta: Number = 0.0,
) -> jax.Array:
    """Binary classification of the two responses: is the implicit reward above a threshold?

    loss = -log sigmoid(beta h_w - delta) - log sigmoid(-(beta h_l - delta))

    `delta` is halfway between the mean implicit rewards of chosen and of rejected responses. It
    starts at 0 and gets no gradient. Its running mean is `LOSSES["bco"].running`.

    Jung et al. 2024 (BCO).
    """
    h_w, h_l = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    delta = stop_gradient(delta)
    return -log_sigmoid(beta * h_w - delta) - log_sigmoid(delta - beta * h_l)


def _moved_mean(
    mean: jax.Array, count: jax.Array, total: ArrayLike, weight: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The mean and its weight `count` after `weight` more, whose sum is `total`."""
    new_count = count + weight
    return mean + (total - weight * mean) / jnp.where(new_count > 0, new_count, 1.0), new_count


def _bco_statistics(values: Mapping[str, jax.Array], beta: Number) -> dict[str, jax.Array]:
    chosen, rejected = BCO.rewards(values, beta=beta)
    return {"reward": stop_gradient((chosen + rejected) / 2)}


def _bco_update(
    state: Mapping[str, jax.Array], sums: Mapping[str, jax.Array], weight: ArrayLike
) -> dict[str, jax.Array]:
    delta, count = _moved_mean(state["delta"], state["count"], sums["reward"], weight)
    return {"delta": delta, "count": count}


# `delta` is the mean implicit reward of all responses that the run saw before this step.
BCO = PreferenceLoss(
    "bco",
    bco_loss,
    _WITH_REFERENCE,
    running=Running({"delta": 0.0, "count": 0.0}, ("delta",), _bco_statistics, _bco_update),
)


def bco_unpaired_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    beta: Number = 0.1,
    delta: Number = 0.0,
) -> jax.Array:
    """`bco_loss` of single responses that people accepted or refused.

    loss = -log sigmoid(+-(beta (logps - ref_logps) - delta)), + where `desirable`

    `desirable` is [B], true or 1 for accepted responses.

    Jung et al. 2024 (BCO).
    """
    logps, ref_logps = same_shape_floats(logps=logps, ref_logps=ref_logps)
    z = beta * (logps - stop_gradient(ref_logps)) - stop_gradient(delta)
    return -log_sigmoid(jnp.where(jnp.asarray(desirable).astype(bool), z, -z))


def _bco_unpaired_statistics(values: Mapping[str, jax.Array], beta: Number) -> dict[str, jax.Array]:
    (reward,) = BCO_UNPAIRED.rewards(values, beta=beta)
    desirable = values["desirable"].astype(bool)
    return {
        "desirable": desirable.astype(reward.dtype),
        "undesirable": (~desirable).astype(reward.dtype),
        "desirable_reward": stop_gradient(jnp.where(desirable, reward, 0.0)),
        "undesirable_reward": stop_gradient(jnp.where(desirable, 0.0, reward)),
    }


def _bco_unpaired_update(
    state: Mapping[str, jax.Array], sums: Mapping[str, jax.Array], weight: ArrayLike
) -> dict[str, jax.Array]:
    del weight  # each label has its own
    new = {}
    for label in ("desirable", "undesirable"):
        new[f"{label}_mean"], new[f"{label}_count"] = _moved_mean(
            state[f"{label}_mean"], state[f"{label}_count"], sums[f"{label}_reward"], sums[label]
        )
    # A label that has not come up yet has mean 0: then `delta` is the mean of the other.
    labels = (new["desirable_count"] > 0) * 1.0 + (new["undesirable_count"] > 0)
    new["delta"] = (new["desirable_mean"] + new["undesirable_mean"]) / jnp.maximum(labels, 1.0)
    return new


# `delta` is halfway between the mean implicit rewards of the two labels' responses seen so far.
# Data with few responses of one label thus get the threshold that balanced data would have.
BCO_UNPAIRED = PreferenceLoss(
    "bco_unpaired",
    bco_unpaired_loss,
    ("response", "ref_response", "desirable"),
    sft_weight=None,
    running=Running(
        {
            "delta": 0.0,
            "desirable_mean": 0.0,
            "desirable_count": 0.0,
            "undesirable_mean": 0.0,
            "undesirable_count": 0.0,
        },
        ("delta",),
        _bco_unpaired_statistics,
        _bco_unpaired_update,
    ),
)


def kto_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    kl: ArrayLike,
    *,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> jax.Array:
    """Prospect-theoretic value of single responses that people found desirable or not.

    z = beta (logps - ref_logps - max(kl, 0))
    loss = desirable_weight sigmoid(-z) where `desirable`, else undesirable_weight sigmoid(z)

    Args:
      logps, ref_logps: [B] floats, nats.
      desirable: [B], true or 1 for desirable responses.
      kl: the reference point z_0, an estimate of KL(policy || reference) in nats: a number or [B].
        It gets no gradient, and estimates below 0 count as 0.

    Returns: [B], in [0, weight].

    Ethayarajh et al. 2024 (KTO), eq. 8 (eq. 7 in the first version): the loss is lambda_y - v.
    """
    logps, ref_logps = same_shape_floats(logps=logps, ref_logps=ref_logps)
    reference_point = jnp.maximum(stop_gradient(as_float("kl", kl)), 0.0)
    z = beta * (logps - stop_gradient(ref_logps) - reference_point)
    return jnp.where(
        jnp.asarray(desirable).astype(bool),
        desirable_weight * sigmoid(-z),
        undesirable_weight * sigmoid(z),
    )


KTO = PreferenceLoss(
    "kto",
    kto_loss,
    ("response", "ref_response", "desirable", "kl"),
    options=(Option("desirable_weight", least=0.0), Option("undesirable_weight", least=0.0)),
    sft_weight=None,
)


# Losses without a reference.


def cpo_loss(
    chosen_logps: ArrayLike, rejected_logps: ArrayLike, *, beta: Number = 0.1
) -> jax.Array:
    """DPO with a uniform reference: the contrastive term of CPO.

    loss = -log sigmoid(beta (chosen_logps - rejected_logps))

    Args:
      chosen_logps, rejected_logps: [B] nats, summed over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Xu et al. 2024 (CPO). The caller adds its second term, the negative log-likelihood of the chosen
    responses: an ordinary fine-tuning loss.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return -log_sigmoid(beta * (chosen - rejected))


CPO = PreferenceLoss("cpo", cpo_loss, _SUMS, sft_weight=1.0)


def simpo_loss(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    *,
    beta: Number = 2.0,
    gamma: Number = 1.0,
) -> jax.Array:
    """Comparison of log-probabilities per token, which the chosen response should win by `gamma`.

    loss = -log sigmoid(beta chosen_logps - beta rejected_logps - gamma)

    Args:
      chosen_logps, rejected_logps: [B] nats per token, AVERAGED over response tokens
        (`sequence_log_probs(..., average=True)`). The average is the method: on sums this loss
        is CPO with a margin.
      gamma: target margin, on the scale of beta times nats (TRL's `gamma_beta_ratio` is
        gamma / beta).

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Meng et al. 2024 (SimPO), eq. 6.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


SIMPO = PreferenceLoss("simpo", simpo_loss, _AVERAGES, options=(Option("gamma", least=0.0),))


def orpo_loss(chosen_avg_logps: ArrayLike, rejected_avg_logps: ArrayLike) -> jax.Array:
    """Log-odds of the chosen against the rejected response: ORPO's odds-ratio term.

    log odds(p) = log p - log(1 - p)
    loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    Args:
      chosen_avg_logps, rejected_avg_logps: [B] nats per token, averaged over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Hong et al. 2024 (ORPO), eq. 7. The caller multiplies this term by lambda and adds the negative
    log-likelihood of the chosen responses (eq. 6).
    """
    chosen, rejected = same_shape_floats(
        chosen_avg_logps=chosen_avg_logps, rejected_avg_logps=rejected_avg_logps
    )

    def log_odds(log_p):
        # A probability that rounds to 1 has infinite odds; 1e-7 is float32's distance from 1.
        log_p = jnp.minimum(log_p, -1e-7)
        return log_p - jax.nn.log1mexp(-log_p)

    return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


def _weighted_orpo(chosen: jax.Array, rejected: jax.Array, *, beta: Number) -> jax.Array:
    """The odds-ratio term times `beta`, the lambda of eq. 6."""
    return beta * orpo_loss(chosen, rejected)


ORPO = PreferenceLoss("orpo", _weighted_orpo, _AVERAGES, sft_weight=1.0)


def slic_loss(
    chosen_logps: ArrayLike, rejected_logps: ArrayLike, *, delta: Number = 1.0
) -> jax.Array:
    """Hinge that asks the chosen response to be `delta` nats likelier than the rejected one.

    loss = max(0, delta - chosen_logps + rejected_logps)

    Args:
      chosen_logps, rejected_logps: [B] nats, summed over response tokens.

    Returns: [B] nats.
    Raises: TypeError for integer log-probabilities; ValueError for unequal shapes.

    Zhao et al. 2023 (SLiC-HF), eq. 1. The caller adds its regulariser, -lambda log pi(y_ref): an
    ordinary fine-tuning loss on the SFT data.
    """
    chosen, rejected = same_shape_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return jax.nn.relu(delta - chosen + rejected)


def _scaled_slic(chosen: jax.Array, rejected: jax.Array, *, beta: Number) -> jax.Array:
    """The hinge in units of its delta = 1 / `beta`, as in RSO."""
    return beta * slic_loss(chosen, rejected, delta=1 / beta)


SLIC = PreferenceLoss("slic", _scaled_slic, _SUMS, sft_weight=1.0)


LOSSES: dict[str, PreferenceLoss] = {
    loss.name: loss
    for loss in (
        DPO,
        LENGTH_NORMALIZED_DPO,
        LD_DPO,
        WPO,
        F_DPO,
        IPO,
        ROBUST_DPO,
        EXO,
        DISCOPOP,
        AOT,
        AOT_UNPAIRED,
        RSO_HINGE,
        NCA,
        SPPO,
        APO_ZERO,
        APO_DOWN,
        BCO,
        BCO_UNPAIRED,
        KTO,
        CPO,
        SIMPO,
        ORPO,
        SLIC,
    )
}
