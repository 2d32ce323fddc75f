"""Partition rules, meshes, and models loaded straight onto a mesh of eight forced CPU devices."""

import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from align_jax.distributed.mesh import make_mesh
from align_jax.distributed.partitioning import MESH_AXES, RULES, partition_spec
from align_jax.models.dimensions import PARAMETER_DIMENSIONS, parameter_dimensions
from align_jax.models.interchange import load_model
from tests.devices import run_on_devices

HERE = pathlib.Path(__file__).parent


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_rules_name_mesh_axes_and_cover_all_parameters():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)
    named = {name for dimensions in PARAMETER_DIMENSIONS.values() for name in dimensions}
    assert named <= RULES.keys()


@pytest.mark.parametrize("name", ["tiny", "tiny:gpt2"])
def test_every_parameter_has_as_many_names_as_dimensions(name):
    model = load_model(name)
    named = parameter_dimensions(model)
    names = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
    assert named.blocks.attention.value.get_value() == ("layers", "embed", "kv_heads", "head_dim")
    for leaf, dimensions in zip(jax.tree.leaves(model), names, strict=True):
        assert leaf.ndim == len(dimensions)


def test_partition_spec_follows_the_rules():
    sizes = mesh(data=2, fsdp=4, tensor=2)
    spec = partition_spec(("embed", "heads", "head_dim"), (64, 8, 16), sizes)
    assert spec == PartitionSpec(("fsdp",), ("tensor",), None)
    assert partition_spec(("batch", "sequence"), (16, 7), sizes) == PartitionSpec(
        ("data", "fsdp"), None
    )


def test_a_dimension_that_does_not_divide_stays_whole():
    sizes = mesh(fsdp=4, tensor=2)
    spec = partition_spec(("embed", "kv_heads", "head_dim"), (64, 3, 16), sizes)
    assert spec == PartitionSpec(("fsdp",), None, None)
    assert partition_spec(("embed",), (66,), sizes) == PartitionSpec(None)
    assert partition_spec(("embed", "mlp"), (64, 8), mesh()) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="do not fit an array of shape"):
        partition_spec(("embed",), (4, 4), sizes)


def test_meshes_that_do_not_fit_are_refused():
    devices = jax.device_count()
    assert make_mesh().size == devices
    with pytest.raises(ValueError, match=f"does not fit {devices} device"):
        make_mesh(fsdp=devices + 1)
    with pytest.raises(ValueError, match=f"does not fit {devices} device"):
        make_mesh(tensor=2 * devices)
    with pytest.raises(ValueError, match="only one axis may be -1, got data and fsdp"):
        make_mesh(data=-1)


def test_models_load_onto_a_mesh_and_compute_the_same(tmp_path):
    run_on_devices(8, HERE / "sharded_load.py", HERE.parent / "goldens", tmp_path)
