"""Rounds of generating, comparing, refitting and continuing; stopped in every phase."""

import json

import numpy as np
import pytest

from align_jax.algorithms import online_preferences, policy_gradient, reward_model
from align_jax.algorithms.online_preferences import rank_by_wins
from align_jax.data.formats import DataError
from align_jax.data.sources import load_records
from align_jax.rewards.base import RewardError
from align_jax.rewards.people import WaitingForLabels
from align_jax.training import online, pretrained
from align_jax.training.checkpoint import flatten
from align_jax.training.errors import RunError
from align_jax.training.workdir import Workdir


def test_ranks_count_who_won_more():
    assert rank_by_wins(np.array([2.0, 0.5, 3.0, 0.5])) == [1, 2, 0, 2]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


SMALL = {
    "prompts": 8,
    "samples": 3,
    "reward_model.loss": "all_pairs",
    "policy.evaluation.source": "",
    "policy.num_iterations": 1,
    "policy.epochs": 1,
    "policy.minibatches": 1,
}


def policy_of(config, folder):
    mesh = pretrained.open_mesh(config.policy)
    return flatten(pretrained.load_pretrained(config.policy, folder, mesh))


def test_rounds_stopped_in_every_phase_are_those_left_alone(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("ziegler2019_sentiment", SMALL)
    whole = online_preferences.run(config, Workdir(tmp_path / "whole", config))
    assert list(whole) == [f"round_{n}/{run}" for n in range(2) for run in ("reward", "policy")]

    class Stop(Exception):
        pass

    def stop(*arguments, **keywords):
        raise Stop

    places = [
        (online_preferences, "draw_samples"),
        (online_preferences, "checked_probabilities"),
        (reward_model, "run"),
        (policy_gradient, "run"),
    ]
    for module, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(Stop):
                online_preferences.run(config, Workdir(tmp_path / "parts", config))
    parts = online_preferences.run(config, Workdir(tmp_path / "parts", config))
    assert parts.keys() == whole.keys()
    a, b = (policy_of(config, tmp_path / name) for name in ("whole", "parts"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

    # The oracle is the length of a completion: ranks follow it.
    records = read(tmp_path / "whole/round_0/samples/comparisons.jsonl")
    assert len(records) == 8
    for record in records:
        lengths = [len(text) for text in record["completions"]]
        assert record["ranks"] == [sum(other > own for other in lengths) for own in lengths]
    # The second round's reward model learns from both rounds, and other prompts were asked.
    counts = [len(read(tmp_path / f"whole/round_{n}/all_comparisons.jsonl")) for n in range(2)]
    assert counts[1] > counts[0]
    later = read(tmp_path / "whole/round_1/samples/comparisons.jsonl")
    assert not {r["prompt"] for r in records} & {r["prompt"] for r in later}
    # What was compared is not what the policy then learns from.
    drawn = read(tmp_path / "whole/round_0/samples/sample.jsonl")
    learnt = read(tmp_path / "whole/round_0/policy/samples/iteration_000000.jsonl")
    assert not {tuple(s["tokens"]) for s in drawn} & {tuple(s["tokens"]) for s in learnt}
    # It continues the first round's policy: the KL to the reference is not 0 at its start.
    first, second = (
        read(tmp_path / f"whole/round_{n}/policy/metrics.jsonl")[0]["objective/kl"]
        for n in range(2)
    )
    assert first == 0.0 and second != 0.0


def test_people_label_through_files(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("ziegler2019_sentiment", SMALL | {"samples": 2, "prompts": 4})
    config.update(rounds=1, result="round_0/policy")
    config.comparer.update(kind="people", reward="")
    config.reward_model.data.update(source="builtin:tiny_chat_preferences", limit=3)
    config.reward_model.data.batch_size = 1
    with pytest.raises(WaitingForLabels, match="labels.jsonl"):
        online_preferences.run(config, Workdir(tmp_path / "run", config))
    folder = tmp_path / "run/round_0/labels"
    pairs = read(folder / "pairs.jsonl")
    labels = [{"id": pair["id"], "preferred": "second"} for pair in pairs]
    (folder / "labels.jsonl").write_text("".join(json.dumps(x) + "\n" for x in labels))
    # Only what people said is needed now; the rest is tested above.
    monkeypatch.setattr(reward_model, "run", lambda *_: {})
    monkeypatch.setattr(policy_gradient, "run", lambda *_: {})
    online_preferences.run(config, Workdir(tmp_path / "run", config))
    records = read(tmp_path / "run/round_0/samples/comparisons.jsonl")
    assert len(records) == 4
    assert all(record["ranks"] == [1, 0] for record in records)
    # The reward model learns from these and from the pairs there were before, the best one first.
    learnt = read(tmp_path / "run/round_0/all_comparisons.jsonl")
    pairs = load_records("builtin:tiny_chat_preferences", kind="preference", limit=3)
    assert learnt[3:] == records and len(learnt) == 7
    for one, pair in zip(learnt, pairs):
        assert one["completions"] == [pair["chosen"], pair["rejected"]]
        assert one["prompt"] == pair["prompt"] and one["ranks"] == [0, 1]
    settings = json.loads((tmp_path / "run/round_0/reward/config.json").read_text())
    assert settings["data"]["limit"] == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"samples": 1}, "config.samples is 1; expected at least 2"),
        ({"reward_model.loss": "pairwise"}, "config.reward_model.loss is 'pairwise'"),
        ({"rounds": 3}, "config.result is 'round_1/policy'; with config.rounds = 3"),
        ({"reward_model.data.source": "/no/pairs.jsonl"}, "/no/pairs.jsonl"),
        ({"policy.loss": "ppoo"}, "in config.policy: config.loss is 'ppoo'"),
        ({"reward_model.loss": "best"}, "in config.reward_model: config.loss is 'best'"),
        ({"policy.sampling.prompts": 1000, "policy.minibatches": 1}, "more than there are prompts"),
        ({"comparer.kind": "people"}, "has no key 'reward'.*An empty value takes it away"),
    ],
)
def test_a_wrong_config_is_refused(tiny_config, tmp_path, monkeypatch, overrides, message):
    config = tiny_config("ziegler2019_sentiment", overrides)
    monkeypatch.setattr(online, "generate", pytest.fail)
    with pytest.raises((RunError, RewardError, DataError), match=message):
        online_preferences.run(config, Workdir(tmp_path / "run", config))
