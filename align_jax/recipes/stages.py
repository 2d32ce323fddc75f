"""An experiment of several stages, each a run of its own: supervised, reward model, policy.

    WORKDIR/STAGE/    the workdir of each stage of `config.order`, with its own config and report

`config.STAGE` is the config of a stage. Where a field of it names a model or data, "stage:NAME" is
the directory of an earlier stage, and "stage:NAME/reward_model" is what lies in it. The samples of
an earlier stage are the source "samples:stage:NAME/samples/samples.jsonl". A stage that is finished
is not run again; one that was stopped goes on.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

from align_jax.algorithms import Source, algorithm_of, errors_in, read_sources, settings_of
from align_jax.data.samples import PREFIX as SAMPLES
from align_jax.errors import RunError
from align_jax.settings import Settings
from align_jax.training.workdir import Workdir

PREFIX = "stage:"

# What refers to an earlier stage: perhaps the kind of source, and the path in this experiment.
_REFERENCE = re.compile(f"({SAMPLES})?{PREFIX}(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of an experiment in stages.

    As a mapping, the stages stand beside the other fields, each under its own name.
    """

    stages: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings by name
    order: tuple[str, ...] = ()
    result: str = ""  # the stage whose policy is the outcome
    algorithm: str = "stages"

    def __post_init__(self):
        # The base would make plain values of the stages, which are settings already.
        stages = dict(self.stages)
        object.__setattr__(self, "stages", {})
        super().__post_init__()
        object.__setattr__(self, "stages", stages)
        before: list[str] = []
        for name in self.order:
            if name in before:
                raise RunError(f"config.order names the stage {name!r} twice.")
            if name not in stages:
                raise RunError(
                    f"config.order has the stage {name!r}, but there is no config.{name}."
                )
            for value in _texts(stages[name].to_dict()):
                reference = _REFERENCE.fullmatch(value)
                if reference and reference[2].split("/")[0] not in before:
                    raise RunError(
                        f"config.{name} refers to {value!r}; the stages before it are "
                        f"{', '.join(before) or 'none'}."
                    )
            before.append(name)
        if self.result not in before:
            raise RunError(f"config.result is {self.result!r}; expected one of {before}.")

    @classmethod
    def of(cls, **stages: Any) -> Self:
        """These stages (settings or `ConfigDict`s) in this order; the last one's policy results."""
        order = tuple(stages)
        return cls.from_dict({"order": order, "result": order[-1], **stages})

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """As `Settings.from_dict`; every name that is no other field is a stage."""
        own = [field.name for field in dataclasses.fields(cls) if field.name != "stages"]
        stages = {}
        for name, value in values.items():
            if name in own:
                continue
            if not isinstance(value, Settings):
                with errors_in(name):
                    value = settings_of(value, key=f"config.{name}")
            stages[name] = value
        return cls(stages=stages, **{name: x for name, x in values.items() if name in own})

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values; the inverse of `from_dict`."""
        content = {"algorithm": self.algorithm, "order": self.order, "result": self.result}
        return content | {name: stage.to_dict() for name, stage in self.stages.items()}

    def to_config_dict(self) -> Any:
        """As `Settings.to_config_dict`, the stages beside the other fields."""
        from ml_collections import ConfigDict

        content = {"algorithm": self.algorithm, "order": self.order, "result": self.result}
        stages = {name: stage.to_config_dict() for name, stage in self.stages.items()}
        return ConfigDict(content | stages)


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Runs the stages that are not finished; returns the summary of each."""
    _read_sources_to_come(config, workdir)
    summaries = {}
    for name in config.order:
        stage = settings_of(_resolved(config.stages[name].to_dict(), workdir))
        folder = workdir.part(name, stage)
        if folder.finished() is None:
            print(f"Stage {name}: {folder.path}")
            folder.finish(algorithm_of(stage).run(stage, folder))
        summaries[name] = folder.finished()
    return summaries


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The summaries of the finished stages."""
    files = {name: workdir.path / name / "finished.json" for name in config.order}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


def sources(config: Config) -> list[Source]:
    """None of its own: `run` reads those of the stages."""
    return []


def _read_sources_to_come(config: Config, workdir: Workdir) -> None:
    """Reads what the stages to come will: wrong data is found before earlier ones are paid for."""
    for name in config.order:
        if (workdir.path / name / "finished.json").exists():
            continue
        stage = config.stages[name]
        with errors_in(name):
            wanted = algorithm_of(stage).sources(stage)
            read_sources([one for one in wanted if not _REFERENCE.fullmatch(one[0])])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _resolved(value: Any, workdir: Workdir) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolved(one, workdir) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_resolved(one, workdir) for one in value)
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    return (reference[1] or "") + str(workdir.directory(reference[2]))
