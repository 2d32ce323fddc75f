"""Reading models: a Hugging Face directory, a hub id, a GGUF file, or random weights.

No pickle is ever read. Files are checked as a whole before any parameter is built.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from align_jax.distributed.partitioning import named_sharding
from align_jax.errors import ModelError
from align_jax.files import irregular
from align_jax.models.config import TransformerConfig
from align_jax.models.dimensions import parameter_dimensions
from align_jax.models.families import config_from_hf, family_of
from align_jax.models.families.base import is_stacked
from align_jax.models.gguf import GGUFFile
from align_jax.models.locate import Location, locate, read_json
from align_jax.models.transformer import Transformer
from align_jax.text import brief
from align_jax.trees import flatten, unflatten

_Module = TypeVar("_Module", bound=nnx.Module)

# The vocabulary is that of `tokenizers.tiny_tokenizer`.
_TINY = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "tiny:gpt2": {
        "model_type": "gpt2",
        "vocab_size": 264,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 512,
    },
}


class TensorSource(Protocol):
    """Tensors under their Hugging Face names."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> Transformer:
    """Reads a pretrained model.

    Args:
      path: a Hugging Face directory, a hub id, a GGUF file, `smollm2`, or the random-weight models
        `tiny` and `tiny:gpt2`.
      dtype: of the parameters; float32 by default, whatever they are stored in.
      mesh: places each parameter by the rules of `distributed/partitioning.py`. No device ever
        holds more than its share, and the host holds one stacked parameter at a time.
      compute_dtype, remat: see `TransformerConfig`.

    Raises:
      ModelError: no such model, an unsupported one, missing or damaged files or tensors. Files are
        checked as a whole before any parameter is read.
    """
    location = locate(path, weights=True)
    dtype = jnp.dtype(dtype or "float32")
    with name_in_errors(location.path):
        hf_config, source = _open_model(location, weights=True)
        config = runtime_config(hf_config, compute_dtype=compute_dtype, remat=remat)
        if source is None:
            model = Transformer(config, key=jax.random.key(0))
            return fill(model, lambda _, leaf: np.asarray(leaf, dtype), mesh)
        return read_transformer(config, source, dtype, mesh)


def abstract_model(
    path: str | os.PathLike,
    *,
    mesh: Mesh,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> Transformer:
    """The model that `load_model` would read, as shapes; no weight is read.

    Leaves are `jax.ShapeDtypeStruct` in float32 with the shardings of `mesh`, which is what
    restoring a checkpoint needs. Arguments as for `load_model`.

    Raises:
      ModelError: as `load_model`, except for what is wrong with the weights.
    """
    location = locate(path, weights=False)
    with name_in_errors(location.path):
        hf_config, _ = _open_model(location, weights=False)
        config = runtime_config(hf_config, compute_dtype=compute_dtype, remat=remat)
    return abstract_transformer(config, mesh)


def abstract_transformer(config: TransformerConfig, mesh: Mesh) -> Transformer:
    """A model of this configuration as float32 shapes with the shardings of `mesh`."""
    model = jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    dimensions = parameter_dimensions(model)
    return jax.tree.map(
        lambda leaf, named: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32, sharding=named_sharding(mesh, named, leaf.shape)
        ),
        model,
        dimensions,
    )


@contextlib.contextmanager
def name_in_errors(path: pathlib.Path) -> Iterator[None]:
    """Puts the model's path in front of a `ModelError` that does not name it."""
    try:
        yield
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise ModelError(f"{path}: {error}") from error


def runtime_config(
    hf_config: dict[str, Any], *, compute_dtype: str, remat: str
) -> TransformerConfig:
    """The configuration of a `config.json`, with the two settings that no checkpoint holds."""
    settings = {"compute_dtype": jnp.dtype(compute_dtype).name, "remat": remat}
    return dataclasses.replace(config_from_hf(hf_config), **settings)


def _open_model(location: Location, *, weights: bool) -> tuple[dict[str, Any], TensorSource | None]:
    """A model's `config.json` and tensors; None if it has random weights or they are unwanted."""
    if location.kind == "tiny":
        return _TINY[str(location.path)], None
    if location.kind == "gguf":
        file = GGUFFile(location.path)
        return file.hf_config(), file
    hf_config = read_json(location.path / "config.json")
    return hf_config, SafetensorsFiles(location.path) if weights else None


