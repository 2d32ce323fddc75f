"""What a family of models is: its configurations and tensors in a Hugging Face checkpoint."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from align_jax.errors import ModelError
from align_jax.models.config import TransformerConfig
from align_jax.models.transformer import Transformer
from align_jax.text import brief
from align_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one of our parameters lies in a Hugging Face checkpoint, and in which layout.

    Shapes and arrays below are those of one layer.

    Attributes:
      name: the tensor's name; `{}` stands for the layer's number.
      rows: how many of our leading axes are folded into the matrix's rows; 0 for vectors.
      transposed: stored (out, in) as `torch.nn.Linear` does; else (in, out) as GPT-2's Conv1D.
      part: (i, n) if the tensor holds n equal parameters side by side on its last axis, and this
        is the i-th of them.
    """

    name: str
    rows: int = 1
    transposed: bool = False
    part: tuple[int, int] = (0, 1)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor, if our parameter has this shape."""
        if self.rows == 0:
            return (math.prod(shape) * self.part[1],)
        matrix = math.prod(shape[: self.rows]), math.prod(shape[self.rows :]) * self.part[1]
        return matrix[::-1] if self.transposed else matrix

    def from_stored(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our parameter from the checkpoint's tensor; a view where possible."""
        i, n = self.part
        width = tensor.shape[-1] // n
        tensor = tensor[..., i * width : (i + 1) * width]
        return (tensor.T if self.transposed else tensor).reshape(shape)

    def to_stored(self, layer: np.ndarray) -> np.ndarray:
        """The inverse of `from_stored`; gives this part of the tensor."""
        if self.rows == 0:
            return layer.reshape(-1)
        matrix = layer.reshape(math.prod(layer.shape[: self.rows]), -1)
        return matrix.T if self.transposed else matrix


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      shape: its shape.
      parts: the parameters that it holds side by side, each as a name and the number of the layer
        (None: not stacked over layers).
    """

    shape: tuple[int, ...]
    parts: list[tuple[str, int | None]]


class Family(abc.ABC):
    """A family of models. `families/__init__.py` lists them all.

    Attributes:
      name: `TransformerConfig.family`, and the `model_type` that is written.
      model_types: every `model_type` that is read.
      models: which models these are, for an error message; empty if the name says it.
      causal_class: the class of transformers that has a projection to the vocabulary.
      classification_class: the class of transformers that has a head `score`.
      base_prefix: what a base model, saved without its head, leaves off the names of its tensors.
      ignored_suffixes: constants that some checkpoints hold (causal masks, rotary tables).
      tensors: where each parameter lies. Names are those of `trees.flatten`; parameters under
        `blocks` are stacked over layers.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    models: ClassVar[str] = ""
    causal_class: ClassVar[str]
    classification_class: ClassVar[str]
    base_prefix: ClassVar[str]
    ignored_suffixes: ClassVar[tuple[str, ...]] = (
        ".attn.bias",
        ".attn.masked_bias",
        ".rotary_emb.inv_freq",
    )
    tensors: ClassVar[Mapping[str, TensorRule]]

    @abc.abstractmethod
    def config_from_hf(self, hf: dict[str, Any]) -> TransformerConfig:
        """The `TransformerConfig` of a `config.json`.

        Raises:
          ModelError: a feature that this transformer does not have.
        """

    @abc.abstractmethod
    def config_to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        """The entries of `config.json` that this family spells in its own way."""

    def stored_tensors(self, model: Transformer) -> dict[str, StoredTensor]:
        """The tensors of a checkpoint of `model` by name. The model's leaves may be shapes."""
        stored: dict[str, StoredTensor] = {}
        leaves: dict[str, jax.Array] = flatten(model)
        for parameter, rule in self.tensors.items():
            if parameter not in leaves:
                continue
            shape = leaves[parameter].shape
            layers = range(shape[0]) if is_stacked(parameter) else [None]
            for layer in layers:
                one = shape if layer is None else shape[1:]
                tensor = stored.setdefault(
                    rule.name.format(layer), StoredTensor(rule.stored_shape(one), [])
                )
                tensor.parts.append((parameter, layer))
        return stored


def is_stacked(parameter: str) -> bool:
    """Whether the parameter of that name has the layers as its leading axis."""
    return parameter.startswith("blocks.")


# A width, a vocabulary or a context beyond this, and more layers, are a slip or an attack: merely
# naming the tensors of a billion layers fills the memory.
MAX_SIZE, MAX_LAYERS = 2**24, 10_000


def size(hf: dict[str, Any], key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
    """The positive integer under `key`, at most `most`; an absent one is `default`."""
    value = hf.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= most:
        bound = f" of at most {most:,}" if type(value) is int and value > 0 else ""
        raise ModelError(
            f"config.json: {key!r} must be a positive integer{bound}, got {brief(value)}."
        )
    return value


def number(hf: dict[str, Any], key: str, default: float | None = None, *, above: float) -> float:
    """The finite number under `key`, more than `above`; an absent one is `default`."""
    value = hf.get(key, default)
    try:
        if isinstance(value, int | float) and above < value < math.inf and type(value) is not bool:
            return float(value)
    except OverflowError:  # a whole number beyond every float
        pass
    raise ModelError(
        f"config.json: {key!r} must be a number above {above:g}, and finite, got {brief(value)}."
    )


def flag(hf: dict[str, Any], key: str, default: bool) -> bool:
    """The truth value under `key`; an absent one is `default`."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key!r} must be true or false, got {brief(value)}.")
    return value


def mapping(hf: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; an absent one is empty."""
    value = hf.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ModelError(f"config.json: {key!r} must be an object, got {brief(value)}.")
    return value


def head_width(hidden: int, heads: int) -> int:
    """The width of each of `heads` that share `hidden`."""
    if hidden % heads:
        raise ModelError(
            f"config.json: a hidden size of {hidden} cannot be shared by {heads} attention heads "
            "evenly."
        )
    return hidden // heads


def only(hf: dict[str, Any], key: str, supported: Any) -> None:
    """Refuses a setting that is there and is not the supported one."""
    value = hf.get(key)
    if value is not None and value != supported:
        raise ModelError(
            f"config.json: {key}={brief(value)} is not supported, only {supported!r} is."
        )
