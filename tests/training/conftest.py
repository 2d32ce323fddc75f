"""What the tests of training share: made examples, the tiny model's parts, a cache of their own."""

import pathlib

import jax
import numpy as np
import pytest

from align_jax.config import load_config
from align_jax.data.chat import Example
from align_jax.distributed.mesh import make_mesh

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


@pytest.fixture(scope="session")
def mesh():
    return make_mesh()


@pytest.fixture
def tiny_config():
    """experiments/NAME.py at scale=tiny with overrides `{"data.batch_size": 4}`."""

    def load(name, overrides):
        items = [f"--config.{key}={value}" for key, value in overrides.items()]
        return load_config(f"{EXPERIMENTS / name}.py:scale=tiny", items)

    return load


@pytest.fixture
def make_examples():
    """Examples of random tokens; example i has the prompt length and response lengths given."""

    def make(lengths, seed=0):
        rng = np.random.default_rng(seed)
        examples = []
        for index, (prompt, *responses) in enumerate(lengths):
            drawn = tuple(rng.integers(8, 264, size, np.int32) for size in responses)
            examples.append(
                Example(
                    id=index,
                    prompt=rng.integers(8, 264, prompt, np.int32),
                    responses=drawn,
                    response_masks=tuple(np.ones(len(r), np.float32) for r in drawn),
                    extras={},
                )
            )
        return examples

    return make
