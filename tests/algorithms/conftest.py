"""What the tests of algorithms share: tiny configs, quick compilation, a cache of their own."""

import pathlib

import jax
import pytest

from align_jax.config import load_config

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny models are compiled far longer than they run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny_config():
    """experiments/NAME.py at scale=tiny with overrides `{"data.batch_size": 4}`."""

    def load(name, overrides):
        items = [f"--config.{key}={value}" for key, value in overrides.items()]
        return load_config(f"{EXPERIMENTS / name}.py:scale=tiny", items)

    return load
