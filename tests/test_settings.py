"""Settings: what they refuse, and that nothing is lost on the way to a ConfigDict and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest

from align_jax.errors import RunError
from align_jax.settings import Described, Settings


@dataclasses.dataclass(frozen=True)
class Inner(Settings, key="config.inner"):
    rate: float = 0.5
    buckets: tuple[int, ...] = (64, 128)
    name: str = "a"

    def __post_init__(self):
        super().__post_init__()
        self.between(0, 1, "rate")
        self.one_of(("a", "b"), "name")


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    count: int = 1
    flag: bool = False
    maybe: float | None = None
    inner: Inner = Inner()
    reward: Described = "vader"
    parts: tuple[Mapping[str, Any], ...] = ()
    extra: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "count")
        self.above(0, "maybe")
        if not self.flag:
            self.at_default("config.flag is off", "inner.buckets", "extra")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "config.count is 0; expected at least 1."),
        ({"count": 1.5}, "config.count is 1.5; expected a whole number."),
        ({"count": True}, "config.count is True; expected a whole number."),
        ({"flag": 1}, "config.flag is 1; expected True or False."),
        ({"maybe": math.nan}, "config.maybe is nan; expected a finite number."),
        ({"maybe": math.inf}, "config.maybe is inf; expected a finite number."),
        ({"maybe": 0}, "config.maybe is 0.0; expected more than 0."),
        ({"maybe": "x"}, "config.maybe is 'x'; expected a number or None."),
        ({"inner": {"rate": 1.5}}, "config.inner.rate is 1.5; expected from 0 to 1."),
        ({"inner": {"name": "c"}}, "config.inner.name is 'c'; expected one of a, b."),
        ({"inner": {"rat": 1.0}}, "config.inner has no field 'rat'. Did you mean 'rate'?"),
        ({"inner": {"buckets": [64, "x"]}}, "config.inner.buckets[1] is 'x'; expected a whole"),
        ({"inner": 3}, "config.inner is 3; expected a mapping."),
        ({"extra": 1}, "config.extra is 1.0, but config.flag is off: leave it at 0.0."),
        ({"countt": 3}, "config has no field 'countt'. Did you mean 'count'?"),
        ({"reward": 3}, "config.reward is 3; expected a string or a mapping."),
        ({"parts": {"kind": "loss"}}, "config.parts is {'kind': 'loss'}; expected a tuple."),
        (
            {"inner": {"buckets": [1]}},
            "config.inner.buckets is (1,), but config.flag is off: leave it at (64, 128).",
        ),
    ],
)
def test_what_is_refused_is_named(values, message):
    with pytest.raises(RunError) as caught:
        Outer.from_dict(values)
    assert message in str(caught.value)


def test_what_is_exact_is_converted():
    config = Outer(count=3, maybe=2, inner={"rate": 1, "buckets": [64, 128]})
    assert config.maybe == 2.0 and type(config.maybe) is float
    assert config.inner == Inner(rate=1.0) and type(config.inner.rate) is float
    assert config.inner.buckets == (64, 128)


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(
            maybe=0.25,
            flag=True,
            inner=Inner(buckets=(8,)),
            reward={"kind": "mixture", "components": {"a": {"weight": 1.0}}},
            parts=({"kind": "loss", "sizes": (1, 2)},),
        ),
    ],
)
def test_nothing_is_lost_in_a_config_dict(config):
    first = config.to_config_dict()
    again = Outer.from_dict(first).to_config_dict()
    assert Outer.from_dict(first) == config == Outer.from_dict(config.to_dict())
    assert again.to_dict() == first.to_dict()
    for name in first:
        assert again.get_type(name) == first.get_type(name)
    assert first.get_type("maybe") is float


def test_a_placeholder_takes_a_value_of_its_type_later():
    config = Outer().to_config_dict()
    config.maybe = 0.5
    assert Outer.from_dict(config).maybe == 0.5
    with pytest.raises(TypeError):
        config.maybe = "x"


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().count = 2
