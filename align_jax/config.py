"""Reading an experiment: its config file, the argument after the colon, and overrides.

A config file is Python with `get_config(arg) -> ConfigDict`; it is code of the user's own
choosing. The values after `--config.key=` are literals, never evaluated.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from align_jax.training.errors import RunError

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
    config = _parse([f"--config={spec}"])
    known = list(_keys(config))
    for override in overrides:
        key = override.removeprefix("--config.").partition("=")[0]
        if key not in known:
            raise RunError(
                f"--config.{key}: the config has no field {key!r}.{_nearest(key, known)}"
            )
    return _parse([f"--config={spec}", *overrides])


def _parse(arguments: list[str]) -> ConfigDict:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(["align-jax", *arguments])
    except flags.Error as error:
        raise RunError(str(error)) from error
    except AttributeError as error:
        if "get_config" not in str(error):
            raise
        raise RunError(f"{arguments[0]}: the file has no function get_config(arg).") from error
    return values.config


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
