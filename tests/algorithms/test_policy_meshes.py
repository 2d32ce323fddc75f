"""A policy-gradient run is the same on any mesh, and on another one after it was stopped."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_eight_devices_sample_score_and_update_as_one_does(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, HERE / "policy_meshes.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
