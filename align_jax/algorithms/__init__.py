"""One file per method; `ALGORITHMS` says which."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from ml_collections import ConfigDict

from align_jax.data.sources import load_as_configured
from align_jax.errors import DataError, RewardError, RunError

# What a run reads: a source, the kind of its records, and the `data` config it is read by.
Source = tuple[str, str, ConfigDict]

# What `config.algorithm` may say, and the module with its `run` and `evaluate`, of (config,
# workdir), its `check`, of a config alone, and its `sources`.
ALGORITHMS = {
    "sft": "align_jax.algorithms.sft",
    "preference": "align_jax.algorithms.preference",
    "reward_model": "align_jax.algorithms.reward_model",
    "policy_gradient": "align_jax.algorithms.policy_gradient",
    "online_preferences": "align_jax.algorithms.online_preferences",
    "controlled_sentiment": "align_jax.algorithms.controlled_sentiment",
    "stages": "align_jax.algorithms.stages",
}

# Those whose runs are evaluated on samples they keep, not on records of `data.eval_source`.
OF_OWN_SAMPLES = ("policy_gradient", "online_preferences", "controlled_sentiment", "stages")


def algorithm_of(config: ConfigDict, *, key: str = "config") -> ModuleType:
    """The module that runs a config; `RunError` if it names none."""
    name = config.get("algorithm")
    if name not in ALGORITHMS:
        raise RunError(f"{key}.algorithm is {name!r}; expected one of {list(ALGORITHMS)}.")
    return importlib.import_module(ALGORITHMS[name])


def read_sources(sources: list[Source]) -> None:
    """Raises `DataError` for what a run would stop at once something has been paid for."""
    for source, kind, data in sources:
        if source:
            load_as_configured(data, source, kind=kind)


@contextlib.contextmanager
def errors_in(name: str) -> Iterator[None]:
    """Says of an error that it is in `config.NAME`, a run of several in one config."""
    try:
        yield
    except (RunError, DataError, RewardError) as error:
        raise RunError(f"in config.{name}: {error}") from error
