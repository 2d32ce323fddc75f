"""Run by test_meshes.py under eight forced CPU devices: DPO, rewards, sampling on three meshes."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np

from align_jax.algorithms import comparisons, preference, reward_model, settings_of
from align_jax.config import load_config
from align_jax.data import batching
from align_jax.data.dataset import Data, examples_of
from align_jax.data.tokenise import Example
from align_jax.distributed import mesh as meshes
from align_jax.generation import generate
from align_jax.losses.preference import LOSSES
from align_jax.models.heads import ScalarModel
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.model import RewardModel, RewardScale
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.pretrained import MeshSizes
from align_jax.training.reference import compute_log_probs
from align_jax.training.state import init_state
from align_jax.training.step import make_train_step, place_batch
from align_jax.training.workdir import Workdir
from align_jax.trees import flatten

CONFIG = pathlib.Path(__file__).parents[2] / "experiments" / "dpo.py"

# (data, fsdp, tensor) -> a device's share of parameters of `tiny` (V 264, D 32, H 4, K 2, d 8).
MESHES = {
    (1, 8, 1): {"embedding": (264, 4), "query": (2, 4, 4, 8), "up": (2, 4, 64)},
    (2, 2, 2): {"embedding": (132, 16), "query": (2, 16, 2, 8), "up": (2, 16, 32)},
}


def config():
    overrides = ["num_steps=5", "data.batch_size=16", "data.accumulation=2", "data.limit=64"]
    overrides += ["optimizer.weight_decay=0.1", "remat=linear"]
    items = [f"--config.{item}" for item in overrides]
    return settings_of(load_config(f"{CONFIG}:scale=tiny", items))


def check_shares(state, shares):
    """Parameters and moments are really split: every device holds its share and no more."""
    parameters, moments = flatten(state.model), flatten(state.optimizer)
    for name, share in shares.items():
        (full,) = [n for n in parameters if n.rsplit(".", 1)[-1] == name]
        ours = [parameters[full], *(moments[n] for n in moments if n.endswith(f".{full}"))]
        assert len(ours) == 3
        for leaf in ours:
            found = {shard.data.shape for shard in leaf.addressable_shards}
            assert found == {share}, (full, found)
            assert len(leaf.sharding.device_set) == 8


def steps(mesh, shares):
    """Five steps by the trainer's own parts: metrics, and greedy tokens of what came out."""
    c = config()
    tokenizer = load_tokenizer("tiny")
    examples = examples_of(c.data.source, tokenizer, c.data, kind="preference")
    model = load_model("tiny", mesh=mesh, remat=c.remat)
    reference = compute_log_probs(model, mesh, examples, c.data)
    collate = batching.make_collate(c.data, preference.attach_reference(examples, reference))
    optimizer = make_optimizer(c.optimizer, c.num_steps)
    state = init_state(model, optimizer, mesh)
    schedule = make_schedule(c.optimizer, c.num_steps)
    loss = preference.preference_loss(LOSSES[c.loss], beta=c.beta)
    step = make_train_step(loss, optimizer, schedule, state, mesh, accumulated=True)
    rows = []
    with jax.set_mesh(mesh):
        for number in range(c.num_steps):
            check_shares(state, shares)
            batch = collate(examples[16 * (number % 4) :][:16])
            placed = place_batch(batch, mesh, accumulated=True)
            tokens = placed["tokens"]
            if mesh.size > 1:
                assert tokens.addressable_shards[0].data.shape[1] == tokens.shape[1] // (
                    mesh.shape["data"] * mesh.shape["fsdp"]
                )
            state, metrics = step(state, placed)
            rows.append({name: float(value) for name, value in metrics.items()})
        check_shares(state, shares)
        prompts = [example.prompt.tolist() for example in examples[:8]]
        drawn = generate(
            state.model, prompts, key=jax.random.key(0), max_new_tokens=12, temperature=0.0
        )
    assert step._cache_size() == 1
    return reference, rows, np.asarray(drawn.tokens)


