"""Config files and overrides, through `load_config`, `settings_of` and `main`."""

import pathlib

import pytest

from align_jax import main as command_line
from align_jax.algorithms import settings_of
from align_jax.config import load_config
from tests.hostile.rows import rows

SFT = f"{pathlib.Path(__file__).parents[2] / 'experiments' / 'sft.py'}:scale=tiny"
START = "from ml_collections import ConfigDict\n"


def returning(what, argument=""):
    return f"{START}\ndef get_config({argument}):\n    return {what}\n"


# The file, the argument after the colon (None: no colon), what the message must name.
FILES = [
    ("", None, ("get_config",)),
    ("x = 1", None, ("get_config",)),
    ("get_config = 3", None, ("get_config",)),
    ("get_config = ConfigDict", None, ("NameError", "line 1", "ConfigDict")),
    ("class get_config: pass", None, ("get_config",)),
    ("def get_config(:", None, ("SyntaxError", "line 1")),
    ("x = 1\n  y = 2", None, ("IndentationError", "line 2")),
    ("x = '\x00'", None, ("null byte",)),
    ("x = 1\nraise ValueError('first\\nsecond')", None, ("line 2", "ValueError", "first")),
    ("1 / 0", None, ("line 1", "ZeroDivisionError")),
    ("import nowhere_to_be_found", None, ("line 1", "nowhere_to_be_found")),
    ("from align_jax import nothing_such", None, ("line 1", "nothing_such")),
    ("from align_jax.algorithms.sft import Confg", None, ("line 1", "Confg")),
    ("import sys\nsys.exit(0)", None, ("line 2", "SystemExit")),
    ("exit()", None, ("line 1",)),
    ("def f(): return f()\nf()", None, ("RecursionError",)),
    ("raise BaseException('odd')", None, ("line 1", "BaseException", "odd")),
    ("assert False", None, ("line 1", "AssertionError")),
    ("def get_config():\n    return arg.nothing", None, ("line 2", "NameError", "arg")),
    ("def get_config(arg):\n    return arg.nothing", "x", ("line 2", "AttributeError", "nothing")),
    ("def get_config():\n    import sys; sys.exit()", None, ("line 2", "SystemExit")),
    ("def get_config():\n    open('/nowhere/at/all')", None, ("line 2", "FileNotFoundError")),
    (returning("ConfigDict()"), "scale=tiny", ("takes no argument", "'scale=tiny'")),
    (returning("ConfigDict()", "arg"), None, ("argument", "FILE:arg")),
    (returning("ConfigDict()", "arg, more"), "x", ("argument",)),
    (returning("ConfigDict()", "*, arg"), "x", ("argument",)),
    (returning("None"), None, ("NoneType", "ConfigDict")),
    (returning("{}"), None, ("dict", "ConfigDict")),
    (returning("[ConfigDict()]"), None, ("list", "ConfigDict")),
    (returning("ConfigDict"), None, ("ConfigDict",)),
    (
        "import align_jax.algorithms.sft as s\ndef get_config(): return s.Config()",
        None,
        ("to_config_dict",),
    ),
    ("def get_config(): yield 1", None, ("generator",)),
    # Configs that are read, and are no run.
    (returning("ConfigDict()"), None, ("config.algorithm is None", "'sft'")),
    (returning("ConfigDict({'algorithm': 'sftt'})"), None, ("'sftt'", "'sft'")),
    (returning("ConfigDict({'algorithm': 3})"), None, ("3", "'sft'")),
    (returning("ConfigDict({'algorithm': 'sft', 'beta': 0.1})"), None, ("'beta'",)),
    (returning("ConfigDict({'algorithm': 'sft', 3: 1})"), None, ("3",)),
    (returning("ConfigDict({'algorithm': 'sft', 'data': 3})"), None, ("config.data", "3")),
    (
        returning("ConfigDict({'algorithm': 'sft', 'data': {'source': print}})"),
        None,
        ("config.data.source",),
    ),
    (returning("ConfigDict({'algorithm': 'sft', 'seed': object()})"), None, ("config.seed",)),
    (returning("ConfigDict({'algorithm': 'sft', 'mesh': [1]})"), None, ("config.mesh",)),
    (
        returning("ConfigDict({'algorithm': 'sft', 'data': {'source': 'x' * 10**6, 'rows': -1}})"),
        None,
        ("config.data.rows", "-1"),
    ),
]


@rows("content, argument, names", FILES)
def test_a_bad_config_file(refused, tmp_path, content, argument, names):
    file = tmp_path / "experiment.py"
    file.write_text(content)
    spec = str(file) if argument is None else f"{file}:{argument}"
    message = refused(lambda: settings_of(load_config(spec)), *names)
    assert "experiment.py" in message or "config" in message


