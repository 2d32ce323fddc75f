"""Damaged runs: what is in a workdir, and a machine that lets nothing be written."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from align_jax.algorithms import sft
from align_jax.config import load_config
from align_jax.training.metrics import MetricWriter, read_metrics
from align_jax.training.pretrained import load_pretrained_tokenizer, run_at
from align_jax.training.workdir import Workdir, read_config
from tests.hostile.rows import rows

ROOT = pathlib.Path(__file__).parents[2]
SFT = f"{ROOT / 'experiments' / 'sft.py'}:scale=tiny"
BROKEN = [
    (b"", ("damaged",)),
    (b"{", ("damaged",)),
    (b"\x00" * 512, ("damaged",)),
    (b"\xff\xfe{}", ("damaged",)),
    (b"[]", ("damaged", "list")),
    (b"null", ("damaged", "NoneType")),
    (b"3", ("damaged", "int")),
    (b'"sft"', ("damaged", "str")),
    (b"[" * 100_000, ("damaged", "nested too deeply")),
    (b'{"seed": ' + b"1" * 5000 + b"}", ("damaged", "digits")),
    (b'{"seed": 1, "seed": 2}', ("damaged", "'seed'", "twice")),
]


@pytest.fixture
def run(tmp_path):
    """A run that has begun and not finished."""
    workdir = Workdir(tmp_path / "run", sft.Config(model="tiny"))
    (workdir.path / "metrics.jsonl").write_text('{"step": 1, "wall_time": 0.0, "loss": 1.0}\n')
    return workdir.path


@rows("content, names", BROKEN)
def test_a_damaged_config(refused, fails, run, content, names):
    file = run / "config.json"
    file.write_bytes(content)
    refused(lambda: read_config(run), str(file), *names)
    refused(lambda: Workdir(run, sft.Config()), str(file), *names)
    refused(lambda: run_at(run), str(file), *names)
    fails(["evaluate", f"--workdir={run}"], str(file), *names)
    assert file.read_bytes() == content


@rows("content, names", BROKEN)
def test_a_damaged_finished_file(refused, fails, run, content, names):
    file = run / "finished.json"
    file.write_bytes(content)
    workdir = Workdir(run, sft.Config(model="tiny"))
    refused(workdir.finished, str(file), "remove", *names)


def test_a_damaged_finished_file_on_the_command_line(fails, tmp_path):
    arguments = ["train", f"--config={SFT}", f"--workdir={tmp_path / 'run'}"]
    Workdir(tmp_path / "run", sft.Config.from_dict(load_config(SFT)))
    (tmp_path / "run" / "finished.json").write_text('{"eval": {"lo')
    fails(arguments, "finished.json", "damaged", "remove")


def put(path, kind):
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)


@pytest.mark.parametrize("name", ["config.json", "finished.json", "metrics.jsonl"])
@rows(
    "kind, names",
    [
        ("fifo", ("a pipe",)),
        ("directory", ("a directory",)),
        ("device", ("a device",)),
        ("loop", ("a link",)),
    ],
)
def test_no_file_where_a_file_is_wanted(refused, run, name, kind, names):
    put(run / name, kind)
    reading = {
        "config.json": lambda: read_config(run),
        "finished.json": lambda: Workdir(run, sft.Config(model="tiny")).finished(),
        "metrics.jsonl": lambda: read_metrics(run),
    }
    refused(reading[name], str(run / name), *names)


# Configs of runs that are JSON and no config: content, what the message must name.
CONFIGS = [
    ({}, ("something else's",)),
    ({"algorithm": None}, ("something else's",)),
    ({"algorithm": ["sft"]}, ("something else's",)),
    ({"algorithm": "sfft"}, ("'sfft'", "'sft'")),
    ({"algorithm": "sft", "beta": 1}, ("'beta'",)),
    ({"algorithm": "sft", "seed": "x"}, ("config.seed",)),
    ({"algorithm": "sft", "seed": 2**32}, ("config.seed",)),
    ({"algorithm": "sft", "data": {"rows": -1}}, ("config.data.rows",)),
    ({"algorithm": "sft", "model": ["tiny"]}, ("config.model",)),
    ({"algorithm": "sft", "order": 3}, ("'order'",)),
]


@rows("content, names", CONFIGS)
def test_a_config_that_is_none(fails, run, content, names):
    (run / "config.json").write_text(json.dumps(content))
    fails(["evaluate", f"--workdir={run}", "--data=builtin:tiny_sft"], *names)


@rows(
    "content, names",
    [
        ({"algorithm": "stages", "result": "."}, ("config.json", "result")),
        ({"algorithm": "stages", "result": "../run"}, ("config.json", "result")),
        ({"algorithm": "stages", "result": 3}, ("config.json", "result")),
        ({"algorithm": "stages", "result": "gone"}, ("gone",)),
        ({"algorithm": "sft", "init": 3}, ("config.json", "init")),
        ({"algorithm": "sft", "seed": []}, ("config.seed",)),
        ({"algorithm": 3}, ("config.json", "algorithm")),
    ],
)
def test_a_run_that_leads_nowhere_or_to_itself(fails, run, content, names):
    (run / "config.json").write_text(json.dumps(content))
    fails(["generate", f"--model={run}", "--prompt=a"], *names)


def test_a_run_that_began_from_itself(refused, run):
    (run / "config.json").write_text(json.dumps({"algorithm": "sft", "model": str(run)}))
    refused(lambda: load_pretrained_tokenizer(str(run)), str(run), "itself")


METRICS = [
    (b"nonsense\n", ("line 1",)),
    (b'{"step": 1}\nnonsense\n', ("line 2",)),
    (b'{"loss": 1.0}\n', ("line 1",)),
    (b'{"step": "1"}\n', ("line 1",)),
    (b'{"step": 1.5}\n', ("line 1",)),
    (b'{"step": true}\n', ("line 1",)),
    (b'{"step": null}\n', ("line 1",)),
    (b'{"step": NaN}\n', ("line 1",)),
    (b'{"step": 1, "loss": null}\n', ("line 1",)),
    (b'{"step": 1, "loss": []}\n', ("line 1",)),
    (b'{"step": 1, "loss": "low"}\n', ("line 1",)),
    (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", ("line 1",)),
    (b'{"step": 1, "loss": ' + b"1" * 5000 + b"}\n", ("line 1",)),
    (b'{"step": 1, "step": 2}\n', ("line 1",)),
    (b"[1]\n", ("line 1",)),
    (b"[" * 100_000 + b"\n", ("line 1",)),
    (b'{"step": 1}\n\xff\xfe\n', ("line 2",)),
    (b"\x00" * 4096 + b"\n", ("line 1",)),
]


@rows("content, names", METRICS)
def test_damaged_metrics(refused, run, content, names):
    file = run / "metrics.jsonl"
    file.write_bytes(content)
    refused(lambda: read_metrics(run), str(file), *names)
    refused(lambda: MetricWriter(run, resume_step=1), str(file), *names)
    assert file.read_bytes() == content


def test_a_last_row_that_was_cut_short_is_no_damage(run):
    for end in (b'{"step": 2, "lo', b"\xe2\x82", b"\x00\x00"):
        (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + end)
        assert read_metrics(run) == [{"step": 1}]


# --- directories


def folder(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("1")
    elif kind == "below a file":
        path.write_text("1")
        path = path / "run"
    elif kind == "others":
        path.mkdir()
        (path / "thesis.tex").write_text("all of it")
    elif kind == "long":
        path = tmp_path / ("a" * 300)
    elif kind != "device":
        put(path, kind)
    return pathlib.Path("/dev/null") if kind == "device" else path


@rows(
    "kind, names",
    [
        ("file", ("is a file",)),
        ("fifo", ("is a pipe",)),
        ("device", ("is a device",)),
        ("loop", ("a link", "nowhere")),
        ("below a file", ("Not a directory",)),
        ("others", ("holds no run",)),
        ("long", ("File name too long",)),
    ],
)
def test_what_cannot_be_a_workdir(refused, tmp_path, kind, names):
    path = folder(tmp_path, kind)
    refused(lambda: Workdir(path, sft.Config()), "--workdir=", str(path), *names)


def test_odd_names_of_workdirs(refused):
    refused(lambda: Workdir("", sft.Config()), "--workdir is empty")
    refused(lambda: Workdir("a\x00b", sft.Config()), "--workdir=", "NUL")
    refused(lambda: read_config(""), "--workdir is empty")


def test_a_workdir_that_may_not_be_written(refused, tmp_path, unprivileged):
    (tmp_path / "run").mkdir(mode=0o555)
    with unprivileged():
        refused(lambda: Workdir(tmp_path / "run", sft.Config()), "--workdir=", "Permission denied")
        refused(lambda: Workdir(tmp_path / "new", sft.Config()), "--workdir=", "Permission denied")


@rows(
    "what, names",
    [
        ("nothing", ("has no checkpoint yet",)),
        ("a file", ("checkpoints", "is a file")),
        ("an empty folder", ("has no checkpoint yet",)),
        ("an empty step", ("step 5", "cannot be read")),
        ("a step of rubbish", ("step 5", "cannot be read")),
    ],
)
def test_damaged_checkpoints(fails, run, what, names):
    folder = run / "checkpoints"
    if what == "a file":
        folder.write_text("1")
    elif what != "nothing":
        folder.mkdir()
    if "step" in what:
        (folder / "5").mkdir()
        (folder / "5" / "_CHECKPOINT_METADATA").write_text("{}" if "empty" in what else "\x00")
    fails(["evaluate", f"--workdir={run}", "--data=builtin:tiny_sft"], *names)
    fails(["generate", f"--model={run}", "--prompt=a"], *names)


# --- limits of the operating system, each in a process of its own

FILES_LEFT = "len(os.listdir('/proc/self/fd')) + 1"

LIMITED = """
import os, resource, sys
from align_jax import main
resource.setrlimit(resource.{name}, ({limit}, {limit}))
sys.exit(main.main(sys.argv[1:]))
"""

SAVE = """
import collections, logging, os, pathlib, resource, sys
import numpy as np
from align_jax.errors import RunError
from align_jax.training.checkpoint import Checkpointer
logging.getLogger("absl").setLevel(logging.CRITICAL)
State = collections.namedtuple("State", "step model optimizer running")
state = State(np.int32(3), {{"w": np.arange(2.0**18)}}, {{"m": np.zeros(3)}}, {{}})
checkpointer = Checkpointer(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.{name}, ({limit}, {limit}))
try:
    checkpointer.save(state, {{}})
    checkpointer.wait()
    checkpointer.close()
