"""Reading an experiment: its config file, the argument after the colon, and overrides.

A config file is Python with `get_config(arg) -> ConfigDict`; it is code of the user's own
choosing, and it is run. The values after `--config.key=` are literals, never evaluated.
"""

import contextlib
import difflib
import importlib.util
import inspect
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from align_jax.errors import DataError, ModelError, RewardError, RunError
from align_jax.files import irregular
from align_jax.settings import Settings
from align_jax.text import one_line

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
      RunError: no such file, no `get_config` in it, whatever the file's own code raises, an
        override that names no field (the nearest one is suggested), or a value of another type.
    """
    name = spec.partition(":")[0]
    if not name:
        raise RunError(f"--config={spec} names no file; expected FILE.py or FILE.py:arg.")
    file = Path(name)
    if found := irregular(file):
        raise RunError(f"--config={spec}: {file} {found}; expected a Python file.")
    if not file.is_file():
        near = _nearest(str(file), [str(path) for path in file.parent.glob("*.py")])
        raise RunError(f"--config={spec}: there is no file {file}.{near}")
    config = _read(spec)
    with _errors_of(file):
        known = list(_keys(config))
    for override in overrides:
        key = override.removeprefix("--config.").partition("=")[0]
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise RunError(
                f"--config.{key}: {key!r} is a group of fields; set one of them, such as "
                f"--config.{inside[0]}=..."
            )
        if key not in known:
            raise RunError(
                f"--config.{key}: the config has no field {key!r}.{_nearest(key, known)}"
            )
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(overrides))
    try:
        values(["align-jax", *overrides])
    except flags.Error as error:
        raise RunError(one_line(str(error))) from error
    return values.config


def _read(spec: str) -> ConfigDict:
    file, colon, argument = spec.partition(":")
    # Not ml_collections' own loader: it leans on what Python 3.12 is about to remove.
    description = importlib.util.spec_from_file_location("align_jax_config_file", file)
    if description is None or description.loader is None:
        raise RunError(f"--config={spec}: {file} is no Python file (.py).")
    module = importlib.util.module_from_spec(description)
    with _errors_of(file):
        description.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise RunError(f"--config={spec}: the file has no function get_config(arg).")
    arguments = [argument] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        problem = "takes no argument, and" if arguments else "needs one: write FILE:arg;"
        given = repr(argument) if arguments else "none"
        raise RunError(
            f"--config={spec}: get_config {problem} {given} was given as its argument ({error})."
        ) from error
    with _errors_of(file):
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        hint = " (return its .to_config_dict())" if isinstance(config, Settings) else ""
        raise RunError(
            f"--config={spec}: get_config returned {type(config).__name__}; expected a "
            f"ConfigDict{hint}."
        )
    return config


@contextlib.contextmanager
def _errors_of(file: str | Path) -> Iterator[None]:
    """Makes a `RunError` that names the line of whatever the code of a config file raises."""
    try:
        yield
    except (RunError, DataError, ModelError, RewardError, KeyboardInterrupt):
        raise
    # SystemExit as well: after `sys.exit(0)` a run that never began would count as done.
    except BaseException as error:
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == str(file)
        ]
        if isinstance(error, OSError) and not lines:
            raise RunError(f"--config={file} cannot be read: {error.strerror}.") from error
        said = str(error)
        if isinstance(error, SyntaxError):
            lines, said = [error.lineno or 1], error.msg
        at = f", line {lines[-1]}" if lines else ""
        what = one_line(f"{type(error).__name__}: {said}")
        raise RunError(f"--config={file}{at}: the config's own code raised {what}") from error


def _keys(config: ConfigDict, prefix: str = "") -> Iterable[str]:
    for name in config:
        if not isinstance(name, str):
            raise RunError(f"the config has the field {prefix}{name!r}; names must be strings.")
        value = config[name]
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