def through_train(directory, sizes):
    """The metrics of `preference.run` on the config's mesh."""
    data, fsdp, tensor = sizes
    c = dataclasses.replace(config(), mesh=MeshSizes(data=data, fsdp=fsdp, tensor=tensor))
    preference.run(c, Workdir(directory, c))
    mesh = pretrained.open_mesh(c)
    # What eight devices saved, eight devices laid out otherwise read.
    other = pretrained.restored_model(c, directory, meshes.make_mesh(fsdp=4, tensor=2))
    again = pretrained.restored_model(c, directory, mesh)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    return read_metrics(directory)


def token_extras(mesh):
    """A sum over values of tokens `[L,3]`, packed and in micro-batches, split by rows."""
    rng = np.random.default_rng(0)
    examples = [
        Example.of_samples(i, [9, 8], [[7] * int(n), [6]]) for i, n in enumerate(range(1, 65))
    ]
    examples = [
        dataclasses.replace(
            one,
            token_extras={
                "teacher": tuple(rng.random((len(r), 3), np.float32) for r in one.responses)
            },
        )
        for one in examples
    ]
    data = Data(batch_size=64, accumulation=2, rows=16)
    with jax.set_mesh(mesh):
        batch = place_batch(batching.make_collate(data)(examples), mesh, accumulated=True)
        teacher, targets = batch["teacher"], batch["targets"]
        assert teacher.shape == (*targets.shape, 3)
        for shard, other in zip(teacher.addressable_shards, targets.addressable_shards):
            assert shard.data.shape == (*other.data.shape, 3)
            assert shard.data.shape[1] == 16 // (mesh.shape["data"] * mesh.shape["fsdp"])
        total = jax.jit(lambda b: (b["teacher"] * b["target_mask"][..., None]).sum((0, 1, 2)))
        found = np.asarray(total(batch))
    expected = sum(r.sum(0) for one in examples for r in one.token_extras["teacher"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def rewards(mesh):
    """The loss of a batch of rankings, two records a row, and the rewards of texts."""
    overrides = ["loss=all_pairs", "data.source=builtin:tiny_ranked", "data.rows=8"]
    items = [f"--config.{item}" for item in [*overrides, "data.limit=16"]]
    c = settings_of(load_config(f"{CONFIG.with_name('reward_model.py')}:scale=tiny", items))
    tokenizer = load_tokenizer("tiny")
    inputs = reward_model.read_inputs(
        c.data.source, tokenizer, c, held_out="", directory=None, mesh=mesh
    )
    model = ScalarModel(load_model("tiny", mesh=mesh), key=jax.random.key(1))
    batch = batching.make_collate(c.data, comparisons.attach)(inputs.examples)
    with jax.set_mesh(mesh):
        placed = place_batch(batch, mesh, accumulated=False)
        loss = float(jax.jit(functools.partial(reward_model.loss_sums, c))(model, placed).loss)
    reward = RewardModel([(model, RewardScale())], tokenizer, mesh=mesh)
    texts = [" a" * n for n in range(1, 60, 5)]
    return np.array([loss, *reward([{"prompt": "b"}] * len(texts), texts)])


def compare(name, found, expected):
    for row, wanted in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm"):
            difference = abs(row[key] - wanted[key])
            assert difference < 1e-5, (name, key, row[key], wanted[key])


def main(scratch: pathlib.Path) -> None:
    assert jax.device_count() == 8
    single = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "tensor", "context")
    )
    reference, rows, tokens = steps(single, {})
    assert abs(rows[0]["loss"] - np.log(2)) < 1e-6 and rows[-1]["loss"] < rows[0]["loss"]
    losses = {}
    for sizes, shares in MESHES.items():
        mesh = meshes.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        sharded_reference, sharded, sharded_tokens = steps(mesh, shares)
        np.testing.assert_allclose(sharded_reference, reference, atol=1e-4)
        compare(sizes, sharded, rows)
        np.testing.assert_array_equal(sharded_tokens, tokens)
        token_extras(mesh)
        np.testing.assert_allclose(rewards(mesh), rewards(single), atol=1e-4)
    losses = through_train(scratch / "run", (2, 2, 2))
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5]
    assert abs(losses[0]["loss"] - np.log(2)) < 1e-6
    print(json.dumps(rows))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
