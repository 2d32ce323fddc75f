"""Hosts that differ agree, a signal at one stops all, and nobody waits for a host that is gone."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from align_jax.distributed import hosts as module
from align_jax.training.metrics import read_metrics
from tests.devices import ROOT, environment_of
from tests.distributed.two_hosts import ends_of, two_hosts

AGREEMENT = pathlib.Path(__file__).with_name("agreement.py")
STEPS = 200

FAILING = """
import sys, time
from align_jax.distributed import hosts, mesh
from align_jax.errors import RunError
mesh.initialize_distributed()
with hosts.telling_failures(except_for=ZeroDivisionError):
    if hosts.first() == (sys.argv[1] == "0"):
        raise RunError("config.data.source: no such file")
    time.sleep(300)
"""


def test_one_process_agrees_with_itself():
    assert not module.several() and module.first()
    assert module.broadcast_json((1,)) == (1,) and module.on_first_host(lambda: 2) == 2
    assert module.any_host(True) and not module.any_host(False)
    module.barrier("nobody else")


def test_two_hosts_agree_on_what_they_know_find_and_meet(tmp_path):
    with two_hosts(AGREEMENT, tmp_path, caches=tmp_path) as hosts:
        for status, errors in ends_of(hosts, timeout=120):
            assert status == 0, errors[-3000:]


def train(workdir):
    command = ["-m", "align_jax", "train", f"--workdir={workdir}"]
    command += ["--config=experiments/sft.py:scale=tiny", f"--config.num_steps={STEPS}"]
    return [*command, "--config.checkpoint_every=50"]


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 120
    file = workdir / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= step):
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended and ended[0].communicate()[1]
        time.sleep(0.02)


def signal_second(hosts):
    hosts[1].send_signal(signal.SIGTERM)


def signal_both(hosts):
    hosts[0].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    hosts[1].send_signal(signal.SIGTERM)
    hosts[1].send_signal(signal.SIGTERM)


def stopped_after(workdir, stop, folder):
    """The step after which two hosts of a run stopped for signals, saved and said so."""
    with two_hosts(*train(workdir), caches=folder) as hosts:
        wait_for_step(workdir, 3, hosts)
        stop(hosts)
        ends = ends_of(hosts, timeout=60)
    steps = [row["step"] for row in read_metrics(workdir)]
    assert 3 <= steps[-1] < STEPS and steps == list(range(1, steps[-1] + 1))
    for status, errors in ends:
        assert status == 128 + signal.SIGTERM, errors[-3000:]
        assert f"stopped by SIGTERM after step {steps[-1]}, which is saved." in errors
        assert errors.count("align-jax:") == 1
    assert str(steps[-1]) in [path.name for path in (workdir / "checkpoints").iterdir()]
    assert not (workdir / "run.lock").exists()


def test_a_signal_at_one_host_stops_both_after_one_step(tmp_path):
    stopped_after(tmp_path / "run", signal_second, tmp_path)


def test_signals_at_both_hosts_stop_them_and_one_process_goes_on(tmp_path):
    workdir = tmp_path / "run"
    stopped_after(workdir, signal_both, tmp_path)
    done = subprocess.run(
        [sys.executable, *train(workdir)],
        cwd=ROOT,
        env=environment_of(1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


def test_a_signal_in_start_up_at_one_host_stops_both(tmp_path):
    workdir = tmp_path / "run"
    with two_hosts(*train(workdir), caches=tmp_path) as hosts:
        deadline = time.monotonic() + 60
        while not (workdir / "config.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        signal_second(hosts)
        for status, errors in ends_of(hosts, timeout=60):
            assert status == 128 + signal.SIGTERM, errors[-3000:]
    assert len(read_metrics(workdir)) < STEPS


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_host_that_was_killed_is_named_by_the_other_which_ends(tmp_path, killed):
    workdir = tmp_path / "run"
    with two_hosts(*train(workdir), caches=tmp_path) as hosts:
        wait_for_step(workdir, 3, hosts)
        hosts[killed].kill()
        begin = time.monotonic()
        other = hosts[1 - killed]
        _, errors = other.communicate(timeout=60)
        assert time.monotonic() - begin < 60
    assert other.returncode == 1, errors[-3000:]
    assert (
        errors.rstrip().split("\n")[-1].startswith(f"align-jax: error: host {killed} of 2 ")
        and "is missing" in errors
    )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_alone_ends_the_other_with_its_message(failing):
    with two_hosts("-c", FAILING, "0" if failing == 0 else "1") as hosts:
        ends = ends_of(hosts, timeout=60)
    assert ends[failing][0] == 2
    status, errors = ends[1 - failing]
    assert status == 1, errors[-3000:]
    assert f"host {failing} of 2 ({os.uname().nodename}) has failed" in errors
    assert "config.data.source: no such file" in errors
