"""Whose a directory is, and files that are whole or not there."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from align_jax.errors import RunError
from align_jax.files import write_file, write_json
from align_jax.training import workdir as module
from align_jax.training.workdir import Workdir, only_run_in, read_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config():
    return ConfigDict({"algorithm": "sft", "data": {"sizes": (1, 2), "rate": 0.1}, "seed": 0})


def test_a_new_directory_is_made_and_claimed_and_the_same_config_continues_it(tmp_path, config):
    path = tmp_path / "a" / "b"
    first = Workdir(path, config)
    assert json.loads((path / "config.json").read_text())["data"] == {"sizes": [1, 2], "rate": 0.1}
    (path / "metrics.jsonl").write_text("")
    assert Workdir(str(path), config).path == first.path == path
    assert Workdir(path, ConfigDict(read_config(path))).path == path


def test_another_experiment_is_refused_with_what_differs(tmp_path, config):
    Workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    before = (tmp_path / "config.json").read_bytes()
    other = ConfigDict(config.to_dict() | {"seed": 1, "beta": 0.1})
    other.data.rate = 0.2
    with pytest.raises(RunError) as caught:
        Workdir(tmp_path, other)
    message = str(caught.value)
    assert f"--workdir={tmp_path} belongs to another experiment" in message
    assert "config.seed is 0 there and 1 here" in message
    assert "config.data.rate is 0.1 there and 0.2 here" in message
    assert "config.beta is '(absent)' there and 0.1 here" in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_that_was_stopped_before_it_began_can_be_given_another_config(tmp_path, config):
    Workdir(tmp_path, config)
    config.data.rate = 0.2
    Workdir(tmp_path, config)
    assert read_config(tmp_path)["data"]["rate"] == 0.2
    # Somebody else's config.json is not ours to replace.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="belongs to another experiment"):
        Workdir(tmp_path, config)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_long_list_of_differences_is_cut(tmp_path, config):
    Workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    other = ConfigDict({f"field_{i}": i for i in range(6)})
    with pytest.raises(RunError, match="; and 5 more"):
        Workdir(tmp_path, other)


def test_what_is_no_run_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        Workdir(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for path in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "below"):
        with pytest.raises(RunError, match=f"--workdir={path}"):
            Workdir(path, config)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_a_damaged_config_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text('{"algorithm": "sf')
    with pytest.raises(RunError, match="config.json is damaged"):
        Workdir(tmp_path, config)
    with pytest.raises(RunError, match="is not the workdir of a run"):
        read_config(tmp_path / "nowhere")


def test_a_run_killed_while_it_claimed_its_directory_can_start_again(tmp_path, config, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", killed)
        patch.setattr(module.Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            Workdir(tmp_path, config)
    assert len(list(tmp_path.iterdir())) == 1
    Workdir(tmp_path, config)
    assert read_config(tmp_path)["algorithm"] == "sft"


def test_finished_is_what_finish_wrote(tmp_path, config):
    run = Workdir(tmp_path, config)
    assert run.finished() is None
    run.finish({"eval": {"loss": np.float32(0.5), "counts": np.arange(2)}, "config": config.data})
    expected = {"eval": {"loss": 0.5, "counts": [0, 1]}, "config": {"sizes": [1, 2], "rate": 0.1}}
    assert run.finished() == Workdir(tmp_path, config).finished() == expected


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"a": 2})
    with pytest.raises(AttributeError):
        write_json(path, {"a": object()})
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_file(path, b"{}")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_files_are_as_readable_as_any(tmp_path):
    write_file(tmp_path / "x", b"1")
    (tmp_path / "y").write_bytes(b"1")
    assert os.stat(tmp_path / "x").st_mode == os.stat(tmp_path / "y").st_mode


def on_disk(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_part_names_what_lies_in_its_experiment_relative_to_itself(tmp_path, config):
    outer = Workdir(tmp_path / "a", config)
    (tmp_path / "aa").mkdir()
    paths = {
        "model": str(tmp_path / "a/sft"),
        "data": {"sources": [str(tmp_path / "a/round_0/x y.jsonl"), "builtin:tiny_sft"]},
        "outside": str(tmp_path / "aa"),
        "given": "a/sft",
    }
    wanted = ConfigDict(config.to_dict() | paths)
    part = outer.part("round_0", config).part("policy", wanted)
    assert part.path == tmp_path / "a/round_0/policy"
    stored = on_disk(part.path)
    assert stored["model"] == "workdir:../../sft"
    assert stored["data"]["sources"] == ["workdir:../x y.jsonl", "builtin:tiny_sft"]
    assert stored["outside"] == str(tmp_path / "aa") and stored["given"] == "a/sft"
    assert read_config(part.path) == json.loads(json.dumps(wanted.to_dict()))
    (part.path / "metrics.jsonl").write_text("")

    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b/round_0/policy"
    read = read_config(moved)
    assert read["model"] == str(tmp_path / "b/sft") and read["outside"] == str(tmp_path / "aa")
    # As the run goes on, and as a command that knows the part alone; neither writes it anew.
    wanted.update(model=read["model"], data=ConfigDict(read["data"]))
    Workdir(tmp_path / "b", config).part("round_0/policy", wanted)
    Workdir(moved, ConfigDict(read))
    assert on_disk(moved) == stored
    wanted.model = str(tmp_path / "a/sft")
    with pytest.raises(RunError, match=f"config.model is '{tmp_path}/b/sft' there and '{tmp_path}"):
        Workdir(tmp_path / "b", config).part("round_0/policy", wanted)


def test_a_part_may_be_a_link_to_another_disk_and_names_may_end_in_a_slash(tmp_path, config):
    outer = Workdir(tmp_path / "a", config)
    (tmp_path / "disk").mkdir()
    (tmp_path / "a/ppo").symlink_to(tmp_path / "disk")
    wanted = ConfigDict(config.to_dict() | {"model": f"{tmp_path}/a/sft/"})
    for _ in range(2):
        part = outer.part("ppo", wanted)
        (part.path / "metrics.jsonl").write_text("")
        assert read_config(part.path)["model"] == str(tmp_path / "a/sft")


def test_the_config_of_before_paths_were_relative_is_still_read(tmp_path, config):
    outer, part = Workdir(tmp_path / "a", config), tmp_path / "a/ppo"
    part.mkdir()
    wanted = ConfigDict(config.to_dict() | {"model": str(tmp_path / "a/sft")})
    (part / "config.json").write_text(json.dumps(wanted.to_dict()))
    (part / "metrics.jsonl").write_text("")
    assert outer.part("ppo", wanted).path == part


# --- one run at a time


HOLDER = """
import sys, time
from align_jax.training.workdir import only_run_in
with only_run_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def locked_by(folder, **changes):
    """The lock of this process, changed to look as if left by another."""
    with only_run_in(folder):
        content = json.loads((folder / "run.lock").read_text())
    (folder / "run.lock").write_text(json.dumps(content | changes))
    return folder / "run.lock"


