"""Writing a model, or a reward model, as a Hugging Face directory."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from align_jax.errors import ModelError
from align_jax.models import families
from align_jax.models.heads import RewardScale, ScalarModel, without_unembedding
from align_jax.models.lora import merge_adapters
from align_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A model larger than this is written as several files, so that only one has to be built in memory.
MAX_SHARD_BYTES = 4 * 2**30


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
    _save(model, tokenizer, path)


def save_reward_model(
    model: ScalarModel,
    tokenizer: "PreTrainedTokenizerFast",
    path: str | os.PathLike,
    *,
    scale: RewardScale,
) -> None:
    """Writes a reward model as a directory that `AutoModelForSequenceClassification` loads.

    The head is `score.weight`; that class has no bias, so the head's own goes into the bias of
    `reward.json`: reward = gain * (what transformers computes) + bias.

    Raises:
      ModelError: as `save_model`.
    """
    head_bias = float(np.asarray(model.head.head_bias[...]))
    scale = dataclasses.replace(scale, bias=scale.gain * head_bias + scale.bias)
    transformer = without_unembedding(model.transformer)
    dtype = transformer.embedding[...].dtype
    kernel = np.asarray(_gathered(model.head.head_kernel[...])).astype(dtype)[None]
    _save(
        transformer,
        _with_distinct_padding(tokenizer),
        path,
        tensors={"score.weight": kernel},
        config={"id2label": {"0": "reward"}, "label2id": {"reward": 0}},
        files={"reward.json": dataclasses.asdict(scale)},
    )


def _with_distinct_padding(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """A copy that pads with another token than EOS, or with none if it has no other.

    transformers scores at the last token whose id is not the padding's: with EOS as padding it
    would score before the EOS that ends a response.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        special = {tokenizer.unk_token: tokenizer.unk_token_id}
        special |= {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        free = [token for token, id in special.items() if id is not None and id not in taken]
        tokenizer.pad_token = free[0] if free else None
    return tokenizer


def _save(
    model: Transformer,
    tokenizer: "PreTrainedTokenizerFast",
    path: str | os.PathLike,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, dict] | None = None,
) -> None:
    """Writes the directory; `tensors` and `config` are those of a classification head."""
    path = pathlib.Path(path).expanduser()
    model = merge_adapters(model)
    leaves = {
        families.parameter_path(keys): _gathered(leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    if jax.process_index() == 0:
        _write(model, leaves, tokenizer, path, tensors or {}, config, files or {})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {path}")


def _gathered(leaf: jax.Array) -> jax.Array | np.ndarray:
    """The array as it is, or if it lies on several hosts, each of which takes part, whole here."""
    if leaf.is_fully_addressable:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


def _write(
    model: Transformer,
    leaves: dict[str, jax.Array | np.ndarray],
    tokenizer: "PreTrainedTokenizerFast",
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None,
    files: Mapping[str, dict],
) -> None:
    _check(model, tokenizer, path)
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
        _write_weights(model, leaves, temporary, tensors)
        _write_configs(model, leaves["embedding"].dtype, tokenizer, temporary, config)
        for name, content in files.items():
            _write_json(temporary / name, content)
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


def _check(model, tokenizer, path: pathlib.Path) -> None:
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
    more: Mapping[str, np.ndarray],
) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    rules = families.TENSORS[model.config.family]
    tensors = families.stored_tensors(model)
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
            for path, layer in tensors[name].parts:
                parameter = np.asarray(leaves[path])
                parts.append(
                    rules[path].to_stored(parameter if layer is None else parameter[layer])
                )
            # safetensors writes the memory as it lies, whatever the strides.
            content[name] = np.ascontiguousarray(np.concatenate(parts, axis=-1))
            weight_map[name] = file
        if number == len(shards):
            content |= more
            weight_map |= dict.fromkeys(more, file)
        try:
            save_file(content, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


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
    classification: Mapping[str, Any] | None,
) -> None:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = families.config_to_hf(model.config, dtype=dtype.name, **ids)
    if classification is None:
        _write_json(folder / "generation_config.json", ids)
    else:
        [name] = config["architectures"]
        family = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        config |= {"architectures": [f"{family}ForSequenceClassification"], **classification}
    _write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name here that transformers 4 does not know; both know this one.
    config_path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(config_path.read_text(encoding="utf-8"))
    _write_json(config_path, {**tokenizer_config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