def test_files_that_are_no_config_files(refused, tmp_path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "a.yaml").write_text("loss: dpo")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    for name, names in (
        ("folder.py", ("is a directory",)),
        ("loop.py", ("a link", "nowhere")),
        ("a.yaml", ("no Python file",)),
        ("latin.py", ("SyntaxError",)),
        ("gone.py", ("there is no file",)),
        ("", ("is a directory",)),
    ):
        refused(lambda name=name: load_config(f"{tmp_path}/{name}"), *names)
    refused(lambda: load_config(""), "--config", "names no file")
    refused(lambda: load_config(":scale=tiny"), "--config", "names no file")


def test_a_config_file_that_may_not_be_read(refused, tmp_path, unprivileged):
    (tmp_path / "experiment.py").write_text(returning("ConfigDict()"))
    (tmp_path / "experiment.py").chmod(0)
    with unprivileged():
        refused(lambda: load_config(f"{tmp_path}/experiment.py"), "experiment.py cannot be read")


OVERRIDES = [
    ("data.rows=-1", ("config.data.rows", "-1")),
    ("num_epochs=nan", ("config.num_epochs", "nan")),
    ("num_epochs=-inf", ("config.num_epochs", "inf")),
    ("num_epochs=1e999", ("config.num_epochs", "inf")),
    ("num_epochs=" + "9" * 400, ("config.num_epochs",)),
    ("num_epochs=" + "9" * 5000, ("num_epochs",)),
    ("mesh.data=0", ("config.mesh.data", "0")),
    ("mesh.fsdp=-2", ("config.mesh.fsdp", "-2")),
    ("mesh.tensor=" + "9" * 30, ("config.mesh.tensor",)),
    ("seed=-1", ("config.seed", "-1")),
    ("seed=4294967296", ("config.seed", "4294967295")),
    ("seed=9223372036854775808", ("config.seed", "64 bits")),
    ("seed=" + "9" * 400, ("config.seed",)),
    ("seed=" + "9" * 5000, ("--config.seed", "4300")),
    ("seed=1.5", ("config.seed",)),
    ("seed=", ("config.seed",)),
    ("seed=True", ("config.seed",)),
    ("seed=__import__('os').getpid()", ("config.seed",)),
    ("sed=1", ("'sed'", "'seed'")),
    ("=1", ("config",)),
    ("data=1", ("'data'", "--config.data.")),
    ("data.=1", ("'data.'",)),
    ("data.source.x=1", ("'data.source.x'",)),
    ("__class__=1", ("'__class__'",)),
    ("data.length_buckets=(64,", ("data.length_buckets",)),
    ("data.length_buckets=(64,'x')", ("data.length_buckets",)),
    ("data.length_buckets=(0,)", ("config.data.length_buckets",)),
    ("data.length_buckets=()", ("config.data.length_buckets",)),
    ("data.limit=-1", ("config.data.limit",)),
    ("data.max_length=1", ("config.data.max_length",)),
    ("data.batch_size=0", ("config.data.batch_size",)),
    ("data.batch_size=" + "9" * 30, ("config.data.batch_size",)),
    ("data.accumulation=3", ("config.data.accumulation",)),
    ("data.invalid=ignore", ("config.data.invalid", "drop")),
    ("data.overlong=cut", ("config.data.overlong", "truncate")),
    ("optimizer.learning_rate=nan", ("config.optimizer.learning_rate",)),
    ("optimizer.learning_rate=-1", ("config.optimizer.learning_rate",)),
    ("optimizer.b1=2", ("config.optimizer.b1",)),
    ("optimizer.eps=0", ("config.optimizer.eps",)),
    ("optimizer.schedule=sine", ("config.optimizer.schedule", "cosine")),
    ("lora.rank=-1", ("config.lora.rank",)),
    ("lora.rank=100000", ("config.lora.rank", "16384")),
    ("lora.alpha=nan", ("config.lora.alpha",)),
    ("lora.targets=queri", ("config.lora.targets", "query")),
    ("compute_dtype=float8", ("config.compute_dtype", "bfloat16")),
    ("remat=some", ("config.remat", "linear")),
    ("checkpoint_every=0", ("config.checkpoint_every",)),
    ("log_every=0", ("config.log_every",)),
    ("num_steps=-1", ("config.num_steps",)),
    ("num_steps=" + "9" * 30, ("config.num_steps",)),
]


@rows("override, names", OVERRIDES)
def test_a_bad_override(fails, tmp_path, override, names):
    workdir = tmp_path / "run"
    fails(["train", f"--config={SFT}", f"--workdir={workdir}", f"--config.{override}"], *names)
    assert not workdir.exists()


