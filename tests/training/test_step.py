"""The train step: accumulation, normalisation, donation, and where the optimizer's state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from align_jax.algorithms import preference, sft
from align_jax.data import batching
from align_jax.data.dataset import Data
from align_jax.distributed.partitioning import MESH_AXES
from align_jax.losses.preference import LOSSES
from align_jax.models.interchange import load_model
from align_jax.training.optimizer import Optimizer, make_optimizer
from align_jax.training.state import TrainState, init_state, state_shardings
from align_jax.training.step import LossSums, make_train_step, place_batch
from align_jax.trees import flatten

# Half of the tokens are in the first two examples: an average of averages would be far off.
UNEQUAL = [
    (5, 40, 30),
    (3, 33, 45),
    (9, 2, 3),
    (4, 1, 2),
    (7, 3, 1),
    (2, 2, 2),
    (6, 4, 3),
    (5, 1, 1),
]


def one_step(mesh, loss_function, examples, attach, **data):
    """Metrics of one step of plain SGD at rate 1 and the parameters after it."""
    data = Data(
        batch_size=len(examples), length_buckets=(16, 64, 192), target_buckets=(16, 192), **data
    )
    optimizer = optax.sgd(1.0)
    state = init_state(load_model("tiny", mesh=mesh), optimizer, mesh)
    accumulated = data.accumulation > 1
    step = make_train_step(
        loss_function, optimizer, lambda step: 0.5, state, mesh, accumulated=accumulated
    )
    batch = batching.make_collate(data, attach)(examples)
    with jax.set_mesh(mesh):
        state, metrics = step(state, place_batch(batch, mesh, accumulated=accumulated))
    return jax.device_get(metrics), jax.device_get(flatten(state.model))


def sft_case(make_examples):
    return sft.loss_sums, make_examples([lengths[:2] for lengths in UNEQUAL]), None


def dpo_case(make_examples):
    examples = make_examples(UNEQUAL)
    reference = -np.random.default_rng(1).uniform(5, 300, (len(examples), 2)).astype(np.float32)
    return (
        preference.preference_loss(LOSSES["dpo"], beta=0.5),
        examples,
        preference.attach_reference(examples, reference),
    )


@pytest.mark.parametrize("case", [sft_case, dpo_case])
def test_unequal_micro_batches_add_up_to_the_undivided_batch(mesh, make_examples, case):
    arguments = case(make_examples)
    metrics, parameters = one_step(mesh, *arguments)
    divided_metrics, divided = one_step(mesh, *arguments, accumulation=4, rows=1)
    assert divided_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(divided_metrics[name], value, rtol=1e-6, err_msg=name)
    for name, value in parameters.items():
        np.testing.assert_allclose(divided[name], value, atol=1e-6, err_msg=name)


def test_sums_are_divided_by_the_weight_and_the_step_counts(mesh):
    values = np.array([[3.0, 5.0], [7.0, 1.0]], np.float32)

    def loss_function(model, batch):
        loss = (batch["x"] * model["w"]).sum()
        return LossSums(loss, jnp.float32(8), {"sum": batch["x"].sum()})

    def schedule(step):
        return 0.1 * (step + 1)

    optimizer = optax.sgd(schedule)
    state = TrainState(jnp.int32(0), {"w": jnp.float32(2)}, optimizer.init({"w": jnp.float32(2)}))
    replicated = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align_jax.training.step.state_shardings", lambda *_: replicated)
        step = make_train_step(loss_function, optimizer, schedule, state, mesh, accumulated=False)
    batch = place_batch({"x": values}, mesh, accumulated=False)
    weight = 2.0
    for number in (1, 2):
        state, metrics = step(state, batch)
        assert int(state.step) == number
        # loss = 16 w / 8, its gradient 2.
        np.testing.assert_allclose(metrics["loss"], 2 * weight, rtol=1e-6)
        np.testing.assert_allclose(metrics["sum"], 2.0, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], 2.0, rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], 0.1 * number, rtol=1e-6)
        weight -= 0.1 * number * 2.0
        np.testing.assert_allclose(state.model["w"], weight, rtol=1e-6)


def test_the_logged_gradient_norm_is_before_clipping_and_the_update_after(mesh, make_examples):
    loss_function, examples, _ = sft_case(make_examples)
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    state = init_state(load_model("tiny", mesh=mesh), optimizer, mesh)
    before = jax.device_get(flatten(state.model))
    step = make_train_step(loss_function, optimizer, lambda _: 1.0, state, mesh, accumulated=False)
    batch = batching.make_collate(Data())(examples)
    state, metrics = step(state, place_batch(batch, mesh, accumulated=False))
    after = jax.device_get(flatten(state.model))
    moved = np.sqrt(sum(np.square(after[n] - before[n]).sum() for n in before))
    assert metrics["grad_norm"] > 0.1
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_the_state_is_donated(mesh, make_examples):
    loss_function, examples, _ = sft_case(make_examples)
    optimizer = make_optimizer(Optimizer(), 10)
    state = init_state(load_model("tiny", mesh=mesh), optimizer, mesh)
    step = make_train_step(loss_function, optimizer, lambda _: 1.0, state, mesh, accumulated=False)
    batch = batching.make_collate(Data())(examples)
    new, _ = step(state, place_batch(batch, mesh, accumulated=False))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
def test_moments_lie_as_their_parameters_do_and_counts_lie_whole(name):
    optimizer = make_optimizer(Optimizer(weight_decay=0.1), 10)
    model = load_model(name)
    state = jax.eval_shape(lambda m: TrainState(jnp.int32(0), m, optimizer.init(m)), model)
    shardings = state_shardings(state, AbstractMesh((1, 2, 2, 1), MESH_AXES))
    parameters, moments = flatten(shardings.model), flatten(shardings.optimizer)
    assert parameters["blocks.attention.query"].spec == jax.P(None, ("fsdp",), ("tensor",), None)
    assert parameters["final_norm.scale"].spec == jax.P(("fsdp",))
    for part in ("mu", "nu"):
        found = {n.split(f".{part}.")[1]: s for n, s in moments.items() if f".{part}." in n}
        assert {n: s.spec for n, s in found.items()} == {n: s.spec for n, s in parameters.items()}
    counts = [sharding for n, sharding in moments.items() if n.endswith("count")]
    assert counts and all(sharding.spec == jax.P() for sharding in counts)
    assert shardings.step.spec == jax.P()


def test_a_placed_batch_keeps_its_values_and_types(mesh):
    batch = {
        "tokens": np.arange(12, dtype=np.int32).reshape(2, 2, 3),
        "reference_log_probs": np.arange(4, dtype=np.float32).reshape(2, 2),
        "teacher": np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2),
    }
    placed = place_batch(batch, mesh, accumulated=True)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].dtype == value.dtype
