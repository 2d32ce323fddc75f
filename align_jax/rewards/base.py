"""What a reward is, and the check every score passes before anything learns from it.

A *reward* is a callable `(records, completions) -> [N] numbers`; `records[i]` is the record of the
prompt that `completions[i]` answers, in normal form (docs/data.md), repeated for several samples.
A *comparer* is a callable `(records, first, second) -> [N] probabilities` that the first is better.
"""

import decimal
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from align_jax.distributed import hosts
from align_jax.errors import DataError, ModelError, RewardError
from align_jax.user_code import OF_USERS_CODE

Records = Sequence[Mapping[str, Any]]
Reward = Callable[[Records, Sequence[str]], Any]
Comparer = Callable[[Records, Sequence[str], Sequence[str]], Any]

_SHOWN = 160  # characters of a prompt or a completion in a message


# Errors that say themselves what was wrong: passed on as they are.
_EXPLAINED = (RewardError, DataError, ModelError, ImportError)


def checked_scores(reward: Reward, records: Records, completions: Sequence[str]) -> np.ndarray:
    """The reward of each completion, `[N]` float32, or an error that names the completion.

    Integers and booleans become floats; nothing is rounded to them. No completions, no call.

    Raises:
      RewardError: the reward raised (it is called again on fewer and fewer completions, to find
        the one), or returned NaN, infinity, another number of scores, or something that is no
        number. An ImportError (it says what to install), DataError or ModelError is passed on.
      ValueError: as many records as completions are needed.
    """
    return _checked_values(
        reward, records, {"completion": completions}, f"the reward {name_of(reward)}"
    )


def checked_probabilities(
    comparer: Comparer, records: Records, first: Sequence[str], second: Sequence[str]
) -> np.ndarray:
    """The comparer's probabilities that the first is better, `[N]` float32, each in [0, 1].

    Raises: as `checked_scores`; also for a value outside [0, 1].
    """
    texts, label = {"first": first, "second": second}, f"the comparer {name_of(comparer)}"
    values = _checked_values(comparer, records, texts, label)
    for index in np.flatnonzero((values < 0) | (values > 1))[:1]:
        raise RewardError(
            f"{label} returned {values[index]}, which is no probability, for "
            + _describe(index, records, texts)
        )
    return values


