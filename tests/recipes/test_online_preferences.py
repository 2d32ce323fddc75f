"""Rounds of generating, comparing, refitting and continuing; stopped anywhere; moved."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest

from align_jax import files
from align_jax.algorithms import policy_gradient, reward_model, settings_of
from align_jax.config import load_config
from align_jax.data.sources import load_records
from align_jax.errors import DataError, RewardError, RunError
from align_jax.generation import rollout as rollouts
from align_jax.losses.policy_gradient import adaptive_kl_update
from align_jax.models.interchange import load_tokenizer
from align_jax.recipes import online_preferences
from align_jax.recipes.online_preferences import rank_by_wins
from align_jax.rewards.model import load_reward_model
from align_jax.rewards.people import WaitingForLabels
from align_jax.training import metrics, pretrained
from align_jax.training.phases import Phases
from align_jax.training.signals import Interrupted
from align_jax.training.workdir import Workdir, read_config
from align_jax.trees import flatten
from tests.conftest import EXPERIMENTS


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
# Saved after every step, and a controller that moves.
INTERRUPTED = SMALL | {
    "seed": 1,
    "reward_model.checkpoint_every": 1,
    "policy.checkpoint_every": 1,
    "policy.num_iterations": 2,
    "policy.kl.horizon": 16,
}
RUNS = [f"round_{n}/{run}" for n in range(2) for run in ("reward", "policy")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config of two rounds and the workdir of their uninterrupted run."""
    items = [f"--config.{key}={value}" for key, value in INTERRUPTED.items()]
    config = load_config(f"{EXPERIMENTS / 'ziegler2019_sentiment'}.py:scale=tiny", items)
    config = settings_of(config)
    folder = tmp_path_factory.mktemp("rounds") / "whole"
    assert list(online_preferences.run(config, Workdir(folder, config))) == RUNS
    return config, folder


class Killed(BaseException):
    """A kill, as far as one process can show it: nothing catches this."""


@contextlib.contextmanager
def killed_before_renaming(name):
    """Killed when a file called NAME is about to be put in its place."""
    rename = os.replace

    def replace(source, target):
        if str(target).endswith(name):
            raise Killed
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        patch.setattr(files.Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            yield


@contextlib.contextmanager
def stopped_at(folder, step, action, expected):
    """ACTION happens when the run in FOLDER has written the metrics of STEP and not saved it."""
    write = metrics.MetricWriter.write

    def wrapped(self, number, values):
        write(self, number, values)
        if str(folder) in self._file.name and number == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.MetricWriter, "write", wrapped)
        with pytest.raises(expected):
            yield


def signalled(number):
    return lambda: signal.raise_signal(number)


def kill():
    raise Killed


def test_rounds_interrupted_in_every_phase_are_those_left_alone(whole, tmp_path):
    config, folder = whole
    parts = tmp_path / "parts"
    interruptions = [
        killed_before_renaming("sample.jsonl"),
        killed_before_renaming("all_comparisons.jsonl"),
        stopped_at("round_0/reward", 2, signalled(signal.SIGTERM), Interrupted),
        killed_before_renaming("round_0/policy/finished.json"),
        stopped_at("round_1/policy", 1, signalled(signal.SIGINT), Interrupted),
        stopped_at("round_1/policy", 2, kill, Killed),
    ]
    for interruption in interruptions:
        with interruption:
            online_preferences.run(config, Workdir(parts, config))
    online_preferences.run(config, Workdir(parts, config))
    for run in RUNS:
        rows = [
            [
                {k: x for k, x in row.items() if k != "wall_time" and not k.startswith("seconds/")}
                for row in read(one / run / "metrics.jsonl")
            ]
            for one in (folder, parts)
        ]
        assert rows[0] == rows[1] and len(rows[0]) >= 2, run
        load = load_reward if run.endswith("reward") else load_policy
        a, b = (load(config, one / run) for one in (folder, parts))
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{run}: {name}")
    for file in ("samples/sample.jsonl", "samples/comparisons.jsonl", "all_comparisons.jsonl"):
        for number in range(2):
            one, other = (path / f"round_{number}" / file for path in (folder, parts))
            assert one.read_bytes() == other.read_bytes(), one


def load_policy(config, folder):
    mesh = pretrained.open_mesh(config.policy)
    return flatten(pretrained.load_pretrained(config.policy, folder, mesh))


def load_reward(config, folder):
    return flatten(load_reward_model(folder / "reward_model")[0])


