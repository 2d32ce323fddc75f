"""What a run starts from: a pretrained model or an earlier run, and a config's new adapters."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.distributed.mesh import make_mesh
from align_jax.errors import RunError
from align_jax.models.loading import abstract_model, load_model
from align_jax.models.lora import add_adapters, merge_adapters
from align_jax.models.tokenizers import load_tokenizer
from align_jax.models.transformer import Transformer
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.workdir import read_config

_CHOICES = {
    "compute_dtype": ("float32", "bfloat16", "float16"),
    "remat": ("none", "linear", "full"),
}


def default_run_config() -> ConfigDict:
    """The fields that every training config has beside its algorithm's own."""
    return ConfigDict(
        {
            "seed": 0,
            "model": "smollm2",
            "compute_dtype": "float32",
            "remat": "linear",
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            # Low-rank adapters (models/lora.py). rank 0: none, every parameter is trained.
            # targets: "all", or some of "query,key,value,output,gate,up,down".
            "lora": {"rank": 0, "alpha": 16.0, "targets": "all"},
            "checkpoint_every": 1000,
            "wandb_project": "",
        }
    )


def open_mesh(config: ConfigDict) -> Mesh:
    """The config's mesh over all devices; `RunError` if its sizes do not fit them."""
    try:
        return make_mesh(**config.mesh)
    except ValueError as error:
        raise RunError(str(error)) from error


def open_model(config: ConfigDict) -> tuple[Transformer, Mesh]:
    """The pretrained model of a config, with its adapters if it has any, on the config's mesh."""
    for name, choices in _CHOICES.items():
        if config[name] not in choices:
            raise RunError(
                f"config.{name} is {config[name]!r}; expected one of {', '.join(choices)}."
            )
    mesh = open_mesh(config)
    return with_adapters(config, load_pretrained(config, config.model, mesh), mesh), mesh


def with_adapters(config: ConfigDict, model: Transformer, mesh: Mesh) -> Transformer:
    """The model with new adapters if `config.lora` asks for them; its arrays are shared."""
    if not _has_adapters(config):
        return model
    lora = config.lora
    targets = None if lora.targets == "all" else [name.strip() for name in lora.targets.split(",")]
    key = jax.random.key(config.seed)
    try:
        return add_adapters(
            model, rank=lora.rank, alpha=lora.alpha, key=key, targets=targets, mesh=mesh
        )
    except ValueError as error:
        raise RunError(f"config.lora.{error}") from error


def load_pretrained(config: ConfigDict, path: str, mesh: Mesh) -> Transformer:
    """What `load_model` reads, or the trained model of a run's directory, its adapters merged.

    It computes as `config` says, whatever the other run did.
    """
    found = run_at(path)
    settings = {"compute_dtype": config.compute_dtype, "remat": config.remat}
    if found is None:
        return load_model(path, mesh=mesh, **settings)
    run, folder = found
    run.update(settings)
    return merge_adapters(restored_model(run, folder, mesh))


def load_pretrained_tokenizer(path: str) -> Any:
    """The tokenizer of whatever `load_pretrained` reads."""
    found = run_at(path)
    return load_tokenizer(path) if found is None else load_pretrained_tokenizer(found[0].model)


def run_at(path: str | os.PathLike) -> tuple[ConfigDict, Path] | None:
    """Config and folder of the run in a directory; None if there is none.

    A run made of runs (`stages`, `online_preferences`) names the one with its result.
    """
    folder = Path(path).expanduser()
    content = read_config(folder) if (folder / "config.json").is_file() else {}
    if "algorithm" not in content:
        return None
    return (
        run_at(folder / content["result"]) if "result" in content else (ConfigDict(content), folder)
    )


def restored_model(config: ConfigDict, directory: Path, mesh: Mesh) -> Transformer:
    """The trained model of a run directory, adapters and all; `RunError` if it has none yet."""
    if not (directory / "checkpoints").is_dir():
        raise RunError(f"{directory} has no checkpoint yet: its run has not got that far.")
    # Adapters stand beside weights that no checkpoint holds; otherwise shapes are enough.
    if _has_adapters(config):
        # An online policy may have started from another model than its reference.
        start = config.get("init") or config.model
        model = with_adapters(config, load_pretrained(config, start, mesh), mesh)
    else:
        model = _abstract_pretrained(config, config.model, mesh)
    checkpointer = Checkpointer(directory / "checkpoints")
    try:
        if checkpointer.latest_step() is None:
            raise RunError(f"{directory} has no checkpoint yet: its run has not got that far.")
        return checkpointer.restore_model(model)
    finally:
        checkpointer.close()


def _has_adapters(config: ConfigDict) -> bool:
    lora = config.get("lora")
    return lora is not None and lora.rank != 0


def _abstract_pretrained(config: ConfigDict, path: str, mesh: Mesh) -> Transformer:
    """The shapes of `load_pretrained`."""
    found = run_at(path)
    if found is not None:
        return _abstract_pretrained(config, found[0].model, mesh)
    settings = {"compute_dtype": config.compute_dtype, "remat": config.remat}
    return abstract_model(path, mesh=mesh, **settings)
