"""Checkpoints: bitwise, atomic, and refused by name where they do not fit."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from align_jax.errors import RunError
from align_jax.models.interchange import load_model
from align_jax.training import checkpoint
from align_jax.training.checkpoint import Checkpointer, require_space
from align_jax.training.optimizer import Optimizer, make_optimizer
from align_jax.training.state import init_state
from align_jax.trees import flatten, unflatten


def make_state(mesh, name="tiny", step=0, seed=None):
    state = init_state(load_model(name, mesh=mesh), make_optimizer(Optimizer(), 10), mesh)
    if seed is not None:
        rng = np.random.default_rng(seed)

        def random(leaf):
            # Any bits, but no NaN: they compare unequal to themselves.
            bits = rng.integers(0, 2**32, leaf.shape, np.uint32) & np.uint32(0xBFFFFFFF)
            return jax.device_put(bits.view(np.dtype(leaf.dtype)), leaf.sharding)

        state = jax.tree.map(random, state)
    return state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def save(folder, state, data):
    checkpointer = Checkpointer(folder, clean=True)
    checkpointer.save(state, data)
    checkpointer.close()


def test_names_are_the_paths_of_the_leaves_and_flatten_has_an_inverse(mesh):
    state = make_state(mesh)
    names = flatten(state)
    # An attention's parameter is itself called `value`, as is flax's own field.
    assert {"step", "model.blocks.attention.value", "model.final_norm.scale"} <= names.keys()
    assert len(names) == len(jax.tree.leaves(state))
    again = unflatten(state, dict(reversed(names.items())))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


def test_a_round_trip_is_bitwise_though_the_arrays_are_donated_at_once(mesh, folder):
    state = make_state(mesh, step=7, seed=0)
    expected = {name: np.array(leaf, copy=True) for name, leaf in flatten(state).items()}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 1, s), donate_argnums=0)
    writer = Checkpointer(folder, clean=True)
    writer.save(state, {"next_example": 56})
    overwrite(state)
    writer.wait()
    writer.close()
    reader = Checkpointer(folder)
    assert reader.latest_step() == 7
    fresh = make_state(mesh)
    restored, data = reader.restore(fresh)
    reader.close()
    assert data == {"next_example": 56}
    for name, leaf in flatten(restored).items():
        assert leaf.dtype == expected[name].dtype and leaf.sharding == flatten(fresh)[name].sharding
        assert np.asarray(leaf).tobytes() == expected[name].tobytes(), name


def test_the_model_alone_is_restored(mesh, folder):
    state = make_state(mesh, step=3, seed=1)
    save(folder, state, {})
    model = Checkpointer(folder).restore_model(load_model("tiny", mesh=mesh))
    for name, leaf in flatten(model).items():
        np.testing.assert_array_equal(leaf, flatten(state.model)[name])


def test_the_newest_two_are_kept(mesh, folder):
    state = make_state(mesh)
    for step in (1, 2, 5):
        save(folder, state._replace(step=jnp.int32(step)), {})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5"]


def test_another_shape_is_refused_by_the_parameters_name(mesh, folder):
    save(folder, make_state(mesh, step=1), {})
    model = load_model("tiny", mesh=mesh)
    model.blocks.mlp.up.set_value(jnp.zeros((2, 32, 65)))
    with pytest.raises(
        RunError,
        match=r"step 1 in .*checkpoints has blocks.mlp.up of shape \(2, 32, 64\).*\(2, 32, 65\)",
    ):
        Checkpointer(folder).restore_model(model)


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ("tiny", "tiny:gpt2", "has no blocks.attention.key_bias"),
        ("tiny:gpt2", "tiny", "also has blocks.attention.key_bias"),
    ],
)
def test_another_architecture_is_refused_by_a_parameters_name(mesh, folder, saved, wanted, message):
    save(folder, make_state(mesh, saved, step=1), {})
    checkpointer = Checkpointer(folder)
    with pytest.raises(RunError, match=message):
        checkpointer.restore(make_state(mesh, wanted))
    with pytest.raises(RunError, match=message):
        checkpointer.restore_model(load_model(wanted, mesh=mesh))


def test_what_a_killed_run_left_half_written_is_ignored_and_cleaned_by_the_next_writer(
    mesh, folder
):
    save(folder, make_state(mesh, step=4, seed=2), {"next_example": 8})
    for name in ("5.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "4", folder / name)
        (folder / name / "_CHECKPOINT_METADATA").unlink()
        shutil.rmtree(folder / name / "optimizer")
    reader = Checkpointer(folder)
    assert reader.latest_step() == 4
    assert reader.restore(make_state(mesh))[1] == {"next_example": 8}
    reader.close()
    assert len(list(folder.iterdir())) == 3  # another process may be writing them just now
    save(folder, make_state(mesh, step=5), {"next_example": 10})
    assert sorted(path.name for path in folder.iterdir()) == ["4", "5"]


def damaged(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_every_damaged_file_is_named_before_anything_is_read(mesh, folder, how, capfd):
    state = make_state(mesh, step=4, seed=3)
    save(folder, state, {"next_example": 8})
    reader = Checkpointer(folder)
    files = [path for path in (folder / "4").rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "file_sizes.json"]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        damaged(path, how)
        with pytest.raises(RunError) as caught:
            reader.restore(state)
        message = str(caught.value)
        assert f"the checkpoint of step 4 in {folder} cannot be read" in message
        assert path.name in message and "remove that directory" in message
        path.write_bytes(content)
    assert reader.restore(state)[1] == {"next_example": 8}
    reader.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["model/_METADATA", "optimizer/_METADATA", "model/manifest.ocdbt", "data/metadata"]
)
def test_damage_after_a_kill_is_said_too_though_no_sizes_were_written(mesh, folder, name):
    state = make_state(mesh, step=4)
    save(folder, state, {})
    for path in (folder / "4" / "file_sizes.json", folder / "4" / name):
        damaged(path, "cut" if path.name == "manifest.ocdbt" else "gone")
    (folder / "4" / "file_sizes.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="the checkpoint of step 4 in .* cannot be read"):
        Checkpointer(folder).restore(state)


def test_a_directory_without_checkpoints_has_no_latest_step(folder):
    folder.mkdir()
    assert Checkpointer(folder).latest_step() is None


def test_too_little_space_is_said_with_both_sizes(monkeypatch, tmp_path):
    state = [jax.ShapeDtypeStruct((2**28,), jnp.float32)] * 2  # 2 GiB

    def free(size):
        usage = types.SimpleNamespace(free=size)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)

    free(6 * 2**30)
    require_space(tmp_path, state)
    free(6 * 2**30 - 1)
    with pytest.raises(RunError, match=r"has 6.00 GiB free.* need 6.00 GiB.*--workdir"):
        require_space(tmp_path, state)
    # What was half written is no checkpoint, and will be removed.
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(RunError, match="need 6.00 GiB"):
        require_space(tmp_path, state)


@pytest.mark.parametrize(("saved", "gibibytes"), [((4,), 4), ((2, 4), 2)])
def test_a_run_that_goes_on_has_some_of_three_checkpoints_on_the_disk(
    monkeypatch, tmp_path, saved, gibibytes
):
    state = [jax.ShapeDtypeStruct((2**28,), jnp.float32)] * 2  # 2 GiB
    for step in saved:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    usage = types.SimpleNamespace(free=gibibytes * 2**30)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    require_space(tmp_path, state)
    usage.free -= 1
    with pytest.raises(RunError, match=f"need {gibibytes}.00 GiB"):
        require_space(tmp_path, state)


# --- other numbers, and the checkpoint before


def change_one_number(folder, item):
    """Writes a checkpoint's item again with one number changed: whole files, other bytes."""
    handler = ocp.StandardCheckpointer()
    leaves = handler.restore(folder / item)
    name = [name for name in sorted(leaves) if leaves[name].dtype == jnp.float32][-1]
    leaves[name] = leaves[name].at[(0,) * leaves[name].ndim].set(1e28)
    shutil.rmtree(folder / item)
    handler.save(folder / item, leaves)
    handler.close()
    (folder / "file_sizes.json").unlink()


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_files_that_are_whole_but_hold_another_number_are_refused(mesh, folder, item):
    state = make_state(mesh, step=4, seed=5)
    save(folder, state, {})
    change_one_number(folder / "4", item)
    with pytest.raises(RunError, match=f"the numbers in {item} are not those that were saved"):
        Checkpointer(folder).restore(state)


