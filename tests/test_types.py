"""The type checker of launch/test.sh sees a wrong argument of a loss, a `Config` and `train`."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

USES = """\
import jax
from align_jax import losses
from align_jax.algorithms import policy_gradient, preference, sft
from align_jax.models.transformer import Transformer
from align_jax.training.optimizer import Optimizer


def right(model: Transformer, logps: jax.Array) -> Transformer:
    losses.preference.dpo_loss(logps, logps, logps, logps, beta=0.1).mean()
    options = preference.LossOptions(label_smoothing=0.1)
    config = preference.Config(beta=1, loss_options=options, optimizer=Optimizer(warmup_steps=1))
    preference.train(model, None, [{"prompt": "a", "chosen": "b", "rejected": "c"}], config)
    policy_gradient.train(model, None, "prompts.jsonl", policy_gradient.Config(), donate=False)
    return sft.train(model, None, [], sft.Config()).model


def wrong(model: Transformer, logps: jax.Array) -> None:
    losses.preference.dpo_loss(logps, logps, logps, logps, beta="0.1")  # wrong
    losses.policy_gradient.ppo_loss(logps, logps, logps, clip_range=None)  # wrong
    losses.preference.dpo_loss(logps, logps, logps)  # wrong
    losses.ranking.all_pairs_loss(logps, ranks=[logps], margin=1.0)  # wrong
    sft.Config(num_epochs="2")  # wrong
    Optimizer(learning_rates=1e-5)  # wrong
    preference.Config(optimizer={"learning_rate": 1e-5})  # wrong
    sft.train(model, None, [], preference.Config())  # wrong
    preference.train(model, None, 7, preference.Config())  # wrong
    policy_gradient.train(model, None, [], policy_gradient.Config(), reward="vader")  # wrong
"""


def test_wrong_arguments_are_found_and_right_ones_are_not(tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    settings = {"include": ["uses.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    run = subprocess.run([*command, "--outputjson", "-p", tmp_path], capture_output=True, text=True)
    found = json.loads(run.stdout)["generalDiagnostics"]
    lines = USES.splitlines()
    wrong = {i for i, line in enumerate(lines) if line.endswith("# wrong")}
    assert {one["range"]["start"]["line"] for one in found} == wrong, found
