"""Callables of the user's own, named on the command line or in a config."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from align_jax.text import hint

# What code of the user's own may raise. SystemExit too: `sys.exit(0)` would end the run as if it
# were done.
OF_USERS_CODE = (Exception, SystemExit)


def load_callable(spec: str, key: str, *, error: type[Exception]) -> Callable[..., Any]:
    """The function, or instance with `__call__`, at `package.module:name`. Its module is run.

    Raises:
      error: the module or the name does not exist, importing it fails, or the name is a class or
        no callable. The message begins with `key`, which says where the user wrote `spec`.
    """
    module_name, _, name = spec.partition(":")
    # `python -m align_jax` finds modules of the directory it is started in, and the installed
    # command `align-jax` has only its own directory there.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name and (module_name + ".").startswith(cause.name + "."):
            raise error(
                f"{key} is {spec!r}: there is no module {cause.name!r}. Start in the directory "
                "that holds it, or put that on PYTHONPATH."
            ) from cause
        raise error(f"{key} is {spec!r}: importing it fails: {cause}.") from cause
    except OF_USERS_CODE as cause:
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        raise error(
            f"{key} is {spec!r}: importing it fails: {type(cause).__name__}: {cause} "
            f"({frame.filename}:{frame.lineno})."
        ) from cause
    if not hasattr(module, name):
        public = [one for one in dir(module) if not one.startswith("_")]
        raise error(f"{key} is {spec!r}: {module_name} has no {name!r}.{hint(name, public)}")
    found = getattr(module, name)
    if not callable(found) or inspect.isclass(found):
        what = "a class" if inspect.isclass(found) else f"{type(found).__name__} {found!r}"
        raise error(f"{key} is {spec!r}: found {what}; expected a function or an instance.")
    return found
