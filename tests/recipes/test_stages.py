"""Experiments of several stages: what they hand on, in which order, and not twice."""

import json
import signal

import numpy as np
import pytest

from align_jax import main
from align_jax.algorithms import policy_gradient, reward_model, settings_of, sft
from align_jax.config import load_config
from align_jax.errors import RunError
from align_jax.recipes import stages
from align_jax.rewards.model import load_reward_model
from align_jax.training import metrics, pretrained
from align_jax.training.signals import Interrupted
from align_jax.training.workdir import Workdir, read_config
from align_jax.trees import flatten
from tests.conftest import EXPERIMENTS


def test_the_stages_build_on_each_other_and_are_not_run_again(
    tiny_config, tmp_path, monkeypatch, capsys
):
    demonstrations = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": "1 2 3", "completion": f" 4 5 {i}"} for i in range(8)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"sft.data.source": str(demonstrations)}
    config = tiny_config("instructgpt", given)
    runs = []
    for module in (sft, reward_model, policy_gradient):

        def spy(config, workdir, run=module.run):
            runs.append(workdir.path.name)
            return run(config, workdir)

        monkeypatch.setattr(module, "run", spy)
    with monkeypatch.context() as patch:
        patch.setattr(policy_gradient, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stages.run(config, Workdir(tmp_path / "run", config))
    assert runs == ["sft", "reward"]
    with pytest.raises(RunError, match=r"another experiment: config\.reward\.seed is"):
        Workdir(tmp_path / "run", tiny_config("instructgpt", given | {"reward.seed": 5}))
    # A stage that has not begun may still be corrected.
    config = tiny_config("instructgpt", given | {"ppo.kl.coefficient": 0.03})
    demonstrations.unlink()  # which no stage that is still to run reads
    summary = stages.run(config, Workdir(tmp_path / "run", config))
    assert runs == ["sft", "reward", "ppo"]
    assert summary["ppo"]["train"]["loss/ptx_avg"] > 0
    assert summary["ppo"]["train"]["objective/kl_coefficient"] == pytest.approx(0.03)
    assert stages.evaluate(config, Workdir(tmp_path / "run", config)) == summary

    first = config.stages["sft"]
    mesh = pretrained.open_mesh(first)
    start, result = (
        flatten(pretrained.load_pretrained(first, tmp_path / "run" / name, mesh))
        for name in ("sft", "")
    )
    # The reference is the first stage's model: at the first update the KL to it is 0.
    rows = [
        json.loads(line) for line in (tmp_path / "run/ppo/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["objective/kl"] == 0.0
    assert any(np.abs(np.asarray(result[n]) - np.asarray(start[n])).max() > 0 for n in start)
    # The demonstrations have mean reward 0.
    _, scale = load_reward_model(tmp_path / "run/reward/reward_model")
    assert scale.gain == 1.0 and scale.bias != 0.0

    workdir = str(tmp_path / "run")
    capsys.readouterr()
    assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert main.main(["export", f"--workdir={workdir}", f"--to={tmp_path / 'out'}"]) == 0
    exported = flatten(pretrained.load_pretrained(first, tmp_path / "out", mesh))
    for name in exported:
        np.testing.assert_array_equal(exported[name], result[name], err_msg=name)


def test_stages_can_be_moved(tiny_config, tmp_path, monkeypatch, capsys):
    short = {"num_steps": 2, "checkpoint_every": 1, "data.limit": 8}
    one = tiny_config("sft", short)
    two = tiny_config("sft", short | {"model": "stage:one", "lora.rank": 2})
    config = stages.Config.of(one=one, two=two)
    write = metrics.MetricWriter.write
    with monkeypatch.context() as patch:

        def stop(self, step, values):
            write(self, step, values)
            if "two" in self._file.name:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(metrics.MetricWriter, "write", stop)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Interrupted):
            stages.run(config, Workdir("a", config))
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_config(tmp_path / "b/two")["model"] == str(tmp_path / "b/one")
    began = (tmp_path / "b/one/metrics.jsonl").read_text()
    first_row = (tmp_path / "b/two/metrics.jsonl").read_text()
    stages.run(config, Workdir(tmp_path / "b", config))
    assert (tmp_path / "b/one/metrics.jsonl").read_text() == began
    assert (tmp_path / "b/two/metrics.jsonl").read_text().startswith(first_row)
    # Nothing is run again, and what is there is read from where it now lies.
    mesh = pretrained.open_mesh(one)
    before = flatten(pretrained.load_pretrained(one, tmp_path / "b", mesh))
    (tmp_path / "b").rename(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "run", pytest.fail)
        stages.run(config, Workdir("c", config))
    assert main.main(["export", "--workdir=c", "--to=out"]) == 0
    for path in ("c", "out"):
        after = flatten(pretrained.load_pretrained(one, path, mesh))
        for name in before:
            np.testing.assert_array_equal(after[name], before[name], err_msg=f"{path}: {name}")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(order=("sft", "ppo")), r"config.ppo refers to 'stage:reward"),
        (lambda c: c.update(order=("sft", "rm")), "there is no config.rm"),
        (lambda c: c.reward.update(algorithm="rewardmodel"), "config.reward.algorithm is"),
        (lambda c: c.update(result="policy"), "config.result is 'policy'; expected one of"),
        (lambda c: c.ppo.update(loss="pppo"), "in config.ppo: config.loss is 'pppo'"),
        (lambda c: c.ppo.sampling.update(prompts=7), "in config.ppo: config.sampling.prompts = 7"),
        (lambda c: c.ppo.ptx.update(source="/nowhere.jsonl"), "in config.ppo: .*nowhere.jsonl"),
        (lambda c: c.ppo.optimizer.update(schedule="steep"), "in config.ppo: .*schedule"),
        (lambda c: c.ppo.reward.update(kind="modle"), "in config.ppo: config.reward: .*no kind"),
        (lambda c: c.ppo.reward.update(path=""), "in config.ppo: config.reward .*needs .*'path'"),
        (lambda c: c.ppo.evaluation.update(reward="lenght"), "config.evaluation.reward: .*no kind"),
        (lambda c: c.reward.normalization.update(kind="z"), "in config.reward: .*normalization"),
        (lambda c: c.reward.data.update(source="builtin:tiny_sft"), "in config.reward: .*ranked"),
    ],
)
def test_a_wrong_order_is_refused_before_the_first_stage(
    tiny_config, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr(sft, "run", pytest.fail)
    config = load_config(f"{EXPERIMENTS / 'instructgpt'}.py:scale=tiny")
    change(config)
    with pytest.raises(RunError, match=message):
        settings = settings_of(config)
        stages.run(settings, Workdir(tmp_path / "run", settings))


def test_a_wrong_comparer_of_a_later_stage_is_refused_before_the_first(tiny_config):
    with pytest.raises(RunError, match="in config.online: config.comparer: there is no kind"):
        tiny_config("hh_rlhf", {"online.comparer.kind": "poeple"})
