"""Building the device mesh from four sizes, on one host or many."""

import os

import jax
from jax.sharding import AxisType, Mesh

from align_jax.distributed import hosts
from align_jax.distributed.partitioning import MESH_AXES

# The compiler propagates shardings from the rules; jax.make_mesh would default to Explicit.
_AUTO = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`, `context` over all devices of all hosts.

    Args:
      data, fsdp, tensor, context: axis sizes; at most one may be -1, which takes what the others
        leave.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    devices = jax.device_count()
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for size in sizes.values():
        fixed *= 1 if size == -1 else size
    if len(free) > 1:
        raise ValueError(f"mesh: only one axis may be -1, got {' and '.join(free)}.")
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif free or fixed != devices:
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh({asked}) does not fit {devices} device(s): the sizes must multiply to "
            f"{devices}; set config.mesh.* accordingly (-1 on one axis takes the rest)."
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=_AUTO)


def single_device_mesh(device: jax.Device) -> Mesh:
    """A mesh of one device, for a model that was put there without a mesh."""
    return jax.make_mesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=_AUTO, devices=[device])


def initialize_distributed() -> None:
    """Joins the other hosts of a multi-host run; does nothing on a single host.

    Slurm, Open MPI and Cloud TPU pods are recognised by JAX itself; elsewhere the three usual
    variables (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) say where the
    others are. From then on a host that is missing or fails ends the others, see `hosts.watch`.
    """
    environment = os.environ
    tpu_hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    given = {}
    if "JAX_COORDINATOR_ADDRESS" in environment:
        given = {
            "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
            "num_processes": int(environment["JAX_NUM_PROCESSES"]),
            "process_id": int(environment["JAX_PROCESS_ID"]),
        }
    elif (
        int(environment.get("SLURM_NTASKS", "1")) <= 1
        and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) <= 1
        and len(tpu_hosts) <= 1
    ):
        return
    # It would take SIGTERM from `training.signals`, without a step that all hosts stop after.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**given)
    hosts.watch()