OF_OTHER_ALGORITHMS = [
    ("dpo", "beta=nan", ("config.beta",)),
    ("dpo", "beta=-1", ("config.beta",)),
    ("dpo", "beta=0", ("config.beta",)),
    ("dpo", "loss=dpoo", ("config.loss", "dpo")),
    ("dpo", "seed=4294967296", ("config.seed",)),
    ("dpo", "data.rows=-1", ("config.data.rows",)),
    ("reward_model", "ensemble=1000000", ("config.ensemble",)),
    ("reward_model", "ensemble=0", ("config.ensemble",)),
    ("reward_model", "num_epochs=nan", ("config.num_epochs",)),
    ("reward_model", "loss=pairs", ("config.loss",)),
    ("ppo", "sampling.samples=10000000", ("config.sampling.samples",)),
    ("ppo", "sampling.temperature=inf", ("config.sampling.temperature",)),
    ("ppo", "sampling.prompts=0", ("config.sampling.prompts",)),
    ("ppo", "kl.target=nan", ("config.kl",)),
    ("ppo", "mesh.data=0", ("config.mesh.data",)),
    ("instructgpt", "sft.data.rows=-1", ("config.sft", "rows")),
    ("instructgpt", "order=(1,)", ("order",)),
    ("instructgpt", "order=('sft','sft')", ("order",)),
    ("quickstart", "sampling.samples=10000000", ("config.sampling.samples",)),
    ("quickstart", "sampling.samples=1", ("config.sampling.samples",)),
    ("quickstart", "seed=4294967296", ("config.seed",)),
    ("quickstart", "evaluation.prompts=0", ("config.evaluation.prompts",)),
]


@rows("name, override, names", OF_OTHER_ALGORITHMS)
def test_a_bad_override_of_other_algorithms(fails, tmp_path, name, override, names):
    config = SFT.replace("sft.py", f"{name}.py")
    fails(
        ["train", f"--config={config}", f"--workdir={tmp_path}/run", f"--config.{override}"], *names
    )


COMMANDS = [
    (["train", f"--config={SFT}", "--workdir="], ("--workdir", "empty")),
    (["train", f"--config={SFT}", "--workdir=x", "--config.seed"], ("'--config.seed'", "=")),
    (["train", f"--config={SFT}", "--workdir=x", "--config.seed", "3"], ("'--config.seed'", "=")),
    (["train", f"--config={SFT}", "--workdir=x", "--seed=3"], ("'--seed=3'", "--config.seed=")),
    (["train", f"--config={SFT}", "--workdir=x", "\x1b[2J"], (r"\x1b[2J",)),
    (
        ["generate", "--model=tiny", "--prompt=a", "--seed=9223372036854775808"],
        ("--seed", "4294967295"),
    ),
    (["generate", "--model=tiny", "--prompt=a", "--seed=-1"], ("--seed", "4294967295")),
    (["generate", "--model=tiny", "--prompt=a", "--samples=10000000"], ("samples", "65536")),
    (["generate", "--model=tiny", "--prompt=a", "--samples=0"], ("samples",)),
    (["generate", "--model=tiny", "--prompt=a", "--max_new_tokens=0"], ("max_new_tokens",)),
    (["generate", "--model=tiny", "--prompt=a", f"--max_new_tokens={10**30}"], ("max_new_tokens",)),
    (["generate", "--model=tiny", "--prompt=a", "--temperature=nan"], ("temperature",)),
    (["generate", "--model=tiny", "--prompt=a", "--temperature=inf"], ("temperature",)),
    (["generate", "--model=tiny", "--prompt=a", "--temperature=-1"], ("temperature",)),
    (["generate", "--model=tiny", "--prompt=a", "--top_k=0"], ("top_k",)),
    (["generate", "--model=tiny", "--prompt=a", "--top_p=nan"], ("top_p",)),
    (["generate", "--model=tiny", "--prompt=a\udcff"], ("--prompt", r"\udcff")),
    (["generate", "--model=tiny", "--prompt=", "--raw"], ("--prompt",)),
    (["generate", "--model=", "--prompt=a"], ("no model is named",)),
    (["generate", "--model=no\x1b[2Jwhere", "--prompt=a"], ("no model",)),
    (["evaluate", "--workdir="], ("--workdir", "empty")),
    (["evaluate", "--workdir=/dev/null"], ("/dev/null",)),
    (["export", "--workdir=/proc/self", "--to=x"], ("/proc/self", "config.json")),
    (["export", "--workdir=/nowhere", "--to=/dev/null/x"], ("/nowhere",)),
]


@rows("arguments, names", COMMANDS)
def test_a_bad_command(fails, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    fails(arguments, *names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "--conf=x", "--workdir=y"],
        ["generate", "--model=tiny", "--prompt=a", "--seed=x"],
        ["generate", "--model=tiny", "--prompt=a", "--samples=1e9"],
        ["generate", "--model=tiny", "--prompt=a", "--temperature=warm"],
    ],
)
def test_a_command_that_cannot_be_parsed_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert "usage: align-jax" in capsys.readouterr().err
