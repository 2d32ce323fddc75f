"""The running state of a loss: updated once a step, saved, restored, and constant in evaluation."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from align_jax.algorithms import preference
from align_jax.data.batching import make_collate
from align_jax.data.dataset import examples_of
from align_jax.losses.preference import LOSSES
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training import pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.offline import train_offline
from align_jax.training.optimizer import Optimizer, make_optimizer
from align_jax.training.reference import compute_log_probs
from align_jax.training.state import init_state
from align_jax.training.step import make_train_step, place_batch
from align_jax.training.workdir import Workdir
from align_jax.trees import flatten

BETA, STEPS = 0.3, 3


def labels(count=24):
    return [
        {"prompt": f"{n}:", "completion": " up" * (1 + n % 3), "label": n % 3 == 0}
        for n in range(count)
    ]


def examples_for(name):
    records = labels() if LOSSES[name].labelled else "builtin:tiny_preferences"
    kind = "labelled" if LOSSES[name].labelled else "preference"
    config = preference.Config(loss=name, beta=BETA)
    return examples_of(records, load_tokenizer("tiny"), config.data, kind=kind)[:24], config


def plain_delta(name, model, batches, references):
    """The threshold after each step: a mean over every response that came before, one by one."""
    seen, deltas = [], []
    for step, examples in enumerate(batches):
        log_probs = compute_log_probs(
            model[step], pretrained.mesh_of(model[step]), examples, preference.Config().data
        )
        for example, own in zip(examples, log_probs):
            for reward in BETA * (own - references[example.id]):
                seen.append((bool(example.extras.get("label", True)), float(reward)))
        means = [
            np.mean([reward for label, reward in seen if label == one])
            for one in {label for label, _ in seen}
        ]
        deltas.append(np.mean(means))
    return deltas


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_a_threshold_is_a_mean_over_whole_batches(mesh, name, accumulation):
    examples, config = examples_for(name)
    start = load_model("tiny", mesh=mesh)
    reference = compute_log_probs(start, mesh, examples, config.data)
    loss, optimizer = LOSSES[name], make_optimizer(Optimizer(learning_rate=3e-3), STEPS)
    state = init_state(load_model("tiny", mesh=mesh), optimizer, mesh, loss.running.start())
    step = make_train_step(
        preference.preference_loss(loss, beta=BETA),
        optimizer,
        lambda _: 3e-3,
        state,
        mesh,
        accumulated=accumulation > 1,
        update_running=loss.running.update,
    )
    data = dataclasses.replace(config.data, batch_size=8, accumulation=accumulation)
    collate = make_collate(data, preference.attach_reference(examples, reference))
    models, used, found = [], [], []
    batches = [examples[8 * i :][:8] for i in range(STEPS)]
    for batch in batches:
        models.append(jax.tree.map(lambda x: x.copy(), state.model))
        with jax.set_mesh(mesh):
            placed = place_batch(collate(batch), mesh, accumulated=accumulation > 1)
            state, metrics = step(state, placed)
        used.append(float(metrics["delta"]))
        found.append(float(state.running["delta"]))
    expected = plain_delta(name, models, batches, dict(enumerate(reference)))
    assert abs(expected[-1]) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # The step itself, all micro-batches included, takes the state from before.
    np.testing.assert_allclose(used, [0.0, *found[:-1]], rtol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_a_run_continued_is_bitwise_the_run_that_was_left_alone(mesh, tmp_path, tiny_config, name):
    examples, _ = examples_for(name)
    reference = np.full((len(examples), len(examples[0].responses)), -40.0, np.float32)

    def train(directory, num_steps):
        overrides = {"num_steps": num_steps, "data.batch_size": 4, "data.accumulation": 2}
        config = tiny_config("dpo", overrides | {"loss": name, "optimizer.schedule": "constant"})
        directory.mkdir(exist_ok=True)
        return train_offline(
            config,
            directory,
            load_model("tiny", mesh=mesh),
            mesh,
            examples,
            preference.preference_loss(LOSSES[name], beta=BETA),
            attach=preference.attach_reference(examples, reference),
            running=LOSSES[name].running,
            description=name,
        )

    whole = train(tmp_path / "whole", 5)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 5)
    assert whole.running.keys() == LOSSES[name].running.initial.keys()
    assert abs(float(whole.running["delta"])) > 1e-3
    for a, b in ((whole.running, parts.running), (flatten(whole.model), flatten(parts.model))):
        for key, value in jax.device_get(a).items():
            assert value.tobytes() == np.asarray(b[key]).tobytes(), key
    drop = {"wall_time"}
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(tmp_path / one)]
        for one in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5]
    # A finished run takes no step, and has the state it ended with.
    again = train(tmp_path / "parts", 5)
    assert again.running["delta"].tobytes() == whole.running["delta"].tobytes()


@pytest.mark.parametrize("name", ["dpo", "bco"])
def test_only_a_loss_with_a_running_state_saves_one(tiny_config, tmp_path, name):
    config = tiny_config("dpo", {"num_steps": 1, "data.limit": 8, "loss": name})
    preference.run(config, Workdir(tmp_path, config))
    [saved] = [file for file in (tmp_path / "checkpoints").iterdir() if file.name.isdigit()]
    items = {file.name for file in saved.iterdir() if file.is_dir()}
    assert items == {"model", "optimizer", "data", *({"running"} if name == "bco" else ())}


@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_a_run_learns_and_evaluates_with_the_threshold_it_ended_with(tiny_config, tmp_path, name):
    overrides = {"loss": name, "num_steps": 12, "optimizer.learning_rate": 3e-3}
    if name == "bco":
        records = [{"prompt": f"{n}:", "chosen": " up", "rejected": " down"} for n in range(40)]
    else:
        records = [
            {"prompt": f"{n}:", "completion": " up" if n % 2 else " down", "label": n % 2 == 1}
            for n in range(40)
        ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides |= {"data.source": str(file), "data.eval_source": str(file)}
    config = tiny_config("dpo", overrides)
    workdir = Workdir(tmp_path / "run", config)
    summary = preference.run(config, workdir)["eval"]
    rows = read_metrics(workdir.path)
    # Policy and reference are the same, and the threshold is 0.
    responses = 2 if name == "bco" else 1
    assert rows[0]["loss"] == pytest.approx(responses * np.log(2), abs=1e-5)
    assert rows[0]["delta"] == 0 and summary["loss"] < 0.9 * rows[0]["loss"]
    start = LOSSES[name].running.start()
    running = pretrained.restored_running(start, workdir.path, pretrained.open_mesh(config))
    assert summary["delta"] == pytest.approx(float(running["delta"]), rel=1e-5)
    assert summary["delta"] != pytest.approx(rows[-1]["delta"], rel=1e-3)
    for _ in range(2):
        again = preference.evaluate(config, workdir)["eval"]
        assert again == pytest.approx(summary, rel=1e-4)
