"""A run killed with SIGKILL many times and continued is, bit for bit, the run that was left alone.

The kills hit one run one after another, so every later one meets what all the earlier ones left
behind: the first, third and so on in the middle of a save, the others at any moment of a step.
"""

import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from align_jax.models.interchange import load_model
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import read_metrics
from align_jax.trees import flatten

ROOT = pathlib.Path(__file__).parents[2]
STEPS_PER_KILL = 9
SETTINGS = {"checkpoint_every": 2, "optimizer.weight_decay": 0.1}
SETTINGS |= {"data.accumulation": 2, "data.batch_size": 4}


def start(workdir, num_steps, loss, environment):
    settings = SETTINGS | {"num_steps": num_steps, "loss": loss}
    command = [sys.executable, "-m", "align_jax", "train", f"--workdir={workdir}"]
    command += ["--config=experiments/dpo.py:scale=tiny"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=(workdir.parent / f"{workdir.name}.log").open("a"),
    )


def last_step(workdir):
    try:
        rows = read_metrics(workdir)
    except Exception:  # not there yet
        return 0
    return int(rows[-1]["step"]) if rows else 0


def log_of(workdir):
    return (workdir.parent / f"{workdir.name}.log").read_text()[-3000:]


def saving(workdir):
    return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())


def parameters(workdir, num_steps):
    checkpointer = Checkpointer(workdir / "checkpoints")
    assert checkpointer.latest_step() == num_steps
    leaves = jax.device_get(flatten(checkpointer.restore_model(load_model("tiny"))))
    checkpointer.close()
    return leaves


# BCO carries a running state from step to step.
@pytest.mark.parametrize(
    ("kills", "loss"), [(3, "dpo"), (1, "bco"), pytest.param(10, "dpo", marks=pytest.mark.slow)]
)
def test_killed_and_continued_it_ends_bitwise_the_same(tmp_path, kills, loss):
    num_steps = STEPS_PER_KILL * kills
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALIGN_JAX_CACHE": str(tmp_path / "cache")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, num_steps, loss, environment).wait(timeout=120) == 0, log_of(whole)
    times = [row["wall_time"] for row in read_metrics(whole)]
    step_seconds = (times[-1] - times[0]) / (num_steps - 1)

    half_saved = 0
    for seed in range(kills):
        moment = random.Random(seed)
        process = start(killed, num_steps, loss, environment)
        target = last_step(killed) + moment.randint(1, STEPS_PER_KILL - 4)
        while last_step(killed) < target:
            assert process.poll() is None, log_of(killed)
            time.sleep(0.002)
        if seed % 2:
            time.sleep(moment.uniform(0, 2) * step_seconds)
        else:
            while not saving(killed):
                assert process.poll() is None, log_of(killed)
        process.kill()
        assert process.wait() == -9, f"run {seed} was over before it was killed"
        assert last_step(killed) < num_steps
        half_saved += saving(killed)
    process = start(killed, num_steps, loss, environment)
    assert process.wait(timeout=120) == 0, log_of(killed)

    assert half_saved, "no kill hit a save: this test has lost its point"
    expected, found = parameters(whole, num_steps), parameters(killed, num_steps)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name
    rows = [
        [{k: v for k, v in row.items() if k != "wall_time"} for row in read_metrics(workdir)]
        for workdir in (whole, killed)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, num_steps + 1))
    assert rows[1] == rows[0]
