"""Training with adapters: what moves, what is stored, where it starts and how it goes on."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import main
from align_jax.algorithms import preference, settings_of, sft
from align_jax.config import load_config
from align_jax.data import batching
from align_jax.data.dataset import Data
from align_jax.errors import RunError
from align_jax.generation import generate
from align_jax.losses.log_probs import token_log_probs
from align_jax.models.frozen import partition
from align_jax.models.interchange import load_model
from align_jax.models.lora import add_adapters, merge_adapters, without_adapters
from align_jax.training import pretrained
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import read_metrics
from align_jax.training.offline import train_offline
from align_jax.training.optimizer import Optimizer, make_optimizer
from align_jax.training.state import init_state
from align_jax.training.step import make_train_step, place_batch
from align_jax.training.workdir import Workdir
from align_jax.trees import fingerprint, flatten
from tests.devices import run_on_devices

HERE = pathlib.Path(__file__).parent
RANK = 3


def adapted(base, mesh=None, **arguments):
    arguments = {"rank": RANK, "alpha": 6.0, "key": jax.random.key(0)} | arguments
    return add_adapters(base, mesh=mesh, **arguments)


def moved(model, seed=1):
    """The model with adapters that are not zero."""
    rng = np.random.default_rng(seed)
    model.adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model.adapters
    )
    return model


def tiny_dpo(overrides):
    items = [f"--config.{key}={value}" for key, value in overrides.items()]
    return settings_of(
        load_config(f"{HERE.parents[1] / 'experiments' / 'dpo.py'}:scale=tiny", items)
    )


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_only_the_adapters_move_and_the_base_keeps_its_very_arrays(mesh, make_examples):
    base = load_model("tiny", mesh=mesh)
    before = jax.device_get(flatten(base))
    optimizer = make_optimizer(Optimizer(learning_rate=1e-2, weight_decay=0.1), 10)
    state = init_state(adapted(base, mesh), optimizer, mesh)
    reference, starts = without_adapters(state.model), jax.device_get(flatten(state.model))
    data = Data(batch_size=4, accumulation=2)
    batch = batching.make_collate(data)(make_examples([(3, 9), (5, 4), (2, 2), (7, 5)]))
    step = make_train_step(sft.loss_sums, optimizer, lambda _: 1.0, state, mesh, accumulated=True)
    frozen = jax.tree.leaves(partition(state.model)[1])
    for _ in range(2):  # B is zero, so A does not move in the first step
        state, metrics = step(state, place_batch(batch, mesh, accumulated=True))
    assert step._cache_size() == 1 and metrics["grad_norm"] > 0
    again = jax.tree.leaves(partition(state.model)[1])
    assert all(a is b and not a.is_deleted() for a, b in zip(again, frozen, strict=True))
    for name, leaf in jax.device_get(flatten(state.model)).items():
        same = np.array_equal(leaf, starts[name])
        assert same == ("adapters" not in name), name
    # The view taken before the steps is still that of the base.
    for name, leaf in jax.device_get(flatten(reference)).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_the_optimizer_holds_two_moments_of_the_adapters_and_nothing_of_the_base(mesh):
    optimizer = make_optimizer(Optimizer(), 10)
    base = load_model("tiny", mesh=mesh)
    whole, small = (init_state(m, optimizer, mesh) for m in (base, adapted(base, mesh)))
    # Per layer 3 (D + H d) of the queries' factors and so on: D 32, H d 32, K d 16, F 64.
    numbers = 2 * RANK * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    counts = nbytes([x for n, x in flatten(small.optimizer).items() if n.endswith("count")])
    assert nbytes(small.model.adapters) == 4 * numbers
    assert nbytes(small.optimizer) == 2 * 4 * numbers + counts
    assert nbytes(whole.optimizer) == 2 * nbytes(base) + counts
    moments = [name for name, leaf in flatten(small.optimizer).items() if leaf.ndim]
    assert len(moments) == 2 * 14 and all("adapters" in name for name in moments)


def test_checkpoints_hold_the_adapters_alone_and_know_their_base(mesh, tmp_path):
    optimizer = make_optimizer(Optimizer(), 10)

    def make(base, **arguments):
        return init_state(adapted(base, mesh, **arguments), optimizer, mesh)

    state = make(load_model("tiny", mesh=mesh))
    state = state._replace(step=state.step + 4, model=moved(state.model))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, {"next_example": 8})
    checkpointer.wait()
    # By Orbax's own account: how many bytes its files take depends on the moment, too.
    saved = checkpointer._manager.item_metadata(4)["model"]
    assert set(saved.keys()) == {name for name in flatten(state.model) if "adapters" in name}
    assert sum(4 * np.prod(saved[name].shape) for name in saved) == nbytes(state.model.adapters)
    other = jax.random.key(5)
    restored, data = checkpointer.restore(make(load_model("tiny", mesh=mesh), key=other))
    alone = checkpointer.restore_model(adapted(load_model("tiny", mesh=mesh), mesh, key=other))
    assert data == {"next_example": 8} and int(restored.step) == 4
    assert fingerprint(restored.model) == fingerprint(state.model) == fingerprint(alone)

    changed = load_model("tiny", mesh=mesh)
    scale = changed.final_norm.scale
    scale.set_value(scale[...].at[3].set(np.nextafter(np.float32(1), np.float32(2))))
    with pytest.raises(RunError, match="step 4 .* other frozen parameters .* config.model"):
        checkpointer.restore(make(changed))
    with pytest.raises(RunError, match="config.model names has changed"):
        checkpointer.restore_model(adapted(changed, mesh))
    with pytest.raises(RunError, match="also has adapters.down_a"):
        checkpointer.restore_model(changed)
    with pytest.raises(RunError, match=r"adapters.down_a of shape \(2, 64, 3\).*\(2, 64, 2\)"):
        checkpointer.restore_model(adapted(load_model("tiny", mesh=mesh), mesh, rank=2))
    checkpointer.close()


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory):
    """The workdir of a DPO run with adapters on one batch again and again, and its config."""
    overrides = {"num_steps": 8, "lora.rank": 4, "data.limit": 8, "optimizer.learning_rate": 0.01}
    config = tiny_dpo(overrides)
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "dpo", config)
    preference.run(config, workdir)
    return workdir.path, config


def test_dpo_starts_at_ln_2_and_learns(dpo_run):
    rows = read_metrics(dpo_run[0])
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(rows[0]["rewards/margins"]) < 1e-5
    assert rows[-1]["loss"] < 0.6 and rows[-1]["rewards/margins"] > 0.1


def test_a_runs_model_is_its_base_with_trained_adapters_and_exports_merged(dpo_run, tmp_path):
    path, config = dpo_run
    mesh = pretrained.open_mesh(config)
    model = pretrained.restored_model(config, path, mesh)
    assert fingerprint(partition(model)[1]) == fingerprint(
        partition(pretrained.open_model(config)[0])[1]
    )
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(model.adapters))
    assert main.main(["export", f"--workdir={path}", f"--to={tmp_path / 'out'}"]) == 0
    exported, merged = load_model(tmp_path / "out"), merge_adapters(model)
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)
    # Another run that begins with this one has a base of its own: the merged model.
    config = tiny_dpo({"lora.rank": 2, "model": path})
    after, _ = pretrained.open_model(config)
    base = jax.tree.leaves(without_adapters(after))
    for a, b in zip(base, jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_continued_is_bitwise_the_run_that_was_left_alone(mesh, make_examples, tmp_path):
    examples = make_examples([(3, 5 + i) for i in range(8)])

    def train(name, num_steps):
        overrides = {"num_steps": num_steps, "data.batch_size": 4, "lora.rank": 2}
        overrides |= {"lora.targets": "query, down", "optimizer.schedule": "constant"}
        config = tiny_dpo(overrides)
        model, _ = pretrained.open_model(config)
        (tmp_path / name).mkdir(exist_ok=True)
        trained = train_offline(
            config, tmp_path / name, model, mesh, examples, sft.loss_sums, description="SFT"
        )
        return jax.device_get(flatten(trained.model))

    whole = train("whole", 5)
    train("parts", 2)
    parts = train("parts", 5)
    assert {n for n in whole if "adapters" in n} == {
        f"adapters.{name}" for name in ("query_a", "query_b", "down_a", "down_b")
    }
    for name, leaf in whole.items():
        assert leaf.tobytes() == parts[name].tobytes(), name


def test_the_samplers_log_probs_are_those_of_the_trainers_forward_pass():
    model = moved(adapted(load_model("tiny")))
    prompts = [[9, 30, 41], [12, 200, 17, 5, 60]]
    drawn = generate(model, prompts, key=jax.random.key(0), max_new_tokens=9, samples_per_prompt=2)
    rows = np.zeros((4, 14), np.int32)
    for row, tokens in enumerate(np.asarray(drawn.tokens)):
        prompt = prompts[row // 2]
        rows[row, : len(prompt) + 9] = [*prompt, *tokens]
    logits = jax.jit(lambda m, t: m.logits(m(t)))
    for policy in (model, merge_adapters(model)):
        scored = token_log_probs(logits(policy, rows)[:, :-1], rows[:, 1:])
        for row, start in enumerate((2, 2, 4, 4)):
            found = np.asarray(scored[row, start : start + 9])
            np.testing.assert_allclose(found, drawn.log_probs[row], atol=2e-5)
    base = token_log_probs(logits(without_adapters(model), rows)[:, :-1], rows[:, 1:])
    assert np.abs(base[0, 2:11] - drawn.log_probs[0]).max() > 0.05


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ("tiny", {"rank": -1}, r"config\.lora\.rank is -1; expected"),
        ("tiny", {"rank": 2, "alpha": 0.0}, r"config\.lora\.alpha is 0.0; expected"),
        ("tiny", {"rank": 2, "targets": "query, quary"}, r"config\.lora\.targets names 'quary'"),
        ("tiny", {"rank": 2, "targets": ""}, r"config\.lora\.targets names ''"),
        ("tiny:gpt2", {"rank": 2, "targets": "gate"}, r"config\.lora\.targets names 'gate'"),
    ],
)
def test_bad_values_are_refused_by_their_place_in_the_config(model, lora, message):
    with pytest.raises(RunError, match=message):
        pretrained.open_model(preference.Config(model=model, lora=pretrained.Lora(**lora)))


def test_two_devices_train_as_one_does():
    printed = run_on_devices(2, HERE / "lora_meshes.py")
    single, *others = json.loads(printed.splitlines()[-1])
    assert abs(single[0]["loss"] - np.log(2)) < 1e-6 and len(others) == 2
    for rows in others:
        for row, expected in zip(rows, single, strict=True):
            for name in ("loss", "grad_norm", "rewards/margins"):
                assert abs(row[name] - expected[name]) < 1e-5, (name, row, expected)