def test_where_the_newest_is_damaged_the_one_before_is_used_and_the_run_comes_by_again(
    mesh, folder, capsys
):
    states = {step: make_state(mesh, step=step, seed=step) for step in (2, 4)}
    for step, state in states.items():
        save(folder, state, {"next_example": step})
    change_one_number(folder / "4", "model")
    reader = Checkpointer(folder)
    reader.restore_model(load_model("tiny", mesh=mesh))
    assert reader.latest_step() == 2
    reader.close()
    assert (folder / "4").exists()  # who only reads removes nothing
    assert f"warning: the checkpoint of step 4 in {folder} cannot be read" in (
        capsys.readouterr().err
    )

    writer = Checkpointer(folder, clean=True)
    restored, data = writer.restore(make_state(mesh))
    assert "The checkpoint before it is used." in capsys.readouterr().err
    assert int(restored.step) == writer.latest_step() == 2 and data == {"next_example": 2}
    for name, leaf in flatten(restored.model).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(states[2].model)[name]).tobytes()
    writer.save(states[4], {"next_example": 4})
    writer.close()
    assert capsys.readouterr().err == ""
    assert Checkpointer(folder).restore(make_state(mesh))[1] == {"next_example": 4}


def test_where_both_are_damaged_the_newest_is_named(mesh, folder):
    for step in (2, 4):
        save(folder, make_state(mesh, step=step), {})
        change_one_number(folder / str(step), "model")
    with pytest.raises(RunError, match="the checkpoint of step 4 in .* cannot be read"):
        Checkpointer(folder).restore(make_state(mesh))


def test_another_model_is_refused_though_there_is_a_checkpoint_before(mesh, folder):
    save(folder, make_state(mesh, step=1), {})
    save(folder, make_state(mesh, "tiny:gpt2", step=2), {})
    with pytest.raises(RunError, match="step 2 .* belongs to another model"):
        Checkpointer(folder).restore(make_state(mesh))
