"""Finished runs: evaluated, sampled, exported, and safe from wrong commands."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from align_jax import main as command_line
from align_jax.algorithms import preference
from align_jax.models.interchange import load_model
from align_jax.training.metrics import read_metrics
from tests.main.commands import EVALUATED, SETTINGS, snapshot, train_arguments


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of a few steps, by name of their experiment."""
    folder = tmp_path_factory.mktemp("runs")
    for name, evaluated in EVALUATED.items():
        arguments = train_arguments(name, folder / name, *SETTINGS, evaluated)
        assert command_line.main(arguments) == 0
    return {name: folder / name for name in EVALUATED}


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


def test_a_finished_run_is_not_run_again(runs, monkeypatch, no_model, capsys):
    before = snapshot(runs["dpo"])
    arguments = train_arguments("dpo", runs["dpo"], *SETTINGS, EVALUATED["dpo"])
    assert command_line.main(arguments) == 0
    assert "is finished already" in capsys.readouterr().out
    assert snapshot(runs["dpo"]) == before


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


def test_a_damaged_checkpoint_is_named_with_what_to_do(fails, runs, tmp_path):
    workdir = shutil.copytree(runs["sft"], tmp_path / "damaged")
    largest = max((workdir / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    before = snapshot(workdir)
    for arguments in (
        ["generate", f"--model={workdir}", "--prompt=Hi"],
        ["export", f"--workdir={workdir}", f"--to={tmp_path / 'out'}"],
        ["evaluate", f"--workdir={workdir}"],
    ):
        message = fails(arguments)
        assert f"step 12 in {workdir / 'checkpoints'} cannot be read" in message
        assert largest.name in message and "remove that directory" in message
    assert snapshot(workdir) == before and not (tmp_path / "out").exists()


def test_a_runs_model_is_opened_without_the_one_it_began_with(runs, tmp_path, no_model):
    workdir = f"--workdir={runs['dpo']}"
    assert command_line.main(["export", workdir, f"--to={tmp_path / 'out'}"]) == 0


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


def test_evaluate_without_data_and_on_wrong_data(fails, runs, tmp_path, no_model, monkeypatch):
    before = snapshot(runs["sft"])
    message = fails(["evaluate", f"--workdir={runs['sft']}", f"--data={tmp_path / 'x.jsonl'}"])
    assert "x.jsonl: no such file" in message
    assert snapshot(runs["sft"]) == before
    monkeypatch.setattr(preference, "run", lambda config, workdir: {})
    assert command_line.main(train_arguments("dpo", tmp_path / "run")) == 0
    message = fails(["evaluate", f"--workdir={tmp_path / 'run'}"])
    assert "no data.eval_source; name the data with --data=SOURCE" in message


def test_an_export_does_not_overwrite(fails, runs, tmp_path):
    (tmp_path / "precious").write_text("1")
    message = fails(["export", f"--workdir={runs['sft']}", f"--to={tmp_path}"])
    assert "exists already" in message
    assert snapshot(tmp_path) == {pathlib.Path("precious"): b"1"}
