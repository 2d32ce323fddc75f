"""Models in from, and out to, other people's files: the project's `load_model` and `save_model`.

In: a Hugging Face directory (safetensors), a hub id, a GGUF file, or the words `smollm2`, `tiny`,
`tiny:gpt2`. Out: a Hugging Face directory that `transformers` loads. No pickle is ever read.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.distributed.partitioning import named_sharding
from align_jax.models import families
from align_jax.models.export import save_model
from align_jax.models.families import ModelError
from align_jax.models.gguf import GGUFFile
from align_jax.models.locate import locate, read_json
from align_jax.models.tokenizers import load_tokenizer
from align_jax.models.transformer import Transformer, TransformerConfig, parameter_dimensions

__all__ = ["ModelError", "load_model", "load_tokenizer", "save_model"]

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
    settings = {"compute_dtype": jnp.dtype(compute_dtype).name, "remat": remat}
    if location.kind == "tiny":
        config = families.config_from_hf(_TINY[str(path)])
        config = dataclasses.replace(config, **settings)
        model = Transformer(config, key=jax.random.key(0))
        return _fill(model, lambda _, leaf: np.asarray(leaf, dtype), mesh)
    source: _Source
    try:
        if location.kind == "gguf":
            source = GGUFFile(location.path)
            config = families.config_from_hf(source.hf_config())
        else:
            config = families.config_from_hf(read_json(location.path / "config.json"))
            source = _SafetensorsFiles(location.path)
        config = dataclasses.replace(config, **settings)
        return _read(config, source, dtype, mesh)
    except ModelError as error:
        if str(location.path) in str(error):
            raise
        raise ModelError(f"{location.path}: {error}") from error


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


def _fill(model: Transformer, values, mesh: Mesh | None) -> Transformer:
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
