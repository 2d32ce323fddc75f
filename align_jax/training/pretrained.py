"""What a run starts from: a pretrained model or an earlier run, and a config's new adapters."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from align_jax.distributed.mesh import make_mesh, single_device_mesh
from align_jax.distributed.partitioning import replicated
from align_jax.errors import ModelError, RunError
from align_jax.models.config import TransformerConfig
from align_jax.models.dimensions import PROJECTIONS
from align_jax.models.frozen import own_trained
from align_jax.models.loading import abstract_model, abstract_transformer, load_model
from align_jax.models.lora import add_adapters, merge_adapters
from align_jax.models.tokenizers import check_vocabulary, load_tokenizer
from align_jax.models.transformer import Transformer
from align_jax.settings import MAX_SEED, Settings
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.workdir import read_config
from align_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class MeshSizes(Settings, key="config.mesh"):
    """Devices on each axis of the mesh; one of them may be -1, which takes the rest."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        super().__post_init__()
        for axis, size in self.to_dict().items():
            if size != -1 and not 1 <= size <= 2**20:
                raise RunError(
                    f"config.mesh.{axis} is {size}; expected a number of devices, 1 or more, or -1."
                )


@dataclasses.dataclass(frozen=True)
class Lora(Settings, key="config.lora"):
    """Low-rank adapters (models/lora.py)."""

    rank: int = 0  # 0: none, every parameter is trained
    alpha: float = 16.0
    targets: str = "all"  # or some of "query,key,value,output,gate,up,down"

    def __post_init__(self):
        super().__post_init__()
        self.between(0, 2**14, "rank")  # the widest models have no wider matrices
        for name in [] if self.targets == "all" else self.targets.split(","):
            if name.strip() not in PROJECTIONS:
                raise RunError(
                    f"config.lora.targets names {name.strip()!r}; expected 'all', or some of "
                    f"{', '.join(PROJECTIONS)}."
                )


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
    """What every training run sets beside its algorithm's own fields.

    `offered_evaluators` of a subclass are the kinds that its `evaluators` may have.
    """

    offered_evaluators: ClassVar[tuple[str, ...]] = ()

    seed: int = 0
    model: str = "smollm2"
    compute_dtype: str = "float32"
    remat: str = "linear"  # "none" | "linear" (keep projections) | "full" (keep layer inputs)
    mesh: MeshSizes = MeshSizes()
    lora: Lora = Lora()
    checkpoint_every: int = 1000  # steps, or iterations of an online run
    wandb_project: str = ""  # "": no Weights & Biases
    evaluators: tuple[
        Mapping[str, Any], ...
    ] = ()  # what is measured at the end: docs/evaluation.md

    def __post_init__(self):
        super().__post_init__()
        self.one_of(("float32", "bfloat16", "float16"), "compute_dtype")
        self.one_of(("none", "linear", "full"), "remat")
        self.between(0, MAX_SEED, "seed")
        self.at_least(1, "checkpoint_every")
        if not self.offered_evaluators:
            self.at_default("this algorithm has no evaluators", "evaluators")


def open_mesh(config: RunConfig) -> Mesh:
    """The config's mesh over all devices; `RunError` if its sizes do not fit them."""
    try:
        return make_mesh(**config.mesh.to_dict())
    except ValueError as error:
        raise RunError(str(error)) from error


def mesh_of(model: Any) -> Mesh:
    """The mesh that a model's arrays lie on; one of their only device if they lie on none."""
    sharding = jax.tree.leaves(model)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return single_device_mesh(next(iter(sharding.device_set)))


def open_model(config: RunConfig) -> tuple[Transformer, Mesh]:
    """The pretrained model of a config, with its adapters if it has any, on the config's mesh."""
    mesh = open_mesh(config)
    return with_adapters(config, load_pretrained(config, config.model, mesh), mesh), mesh


def with_adapters(config: RunConfig, model: Transformer, mesh: Mesh) -> Transformer:
    """The model with new adapters if `config.lora` asks for them; its arrays are shared."""
    lora = config.lora
    if lora.rank == 0:
        return model
    targets = None if lora.targets == "all" else [name.strip() for name in lora.targets.split(",")]
    key = jax.random.key(config.seed)
    try:
        return add_adapters(
            model, rank=lora.rank, alpha=lora.alpha, key=key, targets=targets, mesh=mesh
        )
    except ValueError as error:
        raise RunError(f"config.lora.{error}") from error


def as_configured(
    config: RunConfig,
    model: Transformer,
    tokenizer: Any,
    mesh: Mesh | None,
    *,
    donate: bool,
    directory: Path | None = None,
) -> tuple[Transformer, Mesh]:
    """A model to be trained: computing as `config` says, with its adapters, on a mesh.

    Args:
      mesh: where it is to lie; None keeps the model's placement.
      donate: whether training may consume the model's own arrays.
      directory: the run's, whose config is to name the model; None if it has none.

    Raises:
      RunError: `config.model` is a model of other shapes, so the run could not be read again.
      ModelError: the tokenizer has tokens that the model has not.
    """
    check_vocabulary(tokenizer, model.config, config.model)
    if mesh is None:
        mesh = mesh_of(model)
    if directory is not None:
        _check_name(config, model, mesh)
    model = with_adapters(config, as_base(config, model), mesh)
    return (model if donate else own_trained(model)), mesh


def _check_name(config: RunConfig, model: Transformer, mesh: Mesh) -> None:
    try:
        named = flatten(_abstract_pretrained(config, config.model, mesh))
    except ModelError:
        return
    for name, leaf in flatten(model).items():
        if name not in named or named[name].shape != leaf.shape:
            raise RunError(
                f"config.model = {config.model!r} names another model than the one given ({name} "
                "differs), so the run could not be read again: set it to the directory, hub id or "
                "word that the model was loaded from, or train without a workdir."
            )


