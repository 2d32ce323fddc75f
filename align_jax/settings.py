"""Settings: frozen dataclasses that check themselves, and their way to and from a `ConfigDict`.

An algorithm's `Config` is a `Settings`; so is each of its parts (data, optimizer, sampling, ...).
The class is the one place that knows a field's default, unit and range, wherever the value came
from: a config file, the command line, or Python.

    @dataclasses.dataclass(frozen=True)
    class Optimizer(Settings, key="config.optimizer"):
        learning_rate: float = 1e-6
        warmup_steps: int = 0

        def __post_init__(self):
            super().__post_init__()
            self.at_least(0, "learning_rate", "warmup_steps")

Annotations a field may have: `bool`, `int`, `float`, `str`, `tuple[T, ...]`, another `Settings`,
`Mapping` for what has a check of its own (a reward, an evaluator), and unions of these with each
other or with None.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from align_jax.errors import RunError
from align_jax.text import brief, nearest

# `jax.random.key` drops what is above 32 bits, so that two larger seeds could be one.
MAX_SEED = 2**32 - 1

# A reward, a comparer: a name, or a mapping with `kind`; `rewards.configured` checks it.
Described = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of all settings: types, finite numbers and unknown names are checked here.

    A subclass checks its ranges in `__post_init__`, after the base's. `key` is what messages call
    the settings, such as "config.optimizer".
    """

    key: ClassVar[str] = "config"

    def __init_subclass__(cls, *, key: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.key = key

    def __post_init__(self) -> None:
        """Converts what is exact (1 to 1.0, lists to tuples, mappings to settings).

        Raises:
          RunError: a value of a wrong type, NaN or infinity.
        """
        for name, annotation in _annotations(type(self)).items():
            value = _checked(getattr(self, name), annotation, f"{self.key}.{name}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The settings of a nested mapping or `ConfigDict`; fields that are absent get defaults.

        Raises:
          RunError: a name that is no field (the nearest is suggested), or a value refused.
        """
        if not isinstance(values, Mapping):
            if not hasattr(values, "to_dict"):
                raise RunError(f"{cls.key} is {_shown(values)}; expected a mapping.")
            values = values.to_dict()
        names = list(_annotations(cls))
        for name in values:
            if name not in names:
                hint = nearest(name, names) if isinstance(name, str) else ""
                raise RunError(f"{cls.key} has no field {_shown(name)}.{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values; the inverse of `from_dict`."""
        return {name: _plain(getattr(self, name)) for name in _annotations(type(self))}

    def to_config_dict(self) -> Any:
        """A `ConfigDict`, which a recipe edits and the command line overrides.

        A field `X | None` is a placeholder of type X, so that a value can be set and typed later.
        """
        from ml_collections import ConfigDict, config_dict

        config = ConfigDict()
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            options = typing.get_args(annotation)
            if isinstance(value, Settings):
                config[name] = value.to_config_dict()
            elif type(None) in options:
                [kind] = [option for option in options if option is not type(None)]
                config[name] = config_dict.placeholder(typing.get_origin(kind) or kind)
                config[name] = _plain(value)
            else:
                config[name] = _plain(value)
        return config

    # Checks, for `__post_init__`. A name may be dotted: "kl.target".

    def at_least(self, bound: float, *names: str) -> None:
        """Raises `RunError` for a field below `bound`; None passes."""
        self._compare(lambda value: value >= bound, f"at least {bound}", names)

    def above(self, bound: float, *names: str) -> None:
        """Raises `RunError` for a field that is not above `bound`; None passes."""
        self._compare(lambda value: value > bound, f"more than {bound}", names)

    def at_most(self, bound: float, *names: str) -> None:
        """Raises `RunError` for a field above `bound`; None passes."""
        self._compare(lambda value: value <= bound, f"at most {bound}", names)

    def below(self, bound: float, *names: str) -> None:
        """Raises `RunError` for a field that is not below `bound`; None passes."""
        self._compare(lambda value: value < bound, f"less than {bound}", names)

    def between(self, low: float, high: float, *names: str) -> None:
        """Raises `RunError` for a field outside `[low, high]`; None passes."""
        self._compare(lambda value: low <= value <= high, f"from {low} to {high}", names)

    def one_of(self, choices: Iterable[Any], *names: str) -> None:
        """Raises `RunError` for a field that is none of `choices`."""
        for name in names:
            value = self._field(name)
            if value not in choices:
                listed = ", ".join(map(str, choices))
                raise RunError(f"{self.key}.{name} is {_shown(value)}; expected one of {listed}.")

    def at_default(self, reason: str, *names: str) -> None:
        """Raises `RunError` for a field that is set although `reason` makes nothing read it."""
        for name in names:
            owner: Any = self
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            value, default = getattr(owner, last), _defaults(type(owner))[last]
            if value != default:
                raise RunError(
                    f"{self.key}.{name} is {_shown(value)}, but {reason}: leave it at "
                    f"{_shown(default)}."
                )

    def _compare(self, holds: Callable[[Any], bool], expected: str, names: Iterable[str]) -> None:
        for name in names:
            value = self._field(name)
            if value is not None and not holds(value):
                raise RunError(f"{self.key}.{name} is {value}; expected {expected}.")

    def _field(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    # Not from an instance: making one may ask for these.
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(one) for one in value)
    if hasattr(value, "to_dict"):  # a ConfigDict
        return _plain(value.to_dict())
    return value


def _checked(value: Any, annotation: Any, key: str) -> Any:
    """`value` as `annotation` wants it, or `RunError`."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = list(typing.get_args(annotation))
    for option in options:
        found, converted = _converted(value, option, key)
        if found:
            return converted
    expected = " or ".join(_name_of(option) for option in options)
    raise RunError(f"{key} is {_shown(value)}; expected {expected}.")


def _converted(value: Any, option: Any, key: str) -> tuple[bool, Any]:
    """Whether a value is of one kind of annotation, and the value in exactly that kind."""
    origin = typing.get_origin(option) or option
    if option is type(None):
        return value is None, None
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if whole and not -(2**63) <= int(value) < 2**63:
            raise RunError(f"{key} is {_shown(int(value))}; expected a number of 64 bits at most.")
        return whole, int(value) if whole else None
    if option is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False, None
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond every float
            finite = False
        if not finite:
            raise RunError(f"{key} is {_shown(value)}; expected a finite number.")
        return True, float(value)
    if option is str:
        return isinstance(value, str), value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, None
        [inner, _] = typing.get_args(option)
        return True, tuple(_checked(one, inner, f"{key}[{i}]") for i, one in enumerate(value))
    mapping = isinstance(value, Mapping) or hasattr(value, "to_dict")
    if isinstance(origin, type) and issubclass(origin, Settings):
        if isinstance(value, origin):
            return True, value
        return mapping, origin.from_dict(value) if mapping else None
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return mapping, _plain(value) if mapping else None
    raise TypeError(f"{key}: settings cannot have the annotation {option!r}.")


def _shown(value: Any) -> str:
    return brief(value, 200)


def _name_of(option: Any) -> str:
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a string",
        type(None): "None",
    }
    if option in names:
        return names[option]
    origin = typing.get_origin(option) or option
    return "a tuple" if origin is tuple else "a mapping"
