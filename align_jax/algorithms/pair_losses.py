"""Which loss of a pair `config.loss` names, what it reads, and what can be set about it.

Most read four log-probabilities of whole responses, the policy's and the reference's of chosen and
rejected. Those without a reference never compute one. To every loss of pairs,
`config.loss_options.sft_weight` x the chosen response's negative log-likelihood per token can be
added: it is part of ORPO, CPO and SLiC (weight 1 unless set) and of the RPO of Pang et al. 2024
(arXiv:2404.19733), where it keeps `logps/chosen` from falling.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from align_jax.errors import RunError
from align_jax.losses import preference as losses

Array = jax.Array


def _ld_dpo(*log_probs: Array, beta: float, alpha: float) -> Array:
    # `alpha` has acted before: it is the weight of a response's surplus tokens in these sums.
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], but is {alpha}")
    return losses.dpo_loss(*log_probs, beta=beta)


def _orpo(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """ORPO's odds-ratio term, weighted by `beta`, the lambda of its eq. 6."""
    return beta * losses.orpo_loss(chosen, rejected)


def _slic(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """SLiC's hinge in units of its delta = 1 / `beta`, as in RSO."""
    return beta * losses.slic_loss(chosen, rejected, delta=1 / beta)


LOSSES: dict[str, Callable[..., Array]] = {
    "dpo": losses.dpo_loss,
    "length_normalized_dpo": losses.length_normalized_dpo_loss,
    "ld_dpo": _ld_dpo,
    "wpo": losses.wpo_loss,
    "f_dpo": losses.f_dpo_loss,
    "ipo": losses.ipo_loss,
    "robust_dpo": losses.robust_dpo_loss,
    "exo": losses.exo_loss,
    "nca": losses.nca_loss,
    "sppo": losses.sppo_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
    "discopop": losses.discopop_loss,
    "aot": losses.aot_loss,
    "aot_unpaired": losses.aot_unpaired_loss,
    "rso_hinge": losses.rso_hinge_loss,
    "cpo": losses.cpo_loss,
    "simpo": losses.simpo_loss,
    "orpo": _orpo,
    "slic": _slic,
    "kto": losses.kto_loss,
}

# Names of what a loss reads, `[pairs]` each; averages are per token.
_SUMS = ("chosen", "rejected")
_AVERAGES = ("chosen_average", "rejected_average")
_FOUR = (*_SUMS, "ref_chosen", "ref_rejected")
_READS = {
    "length_normalized_dpo": (*_FOUR, "chosen_length", "rejected_length"),
    "wpo": (*_FOUR, "chosen_weight", "rejected_weight"),
    "cpo": _SUMS,
    "slic": _SUMS,
    "simpo": _AVERAGES,
    "orpo": _AVERAGES,
    "kto": ("chosen", "ref_chosen", "desirable", "kl"),
}
_SFT_WEIGHTS = {"orpo": 1.0, "cpo": 1.0, "slic": 1.0}


def default_loss_options() -> ConfigDict:
    """The fields of `config.loss_options`; None leaves a loss its own default."""
    numbers = (
        "label_smoothing",  # dpo, robust_dpo, exo: how often a label is wrong
        "margin",  # dpo: nats by which the chosen response should win
        "alpha",  # f_dpo with divergence="alpha"; ld_dpo: the weight of a surplus token
        "tau",  # discopop
        "gamma",  # simpo: target margin, on the scale of beta x nats per token
        "win_probability",  # sppo
        "desirable_weight",  # kto
        "undesirable_weight",  # kto
        "sft_weight",  # all losses of pairs
    )
    options = ConfigDict({name: config_dict.placeholder(float) for name in numbers})
    options.divergence = config_dict.placeholder(str)  # f_dpo
    return options


def reads(name: str) -> tuple[str, ...]:
    """What the loss of that name reads, in its order."""
    return _READS.get(name, _FOUR)


def needs_reference(name: str) -> bool:
    """Whether the loss of that name compares with a reference model."""
    return "ref_chosen" in reads(name)


def make_pair_loss(config: ConfigDict) -> Callable[[dict[str, Array]], Array]:
    """The loss `[pairs]`, of the values that `reads(config.loss)` names and, with an SFT term, of
    `chosen_average`.

    Raises:
      RunError: an unknown loss, an option that it does not have or needs, a value out of range.
    """
    name, beta = config.loss, config.beta
    if name not in LOSSES:
        raise RunError(f"config.loss is {name!r}; expected one of {sorted(LOSSES)}.")
    if not (beta > 0 and math.isfinite(beta)):
        raise RunError(f"config.beta is {beta}; expected a number above 0.")
    options = _options(config)
    sft_weight = options.pop("sft_weight", _SFT_WEIGHTS.get(name, 0.0))
    if sft_weight < 0:
        raise RunError(f"config.loss_options.sft_weight is {sft_weight}; expected at least 0.")
    function, names = LOSSES[name], reads(name)

    def pair_loss(values: dict[str, Array]) -> Array:
        loss = function(*(values[one] for one in names), beta=beta, **options)
        return loss - sft_weight * values["chosen_average"] if sft_weight else loss

    try:
        jax.eval_shape(pair_loss, dict.fromkeys((*names, "chosen_average"), jnp.zeros(2)))
    except ValueError as error:
        raise RunError(f"config.loss_options of the loss {name!r}: {error}.") from error
    return pair_loss


def _options(config: ConfigDict) -> dict[str, Any]:
    name = config.loss
    given = config.get("loss_options") or {}
    options = {key: value for key, value in given.items() if value is not None}
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta"}
    allowed = sorted([*own, *(() if name == "kto" else ("sft_weight",))])
    for key, value in options.items():
        if key not in allowed:
            raise RunError(
                f"config.loss_options.{key} is no option of the loss {name!r}; it has "
                f"{', '.join(allowed)}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"config.loss_options.{key} is {value}; expected a finite number.")
    for key, parameter in own.items():
        if parameter.default is parameter.empty and key not in options:
            raise RunError(f"the loss {name!r} needs config.loss_options.{key}.")
    return options
