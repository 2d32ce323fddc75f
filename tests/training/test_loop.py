"""The offline loop: what is not finite stops it, signals stop it cleanly, shapes compile once."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import sft
from align_jax.data.loader import Loader
from align_jax.errors import RunError
from align_jax.models.interchange import load_model
from align_jax.training import offline, signals
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import MetricWriter, read_metrics
from align_jax.training.offline import fit_offline, train_offline
from align_jax.training.signals import Interrupted
from align_jax.training.state import TrainState
from align_jax.training.step import LossSums
from align_jax.trees import flatten

ROOT = pathlib.Path(__file__).parents[2]


def saved_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


# --- what is not finite


@pytest.fixture
def config(tiny_config):
    return tiny_config("sft", {"num_steps": 8, "data.batch_size": 4, "checkpoint_every": 1})


def poison(model, batch):
    """SFT's loss, and infinite on a batch with a poisoned example."""
    sums = sft.loss_sums(model, batch)
    poisoned = (batch["poison"] > 0).any()
    return LossSums(sums.loss + jnp.where(poisoned, jnp.inf, 0.0), sums.weight, sums.metrics)


def test_an_exploding_loss_stops_with_its_step_and_examples_and_is_not_saved(
    config, mesh, tmp_path, make_examples
):
    examples = make_examples([(4, 3)] * 16)

    def attach(example):
        return {"poison": np.array([example.id == 5], np.float32)}

    loader = Loader(examples, batch_size=4, seed=config.seed, collate=list)
    batches = [loader.batch_at(4 * step)[1] for step in range(4)]
    bad = next(step for step, ids in enumerate(batches, 1) if 5 in ids)
    assert bad > 1, "the test wants a step before the bad one"
    model = load_model("tiny", mesh=mesh)
    with pytest.raises(RunError) as caught:
        train_offline(
            config, tmp_path, model, mesh, examples, poison, attach=attach, description="SFT"
        )
    message = str(caught.value)
    assert f"loss not finite at step {bad} (loss inf" in message
    assert f"on the batch of examples {batches[bad - 1]}." in message
    assert "Look at these examples." in message
    assert "lower config.optimizer.learning_rate" in message
    assert saved_steps(tmp_path) == [bad - 1]
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, bad))


def test_parameters_that_are_nan_stop_the_first_step_and_nothing_is_saved(
    config, mesh, tmp_path, make_examples
):
    model = load_model("tiny", mesh=mesh)
    scale = np.array(model.final_norm.scale[...])
    scale[0] = np.nan
    model.final_norm.scale.set_value(jnp.asarray(scale))
    with pytest.raises(RunError, match=r"loss and grad_norm not finite at step 1 \(loss nan"):
        train_offline(
            config,
            tmp_path,
            model,
            mesh,
            make_examples([(4, 3)] * 8),
            sft.loss_sums,
            description="SFT",
        )
    assert saved_steps(tmp_path) == []
    assert read_metrics(tmp_path) == []


# --- signals


def run_fit(tmp_path, mesh, train_step, *, num_steps=6, checkpoint_every=100):
    examples = [types.SimpleNamespace(id=index) for index in range(4)]
    loader = Loader(
        examples, batch_size=2, seed=0, collate=lambda chosen: {"x": np.zeros((2, 1), np.float32)}
    )
    start = (jnp.int32(0), {"w": jnp.zeros(3)}, {"mu": jnp.zeros(3)})
    state = TrainState(*jax.device_put(start, jax.NamedSharding(mesh, jax.P())))
    checkpointer = Checkpointer(tmp_path / "checkpoints", clean=True)
    try:
        with MetricWriter(tmp_path) as writer:
            return fit_offline(
                state,
                train_step,
                loader,
                mesh=mesh,
                num_steps=num_steps,
                checkpointer=checkpointer,
                writer=writer,
                checkpoint_every=checkpoint_every,
                log_every=2,
                accumulated=False,
                description="test",
            )
    finally:
        checkpointer.close()


def counting_step(state, batch):
    metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    return state._replace(step=state.step + 1, model={"w": state.model["w"] + 1}), metrics


