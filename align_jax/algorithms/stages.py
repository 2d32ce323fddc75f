"""An experiment of several stages, each a run of its own: supervised, reward model, policy.

    WORKDIR/STAGE/    the workdir of each stage of `config.order`, with its own config and report

`config.STAGE` is the config of a stage. Where a field of it names a model or data, "stage:NAME" is
the directory of an earlier stage (and "stage:NAME/reward_model" what lies in it). A stage that is
finished is not run again; one that was stopped goes on.
"""

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from align_jax.algorithms import Source, algorithm_of, errors_in, read_sources
from align_jax.errors import RunError
from align_jax.training.workdir import Workdir

PREFIX = "stage:"


def make_stages_config(**stages: ConfigDict) -> ConfigDict:
    """The config of these stages in this order; the policy of the last one is the result."""
    order = tuple(stages)
    return ConfigDict({"algorithm": "stages", "order": order, "result": order[-1], **stages})


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Runs the stages that are not finished; returns the summary of each."""
    check(config)
    _read_sources(config, workdir)
    summaries = {}
    for name in config.order:
        stage = ConfigDict(_resolved(config[name].to_dict(), workdir))
        folder = workdir.part(name, stage)
        if folder.finished() is None:
            print(f"Stage {name}: {folder.path}")
            folder.finish(algorithm_of(stage).run(stage, folder))
        summaries[name] = folder.finished()
    return summaries


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The summaries of the finished stages."""
    files = {name: workdir.path / name / "finished.json" for name in config.order}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


def sources(config: ConfigDict) -> list[Source]:
    """None of its own: `run` reads those of the stages."""
    return []


def check(config: ConfigDict) -> None:
    """Raises `RunError` for a stage that is missing, wrong, or referred to before it is run."""
    before: list[str] = []
    for name in config.order:
        if name not in config:
            raise RunError(f"config.order has the stage {name!r}, but there is no config.{name}.")
        stage, algorithm = config[name], algorithm_of(config[name], key=f"config.{name}")
        for value in _texts(stage.to_dict()):
            earlier = value.removeprefix(PREFIX).split("/")[0]
            if value.startswith(PREFIX) and earlier not in before:
                raise RunError(
                    f"config.{name} refers to {value!r}; the stages before it are "
                    f"{', '.join(before) or 'none'}."
                )
        with errors_in(name):
            algorithm.check(stage)
        before.append(name)
    if config.result not in before:
        raise RunError(f"config.result is {config.result!r}; expected one of {before}.")


def _read_sources(config: ConfigDict, workdir: Workdir) -> None:
    """Reads what the stages to come will: wrong data is found before earlier ones are paid for."""
    for name in config.order:
        if (workdir.path / name / "finished.json").exists():
            continue
        stage = config[name]
        with errors_in(name):
            wanted = algorithm_of(stage).sources(stage)
            read_sources([one for one in wanted if not one[0].startswith(PREFIX)])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)


def _resolved(value: Any, workdir: Workdir) -> Any:
    if isinstance(value, dict):
        return {name: _resolved(one, workdir) for name, one in value.items()}
    if isinstance(value, str) and value.startswith(PREFIX):
        return str(workdir.directory(value.removeprefix(PREFIX)))
    return value
