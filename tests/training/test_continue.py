"""A run killed with SIGKILL ten times and continued is, bit for bit, the run that was left alone.

The kills hit one run one after another, each at a random moment some steps after those done before,
so every later one meets what all the earlier ones left behind. Every second step is saved, which
takes far longer than the step, hence many hit a save.
"""

import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np

from align_jax.models.interchange import load_model
from align_jax.training.checkpoint import Checkpointer, flatten
from align_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 10
STEPS = 90
SETTINGS = {"num_steps": STEPS, "checkpoint_every": 2, "optimizer.weight_decay": 0.1}
SETTINGS |= {"data.accumulation": 2, "data.batch_size": 4}


def start(workdir, environment):
    command = [sys.executable, "-m", "align_jax", "train", f"--workdir={workdir}"]
    command += ["--config=experiments/dpo.py:scale=tiny"]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
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


def parameters(workdir):
    checkpointer = Checkpointer(workdir / "checkpoints")
    assert checkpointer.latest_step() == STEPS
    leaves = jax.device_get(flatten(checkpointer.restore_model(load_model("tiny"))))
    checkpointer.close()
    return leaves


def test_killed_at_ten_random_moments_and_continued_it_ends_bitwise_the_same(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALIGN_JAX_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, environment).wait(timeout=120) == 0, log_of(whole)
    times = [row["wall_time"] for row in read_metrics(whole)]
    step_seconds = (times[-1] - times[0]) / (STEPS - 1)

    half_saved = 0
    for seed in range(KILLS):
        moment = random.Random(seed)
        process = start(killed, environment)
        target = last_step(killed) + moment.randint(1, STEPS // KILLS - 4)
        while last_step(killed) < target:
            assert process.poll() is None, log_of(killed)
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 2) * step_seconds)
        process.kill()
        assert process.wait() == -9, f"run {seed} was over before it was killed"
        assert last_step(killed) < STEPS
        half_saved += any("tmp" in path.name for path in (killed / "checkpoints").iterdir())
    process = start(killed, environment)
    assert process.wait(timeout=120) == 0, log_of(killed)

    assert half_saved, "no kill hit a save: this test has lost its point"
    expected, found = parameters(whole), parameters(killed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name
    rows = [
        [{k: v for k, v in row.items() if k != "wall_time"} for row in read_metrics(workdir)]
        for workdir in (whole, killed)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert rows[1] == rows[0]
