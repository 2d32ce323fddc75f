"""The command line from end to end, and what it says to those who gave it something wrong."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import types

import jax
import numpy as np
import pytest

from align_jax import main as command_line
from align_jax.algorithms import controlled_sentiment, preference
from align_jax.models.interchange import load_model, load_tokenizer, save_model
from align_jax.training import checkpoint, offline
from align_jax.training.metrics import MetricWriter, read_metrics

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny models are compiled far longer than they run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def train_arguments(name, workdir, *overrides):
    arguments = ["train", f"--config={EXPERIMENTS / name}.py:scale=tiny", f"--workdir={workdir}"]
    return arguments + [f"--config.{override}" for override in overrides]


EVALUATED = {
    "sft": "data.eval_source=builtin:tiny_sft",
    "dpo": "data.eval_source=builtin:tiny_preferences",
}


SETTINGS = ("num_steps=12", "data.limit=16", "optimizer.learning_rate=0.01")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of a few steps, by name of their experiment."""
    folder = tmp_path_factory.mktemp("runs")
    for name, evaluated in EVALUATED.items():
        arguments = train_arguments(name, folder / name, *SETTINGS, evaluated)
        assert command_line.main(arguments) == 0
    return {name: folder / name for name in EVALUATED}


def snapshot(folder):
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def fails(capsys):
    """Runs a command that must end in one message and exit status 2; returns the message."""

    def run(arguments):
        capsys.readouterr()
        assert command_line.main(arguments) == 2
        captured = capsys.readouterr()
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("align-jax: error: ")
        assert captured.err.count("align-jax: error") == 1 and "Traceback" not in captured.err
        return message

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Nothing that costs anything may happen: no model is loaded."""
    monkeypatch.setattr(offline, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(offline, "fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(
        preference, "reference_log_probs", lambda *_: pytest.fail("the reference was computed")
    )


# --- what works


@pytest.mark.parametrize("name", EVALUATED)
def test_train_evaluate_generate_and_export(runs, name, tmp_path, capsys):
    workdir = runs[name]
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 13))
    finished = json.loads((workdir / "finished.json").read_text())
    assert command_line.main(["evaluate", f"--workdir={workdir}"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["eval"] == pytest.approx(finished["eval"], rel=1e-5)

    exported = tmp_path / "exported"
    assert command_line.main(["export", f"--workdir={workdir}", f"--to={exported}"]) == 0
    assert capsys.readouterr().out == f"Wrote {exported}\n"
    texts = []
    for model in (workdir, exported, "tiny"):
        arguments = ["generate", f"--model={model}", "--prompt=Count 3 from 20:", "--raw"]
        assert command_line.main([*arguments, "--temperature=0", "--max_new_tokens=12"]) == 0
        texts.append(capsys.readouterr().out)
    trained, of_exported, base = texts
    assert trained == of_exported != base


def test_an_exported_model_is_the_trained_one_and_not_the_one_it_began_with(runs, tmp_path):
    command_line.main(["export", f"--workdir={runs['sft']}", f"--to={tmp_path / 'out'}"])
    exported, base = load_model(tmp_path / "out"), load_model("tiny")
    difference = np.abs(np.asarray(exported.embedding[...]) - np.asarray(base.embedding[...]))
    assert 1e-4 < difference.max() < 0.5


def test_sampling_options_reach_the_sampler(capsys):
    arguments = ["generate", "--model=tiny", "--prompt=a", "--max_new_tokens=5", "--samples=3"]
    assert command_line.main(arguments) == 0
    first = capsys.readouterr().out
    assert command_line.main([*arguments, "--seed=1"]) == 0
    second = capsys.readouterr().out
    assert command_line.main(arguments) == 0
    assert capsys.readouterr().out == first != second


def test_a_prompt_is_put_into_the_chat_template_unless_it_is_raw(monkeypatch, capsys):
    seen = []

    def generate(model, prompts, **_):
        seen.append([int(token) for token in prompts[0]])
        return np.zeros((1, 1), np.int32), np.zeros((1, 1)), None

    monkeypatch.setattr("align_jax.generation.generate", generate)
    tokenizer = load_tokenizer("tiny")
    for extra in ([], ["--raw"]):
        assert command_line.main(["generate", "--model=tiny", "--prompt=Hi", *extra]) == 0
    assert tokenizer.decode(seen[0]) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(seen[1]) == "Hi"


def test_a_finished_run_is_not_run_again(runs, monkeypatch, no_model, capsys):
    before = snapshot(runs["dpo"])
    arguments = train_arguments("dpo", runs["dpo"], *SETTINGS, EVALUATED["dpo"])
    assert command_line.main(arguments) == 0
    assert "is finished already" in capsys.readouterr().out
    assert snapshot(runs["dpo"]) == before


# --- what is wrong with the command or the config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("betta=0.5", "the config has no field 'betta'. Did you mean 'beta'?"),
        ("batch_size=4", "Did you mean 'data.batch_size'?"),
        ("data.batch_size=many", "--config.data.batch_size=many"),
        ("loss=dpoo", "config.loss is 'dpoo'; expected one of"),
        ("data.source=pears.jsonl", "pears.jsonl: no such file"),
        ("data.source=builtin:tiny_preference", "no built-in data set 'tiny_preference'"),
        ("data.max_length=8", "over the limit of 7 (data.max_length = 8"),
        ("algorithm=ppoo", "config.algorithm is 'ppoo'; expected one of ['sft', 'preference'"),
    ],
)
def test_a_wrong_config_ends_before_a_model_is_loaded(fails, no_model, tmp_path, override, message):
    assert message in fails(train_arguments("dpo", tmp_path / "run", override))
    # The directory is not lost to the mistake.
    left = [path.name for path in (tmp_path / "run").glob("*")]
    assert left in ([], ["config.json"])


def test_a_run_can_be_started_in_the_directory_where_a_mistake_was_made(
    fails, tmp_path, monkeypatch
):
    fails(train_arguments("dpo", tmp_path, "data.source=pears.jsonl"))
    monkeypatch.setattr(preference, "run", lambda config, workdir: {})
    assert command_line.main(train_arguments("dpo", tmp_path)) == 0


def test_a_wrong_config_file_and_a_wrong_scale(fails, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    message = fails(["train", f"--config={EXPERIMENTS / 'dop.py'}", workdir])
    assert "there is no file" in message and f"Did you mean '{EXPERIMENTS / 'dpo.py'}'?" in message
    message = fails(["train", f"--config={EXPERIMENTS / 'dpo.py'}:scale=huge", workdir])
    assert "'scale=huge'; expected one of 'scale=tiny', 'scale=small'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=x", "--workdir=y", "--beta=3"],
        ["train", "--config=x", "--workdir=y", "stray"],
        ["evaluate", "--workdir=y", "--config.beta=3"],
    ],
)
def test_an_unknown_argument_is_named(fails, arguments):
    assert f"unknown argument {arguments[-1]!r}" in fails(arguments)


def test_a_missing_argument_shows_the_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["train", "--workdir=x"])
    assert caught.value.code == 2 and "--config" in capsys.readouterr().err


# --- what is wrong with the data


def write_pairs(path, count, wrong=None):
    lines = [{"prompt": f"p{i}", "chosen": " yes", "rejected": " no"} for i in range(count)]
    if wrong is not None:
        lines[wrong - 1] = {"prompt": "p", "chosen": " yes", "rejeted": " no"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_wrong_field_is_named_with_its_file_and_line(fails, no_model, tmp_path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, 30, wrong=17)
    message = fails(train_arguments("dpo", tmp_path / "run", f"data.source={file}"))
    assert f"{file}:17: field 'rejected' is missing" in message
    assert "did you mean 'rejeted' as 'rejected'?" in message


def test_an_empty_data_set_and_one_smaller_than_a_batch(fails, no_training, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n")
    message = fails(train_arguments("dpo", tmp_path / "run", f"data.source={file}"))
    assert f"{file}: the data set is empty" in message
    write_pairs(file, 3)
    message = fails(train_arguments("dpo", tmp_path / "run", f"data.source={file}"))
    assert "config.data.batch_size = 8 is more than there are examples: 3" in message


def test_wrong_held_out_data_ends_before_a_model_is_loaded(fails, no_model, tmp_path):
    for name in EVALUATED:
        message = fails(train_arguments(name, tmp_path / name, "data.eval_source=pears.jsonl"))
        assert "pears.jsonl: no such file" in message


def test_evaluate_without_data_and_on_wrong_data(fails, runs, tmp_path, no_model, monkeypatch):
    before = snapshot(runs["sft"])
    message = fails(["evaluate", f"--workdir={runs['sft']}", f"--data={tmp_path / 'x.jsonl'}"])
    assert "x.jsonl: no such file" in message
    assert snapshot(runs["sft"]) == before
    monkeypatch.setattr(preference, "run", lambda config, workdir: {})
    assert command_line.main(train_arguments("dpo", tmp_path / "run")) == 0
    message = fails(["evaluate", f"--workdir={tmp_path / 'run'}"])
    assert "no data.eval_source; name the data with --data=SOURCE" in message


# --- what is wrong with the model


def test_models_that_are_none_or_damaged(fails, no_training, tmp_path):
    (tmp_path / "empty").mkdir()
    save_model(load_model("tiny"), load_tokenizer("tiny"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16)
    for model, expected in (
        (tmp_path / "nowhere", "there is no model at"),
        (tmp_path / "empty", "is not a model directory: it has no config.json"),
        (tmp_path / "cut", "model.safetensors is truncated or damaged"),
        (tmp_path / "cut.gguf", "cut.gguf is truncated"),
    ):
        before = snapshot(tmp_path)
        assert expected in fails(["generate", f"--model={model}", "--prompt=Hi"])
        assert snapshot(tmp_path) == before
        workdir = tmp_path / f"run_{model.name}"
        assert expected in fails(train_arguments("dpo", workdir, f"model={model}"))
        assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_checkpoint_of_another_model_is_refused_by_a_parameters_name(fails, runs, tmp_path):
    workdir = shutil.copytree(runs["sft"], tmp_path / "edited")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"model": "tiny:gpt2"}))
    before = snapshot(workdir)
    for arguments in (
        ["generate", f"--model={workdir}", "--prompt=Hi"],
        ["export", f"--workdir={workdir}", f"--to={tmp_path / 'out'}"],
        ["evaluate", f"--workdir={workdir}"],
    ):
        message = fails(arguments)
        assert "the checkpoint of step 12" in message and "belongs to another model" in message
    assert snapshot(workdir) == before and not (tmp_path / "out").exists()
    (workdir / "finished.json").unlink()
    arguments = train_arguments("sft", workdir, *SETTINGS, EVALUATED["sft"], "model=tiny:gpt2")
    assert "belongs to another model" in fails(arguments)
    (checkpoint_,) = (workdir / "checkpoints").iterdir()
    assert checkpoint_.name == "12"


def test_too_long_a_prompt_and_wrong_sampling_options(fails):
    arguments = ["generate", "--model=tiny", "--prompt=" + "long " * 200]
    assert "exceed the model's context of 512 tokens" in fails(arguments)
    arguments = ["generate", "--model=tiny", "--prompt=a"]
    assert "temperature must be at least 0" in fails([*arguments, "--temperature=-1"])
    assert "max_new_tokens must be at least 1" in fails([*arguments, "--max_new_tokens=0"])
    assert "--prompt: field 'prompt'" in fails([*arguments[:2], "--prompt=", "--raw"])


# --- what is wrong with the directory


def test_directories_of_others_are_left_alone(fails, runs, tmp_path, no_model):
    before = snapshot(runs["dpo"])
    message = fails(train_arguments("dpo", runs["dpo"], *SETTINGS, EVALUATED["dpo"], "beta=0.7"))
    assert "belongs to another experiment" in message
    assert "config.beta is 0.1 there and 0.7 here" in message
    message = fails(train_arguments("sft", runs["dpo"]))
    assert "belongs to another experiment" in message
    assert snapshot(runs["dpo"]) == before

    file = tmp_path / "thesis.tex"
    file.write_text("all of it")
    assert f"--workdir={file} is a file" in fails(train_arguments("dpo", file))
    assert "is not empty and holds no run" in fails(train_arguments("dpo", tmp_path))
    assert snapshot(tmp_path) == {pathlib.Path("thesis.tex"): b"all of it"}


def test_what_is_no_workdir_can_be_neither_evaluated_nor_exported(fails, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert "it has no config.json" in fails(["evaluate", f"--workdir={path}"])
        message = fails(["export", f"--workdir={path}", f"--to={tmp_path / 'out'}"])
        assert "it has no config.json" in message
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "something else's" in fails(["evaluate", f"--workdir={tmp_path}"])


def test_a_run_without_a_checkpoint_is_said_to_have_none(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "run", lambda config, workdir: {})
    assert command_line.main(train_arguments("dpo", tmp_path, EVALUATED["dpo"])) == 0
    monkeypatch.setattr(preference, "reference_log_probs", lambda *_: pytest.fail("computed"))
    for arguments in (
        ["evaluate", f"--workdir={tmp_path}"],
        ["generate", f"--model={tmp_path}", "--prompt=a"],
    ):
        assert "has no checkpoint yet" in fails(arguments)


def test_an_export_does_not_overwrite(fails, runs, tmp_path):
    (tmp_path / "precious").write_text("1")
    message = fails(["export", f"--workdir={runs['sft']}", f"--to={tmp_path}"])
    assert "exists already" in message
    assert snapshot(tmp_path) == {pathlib.Path("precious"): b"1"}


# --- a full disk


def test_too_little_space_is_found_before_any_compute(fails, tmp_path, monkeypatch, no_training):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    message = fails(train_arguments("dpo", tmp_path / "run"))
    assert "GiB free, and checkpoints need" in message and str(tmp_path / "run") in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_disk_that_fills_up_ends_in_a_message_and_the_run_continues(
    fails, tmp_path, monkeypatch, capsys
):
    overrides = ("num_steps=6", "checkpoint_every=2", "data.limit=16")
    write = MetricWriter.write

    def full(self, step, metrics):
        if step == 4:
            raise OSError(28, os.strerror(28))
        write(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", full)
        message = fails(train_arguments("sft", tmp_path / "run", *overrides))
    assert "the disk is full" in message and "No space left on device" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert command_line.main(train_arguments("sft", tmp_path / "run", *overrides)) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_checkpoint_that_does_not_fit_a_real_disk_ends_in_a_message(
    fails, small_disk, monkeypatch
):
    # The check beforehand is blinded, as by another program that takes the space meanwhile.
    monkeypatch.setattr(offline, "require_space", lambda *_, **__: None)
    (small_disk / "taken").write_bytes(bytes(700_000))
    message = fails(train_arguments("sft", small_disk / "run", "num_steps=1", "data.limit=16"))
    assert "the disk is full" in message


# --- interruptions


def test_ctrl_c_while_sampling_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    sample, calls = controlled_sentiment._sample, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(controlled_sentiment, "_sample", interrupted)
    arguments = train_arguments("quickstart", tmp_path, "sampling.max_new_tokens=4")
    assert command_line.main(arguments) == 130
    error = capsys.readouterr().err
    assert "align-jax: interrupted. The same command goes on" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "sample.jsonl",
        "seconds.json",
    ]
