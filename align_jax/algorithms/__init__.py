"""One file per method; `ALGORITHMS` says which.

A module of an algorithm has

    Config                              its settings
    train(model, tokenizer, records, config, ...) -> Result      from Python
    run(config, workdir) -> summary     `train` with the model and the data that the config names
    evaluate(config, workdir)           the numbers of a finished run
    sources(config)                     what it reads
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from align_jax.data.dataset import Data, load_source
from align_jax.errors import DataError, RewardError, RunError
from align_jax.settings import Settings
from align_jax.text import brief

# What a run reads: a source, the kind of its records, and the `data` settings it is read by.
Source = tuple[str, str, Data]

# What `config.algorithm` may say, and its module.
ALGORITHMS = {
    "sft": "align_jax.algorithms.sft",
    "preference": "align_jax.algorithms.preference",
    "reward_model": "align_jax.algorithms.reward_model",
    "policy_gradient": "align_jax.algorithms.policy_gradient",
    "sample": "align_jax.algorithms.sample",
    "online_preferences": "align_jax.recipes.online_preferences",
    "controlled_sentiment": "align_jax.algorithms.controlled_sentiment",
    "stages": "align_jax.recipes.stages",
}

# Those whose runs are made of runs.
OF_RUNS = ("online_preferences", "stages")

# Those whose runs are evaluated on samples they keep, not on records of `data.eval_source`.
OF_OWN_SAMPLES = (
    "sample",
    "policy_gradient",
    "online_preferences",
    "controlled_sentiment",
    "stages",
)


def algorithm_of(config: Any, *, key: str = "config") -> ModuleType:
    """The module that runs a config, settings or mapping; `RunError` if it names none."""
    mapping = isinstance(config, Mapping)
    name = config.get("algorithm") if mapping else getattr(config, "algorithm", None)
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise RunError(f"{key}.algorithm is {brief(name)}; expected one of {list(ALGORITHMS)}.")
    return importlib.import_module(ALGORITHMS[name])


def settings_of(config: Any, *, key: str = "config") -> Settings:
    """The checked settings of a `ConfigDict` or a nested mapping.

    Raises:
      RunError: no such algorithm, or a field that is refused.
    """
    return algorithm_of(config, key=key).Config.from_dict(config)


def read_sources(sources: list[Source]) -> None:
    """Raises `DataError` for what a run would stop at once something has been paid for."""
    for source, kind, data in sources:
        if source:
            load_source(data, source, kind=kind)


@contextlib.contextmanager
def errors_in(name: str) -> Iterator[None]:
    """Prefixes an error with the sub-config it came from: `in config.sft: ...`."""
    try:
        yield
    except (RunError, DataError, RewardError) as error:
        if str(error).startswith(f"config.{name}."):
            raise  # it says so itself
        raise RunError(f"in config.{name}: {error}") from error
