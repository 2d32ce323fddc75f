"""Wrong commands, configs, data and models: one message each, before anything costly."""

import json

import pytest

from align_jax import main as command_line
from align_jax.algorithms import preference
from align_jax.models.interchange import load_model, load_tokenizer, save_model
from tests.main.commands import EVALUATED, EXPERIMENTS, snapshot, train_arguments


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("betta=0.5", "the config has no field 'betta'. Did you mean 'beta'?"),
        ("batch_size=4", "Did you mean 'data.batch_size'?"),
        ("data.batch_size=many", "--config.data.batch_size=many"),
        ("loss=dpoo", "config.loss is 'dpoo'; expected one of"),
        ("data.source=pears.jsonl", "pears.jsonl: no such file"),
        ("data.source=builtin:tiny_preference", "no built-in data set 'tiny_preference'"),
        ("data.max_length=8", "over the limit of 4 (data.max_length = 8, less 4 for"),
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


def test_too_long_a_prompt_and_wrong_sampling_options(fails):
    arguments = ["generate", "--model=tiny", "--prompt=" + "long " * 200]
    assert "exceed the model's context of 512 tokens" in fails(arguments)
    arguments = ["generate", "--model=tiny", "--prompt=a"]
    assert "temperature must be at least 0" in fails([*arguments, "--temperature=-1"])
    assert "max_new_tokens must be at least 1" in fails([*arguments, "--max_new_tokens=0"])
    assert "--prompt: field 'prompt'" in fails([*arguments[:2], "--prompt=", "--raw"])


# --- the data


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


# --- the model and the directory


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


def test_what_is_no_workdir_can_be_neither_evaluated_nor_exported(fails, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert "it has no config.json" in fails(["evaluate", f"--workdir={path}"])
        message = fails(["export", f"--workdir={path}", f"--to={tmp_path / 'out'}"])
        assert "it has no config.json" in message
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "something else's" in fails(["evaluate", f"--workdir={tmp_path}"])


def test_a_reward_models_run_writes_no_text(fails, tmp_path):
    (tmp_path / "config.json").write_text('{"algorithm": "reward_model"}')
    for arguments in (
        ["generate", f"--model={tmp_path}", "--prompt=a"],
        ["export", f"--workdir={tmp_path}", f"--to={tmp_path / 'out'}"],
    ):
        assert f"what transformers loads is {tmp_path / 'reward_model'}" in fails(arguments)


def test_a_run_without_a_checkpoint_is_said_to_have_none(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "run", lambda config, workdir: {})
    assert command_line.main(train_arguments("dpo", tmp_path, EVALUATED["dpo"])) == 0
    monkeypatch.setattr(preference, "reference_log_probs", lambda *_: pytest.fail("computed"))
    for arguments in (
        ["evaluate", f"--workdir={tmp_path}"],
        ["generate", f"--model={tmp_path}", "--prompt=a"],
    ):
        assert "has no checkpoint yet" in fails(arguments)
