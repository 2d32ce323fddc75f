"""Two hosts do what one does: each runs the same program and sees the whole result."""

import json
import pathlib

import pytest

from align_jax.training.metrics import read_metrics
from tests.devices import run_on_devices
from tests.distributed.two_hosts import ends_of, two_hosts

SCRIPT = pathlib.Path(__file__).with_name("hosts.py")


def run_on_two_hosts(workdir):
    with two_hosts(SCRIPT, workdir) as hosts:
        for status, errors in ends_of(hosts, timeout=600):
            assert status == 0, errors[-3000:]


def test_two_hosts_train_a_reward_model_and_a_policy_against_it_as_one_does(tmp_path):
    workdirs = tmp_path / "one", tmp_path / "two"
    for workdir in workdirs:
        workdir.mkdir()
    run_on_devices(4, SCRIPT, workdirs[0])
    run_on_two_hosts(workdirs[1])
    for name, keys in (
        ("reward_model", ("loss", "grad_norm", "rewards/margins")),
        ("rloo", ("loss", "grad_norm", "objective/scores", "objective/entropy", "val/ratio")),
    ):
        rows = [read_metrics(workdir / name) for workdir in workdirs]
        assert len(rows[0]) == len(rows[1]) > 0
        for one, two in zip(*rows, strict=True):
            assert [two[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-4)
    report = "reward_model/report/summary.json"
    one, two = (json.loads((workdir / report).read_text())["nll"] for workdir in workdirs)
    assert two == pytest.approx(one, rel=1e-5)
