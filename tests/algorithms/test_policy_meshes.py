"""A policy-gradient run is the same on any mesh, and on another one after it was stopped."""

import pathlib

import pytest

from tests.devices import run_on_devices

SLOW = ("ppo, adapters, shared trunk", "online dpo")


@pytest.mark.parametrize("name", ["ppo", *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)])
def test_eight_devices_sample_score_and_update_as_one_does(tmp_path, name):
    run_on_devices(8, pathlib.Path(__file__).with_name("policy_meshes.py"), tmp_path, name)
