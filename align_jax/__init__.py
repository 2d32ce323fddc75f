"""Aligning language models in JAX: losses, models, training and evaluation.

The names of `__all__` are imported when they are first asked for: `from align_jax import losses`
brings jax alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align_jax.models.interchange import load_model, load_tokenizer, save_model
    from align_jax.runs import open_run

__version__ = "0.2.0.dev0"  # setup.cfg reads it here

__all__ = ["load_model", "load_tokenizer", "open_run", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "align_jax.runs" if name == "open_run" else "align_jax.models.interchange"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
