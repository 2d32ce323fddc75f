"""Rewards and comparers from a config.

    "vader"                                          a kind that needs nothing else
    {"kind": "regex", "pattern": "(?i)thank"}        a kind and its keys, see `REWARDS`
    "my_package.my_module:my_reward"                 any Python callable

A kind's keys are the keyword arguments of its builder here, or of the class it builds. A key whose
value is "" counts as not given, so that the command line can take one away; a `kind` with a colon
in it is a callable.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from align_jax.errors import DataError, ModelError, RewardError
from align_jax.rewards import rules
from align_jax.rewards.base import Comparer, Reward
from align_jax.rewards.judge import (
    ANSWER,
    OPTIONS,
    QUESTION,
    TEMPLATE,
    LanguageModelJudge,
    OracleJudge,
)
from align_jax.rewards.mixture import Mixture, SafetyGated
from align_jax.rewards.people import PeopleJudge
from align_jax.text import hint
from align_jax.user_code import load_callable


class _Context(NamedTuple):
    """What the run has that a config cannot hold; `key` is where in the config we are."""

    key: str
    tokenizer: Any = None
    mesh: Mesh | None = None
    directory: str | os.PathLike | None = None
    rewards: Mapping[str, Callable] | None = None  # instead of `REWARDS`

    def reward(self, config: Any, key: str) -> Reward:
        return _build(config, self.rewards or REWARDS, self._replace(key=f"{self.key}.{key}"))


def make_reward(
    config: Any, *, tokenizer: Any = None, mesh: Mesh | None = None, key: str = "config.reward"
) -> Reward:
    """The reward that a config describes.

    Args:
      config: a name, a ConfigDict or dict with `kind`, or `package.module:function`.
      tokenizer: the policy's, for lengths in tokens.
      mesh: where reward models go.
      key: what messages call the config.

    Raises:
      RewardError: an unknown kind or key (the nearest is suggested), a missing one, a bad value, a
        callable that cannot be imported. The message begins with the config key.
      ModelError: a reward model that cannot be read.
    """
    return _build(config, REWARDS, _Context(key, tokenizer, mesh))


def make_comparer(
    config: Any,
    *,
    directory: str | os.PathLike | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
    key: str = "config.comparer",
) -> Comparer:
    """The comparer that a config describes: `oracle`, `judge`, `people`, or any callable.

    Args:
      directory: where people find pairs and leave labels; another one for each round.
      config, tokenizer, mesh, key: as for `make_reward`.

    Raises: as `make_reward`.
    """
    return _build(config, COMPARERS, _Context(key, tokenizer, mesh, directory))


def check_reward(config: Any, *, key: str = "config.reward") -> None:
    """Raises what `make_reward` would of the config alone: no model is loaded or looked for."""
    context = _checking(key)
    _build(config, context.rewards, context)


def check_comparer(config: Any, *, key: str = "config.comparer") -> None:
    """Raises what `make_comparer` would of the config alone: no model is loaded or looked for."""
    _build(config, _unloaded(COMPARERS), _checking(key))


def _checking(key: str) -> _Context:
    # Of tokenizer and directory builders only ask whether there is one, and there will be.
    return _Context(key, tokenizer=object(), directory=".", rewards=_unloaded(REWARDS))


def _unloaded(kinds: Mapping[str, Callable]) -> dict[str, Callable]:
    """Builders with the same keys that make nothing of what takes a model."""

    def nothing(builder: Callable) -> Callable:
        return functools.wraps(builder)(lambda context, **options: None)

    return {name: nothing(b) if b in (_model, _judge) else b for name, b in kinds.items()}


def _model(context: _Context, *, path: str, compute_dtype: str | None = None) -> Reward:
    from align_jax.rewards.model import RewardModel

    return RewardModel.load(path, mesh=context.mesh, compute_dtype=compute_dtype)


def _length_penalty(context: _Context, *, limit: float, buffer: float, unit: str = "tokens"):
    return rules.LengthPenalty(limit, buffer, unit=unit, tokenizer=context.tokenizer)


def _length_target(context: _Context, *, target: float, unit: str = "tokens"):
    return rules.LengthTarget(target, unit=unit, tokenizer=context.tokenizer)


def _mixture(context: _Context, *, components: Mapping, standardise: bool = False) -> Reward:
    if not isinstance(components, Mapping):
        raise ValueError(
            f"components: found {components!r}; expected a dict of "
            "{'weight': ..., 'reward': ...} under the components' names."
        )
    parts = {}
    for name, part in components.items():
        key = f"components.{name}"
        if not isinstance(part, Mapping):
            raise ValueError(f"{key}: found {part!r}; expected {{'weight': ..., 'reward': ...}}.")
        _check_keys(part, ("weight", "reward"), (), f"{context.key}.{key}")
        parts[name] = (part["weight"], context.reward(part["reward"], f"{key}.reward"))
    return Mixture(parts, standardise=standardise)


def _safety_gated(
    context: _Context, *, safety: Any, helpfulness: Any, threshold: float = 0.15
) -> Reward:
    return SafetyGated(
        context.reward(safety, "safety"),
        context.reward(helpfulness, "helpfulness"),
        threshold=threshold,
    )


def _oracle(context: _Context, *, reward: Any, temperature: float = 0.0, seed: int = 0) -> Comparer:
    return OracleJudge(context.reward(reward, "reward"), temperature=temperature, seed=seed)


def _judge(
    context: _Context,
    *,
    model: str,
    compute_dtype: str = "float32",
    questions: tuple[str, ...] = (QUESTION,),
    template: str = TEMPLATE,
    answer: str = ANSWER,
    options: tuple[str, str] = OPTIONS,
    batch_size: int = 8,
) -> Comparer:
    from align_jax.models.loading import load_model
    from align_jax.models.tokenizers import load_tokenizer

    return LanguageModelJudge(
        load_model(model, mesh=context.mesh, compute_dtype=compute_dtype),
        load_tokenizer(model),
        questions=questions,
        template=template,
        answer=answer,
        options=options,
        batch_size=batch_size,
        mesh=context.mesh,
    )


def _people(context: _Context) -> Comparer:
    if context.directory is None:
        raise ValueError("kind: 'people' needs a directory to exchange files in; here is none.")
    return PeopleJudge(context.directory)


REWARDS: dict[str, Callable[..., Reward]] = {
    "answer": lambda _: rules.Answer(),
    "format": lambda _, *, style: rules.Format(style),
    "length": lambda _: rules.of_completions(rules.text_length),
    "length_penalty": _length_penalty,
    "length_target": _length_target,
    "mixture": _mixture,
    "model": _model,
    "regex": lambda _, *, pattern, match="any": rules.Regex(pattern, match=match),
    "safety_gated": _safety_gated,
    "vader": lambda _: rules.of_completions(rules.vader_sentiment),
}
COMPARERS: dict[str, Callable[..., Comparer]] = {
    "judge": _judge,
    "oracle": _oracle,
    "people": _people,
}


def _build(config: Any, kinds: Mapping[str, Callable], context: _Context) -> Any:
    key = context.key
    if isinstance(config, str):
        if ":" in config:
            return load_callable(config, key, error=RewardError)
        config = {"kind": config}
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping) or not isinstance(config.get("kind"), str):
        raise RewardError(
            f"{key} is {config!r}; expected one of {', '.join(sorted(kinds))}, a dict with one of "
            "them as its 'kind', or 'package.module:function'."
        )
    kind = config["kind"]
    options = {name: value for name, value in config.items() if name != "kind" and value != ""}
    if ":" in kind:
        if options:
            empty = ", ".join(f"{key}.{name}=''" for name in options)
            raise RewardError(
                f"{key}.kind is {kind!r}, a Python callable, which takes no keys. Set {empty}."
            )
        return load_callable(kind, key, error=RewardError)
    if kind not in kinds:
        raise RewardError(
            f"{key}: there is no kind {kind!r}.{hint(kind, kinds)} Any Python callable is "
            "'package.module:function'."
        )
    parameters = [
        p for p in inspect.signature(kinds[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    required = [p.name for p in parameters if p.default is p.empty]
    _check_keys(options, required, [p.name for p in parameters], f"{key} (kind {kind!r})")
    try:
        return kinds[kind](context, **options)
    except (RewardError, DataError, ModelError):
        raise
    except ValueError as error:
        raise RewardError(f"{key}.{error}") from error


def _check_keys(options: Mapping, required: Any, optional: Any, key: str) -> None:
    known = list(dict.fromkeys([*required, *optional]))
    for name in options:
        if name not in known:
            raise RewardError(
                f"{key} has no key {name!r}.{hint(name, known)} An empty value takes it away."
            )
    for name in required:
        if name not in options:
            raise RewardError(f"{key} needs the key {name!r}.")
