"""Reading an experiment: its config file, the argument after the colon, and overrides.

A config file is Python with `get_config(arg) -> ConfigDict`; it is code of the user's own
choosing. The values after `--config.key=` are literals, never evaluated.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from align_jax.errors import RunError

SCALES = ("tiny", "small", "paper")


def parse_scale(arg: str) -> str:
    """The scale in a config's argument `scale=NAME`; `RunError` for anything else."""
    name, _, scale = arg.partition("=")
    if name != "scale" or scale not in SCALES:
        raise RunError(
            f"the config's argument is {arg!r}; expected one of "
            + ", ".join(f"'scale={scale}'" for scale in SCALES)
            + "."
        )
    return scale


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of `FILE[:arg]` with overrides `--config.key=value` applied.

    Raises:
      RunError: no such file, no `get_config` in it, an override that names no field (the nearest
        one is suggested), or a value of another type.
    """
    file = Path(spec.split(":")[0])
    if not file.is_file():
        near = _nearest(str(file), [str(path) for path in file.parent.glob("*.py")])
        raise RunError(f"--config={spec}: there is no file {file}.{near}")
    config = _read(spec)
    known = list(_keys(config))
    for override in overrides:
        key = override.removeprefix("--config.").partition("=")[0]
        if key not in known:
            raise RunError(
                f"--config.{key}: the config has no field {key!r}.{_nearest(key, known)}"
            )
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(overrides))
    try:
        values(["align-jax", *overrides])
    except flags.Error as error:
        raise RunError(str(error)) from error
    return values.config


def _read(spec: str) -> ConfigDict:
    file, colon, argument = spec.partition(":")
    # Not ml_collections' own loader: it leans on what Python 3.12 is about to remove.
    description = importlib.util.spec_from_file_location("align_jax_config_file", file)
    if description is None or description.loader is None:
        raise RunError(f"--config={spec}: {file} is no Python file (.py).")
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RunError(f"--config={spec}: the file has no function get_config(arg).")
    config = module.get_config(*([argument] if colon else []))
    if not isinstance(config, ConfigDict):
        raise RunError(
            f"--config={spec}: get_config returned {type(config).__name__}; expected a ConfigDict."
        )
    return config


def _keys(config: ConfigDict, prefix: str = "") -> Iterable[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest(name: str, known: Sequence[str]) -> str:
    # A field is often right and only its group is missing: --config.batch_size for data.batch_size.
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [by_leaf[k] for k in difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.6)]
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" There are: {', '.join(sorted(known))}." if known else ""
