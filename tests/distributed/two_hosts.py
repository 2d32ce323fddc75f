"""Two processes that are the hosts of one run, over gloo on this machine."""

import contextlib
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.devices import ROOT, environment_of


@contextlib.contextmanager
def two_hosts(
    *arguments, caches: pathlib.Path | None = None, devices: int = 2
) -> Iterator[list[subprocess.Popen]]:
    """Two processes `python *arguments` with as many devices each; killed at the end.

    With `caches` each has a cache folder of its own there, as on disks that are not shared.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = environment_of(devices)
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    hosts = []
    for host in range(2):
        own = {"JAX_PROCESS_ID": str(host)}
        if caches is not None:
            own["ALIGN_JAX_CACHE"] = str(caches / f"host_{host}")
        hosts.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=shared | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.wait()
            host.stderr.close()


def ends_of(hosts: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """Exit status and errors of each; TimeoutExpired if one has not ended in so many seconds."""
    errors = [host.communicate(timeout=timeout)[1] for host in hosts]
    return [(host.returncode, text) for host, text in zip(hosts, errors, strict=True)]