def test_what_a_round_learns_from(whole):
    _, folder = whole
    # The oracle is the length of a completion: ranks follow it.
    records = read(folder / "round_0/samples/comparisons.jsonl")
    assert len(records) == 8
    for record in records:
        lengths = [len(text) for text in record["completions"]]
        assert record["ranks"] == [sum(other > own for other in lengths) for own in lengths]
    # The second round's reward model learns from both rounds, and other prompts were asked.
    counts = [len(read(folder / f"round_{n}/all_comparisons.jsonl")) for n in range(2)]
    assert counts[1] > counts[0]
    later = read(folder / "round_1/samples/comparisons.jsonl")
    assert not {r["prompt"] for r in records} & {r["prompt"] for r in later}
    # What was compared is not what the policy then learns from.
    drawn = read(folder / "round_0/samples/sample.jsonl")
    learnt = read(folder / "round_0/policy/samples/iteration_000000.jsonl")
    assert not {tuple(s["tokens"]) for s in drawn} & {tuple(s["tokens"]) for s in learnt}
    # It continues the first round's policy: the KL to the reference is not 0 at its start.
    first, second = (
        read(folder / f"round_{n}/policy/metrics.jsonl")[0]["objective/kl"] for n in range(2)
    )
    assert first == 0.0 and second != 0.0
    # Every run has a seed of its own.
    assert len({read_config(folder / run)["seed"] for run in RUNS}) == 4
    # Nothing is left of the reward that the config names, which no round learns from.
    reward = {"kind": "model", "path": str(folder / "round_0/reward")}
    assert read_config(folder / "round_0/policy")["reward"] == reward


def test_the_kl_controller_runs_through_the_rounds(whole):
    config, folder = whole
    before, after = (read(folder / f"round_{n}/policy/metrics.jsonl") for n in range(2))
    assert before[0]["objective/kl_coefficient"] == pytest.approx(config.policy.kl.coefficient)
    last = before[-1]
    expected = adaptive_kl_update(
        np.float32(last["objective/kl_coefficient"]),
        np.float32(last["objective/kl"]),
        target=config.policy.kl.target,
        horizon=config.policy.kl.horizon,
        batch_size=config.policy.sampling.prompts * config.policy.sampling.samples,
    )
    assert after[0]["objective/kl_coefficient"] == pytest.approx(float(expected), rel=1e-6)
    assert abs(expected - config.policy.kl.coefficient) > 0.01


