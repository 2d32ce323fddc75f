"""Run by test_lora.py under two forced CPU devices: DPO steps with adapters on three meshes."""

import json
import pathlib

import jax
import numpy as np

from align_jax.algorithms import preference, settings_of
from align_jax.config import load_config
from align_jax.data import batching
from align_jax.data.dataset import examples_of
from align_jax.distributed.mesh import make_mesh
from align_jax.losses.preference import LOSSES
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.models.lora import add_adapters, merge_adapters, without_adapters
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.reference import compute_log_probs
from align_jax.training.state import init_state
from align_jax.training.step import make_train_step, place_batch
from align_jax.trees import flatten

CONFIG = pathlib.Path(__file__).parents[2] / "experiments" / "dpo.py"

# (fsdp, tensor) -> a device's share of factors of rank 4 of `tiny` (D 32, H 4, K 2, d 8, F 64).
MESHES = {
    (2, 1): {"query_a": (2, 16, 4), "query_b": (2, 4, 4, 8), "down_b": (2, 4, 16)},
    (1, 2): {"query_a": (2, 32, 4), "query_b": (2, 4, 2, 8), "down_a": (2, 32, 4)},
}


def steps(mesh, shares):
    overrides = ["--config.data.limit=16", "--config.data.batch_size=8"]
    c = settings_of(load_config(f"{CONFIG}:scale=tiny", overrides))
    examples = examples_of(c.data.source, load_tokenizer("tiny"), c.data, kind="preference")
    model = add_adapters(
        load_model("tiny", mesh=mesh), rank=4, alpha=8.0, key=jax.random.key(0), mesh=mesh
    )
    reference = compute_log_probs(without_adapters(model), mesh, examples, c.data)
    collate = batching.make_collate(c.data, preference.attach_reference(examples, reference))
    optimizer = make_optimizer(c.optimizer, 4)
    state = init_state(model, optimizer, mesh)
    schedule = make_schedule(c.optimizer, 4)
    loss = preference.preference_loss(LOSSES[c.loss], beta=c.beta)
    step = make_train_step(loss, optimizer, schedule, state, mesh, accumulated=False)
    rows = []
    with jax.set_mesh(mesh):
        for number in range(4):
            batch = collate(examples[8 * (number % 2) :][:8])
            state, metrics = step(state, place_batch(batch, mesh, accumulated=False))
            rows.append({name: float(value) for name, value in metrics.items()})
    for name, share in shares.items():
        leaves = [x for n, x in flatten(state).items() if n.endswith(f"adapters.{name}")]
        assert len(leaves) == 3  # the parameter and its two moments
        for leaf in leaves:
            assert {shard.data.shape for shard in leaf.addressable_shards} == {share}, name
    merged = merge_adapters(state.model)
    assert merged.blocks.mlp.up[...].sharding == state.model.blocks.mlp.up[...].sharding
    return rows


def main() -> None:
    assert jax.device_count() == 2
    single = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "tensor", "context")
    )
    results = [steps(single, {})]
    for (fsdp, tensor), shares in MESHES.items():
        results.append(steps(make_mesh(fsdp=fsdp, tensor=tensor), shares))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
