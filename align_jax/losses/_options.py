"""The hyperparameters of a loss, as its object lists them for a trainer."""

import dataclasses
import math
from typing import Any

from align_jax.losses._inputs import is_number


@dataclasses.dataclass(frozen=True)
class Option:
    """One hyperparameter of a loss: its name, its type and its range.

    `least` and `most` belong to the range, `above` and `below` do not.
    """

    name: str
    value_type: type = float  # float or str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()  # of a str
    required: bool = False
    in_values: bool = False  # acts on the values that the loss reads, and not in its function
    only_if: tuple[str, str] | None = None  # the other option, and its value, that this one needs

    def check(self, value: object) -> None:
        """Raises ValueError, with this option's name first, for a value outside the range."""
        if not self._allows(value):
            raise ValueError(f"`{self.name}` is {value!r}; expected {self.expected}")

    @property
    def expected(self) -> str:
        """The range in words, such as "from 0 to 1"."""
        if self.value_type is str:
            return f"one of {', '.join(map(repr, self.choices))}"
        low = None if self.least is None else f"at least {self.least:g}"
        low = low if self.above is None else f"above {self.above:g}"
        high = None if self.most is None else f"at most {self.most:g}"
        high = high if self.below is None else f"below {self.below:g}"
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        if low and high:
            return f"{low} and {high}"
        return " ".join(filter(None, ("a finite number", low or high)))

    def _allows(self, value: Any) -> bool:
        if self.value_type is str:
            return isinstance(value, str) and value in self.choices
        return (
            is_number(value)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