except RunError as error:
    print("align-jax: error:", error, file=sys.stderr)
    sys.exit(2)
"""


def limited(code, name, limit, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    code = code.format(name=name, limit=limit)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Python itself says what it met in a destructor, after a heading of its own.
    raised = "Traceback" in done.stderr.partition("Exception ignored in")[0]
    assert done.returncode == 2 and not raised, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "align-jax: error" in line]
    return line


@rows(
    "name, limit, names",
    [
        ("RLIMIT_FSIZE", 100, ("File too large", "ulimit -f")),
        ("RLIMIT_NOFILE", FILES_LEFT, ("Too many open files", "ulimit -n")),
    ],
)
def test_limits_at_the_start_of_a_run(tmp_path, name, limit, names):
    workdir = tmp_path / "run"
    line = limited(LIMITED, name, limit, "train", f"--config={SFT}", f"--workdir={workdir}")
    for word in names:
        assert word in line, line


@rows(
    "name, limit, names",
    [
        ("RLIMIT_FSIZE", 100_000, ("checkpoint could not be written", "ulimit -f")),
        ("RLIMIT_NOFILE", FILES_LEFT, ("checkpoint could not be written", "ulimit -n")),
    ],
)
def test_limits_while_a_checkpoint_is_written(tmp_path, name, limit, names):
    line = limited(SAVE, name, limit, str(tmp_path / "checkpoints"))
    for word in names:
        assert word in line, line
