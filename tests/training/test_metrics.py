import io
import json
import math
import os
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.errors import RunError
from align_jax.progress import progress
from align_jax.training import metrics
from align_jax.training.metrics import MetricWriter, read_metrics


def run(workdir, steps, resume_step=None):
    with MetricWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 8})


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir)]


def test_rows_hold_step_time_and_floats(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": jnp.float32(0.5), "logps/chosen": np.float64(-2), "n": 7})
    (row,) = read_metrics(tmp_path)
    assert abs(row.pop("wall_time") - os.stat(tmp_path / "metrics.jsonl").st_mtime) < 5
    assert row == {"step": 3, "loss": 0.5, "logps/chosen": -2.0, "n": 7.0}
    assert isinstance(row["step"], int) and isinstance(row["n"], float)


def test_not_a_number_is_valid_json_and_comes_back(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]
    writer.close()
    writer.close()


def test_a_continued_run_ends_with_the_steps_of_an_uninterrupted_one(tmp_path):
    run(tmp_path, range(0, 7))
    run(tmp_path, range(5, 9), resume_step=4)
    assert steps(tmp_path) == list(range(9))


def test_a_run_that_starts_over_drops_the_rows_of_the_one_before(tmp_path):
    run(tmp_path, range(0, 7))
    run(tmp_path, range(0, 2))
    assert steps(tmp_path) == [0, 1]


def test_rows_that_share_a_step_are_all_kept(tmp_path):
    run(tmp_path, [1, 2, 2, 3])
    run(tmp_path, [3, 3], resume_step=2)
    assert steps(tmp_path) == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    run(tmp_path, range(0, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = sum(line.endswith("}") for line in path.read_text().split("\n"))
    assert whole == (4 if cut == 1 else 3)
    assert steps(tmp_path) == list(range(whole))
    run(tmp_path, range(3, 6), resume_step=2)
    assert steps(tmp_path) == list(range(6))


def test_a_damaged_line_is_named_and_nothing_is_touched(tmp_path):
    run(tmp_path, range(0, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = '{"step": \n'
    path.write_text("".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is no row"):
        MetricWriter(tmp_path, resume_step=3)
    assert path.read_text() == "".join(lines)


def test_no_metrics_is_said_with_the_path(tmp_path):
    with pytest.raises(RunError, match="is not the workdir of a run"):
        read_metrics(tmp_path)


def test_reserved_names_are_refused_before_anything_is_written(tmp_path):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="may not be called 'step'"):
            writer.write(1, {"step": 2.0})
    assert read_metrics(tmp_path) == []


def test_a_failing_rewrite_keeps_the_rows(tmp_path, monkeypatch):
    run(tmp_path, range(0, 4))

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        MetricWriter(tmp_path, resume_step=1)
    monkeypatch.undo()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.hosts, "first", lambda: False)
    run(tmp_path / "w", range(3))
    assert not (tmp_path / "w").exists()


def tensorboard_events(workdir):
    """(step, [(tag, value)], is a session start) of each event, files in order.

    A record is its length (8 bytes), a checksum (4), the event and a checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            values = [(value.tag, value.simple_value) for value in event.summary.value]
            events.append((event.step, values, event.session_log.status == 1))
    return events


def test_tensorboard_gets_every_value_and_is_told_what_was_dropped(tmp_path):
    run(tmp_path, range(0, 4))
    run(tmp_path, range(2, 4), resume_step=1)
    events = tensorboard_events(tmp_path)
    values = [(step, tag, value) for step, pairs, _ in events for tag, value in pairs]
    assert values == [(step, "loss", step / 8) for step in (0, 1, 2, 3, 2, 3)]
    assert [step for step, _, start in events if start] == [0, 2]


def test_wandb_gets_the_values_under_one_id_when_asked(tmp_path, monkeypatch):
    calls = []
    started = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    ids = []

    def init(*, project, dir, id, resume):
        assert (project, dir, resume) == ("mine", str(tmp_path), "allow")
        ids.append(id)
        return started

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 1):
        with MetricWriter(tmp_path, resume_step=resume_step, wandb_project="mine") as writer:
            writer.write(2, {"loss": 0.5})
    assert calls == [(2, {"loss": 0.5}), "end"] * 2
    assert len(set(ids)) == 1 and ids[0]


def test_missing_wandb_is_said_with_its_command_and_harms_nothing(tmp_path, monkeypatch):
    run(tmp_path, range(3))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match="pip install wandb"):
        MetricWriter(tmp_path, wandb_project="mine")
    assert steps(tmp_path) == [0, 1, 2]


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    script = textwrap.dedent("""
        import itertools, sys
        from align_jax.training.metrics import MetricWriter
        writer = MetricWriter(sys.argv[1])
        for step in itertools.count():
            writer.write(step, {"loss": float(step)})
            if step == 20:
                print("ready", flush=True)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    run(tmp_path, range(18, 25), resume_step=17)
    assert steps(tmp_path) == list(range(25))


def log_of(monkeypatch, seconds_each, count):
    """What progress() writes to a log while `count` items take `seconds_each` on a made clock."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress(total=count, description="sampling", unit="text") as bar:
        for _ in range(count):
            now[0] += seconds_each
            bar.update(1)
    return sys.stderr.getvalue()


def test_progress_in_a_log_is_a_line_every_ten_seconds_with_speed_and_time_left(monkeypatch):
    log = log_of(monkeypatch, 1.0, 60)
    lines = log.splitlines()
    assert log.endswith("\n") and "\r" not in log and "" not in lines
    assert 5 <= len(lines) <= 7
    assert lines[0].startswith("sampling:") and "10/60" in lines[0]
    assert "00:50" in lines[0] and "1.00text/s" in lines[0]
    assert "60/60" in lines[-1] and sum("60/60" in line for line in lines) == 1


def test_progress_of_what_is_done_soon_stays_quiet_in_a_log(monkeypatch):
    assert log_of(monkeypatch, 1.0, 9) == ""


def test_progress_over_an_iterable_yields_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress(iter("abc"), description="letters", total=3)) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    assert sum(progress(range(4), description="sum")) == 6
    assert stderr.getvalue().count("\r") >= 1 and "sum: 100%" in stderr.getvalue()