def test_a_second_run_is_refused_by_host_and_process_until_the_first_is_dead(tmp_path, holder):
    with pytest.raises(RunError) as caught:
        with only_run_in(tmp_path):
            pass
    message = str(caught.value)
    assert f"another run is at work in {tmp_path}: process {holder.pid} on " in message
    assert socket.gethostname() in message and "--workdir" in message
    holder.kill()
    holder.wait()
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_holds_its_directory_several_times_over_and_its_parts_apart(tmp_path, config):
    workdir = Workdir(tmp_path, config)
    with only_run_in(tmp_path), only_run_in(workdir.part("sft", config).path):
        with only_run_in(tmp_path):
            pass
        assert (tmp_path / "run.lock").exists() and (tmp_path / "sft/run.lock").exists()
    assert [path.name for path in tmp_path.rglob("*.lock")] == []


def test_the_number_of_a_dead_process_that_another_has_now_holds_nothing(tmp_path):
    locked_by(tmp_path, process_start="1")
    with only_run_in(tmp_path):
        pass


def test_another_machines_run_is_gone_after_a_minute_without_a_heartbeat(tmp_path):
    lock = locked_by(tmp_path, host="elsewhere", pid=7)
    os.utime(lock, (0, lock.stat().st_mtime - 50))
    with pytest.raises(RunError, match="process 7 on elsewhere, last heard of 5[01] seconds ago"):
        with only_run_in(tmp_path):
            pass
    os.utime(lock, (0, lock.stat().st_mtime - 20))
    with only_run_in(tmp_path):
        pass


def test_a_lock_that_a_kill_left_empty_is_gone_after_a_minute(tmp_path):
    lock = tmp_path / "run.lock"
    lock.touch()
    with pytest.raises(RunError, match="an unknown host"):
        with only_run_in(tmp_path):
            pass
    os.utime(lock, (0, lock.stat().st_mtime - 61))
    with only_run_in(tmp_path):
        pass


def test_a_run_gives_signs_of_life_and_a_lock_is_no_beginning(tmp_path, config, monkeypatch):
    monkeypatch.setattr(module, "_BEAT", 0.02)
    Workdir(tmp_path, config)
    with only_run_in(tmp_path):
        lock = tmp_path / "run.lock"
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        config.data.rate = 0.2
        Workdir(tmp_path, config)  # nothing has begun
    assert read_config(tmp_path)["data"]["rate"] == 0.2