def test_rounds_that_were_moved_go_on_and_are_read(whole, tmp_path, monkeypatch):
    config, folder = whole
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    moved = tmp_path / "else" / "moved"
    moved.parent.mkdir()
    summary = {run: Workdir(original / run, config_at(original / run)).finished() for run in RUNS}
    original.rename(moved)
    monkeypatch.setattr(reward_model, "run", pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(policy_gradient, "run", pytest.fail)
        assert online_preferences.run(config, Workdir(moved, config)) == summary
    # One that had not finished goes on: here its last round's policy.
    (moved / "round_1/policy/finished.json").unlink()
    shutil.rmtree(moved / "round_1/policy/checkpoints")
    (moved / "round_1/policy/samples/train.jsonl").unlink()
    online_preferences.run(config, Workdir(moved, config))
    a, b = (load_policy(config, path) for path in (folder, moved))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    policy = read_config(moved / "round_1/policy")
    assert policy["init"] == str(moved / "round_0/policy")
    assert policy["reward"]["path"] == str(moved / "round_1/reward")


def config_at(folder):
    return settings_of(read_config(folder))


def test_people_label_through_files(tiny_config, tmp_path, monkeypatch):
    overrides = {"samples": 2, "prompts": 4, "rounds": 1, "result": "round_0/policy"}
    overrides |= {
        "comparer.kind": "people",
        "reward_model.data.source": "builtin:tiny_chat_preferences",
        "reward_model.data.limit": 3,
        "reward_model.data.batch_size": 1,
    }
    config = tiny_config("ziegler2019_sentiment", SMALL | overrides)
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
    records += [
        {
            "prompt": pair["prompt"],
            "completions": [pair["chosen"], pair["rejected"]],
            "ranks": [0, 1],
        }
        for pair in pairs
    ]
    assert sorted(learnt, key=json.dumps) == sorted(records, key=json.dumps)
    settings = json.loads((tmp_path / "run/round_0/reward/config.json").read_text())
    assert settings["data"]["limit"] == 0


def test_a_language_model_compares(tiny_config, tmp_path, monkeypatch):
    overrides = {"rounds": 1, "result": "round_0/policy"}
    overrides |= {"comparer.kind": "judge", "comparer.model": "tiny"}
    config = tiny_config("ziegler2019_sentiment", SMALL | overrides)
    monkeypatch.setattr(reward_model, "run", lambda *_: {})
    monkeypatch.setattr(policy_gradient, "run", lambda *_: {})
    online_preferences.run(config, Workdir(tmp_path / "run", config))
    records = read(tmp_path / "run/round_0/samples/comparisons.jsonl")
    assert len(records) == 8 and len({tuple(record["ranks"]) for record in records}) > 1


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name, key", [("ziegler2019_sentiment", ""), ("hh_rlhf", "online.")])
def test_the_command_line_chooses_who_compares(name, key, scale):
    for kind, more in (("judge", {"model": "a"}), ("people", {}), ("oracle", {})):
        items = {"kind": kind} | more
        items = [f"--config.{key}comparer.{field}={value}" for field, value in items.items()]
        config = load_config(f"{EXPERIMENTS / name}.py:scale={scale}", items)
        settings = settings_of(config)
        comparer = (settings.stages["online"] if key else settings).comparer
        assert comparer["kind"] == kind


def compare(config, texts, tmp_path):
    record = {"prompt": "p"}
    samples = [{"prompt": "p", "record": record, "text": text} for text in texts]
    (found,) = online_preferences._compare(config, samples, tmp_path)
    return found["ranks"]


def test_equal_texts_share_a_rank_and_nobody_is_asked_about_them(
    tiny_config, tmp_path, monkeypatch
):
    config = tiny_config("ziegler2019_sentiment", {"samples": 3})
    asked = []

    def comparer(records, first, second):
        asked.extend(zip(first, second))
        # Float32, of which one minus it is another number than the answer to the swapped question.
        return np.where(np.array(first) < np.array(second), np.float32(0.3), np.float32(0.7000001))

    monkeypatch.setattr(online_preferences, "make_comparer", lambda *_, **__: comparer)
    assert compare(config, ["a", "c", "a"], tmp_path) == [1, 0, 1]
    assert compare(config, ["c", "a", "a"], tmp_path) == [0, 1, 1]
    assert asked == [("a", "c"), ("c", "a")]
    assert compare(config, ["b", "b", "b"], tmp_path) == [0, 0, 0] and len(asked) == 2
    assert compare(config, ["a", "b", "c"], tmp_path) == [2, 1, 0] and len(asked) == 5


def test_an_oracle_may_count_the_policys_tokens(tiny_config, tmp_path):
    config = tiny_config("ziegler2019_sentiment", {"samples": 3})
    reward = {"kind": "length_target", "target": 2}
    config = dataclasses.replace(config, comparer={"kind": "oracle", "reward": reward})
    texts = ["a", "of the people", "so"]
    tokenizer = load_tokenizer("tiny")
    gaps = [-abs(len(tokenizer(text, add_special_tokens=False).input_ids) - 2) for text in texts]
    assert compare(config, texts, tmp_path) == rank_by_wins(np.array(gaps))


def test_what_is_held_out_is_a_fair_share(tiny_config, tmp_path):
    pairs = [{"prompt": f"old {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    pairs = [pair for pair in pairs for _ in range(2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    overrides = {"reward_model.data.source": tmp_path / "pairs.jsonl"}
    config = tiny_config("ziegler2019_sentiment", overrides)
    for number in range(2):
        made = [
            {"prompt": f"round {number} {i}", "completions": ["a", "b"], "ranks": [0, 1]}
            for i in range(40)
        ]
        (tmp_path / f"round_{number}").mkdir()
        Phases(tmp_path / f"round_{number}").run("comparisons", lambda: made)  # noqa: B023
    settings = online_preferences._reward_config(config, tmp_path, 1)
    prompts = [record["prompt"] for record in read(tmp_path / "round_1/all_comparisons.jsonl")]
    assert len(prompts) == 160
    held_out = prompts[-60:]
    for kind, share in (("old", 30), ("round 0", 15), ("round 1", 15)):
        count = sum(prompt.startswith(kind) for prompt in held_out)
        assert abs(count - share) <= 9, kind
    # The records of one prompt stand next to each other.
    starts = [p for p, before in zip(prompts, ["", *prompts]) if p != before]
    assert len(starts) == len(set(starts)) == 120
    # The order is the config's and the round's own, and stays.
    online_preferences._reward_config(config, tmp_path, 0)
    first = [record["prompt"] for record in read(tmp_path / "round_0/all_comparisons.jsonl")]
    assert first != [prompt for prompt in prompts if not prompt.startswith("round 1")]
    os.remove(settings.data.source)
    online_preferences._reward_config(config, tmp_path, 1)
    again = [record["prompt"] for record in read(tmp_path / "round_1/all_comparisons.jsonl")]
    assert again == prompts


def test_ranks_count_who_won_more():
    assert rank_by_wins(np.array([2.0, 0.5, 3.0, 0.5])) == [1, 2, 0, 2]


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
        ({"comparer.kind": "poeple"}, "config.comparer: there is no kind 'poeple'.*'people'"),
        ({"comparer.kind": "judge"}, r"config.comparer \(kind 'judge'\) needs the key 'model'"),
        ({"comparer.reward": "lenght"}, "config.comparer.reward: there is no kind 'lenght'"),
        ({"policy.seed": 3}, "config.policy.seed is 3, but .* config.seed: set that one"),
        ({"reward_model.seed": 3}, "config.reward_model.seed is 3, but .* config.seed: set"),
    ],
)
def test_a_wrong_config_is_refused(tiny_config, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(rollouts, "generate", pytest.fail)
    with pytest.raises((RunError, RewardError, DataError), match=message):
        config = tiny_config("ziegler2019_sentiment", overrides)
        online_preferences.run(config, Workdir(tmp_path / "run", config))


def test_a_key_that_no_kind_has_is_refused(tiny_config):
    config = tiny_config("ziegler2019_sentiment", {})
    comparer = {**config.comparer, "temprature": 1.0}
    with pytest.raises(RewardError, match="has no key 'temprature'. Did you mean 'temperature'"):
        dataclasses.replace(config, comparer=comparer)