class SafetensorsFiles:
    """The tensors of `model.safetensors`, or of the files that its `.index.json` lists.

    Raises:
      ModelError: a missing or damaged file, or a tensor that is not of floating-point numbers.
    """

    def __init__(self, folder: pathlib.Path):
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        if os.path.lexists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index} has no 'weight_map'.")
            if not weight_map:
                raise ModelError(f"{index} has an empty 'weight_map'.")
            for tensor, name in weight_map.items():
                file_name = pathlib.PurePath(name).name if isinstance(name, str) else ""
                if not file_name.strip(".") or "\0" in file_name:
                    raise ModelError(
                        f"{index} says that {brief(tensor)} is in {brief(name)}, which is no file."
                    )
            # Names only: an index must not lead outside the model's directory.
            files = sorted({pathlib.PurePath(name).name for name in weight_map.values()})
        else:
            files = ["model.safetensors"]
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            if what := irregular(folder / name):
                raise ModelError(f"{folder / name} {what}; expected a file of safetensors.")
            try:
                file = safe_open(folder / name, framework="np")
            except FileNotFoundError as error:
                if os.path.lexists(folder / name):  # safetensors tells these two alike
                    raise ModelError(
                        f"{folder / name} cannot be read: Permission denied."
                    ) from error
                raise ModelError(
                    f"{folder} has no {name}. Weights are read from safetensors only, never from "
                    "pickles (*.bin); save the model again with safetensors."
                ) from error
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{folder / name} is truncated or damaged ({error}). Copy or download it again."
                ) from error
            for tensor in file.keys():
                described = file.get_slice(tensor)
                if described.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ModelError(
                        f"{folder / name}: tensor {tensor} has dtype {described.get_dtype()}; "
                        "supported are F32, F16 and BF16."
                    )
                if tensor in self._files:
                    raise ModelError(
                        f"{folder}: the tensor {tensor} is in both {name} and another of "
                        f"{', '.join(files)}."
                    )
                self._files[tensor] = file
                self._shapes[tensor] = tuple(described.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that is left."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype that it is stored in."""
        return self._files[name].get_tensor(name)

    def pop(self, name: str) -> np.ndarray:
        """Reads a tensor that is not the transformer's, and leaves it out from here on."""
        del self._shapes[name]
        tensor = self._files.pop(name).get_tensor(name)
        require_finite(name, tensor, tensor.dtype)
        return tensor


def read_transformer(
    config: TransformerConfig, source: TensorSource, dtype: np.dtype, mesh: Mesh | None
) -> Transformer:
    """The transformer of `config` from the tensors of a checkpoint, placed on the mesh.

    Raises:
      ModelError: a tensor is missing, has the wrong shape or has no place in the transformer.
    """
    abstract = jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    family = family_of(config)
    expected = {name: tensor.shape for name, tensor in family.stored_tensors(abstract).items()}
    actual = _match_tensors(config, expected, source.shapes())
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def stack(parameter: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            rule = family.tensors[parameter]
            stacked = is_stacked(parameter)
            out = np.empty(leaf.shape if stacked else (1, *leaf.shape), dtype)

            def read_layer(layer: int) -> None:
                tensor = source.read(actual[rule.name.format(layer)])
                with np.errstate(over="ignore"):
                    out[layer] = rule.from_stored(tensor, out.shape[1:])
                require_finite(actual[rule.name.format(layer)], out[layer], dtype)

            list(pool.map(read_layer, range(len(out))))
            return out if stacked else out[0]

        return fill(abstract, stack, mesh)


def require_finite(name: str, tensor: np.ndarray, dtype: np.dtype) -> None:
    """Raises `ModelError` if a parameter has a value that is NaN or infinite in `dtype`."""
    bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
    if bad:
        raise ModelError(
            f"tensor {name} has {bad:,} values of {tensor.size:,} that are NaN or infinite in "
            f"{np.dtype(dtype).name}: the model is damaged, or needs a wider dtype."
        )


def _match_tensors(
    config: TransformerConfig,
    expected: dict[str, tuple[int, ...]],
    present: dict[str, tuple[int, ...]],
) -> dict[str, str]:
    """Expected name -> name in the checkpoint, or an error that names what does not fit."""
    family = family_of(config)
    actual = {}
    for name in present:
        full = name if name in expected else family.base_prefix + name
        if full in expected:
            actual[full] = name
        elif not name.endswith(family.ignored_suffixes) and not (
            name == "lm_head.weight" and config.tie_embeddings
        ):
            raise ModelError(
                f"tensor {name} has no place in this architecture (family {config.family}, "
                f"{config.num_layers} layers): without it the model would compute something else."
            )
    missing = [name for name in expected if name not in actual]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"tensor {missing[0]}{more} missing: is the checkpoint complete?")
    for name, shape in expected.items():
        if tuple(present[actual[name]]) != shape:
            raise ModelError(
                f"tensor {actual[name]} has shape {tuple(present[actual[name]])}, and by the "
                f"configuration it should have {shape}."
            )
    return actual


def fill(module: _Module, values: Callable[[str, Any], np.ndarray], mesh: Mesh | None) -> _Module:
    """`module` with other arrays, each put on the mesh before the next is asked for.

    Args:
      module: arrays or shapes.
      values: the array on the host, by a parameter's name and its leaf in `module`.
      mesh: None puts every array on the default device.
    """
    named = flatten(parameter_dimensions(module), is_leaf=lambda x: isinstance(x, tuple))

    def place(name: str, leaf: Any) -> jax.Array:
        host = values(name, leaf)
        if mesh is None:
            return jnp.asarray(host)
        sharding = named_sharding(mesh, named[name], host.shape)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return unflatten(module, {name: place(name, leaf) for name, leaf in flatten(module).items()})
