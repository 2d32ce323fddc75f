"""Policy-gradient runs on the tiny model, for several files of tests."""

import pytest

from align_jax.algorithms.policy_gradient.iteration import Trainer
from align_jax.algorithms.policy_gradient.task import read_task
from align_jax.distributed.mesh import make_mesh
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training import pretrained
from tests.algorithms.policy_runs import digits


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", mesh=make_mesh())


@pytest.fixture
def new_trainer(tiny_config, tokenizer, base, tmp_path):
    """A trainer of 8 prompts and completions of 6 tokens, with these changes; and its directory."""

    def make(overrides=(), *, reward=digits, name="run", model=None):
        settings = {
            "sampling.prompts": 8,
            "sampling.max_new_tokens": 6,
            "data.source": "builtin:tiny_sft",
            "num_iterations": 2,
            "epochs": 1,
            "minibatches": 1,
            "checkpoint_every": 1,
        }
        config = tiny_config("ppo", settings | dict(overrides))
        mesh = pretrained.open_mesh(config)
        task = read_task(config, tokenizer, mesh, "builtin:tiny_preferences", reward=reward)
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        start = base if model is None else model
        return Trainer(config, directory, mesh, tokenizer, task, start, base), directory

    return make
