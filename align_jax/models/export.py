"""Writing a model as a Hugging Face directory, with or without a classification head."""

import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from align_jax.distributed import hosts
from align_jax.errors import ModelError
from align_jax.files import write_json
from align_jax.models.families import config_to_hf, family_of
from align_jax.models.lora import merge_adapters
from align_jax.models.transformer import Transformer
from align_jax.trees import flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A model larger than this is written as several files, so that only one has to be built in memory.
MAX_SHARD_BYTES = 4 * 2**30


class ClassificationHead(NamedTuple):
    """What a directory of transformers' `...ForSequenceClassification` holds besides the model.

    Attributes:
      tensors: the head's tensors by name, whole on this host.
      config: entries of `config.json`.
      files: JSON objects by the name of their file.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    files: Mapping[str, dict]


def save_model(
    model: Transformer, tokenizer: "PreTrainedTokenizerFast", path: str | os.PathLike
) -> None:
    """Writes a model and its tokenizer as a new Hugging Face directory.

    Parameters keep their dtype; adapters are merged into their kernels. The directory appears
    under its name only once complete. On several hosts all of them call it: each gathers the
    parameters in its memory, the first writes, and the others go on when it has.

    Raises:
      ModelError: the directory exists and is not empty, the tokenizer has more tokens than the
        model, or the disk is full. Nothing is left then.
    """
    save_directory(model, tokenizer, path)


def save_directory(
    model: Transformer,
    tokenizer: "PreTrainedTokenizerFast",
    path: str | os.PathLike,
    *,
    head: ClassificationHead | None = None,
) -> None:
    """Writes what `save_model` writes, or with `head` a `...ForSequenceClassification`."""
    path = pathlib.Path(path).expanduser()
    model = merge_adapters(model)
    leaves = {name: hosts.gathered(leaf) for name, leaf in flatten(model).items()}
    hosts.on_first_host(lambda: _write_directory(model, leaves, tokenizer, path, head))


def _write_directory(
    model: Transformer,
    leaves: dict[str, jax.Array | np.ndarray],
    tokenizer: "PreTrainedTokenizerFast",
    path: pathlib.Path,
    head: ClassificationHead | None,
) -> None:
    _check_destination(model, tokenizer, path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(leaf.nbytes for leaf in leaves.values())
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ModelError(
                f"cannot save to {path}: the model takes {size:,} bytes, the disk has {free:,}."
            )
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        _write_weights(model, leaves, temporary, head)
        _write_configs(model, leaves["embedding"].dtype, tokenizer, temporary, head)
        for name, content in head.files.items() if head else ():
            write_json(temporary / name, content)
        # mkdtemp and safetensors write for their owner only; a model is as readable as any file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise ModelError(f"cannot save to {path}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_destination(
    model: Transformer, tokenizer: "PreTrainedTokenizerFast", path: pathlib.Path
) -> None:
    """Refuses a directory that is not empty, and a tokenizer that is not the model's."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ModelError(f"{path} exists already; name a directory that does not, or an empty one.")
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
            "they do not belong together."
        )


def _write_weights(
    model: Transformer,
    leaves: dict[str, jax.Array | np.ndarray],
    folder: pathlib.Path,
    head: ClassificationHead | None,
) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    family = family_of(model.config)
    tensors = family.stored_tensors(model)
    itemsize = leaves["embedding"].dtype.itemsize
    sizes = {name: itemsize * math.prod(tensor.shape) for name, tensor in tensors.items()}
    shards = _shards(sizes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {}
        for name in names:
            parts = []
            for parameter, layer in tensors[name].parts:
                array = np.asarray(leaves[parameter])
                array = array if layer is None else array[layer]
                parts.append(family.tensors[parameter].to_stored(array))
            # safetensors writes the memory as it lies, whatever the strides.
            content[name] = np.ascontiguousarray(np.concatenate(parts, axis=-1))
            weight_map[name] = file
        if head is not None and number == len(shards):
            content |= head.tensors
            weight_map |= dict.fromkeys(head.tensors, file)
        try:
            save_file(content, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """The tensors' names in order, cut before a file would exceed `MAX_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_configs(
    model: Transformer,
    dtype: np.dtype,
    tokenizer: "PreTrainedTokenizerFast",
    folder: pathlib.Path,
    head: ClassificationHead | None,
) -> None:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = config_to_hf(model.config, dtype=dtype.name, **ids)
    if head is None:
        write_json(folder / "generation_config.json", ids)
    else:
        architectures = [family_of(model.config).classification_class]
        config |= {"architectures": architectures, **head.config}
    write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name here that transformers 4 does not know; both know this one.
    config_path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(config_path.read_text(encoding="utf-8"))
    write_json(config_path, {**tokenizer_config, "tokenizer_class": "PreTrainedTokenizerFast"})
