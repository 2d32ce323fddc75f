"""Scripts under several CPU devices: their number is fixed when jax starts, so a process each."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def environment_of(count: int) -> dict[str, str]:
    """What a process needs that is to have as many CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
        "PYTHONPATH": str(ROOT),
    }


def run_on_devices(count: int, script: pathlib.Path, *arguments: str | os.PathLike) -> str:
    """What the script printed; the end of its errors is the message if it failed."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environment_of(count),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