def test_a_run_logs_every_so_many_steps_and_the_last_and_saves_the_last(tmp_path, mesh):
    state = run_fit(tmp_path, mesh, counting_step, num_steps=5)
    assert int(state.step) == 5 and saved_steps(tmp_path) == [5]
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 5]


def test_every_so_many_steps_and_the_last_are_saved(tmp_path, mesh, monkeypatch):
    saved, save = [], Checkpointer.save

    def recording(self, state, data):
        saved.append((int(state.step), data["next_example"]))
        save(self, state, data)

    monkeypatch.setattr(Checkpointer, "save", recording)
    run_fit(tmp_path, mesh, counting_step, num_steps=7, checkpoint_every=3)
    assert saved == [(3, 6), (6, 12), (7, 14)]  # the batches have two examples


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [3, 6])
def test_a_signal_ends_the_step_it_came_in_and_saves_it_the_last_step_too(
    tmp_path, mesh, number, at
):
    before = signal.getsignal(number)

    def step(state, batch):
        if int(state.step) + 1 == at:
            os.kill(os.getpid(), number)
        return counting_step(state, batch)

    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step {at}") as caught:
        run_fit(tmp_path, mesh, step)
    assert "The same command continues" in str(caught.value)
    assert caught.value.signum == number
    assert saved_steps(tmp_path) == [at]
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    restored = checkpointer.restore_model({"w": jax.device_put(jnp.zeros(3), jax.devices()[0])})
    checkpointer.close()
    np.testing.assert_array_equal(restored["w"], np.full(3, at, np.float32))
    assert signal.getsignal(number) == before


def test_a_second_signal_acts_as_usual(tmp_path, mesh):
    def step(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return counting_step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path, mesh, step)


def test_handlers_are_installed_in_the_main_thread_only(monkeypatch):
    other = object()
    monkeypatch.setattr(signals.threading, "current_thread", lambda: other)
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) == before
    assert stop.received is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signalled_process_saves_and_says_how_to_continue(tmp_path, number):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "align_jax", "train", f"--workdir={workdir}"]
    command += ["--config=experiments/dpo.py:scale=tiny", "--config.num_steps=1000000"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALIGN_JAX_CACHE": str(tmp_path / "cache"),
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    found = re.search(
        rf"align-jax: stopped by {number.name} after step (\d+), which is saved.", stderr
    )
    assert found and "The same command continues from there." in stderr, stderr
    assert "Traceback" not in stderr
    step = int(found[1])
    assert saved_steps(workdir) == [step]
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, step + 1))
    assert not (workdir / "finished.json").exists()


# --- compilation


def test_the_step_is_compiled_once_for_each_shape_of_batch(
    tiny_config, mesh, tmp_path, make_examples, monkeypatch
):
    overrides = {"data.length_buckets": (16, 32, 64), "data.target_buckets": (64,)}
    config = tiny_config("sft", overrides | {"num_steps": 6, "data.batch_size": 2})
    examples = make_examples([(3, 2 + 5 * i) for i in range(6)])
    steps, shapes = [], []

    def spy(state, train_step, loader, **keywords):
        def step(state, batch):
            shapes.append(batch["tokens"].shape)
            return train_step(state, batch)

        steps.append(train_step)
        return fit_offline(state, step, loader, **keywords)

    monkeypatch.setattr(offline, "fit_offline", spy)

    def train():
        model = load_model("tiny", mesh=mesh)
        return train_offline(
            config, tmp_path, model, mesh, examples, sft.loss_sums, description="SFT"
        ).model

    model = train()
    assert len(shapes) == 6 and len(set(shapes)) > 1
    assert steps[0]._cache_size() == len(set(shapes))
    # Restored from a checkpoint the state still has the one layout that was compiled for.
    shapes.clear()
    config = dataclasses.replace(config, num_steps=12)
    train()
    assert len(shapes) == 6 and steps[1]._cache_size() == len(set(shapes))
    # A finished run takes no further step.
    shapes.clear()
    again = train()
    assert shapes == []
    assert flatten(again).keys() == flatten(model).keys()
