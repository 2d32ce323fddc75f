"""Experiments of several stages: what they hand on, in which order, and not twice."""

import json

import numpy as np
import pytest

from align_jax import main
from align_jax.algorithms import policy_gradient, reward_model, sft, stages
from align_jax.models.interchange import load_reward_model
from align_jax.training import pretrained
from align_jax.training.checkpoint import flatten
from align_jax.training.errors import RunError
from align_jax.training.workdir import Workdir


def test_the_stages_build_on_each_other_and_are_not_run_again(
    tiny_config, tmp_path, monkeypatch, capsys
):
    config = tiny_config("instructgpt", {})
    demonstrations = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": "1 2 3", "completion": f" 4 5 {i}"} for i in range(8)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.sft.data.source = str(demonstrations)
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
        Workdir(tmp_path / "run", tiny_config("instructgpt", {"reward.seed": 5}))
    config.ppo.kl.coefficient = 0.03  # of a stage that has not begun: may still be corrected
    demonstrations.unlink()  # which no stage that is still to run reads
    summary = stages.run(config, Workdir(tmp_path / "run", config))
    assert runs == ["sft", "reward", "ppo"]
    assert summary["ppo"]["train"]["loss/ptx_avg"] > 0
    assert summary["ppo"]["train"]["objective/kl_coefficient"] == pytest.approx(0.03)
    assert stages.evaluate(config, Workdir(tmp_path / "run", config)) == summary

    mesh = pretrained.open_mesh(config.sft)
    start, result = (
        flatten(pretrained.load_pretrained(config.sft, tmp_path / "run" / name, mesh))
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
    exported = flatten(pretrained.load_pretrained(config.sft, tmp_path / "out", mesh))
    for name in exported:
        np.testing.assert_array_equal(exported[name], result[name], err_msg=name)


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
        (lambda c: c.reward.normalization.update(kind="z"), "in config.reward: .*normalization"),
        (lambda c: c.reward.data.update(source="builtin:tiny_sft"), "in config.reward: .*ranked"),
    ],
)
def test_a_wrong_order_is_refused_before_the_first_stage(
    tiny_config, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr(sft, "run", pytest.fail)
    config = tiny_config("instructgpt", {})
    change(config)
    with pytest.raises(RunError, match=message):
        stages.run(config, Workdir(tmp_path / "run", config))
