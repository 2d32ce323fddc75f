"""Models in from, and out to, other people's files: the project's `load_model` and `save_model`.

In: a Hugging Face directory (safetensors), a hub id, a GGUF file, or the words `smollm2`, `tiny`,
`tiny:gpt2`. Out: a Hugging Face directory that `transformers` loads. No pickle is ever read.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from align_jax.distributed.partitioning import named_sharding
from align_jax.errors import ModelError
from align_jax.models import families
from align_jax.models.export import save_model, save_reward_model
from align_jax.models.gguf import GGUFFile
from align_jax.models.heads import RewardScale, ScalarModel
from align_jax.models.locate import Location, locate, read_json
from align_jax.models.tokenizers import load_tokenizer
from align_jax.models.transformer import Transformer, TransformerConfig, parameter_dimensions

__all__ = [
    "ModelError",
    "abstract_model",
    "abstract_transformer",
    "load_model",
    "load_reward_model",
    "load_tokenizer",
    "save_model",
    "save_reward_model",
]

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


class _Source(Protocol):
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
      mesh: places each parameter by the rules of `distributed/partitioning.py`; no device ever
        holds more than its share, and the host one stacked parameter at a time.
      compute_dtype, remat: see `TransformerConfig`.

    Raises:
      ModelError: no such model, an unsupported one, missing or damaged files or tensors. Files are
        checked as a whole before any parameter is read.
    """
    location = locate(path, weights=True)
    dtype = jnp.dtype(dtype or "float32")
    with _naming(location):
        config, source = _open(location, compute_dtype, remat)
        if source is None:
            model = Transformer(config, key=jax.random.key(0))
            return _fill(model, lambda _, leaf: np.asarray(leaf, dtype), mesh)
        return _read(config, source, dtype, mesh)