def as_base(config: RunConfig, model: Transformer) -> Transformer:
    """A model computing as `config` says, to compare a trained one with; its arrays are shared."""
    model = jax.tree.map(lambda x: x, model)
    set_computation(model, compute_dtype=config.compute_dtype, remat=config.remat)
    return model


def set_computation(model: Transformer, *, compute_dtype: str, remat: str) -> None:
    """Changes how a transformer computes; every module of it holds the configuration."""
    config = dataclasses.replace(model.config, compute_dtype=compute_dtype, remat=remat)
    module: Any
    for _, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "config", None), TransformerConfig):
            module.config = config


def load_pretrained(config: RunConfig, path: str, mesh: Mesh) -> Transformer:
    """What `load_model` reads, or the trained model of a run's directory, its adapters merged.

    It computes as `config` says, whatever the other run did.
    """
    found = run_at(path)
    settings = {"compute_dtype": config.compute_dtype, "remat": config.remat}
    if found is None:
        return load_model(path, mesh=mesh, **settings)
    run = dataclasses.replace(found.config, **settings)
    return merge_adapters(restored_model(run, found.folder, mesh, start=found.start))


def load_pretrained_tokenizer(path: str) -> Any:
    """The tokenizer of whatever `load_pretrained` reads."""
    passed: list[Path] = []
    while (found := run_at(path)) is not None:
        if found.folder.resolve() in passed:
            raise RunError(f"{found.folder / 'config.json'} says the run began from itself.")
        passed.append(found.folder.resolve())
        path = found.config.model
    return load_tokenizer(path)


class StoredRun(NamedTuple):
    """A run in a directory, as far as its trained model needs to be known.

    Attributes:
      config: its settings that every run has.
      folder: its directory.
      algorithm: what trained it.
      start: the model that training started from.
    """

    config: RunConfig
    folder: Path
    algorithm: str
    start: str


def run_at(path: str | os.PathLike) -> StoredRun | None:
    """The run in a directory; None if there is none.

    A run made of runs (`stages`, `online_preferences`) names the one with its result.
    """
    folder = Path(path).expanduser()
    content = read_config(folder) if (folder / "config.json").is_file() else {}
    if "algorithm" not in content:
        return None
    for name in ("algorithm", "result", "init"):
        if not isinstance(content.get(name, ""), str):
            raise RunError(
                f"{folder / 'config.json'} is damaged: its {name!r} is {content[name]!r}."
            )
    if "result" in content:
        part = folder / content["result"]
        # A part lies inside, so that following results comes to an end.
        if not part.resolve().is_relative_to(folder.resolve()) or part.samefile(folder):
            raise RunError(
                f"{folder / 'config.json'} is damaged: its 'result', {content['result']!r}, is no "
                "directory in the run's own."
            )
        return run_at(part)
    # Evaluators are for the run itself, and refused in a config that says of no algorithm.
    known = {field.name for field in dataclasses.fields(RunConfig)} - {"evaluators"}
    config = RunConfig.from_dict({k: value for k, value in content.items() if k in known})
    # An online policy may have started from another model than its reference.
    return StoredRun(config, folder, content["algorithm"], content.get("init") or config.model)


def restored_model(
    config: RunConfig, directory: Path, mesh: Mesh, *, start: str = ""
) -> Transformer:
    """The trained model of a run directory, adapters and all.

    Args:
      start: the model that training started from; "" is `config.model`.

    Raises:
      RunError: the run has no checkpoint yet.
    """
    with _checkpoints(directory) as checkpointer:
        # Adapters stand beside weights that no checkpoint holds; otherwise shapes are enough.
        if config.lora.rank:
            model = load_pretrained(config, start or config.model, mesh)
            model = with_adapters(config, model, mesh)
        else:
            try:
                model = _abstract_pretrained(config, config.model, mesh)
            except ModelError:  # it has gone since; the checkpoint knows its sizes
                settings = {"compute_dtype": config.compute_dtype, "remat": config.remat}
                architecture = dataclasses.replace(checkpointer.architecture(), **settings)
                model = abstract_transformer(architecture, mesh)
        return checkpointer.restore_model(model)


def _abstract_pretrained(config: RunConfig, path: str, mesh: Mesh) -> Transformer:
    """The shapes of `load_pretrained`."""
    found = run_at(path)
    if found is not None:
        return _abstract_pretrained(config, found.config.model, mesh)
    settings = {"compute_dtype": config.compute_dtype, "remat": config.remat}
    return abstract_model(path, mesh=mesh, **settings)


def restored_running(
    running: dict[str, jax.Array], directory: Path, mesh: Mesh
) -> dict[str, jax.Array]:
    """The running state of a run directory's loss, which starts as `running`; {} for none.

    Raises:
      RunError: the run has no checkpoint yet.
    """
    if not running:
        return {}
    with _checkpoints(directory) as checkpointer:
        return checkpointer.restore_running(jax.device_put(running, replicated(mesh)))


@contextlib.contextmanager
def _checkpoints(directory: Path) -> Iterator[Checkpointer]:
    """Reads the checkpoints of a run directory; `RunError` if there is none yet."""
    if (directory / "checkpoints").is_file():
        raise RunError(f"{directory / 'checkpoints'} is a file; expected the run's checkpoints.")
    missing = RunError(f"{directory} has no checkpoint yet: its run has not got that far.")
    if not (directory / "checkpoints").is_dir():
        raise missing
    checkpointer = Checkpointer(directory / "checkpoints")
    try:
        if checkpointer.latest_step() is None:
            raise missing
        yield checkpointer
    finally:
        checkpointer.close()
