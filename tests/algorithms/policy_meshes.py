"""Run by test_policy_meshes.py under eight forced CPU devices: one method on meshes.

policy_meshes.py SCRATCH METHOD

A run goes on, too, on a mesh that its checkpoint was not saved on.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from align_jax.algorithms import settings_of
from align_jax.algorithms.policy_gradient.iteration import Trainer
from align_jax.algorithms.policy_gradient.task import read_task
from align_jax.config import load_config
from align_jax.distributed.mesh import make_mesh
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.models.lora import without_adapters
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics

CONFIG = pathlib.Path(__file__).parents[2] / "experiments" / "ppo.py"
# (data, fsdp, tensor); the first is one device alone.
MESHES = ((1, 1, 1), (1, 8, 1), (2, 2, 2))
SETTINGS = [
    "sampling.prompts=8",
    "sampling.max_new_tokens=6",
    "epochs=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=constant",
    "checkpoint_every=1",
]
METHODS = {
    "ppo": [],
    "ppo, adapters, shared trunk": ["lora.rank=2", "critic=shared"],
    "online dpo": ["loss=dpo", "critic=none", "sampling.samples=2"],
}


def reward(records, completions):
    return [sum(c in "0123456789" for c in text[:8]) / 8 for text in completions]


def train(directory, overrides, sizes, iterations=2):
    """The metrics of a run up to this iteration, and the tokens it sampled."""
    settings = (*SETTINGS, *overrides, f"num_iterations={iterations}")
    overrides = [f"--config.{one}" for one in settings]
    config = settings_of(load_config(f"{CONFIG}:scale=tiny", overrides))
    tokenizer = load_tokenizer("tiny")
    if sizes == (1, 1, 1):
        # On eight devices a mesh has all of them; one alone is made here.
        axes = ("data", "fsdp", "tensor", "context")
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), axes)
    else:
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    model = pretrained.with_adapters(config, load_model("tiny", mesh=mesh), mesh)
    reference = without_adapters(model)
    directory.mkdir(exist_ok=True)
    task = read_task(config, tokenizer, mesh, "builtin:tiny_preferences", reward=reward)
    Trainer(config, directory, mesh, tokenizer, task, model, reference).fit()
    samples = [
        [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
        for file in sorted((directory / "samples").iterdir())
    ]
    return read_metrics(directory), samples


def compare(name, found, expected):
    (rows, samples), (wanted_rows, wanted_samples) = found, expected
    assert samples == wanted_samples, name
    assert len(rows) == len(wanted_rows) == 2
    for row, wanted in zip(rows, wanted_rows):
        assert row.keys() == wanted.keys(), name
        for key in row.keys() - {"wall_time"}:
            if not key.startswith("seconds/"):
                close = np.isclose(row[key], wanted[key], rtol=1e-4, atol=1e-4)
                assert close, (name, key, row[key], wanted[key])


def main(scratch: pathlib.Path, name: str) -> None:
    assert jax.device_count() == 8
    overrides = METHODS[name]
    alone = train(scratch / "alone", overrides, MESHES[0])
    compare(name, train(scratch / "2x2x2", overrides, MESHES[2]), alone)
    if name == "ppo":
        compare(name, train(scratch / "1x8x1", overrides, MESHES[1]), alone)
        train(scratch / "moved", overrides, MESHES[0], iterations=1)
        compare("moved", train(scratch / "moved", overrides, MESHES[2]), alone)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