def scores_and_components(
    reward: Reward, records: Records, completions: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`checked_scores`, and what a combined reward is made of: `[N]` and {name: `[N]`}, float32.

    The second is empty for a reward without `components`. Each component is computed once.

    Raises: as `checked_scores`; of a component with its name.
    """
    if not len(records) or getattr(reward, "components", None) is None:
        return checked_scores(reward, records, completions), {}
    records, texts = _aligned(records, {"completion": completions})
    column, label = texts["completion"], f"the reward {name_of(reward)}"
    found = _called(
        lambda rows: reward.components(records[rows], column[rows]),
        records,
        texts,
        f"{label} (components)",
    )
    if not isinstance(found, Mapping) or not all(isinstance(k, str) and k for k in found):
        raise RewardError(
            f"{label} has components {_shortened(repr(found))}; expected a dict of "
            f"{len(records)} numbers under each component's name."
        )
    components = {
        name: _validated(values, records, texts, f"component {name!r} of {label}")
        for name, values in found.items()
    }
    combined = _called(
        lambda rows: reward.combine(
            {name: values[rows] for name, values in components.items()}, records[rows]
        ),
        records,
        texts,
        f"{label} (combine)",
    )
    return _validated(combined, records, texts, label), components


def check_records(reward: Reward | Comparer, records: Records) -> None:
    """Lets the reward refuse prompts before anything is computed.

    A reward that needs something of its records (an `answer`) says so in a method
    `check_records(records)`, which raises RewardError; others accept everything.
    """
    check = getattr(reward, "check_records", None)
    if check is None:
        return
    try:
        check(records)
    except _EXPLAINED:
        raise
    except OF_USERS_CODE as error:
        raise RewardError(
            f"the reward {name_of(reward)} (check_records) {_raised(error)}."
        ) from error


def name_of(function: Any) -> str:
    """What messages and metrics call a reward: its `name`, or the function's or class's own."""
    name = getattr(function, "name", None) or getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__name__


def text_of(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as one text; messages as paragraphs that begin with their role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in prompt)


def _checked_values(
    function: Callable, records: Records, texts: dict[str, Sequence[str]], label: str
) -> np.ndarray:
    records, texts = _aligned(records, texts)
    if not records:
        return np.zeros(0, np.float32)
    result = _called(
        lambda rows: function(records[rows], *(column[rows] for column in texts.values())),
        records,
        texts,
        label,
    )
    return _validated(result, records, texts, label)


def _aligned(
    records: Records, texts: dict[str, Sequence[str]]
) -> tuple[list[Mapping[str, Any]], dict[str, list[str]]]:
    """Both as lists; `ValueError` if they are not as long as each other."""
    records = list(records)
    texts = {field: list(column) for field, column in texts.items()}
    for field, column in texts.items():
        if len(column) != len(records):
            raise ValueError(f"{len(records)} records and {len(column)} texts in `{field}`.")
    return records, texts


def _called(
    call: Callable[[slice], Any], records: list, texts: dict[str, list[str]], label: str
) -> Any:
    """`call` of all examples; an error that it raises names the example it raises for."""
    try:
        return call(slice(None))
    except _EXPLAINED:
        raise
    except OF_USERS_CODE as error:
        index, error = _first_to_fail(call, len(records), error)
        message = f"{label} {_raised(error)} for {_describe(index, records, texts)}"
        raise RewardError(message) from error


def _raised(error: BaseException) -> str:
    """What code of the user's own raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
    return f"{what}, which would have ended the run," if isinstance(error, SystemExit) else what


def _validated(
    result: Any, records: Records, texts: dict[str, Sequence[str]], label: str
) -> np.ndarray:
    values = _as_float64(result, len(records), label, lambda i: _describe(i, records, texts))
    with np.errstate(over="ignore"):
        out = values.astype(np.float32)
    for index in np.flatnonzero(~np.isfinite(out))[:1]:
        raise RewardError(
            f"{label} returned {values[index]}, which is no finite float32, for "
            + _describe(index, records, texts)
        )
    # A reward of Python code may say something else on every host: the first one's counts.
    return hosts.broadcast_array(out)


def _first_to_fail(
    call: Callable[[slice], Any], count: int, error: BaseException
) -> tuple[int, BaseException]:
    """By halves: an example that fails, and how. If none does alone, the last half's first."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        try:
            call(slice(low, middle))
        except OF_USERS_CODE as found:
            high, error = middle, found
        else:
            low = middle
    return low, error


def _as_float64(result: Any, count: int, label: str, describe: Callable[[int], str]) -> np.ndarray:
    """`[N]` float64, or an error; bfloat16 has a dtype that numpy knows as void."""
    try:
        array = np.asarray(result)
        if array.dtype.kind == "V":
            array = array.astype(np.float32)
    except (ValueError, TypeError):  # rows of several lengths, structures
        array = np.zeros(0, object)
    if array.shape == (count,) and array.dtype.kind in "biuf":
        return array.astype(np.float64)
    items = list(result) if isinstance(result, Sequence | np.ndarray) and array.ndim else None
    if items is None or isinstance(result, str) or array.ndim > 1:
        what = f"an array of shape {array.shape}" if array.ndim > 1 else _shortened(repr(result))
        raise RewardError(
            f"{label} returned {what}; expected {count} numbers, one for each completion, the "
            f"first of them for {describe(0)}"
        )
    if len(items) != count:
        raise RewardError(
            f"{label} returned {len(items)} values for {count} completions; expected one for each, "
            f"the first of them for {describe(0)}"
        )
    for index, item in enumerate(items):
        if not isinstance(item, numbers.Real | decimal.Decimal | np.bool_):
            raise RewardError(
                f"{label} returned {_shortened(repr(item))}, which is no number, for "
                f"{describe(index)}"
            )
    return np.array([float(item) for item in items])


def _describe(index: int, records: Sequence, texts: dict[str, Sequence[str]]) -> str:
    record = records[index]
    where = f" ({record['where']})" if "where" in record else ""
    parts = [f"prompt {_shortened(text_of(record.get('prompt', '')))!r}{where}"]
    parts += [f"{field} {_shortened(column[index])!r}" for field, column in texts.items()]
    return f"index {index} of {len(records)}: " + ", ".join(parts)


def _shortened(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