def abstract_model(
    path: str | os.PathLike,
    *,
    mesh: Mesh,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> Transformer:
    """The model that `load_model` would read, as shapes: no weight is read, none is in memory.

    Its leaves are `jax.ShapeDtypeStruct` in float32 with the shardings of `mesh`, for what
    restores a checkpoint. Arguments and errors as for `load_model`, but for those of the weights.
    """
    location = locate(path, weights=False)
    with _naming(location):
        config, _ = _open(location, compute_dtype, remat, weights=False)
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
def _naming(location: Location) -> Iterator[None]:
    """Puts the model's path into errors that do not name it."""
    try:
        yield
    except ModelError as error:
        if str(location.path) in str(error):
            raise
        raise ModelError(f"{location.path}: {error}") from error


def _open(
    location: Location, compute_dtype: str, remat: str, *, weights: bool = True
) -> tuple[TransformerConfig, _Source | None]:
    """A model's configuration and, unless it is made in memory or unwanted, its tensors."""
    source: _Source | None = None
    if location.kind == "tiny":
        content = _TINY[str(location.path)]
    elif location.kind == "gguf":
        source = GGUFFile(location.path)
        content = source.hf_config()
    else:
        content = read_json(location.path / "config.json")
    config = families.config_from_hf(content)
    if location.kind == "directory" and weights:
        source = _SafetensorsFiles(location.path)
    settings = {"compute_dtype": jnp.dtype(compute_dtype).name, "remat": remat}
    return dataclasses.replace(config, **settings), source


def load_reward_model(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> tuple[ScalarModel, RewardScale]:
    """Reads what `save_reward_model` wrote, or transformers' `...ForSequenceClassification`.

    The model's scalar at a response's last token is what transformers computes; the scale (gain 1,
    bias 0 if there is no `reward.json`) makes the reward of it. Arguments as for `load_model`.

    Raises:
      ModelError: as `load_model`; the directory has no scalar head, or a damaged reward.json.
    """
    location = locate(path, weights=True)
    if location.kind != "directory":
        raise ModelError(f"{path} is not a reward model: expected a directory with score.weight.")
    folder = location.path
    # A classification model has no projection to the vocabulary, whatever its config says.
    config = families.config_from_hf(
        read_json(folder / "config.json") | {"tie_word_embeddings": True}
    )
    settings = {"compute_dtype": jnp.dtype(compute_dtype).name, "remat": remat}
    config = dataclasses.replace(config, **settings)
    files = _SafetensorsFiles(folder)
    shape = (1, config.hidden_size)
    if files.shapes().get("score.weight") != shape:
        raise ModelError(
            f"{folder} is not a reward model: expected a tensor score.weight of shape {shape}, "
            f"found {files.shapes().get('score.weight', 'none')}."
        )
    kernel = files.pop("score.weight")[0].astype(np.float32)
    dtype = jnp.dtype(dtype or "float32")
    try:
        model = ScalarModel(_read(config, files, dtype, mesh), key=None)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    head = _fill(model.head, lambda name, leaf: kernel if name == "head_kernel" else leaf, mesh)
    model.head = head
    return model, _read_scale(folder / "reward.json")


def _read_scale(file: pathlib.Path) -> RewardScale:
    if not file.is_file():
        return RewardScale()
    content = read_json(file)
    for name in ("gain", "bias"):
        value = content.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{file}: {name!r} must be a finite number, got {value!r}.")
    known = {field.name for field in dataclasses.fields(RewardScale)}
    return RewardScale(**{name: value for name, value in content.items() if name in known})


class _SafetensorsFiles:
    """The tensors of `model.safetensors`, or of the files its `.index.json` lists."""

    def __init__(self, folder: pathlib.Path):
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index} has no 'weight_map'.")
            # Names only: an index must not lead outside the model's directory.
            files = sorted({pathlib.PurePath(str(name)).name for name in weight_map.values()})
        else:
            files = ["model.safetensors"]
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            try:
                file = safe_open(folder / name, framework="np")
            except FileNotFoundError as error:
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
                self._files[tensor] = file
                self._shapes[tensor] = tuple(described.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def pop(self, name: str) -> np.ndarray:
        """Reads a tensor that is not the transformer's, and leaves it out from here on."""
        del self._shapes[name]
        return self._files.pop(name).get_tensor(name)


def _read(
    config: TransformerConfig, source: _Source, dtype: np.dtype, mesh: Mesh | None
) -> Transformer:
    abstract = jax.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))
    expected = {name: tensor.shape for name, tensor in families.stored_tensors(abstract).items()}
    actual = _match(config, expected, source.shapes())
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def stack(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            rule = families.TENSORS[config.family][path]
            layered = path.startswith("blocks.")
            out = np.empty(leaf.shape if layered else (1, *leaf.shape), dtype)

            def fill(layer: int) -> None:
                tensor = source.read(actual[rule.name.format(layer)])
                out[layer] = rule.from_stored(tensor, out.shape[1:])

            list(pool.map(fill, range(len(out))))
            return out if layered else out[0]

        return _fill(abstract, stack, mesh)


def _match(
    config: TransformerConfig,
    expected: dict[str, tuple[int, ...]],
    present: dict[str, tuple[int, ...]],
) -> dict[str, str]:
    """Expected name -> name in the checkpoint, or an error that names what does not fit."""
    prefix = families.BASE_PREFIXES[config.family]
    actual = {}
    for name in present:
        full = name if name in expected else prefix + name
        if full in expected:
            actual[full] = name
        elif not name.endswith(families.IGNORED_SUFFIXES) and not (
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


def _fill(model: _Module, values, mesh: Mesh | None) -> _Module:
    """`model` with every leaf replaced by `values(path, leaf)`, a host array put on the mesh."""
    dimensions = iter(
        jax.tree.leaves(parameter_dimensions(model), is_leaf=lambda x: isinstance(x, tuple))
    )

    def place(path, leaf):
        host, named = values(families.parameter_path(path), leaf), next(dimensions)
        if mesh is None:
            return jnp.asarray(host)
        sharding = named_sharding(mesh, named, host.shape)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(place, model)
