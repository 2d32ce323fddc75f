"""Whole runs of reward models: what is learnt, saved, judged and refused."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from align_jax.algorithms import reward_model, sft
from align_jax.data import sources
from align_jax.data.builtin import load_builtin
from align_jax.data.dataset import Data
from align_jax.errors import DataError, RunError
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.model import RewardModel
from align_jax.training import offline, pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.optimizer import Optimizer
from align_jax.training.signals import Interrupted
from align_jax.training.workdir import Workdir
from align_jax.trees import flatten

FAST = {"num_steps": 200, "data.batch_size": 16, "optimizer.learning_rate": 1e-2}


def test_a_run_learns_saves_and_evaluates(tiny_config, tmp_path, capsys):
    config = tiny_config("reward_model", FAST | {"held_out": 28})
    workdir = Workdir(tmp_path / "run", config)
    summary = reward_model.run(config, workdir)["eval"]
    rows = read_metrics(workdir.path)
    assert len(rows) == 200
    assert np.mean([row["loss"] for row in rows[-8:]]) < 0.3 < rows[0]["loss"]
    assert summary["pairs"] == 28 and summary["accuracy"] > 0.8
    assert np.mean([row["rewards/accuracies"] for row in rows[-8:]]) > 0.9
    assert "accuracy" in capsys.readouterr().out
    report = workdir.path / "report"
    assert {p.name for p in report.iterdir()} == {
        "index.html",
        "summary.json",
        "calibration.png",
        "curves.png",
    }
    full = json.loads((report / "summary.json").read_text())
    assert full["accuracy"] == summary["accuracy"] and full["config"]["held_out"] == 28
    assert sum(row["pairs"] for row in full["reliability"]) == 28

    # What was saved is what was trained: as text, and by the command `evaluate`.
    again = reward_model.evaluate(config, workdir)["eval"]
    assert numbers(again) == pytest.approx(numbers(summary), rel=1e-4)
    reward = RewardModel.load(workdir.path)
    held_out = load_builtin("tiny_preferences")[-28:]
    chosen, rejected = (reward(held_out, [r[name] for r in held_out]) for name in SIDES)
    assert np.mean(chosen > rejected) == summary["accuracy"]
    assert chosen.mean() == pytest.approx(full["rewards"]["chosen"]["mean"], abs=1e-4)


SIDES = ("chosen", "rejected")


def numbers(tree):
    return [float(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce", "best_of_k"])
def test_every_k_wise_loss_learns_the_order(tiny_config, tmp_path, loss):
    overrides = {"loss": loss, "data.source": "builtin:tiny_ranked", "held_out": 28}
    config = tiny_config("reward_model", FAST | {"num_steps": 60} | overrides)
    summary = reward_model.run(config, Workdir(tmp_path, config))["eval"]
    assert summary["pairs"] > 28 == summary["prompts"]
    assert summary["accuracy"] > 0.9


def test_normalisation_gives_reference_samples_their_zero_and_unit(tiny_config, tmp_path):
    overrides = {"num_steps": 3, "normalization.kind": "mean_std", "normalization.limit": 40}
    overrides |= {"normalization.source": "builtin:review_openings", "normalization.policy": "tiny"}
    config = tiny_config("reward_model", overrides | {"normalization.max_new_tokens": 8})
    workdir = Workdir(tmp_path / "sampled", config)
    reward_model.run(config, workdir)
    lines = (workdir.path / "samples" / "reference.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 40 and len({sample["completion"] for sample in samples}) > 30
    reward = RewardModel.load(workdir.path)
    scores = reward(samples, [sample["completion"] for sample in samples])
    assert abs(scores.mean()) < 1e-4 and scores.std() == pytest.approx(1, abs=1e-4)
    stored = json.loads((workdir.path / "reward_model" / "reward.json").read_text())
    assert stored["origin"]["texts"] == 40
    assert stored["gain"] == pytest.approx(1 / stored["origin"]["std"])
    assert stored["origin"]["normalization"]["policy"] == "tiny"

    # Stiennon: demonstrations at 0, the unit as it was trained.
    overrides = {"num_steps": 3, "normalization.kind": "mean", "lora.rank": 2}
    config = tiny_config("reward_model", overrides | {"normalization.source": "builtin:tiny_sft"})
    workdir = Workdir(tmp_path / "read", config)
    reward_model.run(config, workdir)
    records = load_builtin("tiny_sft")
    scores = RewardModel.load(workdir.path)(records, [r["completion"] for r in records])
    assert abs(scores.mean()) < 1e-4
    assert json.loads((workdir.path / "reward_model" / "reward.json").read_text())["gain"] == 1


def test_an_ensemble_learns_from_samples_of_the_data_and_its_mean_is_judged(
    tiny_config, tmp_path, monkeypatch
):
    overrides = {"ensemble": 2, "held_out": 28, "num_steps": 30}
    overrides |= {"normalization.kind": "mean_std", "normalization.source": "builtin:tiny_sft"}
    config = tiny_config("reward_model", FAST | overrides)
    workdir = Workdir(tmp_path, config)
    train_offline, learnt_from = reward_model.train_offline, []

    def spy(config, directory, model, mesh, examples, *args, **kwargs):
        learnt_from.append([example.id for example in examples])
        return train_offline(config, directory, model, mesh, examples, *args, **kwargs)

    monkeypatch.setattr(reward_model, "train_offline", spy)
    summary = reward_model.run(config, workdir)["eval"]
    # As many as there are, drawn with replacement: some twice, about a third not at all.
    assert learnt_from[0] != learnt_from[1]
    for ids in learnt_from:
        assert len(ids) == 100 > len(set(ids)) > 50 and set(ids) <= set(range(100))
    reward = RewardModel.load(workdir.path)
    held_out = load_builtin("tiny_preferences")[-28:]
    each = [reward.member_scores(held_out, [r[name] for r in held_out]) for name in SIDES]
    gaps = each[0] - each[1]
    assert summary["accuracy"] == np.mean(gaps.mean(0) > 0)
    assert summary["ensemble"]["accuracy"] == np.mean(gaps > 0, axis=1).tolist()
    log_odds = [gap / scale.gain for gap, (_, scale) in zip(gaps, reward.members)]
    expected = np.mean(np.abs(log_odds[0] - log_odds[1]) / 2)
    assert summary["ensemble"]["disagreement"] == pytest.approx(expected, rel=1e-4)
    again = reward_model.evaluate(config, workdir)["eval"]
    assert numbers(again) == numbers(summary)


def test_the_report_is_about_each_text_by_itself_as_the_reward_will_score_it(tiny_config, tmp_path):
    overrides = {"num_steps": 4, "held_out": 28, "center_coefficient": 0.1}
    overrides |= {"data.max_length": 24, "data.overlong": "truncate"}
    config = tiny_config("reward_model", overrides)
    workdir = Workdir(tmp_path, config)
    reward_model.run(config, workdir)
    summary = json.loads((workdir.path / "report" / "summary.json").read_text())
    reward, held_out = RewardModel.load(workdir.path), load_builtin("tiny_preferences")[-28:]
    lengths = [len(reward.tokenizer(r["prompt"] + r["chosen"]).input_ids) for r in held_out]
    assert min(lengths) > 24 and summary["prompts"] == 28
    for name in SIDES:
        alone = [reward([r], [r[name]])[0] - reward.members[0][1].bias for r in held_out]
        assert summary["rewards"][name]["mean"] == pytest.approx(np.mean(alone), abs=1e-5)
        assert summary["rewards"][name]["std"] == pytest.approx(np.std(alone), abs=1e-5)
    reward_model.evaluate(config, workdir)
    assert json.loads((workdir.path / "report" / "summary.json").read_text()) == summary


def test_accumulation_changes_nothing_for_rankings_of_several_lengths(tiny_config, tmp_path):
    records = [
        {"prompt": f"{k} of", "completions": [" x" * (1 + i) for i in range(k)], "best": k - 1}
        for k in (2, 4, 3, 2, 3, 4, 2, 4)
    ]
    file = tmp_path / "best.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = []
    for parts in (1, 4):
        overrides = {"loss": "best_of_k", "num_steps": 3, "data.source": str(file)}
        overrides |= {"data.batch_size": 8, "data.rows": 1, "data.accumulation": parts}
        config = tiny_config("reward_model", overrides)
        reward_model.run(config, workdir := Workdir(tmp_path / str(parts), config))
        rows.append(read_metrics(workdir.path))
    for whole, accumulated in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies"):
            assert accumulated[name] == pytest.approx(whole[name], rel=1e-4), name


def test_interrupted_while_training_and_while_saving_it_ends_with_the_same_model(
    tiny_config, tmp_path, monkeypatch
):
    config = tiny_config("reward_model", {"num_steps": 8, "checkpoint_every": 3, "held_out": 28})
    whole = Workdir(tmp_path / "whole", config)
    summary = reward_model.run(config, whole)
    cut = Workdir(tmp_path / "cut", config)
    place_batch, seen = offline.place_batch, []

    def stop_at_the_fifth(batch, mesh, *, accumulated):
        seen.append(None)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return place_batch(batch, mesh, accumulated=accumulated)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "place_batch", stop_at_the_fifth)
        with pytest.raises(Interrupted):
            reward_model.run(config, cut)
    assert not (cut.path / "reward_model").exists()
    replace = os.replace

    def killed_before_it_stands(source, target):
        if target == cut.path / "reward_model":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_before_it_stands)
        with pytest.raises(Killed):
            reward_model.run(config, cut)
    assert not (cut.path / "reward_model").exists()
    # What was half saved does not get in the way.
    (cut.path / ".reward_model" / "model.safetensors").write_bytes(b"half")
    assert reward_model.run(config, cut) == summary
    for name in ("model.safetensors", "reward.json"):
        a, b = (run.path / "reward_model" / name for run in (whole, cut))
        assert a.read_bytes() == b.read_bytes()
    # Killed after that and before it was finished, it trains nothing again.
    monkeypatch.setattr(reward_model, "train_offline", pytest.fail)
    again = reward_model.run(config, cut)
    assert numbers(again) == pytest.approx(numbers(summary), rel=1e-4)


class Killed(BaseException):
    pass


def test_it_starts_from_the_run_of_another_algorithm(tiny_config, tmp_path):
    tuned = Workdir(tmp_path / "sft", config := tiny_config("sft", {"num_steps": 2}))
    sft.run(config, tuned)
    overrides = {"model": str(tuned.path), "num_steps": 1, "optimizer.learning_rate": 0.0}
    config = tiny_config("reward_model", overrides)
    workdir = Workdir(tmp_path / "reward", config)
    reward_model.run(config, workdir)
    mesh = pretrained.open_mesh(config)
    expected = flatten(pretrained.load_pretrained(config, str(tuned.path), mesh))
    [(model, _)] = RewardModel.load(workdir.path).members
    for name, leaf in flatten(model.transformer).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    base = flatten(load_model("tiny"))
    assert any((np.asarray(base[name]) != expected[name]).any() for name in expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss": "pair"}, "config.loss is 'pair'; expected one of pairwise"),
        ({"loss": "all_pairs", "label_smoothing": 0.1}, "label_smoothing is for .*'pairwise' only"),
        ({"ensemble": 0}, "config.ensemble is 0"),
        ({"held_out": 128}, "config.held_out is 128, and config.data.source has 128"),
        ({"margins": "llama2_small"}, "no 'strength'"),
        ({"label_smoothing": 0.6}, "config.label_smoothing is 0.6"),
        ({"center_coefficient": -1.0}, "config.center_coefficient is -1.0"),
        (
            {"held_out": 8, "data.eval_source": "builtin:tiny_chat_preferences"},
            "config.held_out = 8 and config.data.eval_source both",
        ),
        ({"normalization.kind": "std"}, "normalization.kind is 'std'; expected one of none"),
        ({"normalization.kind": "mean"}, "needs config.normalization.source"),
        ({"normalization.source": "builtin:tiny_sft"}, "normalization.kind is 'none', so nothing"),
        ({"data.eval_source": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_computed(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(pretrained, "load_pretrained", pytest.fail)
    with pytest.raises((RunError, DataError), match=message):
        config = tiny_config("reward_model", overrides)
        reward_model.run(config, Workdir(tmp_path, config))


# From Python. Which response is better shows at its first letter.
PAIRS = [
    {"prompt": f"{i} or {j}?", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + j % 3)}
    for i in range(6)
    for j in range(6)
]
FROM_PYTHON = reward_model.Config(
    model="tiny",
    num_steps=40,
    ensemble=2,
    optimizer=Optimizer(learning_rate=1e-2),
    data=Data(batch_size=8, max_length=64, length_buckets=(64,)),
    normalization=reward_model.Normalization(kind="mean_std", source="builtin:tiny_sft", limit=8),
)
TEXTS = ([r for r in PAIRS[:4] for _ in SIDES], [r[name] for r in PAIRS[:4] for name in SIDES])


def test_an_ensemble_trains_from_python_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    before = flatten(jax.tree.map(np.asarray, model))
    result = reward_model.train(model, tokenizer, PAIRS[:30], FROM_PYTHON, held_out=PAIRS[30:])
    assert isinstance(result.model, RewardModel) and len(result.model.members) == 2
    assert result.summary["eval"]["pairs"] == 6 and result.summary["eval"]["accuracy"] == 1
    assert [(row["member"], row["step"]) for row in result.metrics] == [
        (member, step) for member in (0, 1) for step in range(1, 41)
    ]
    rewards = result.model(*TEXTS)
    assert (rewards[::2] > rewards[1::2]).all()
    demonstrations = load_builtin("tiny_sft")[:8]
    each = result.model.member_scores(demonstrations, [r["completion"] for r in demonstrations])
    np.testing.assert_allclose(each.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(each.std(1), 1, atol=1e-4)
    assert result.workdir is None and not list(tmp_path.iterdir())
    for name, leaf in flatten(model).items():
        np.testing.assert_array_equal(before[name], leaf, err_msg=name)

    # In a directory it is the same model, and the one that anybody reads there.
    kept = reward_model.train(
        model, tokenizer, PAIRS[:30], FROM_PYTHON, held_out=PAIRS[30:], workdir=tmp_path / "run"
    )
    assert [row["loss"] for row in kept.metrics] == [row["loss"] for row in result.metrics]
    np.testing.assert_array_equal(kept.model(*TEXTS), RewardModel.load(tmp_path / "run")(*TEXTS))
    np.testing.assert_allclose(kept.model(*TEXTS), rewards, atol=1e-5)
    report = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert report["data"] == "6 records"
    # Called again, it trains nothing again.
    monkeypatch.setattr(reward_model, "train_offline", pytest.fail)
    again = reward_model.train(
        model, tokenizer, PAIRS[:30], FROM_PYTHON, held_out=PAIRS[30:], workdir=tmp_path / "run"
    )
    assert again.metrics == kept.metrics and again.summary == kept.summary


def test_reference_samples_of_a_run_from_python_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    normalization = reward_model.Normalization(
        kind="mean_std", source="builtin:review_openings", policy="tiny", limit=6, max_new_tokens=8
    )
    config = dataclasses.replace(
        FROM_PYTHON, ensemble=1, num_steps=1, held_out=4, normalization=normalization
    )
    result = reward_model.train(load_model("tiny"), load_tokenizer("tiny"), PAIRS, config)
    [(_, scale)] = result.model.members
    assert scale.origin["texts"] == 6 and scale.gain == pytest.approx(1 / scale.origin["std"])
    assert result.summary["eval"]["pairs"] == 4 and "member" not in result.metrics[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("records", "held_out", "changes", "message"),
    [
        ([PAIRS[0], {"prompt": "x"}], (), {}, r"records\[1\]: field"),
        (PAIRS, [{"prompt": "x"}], {}, r"records\[0\]: field"),
        (PAIRS, PAIRS[:2], {"held_out": 2}, "held_out = 2 and the argument held_out both say"),
        (PAIRS[:3], (), {"held_out": 3}, "config.held_out is 3, and there are 3 records"),
        (PAIRS, (), {"loss": "all_pairs"}, r"records\[0\]: .* record of kind 'preference'"),
        ([], (), {}, "there are no records"),
    ],
)
def test_wrong_records_from_python_are_named_before_training(
    monkeypatch, records, held_out, changes, message
):
    monkeypatch.setattr(reward_model, "train_offline", pytest.fail)
    config = dataclasses.replace(FROM_PYTHON, **changes)
    with pytest.raises((RunError, DataError), match=message):
        model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
        reward_model.train(model, tokenizer, records, config, held_out=held_out)


def test_sources_are_read_once(tiny_config, tmp_path, monkeypatch):
    load_records, read = sources.load_records, []

    def spy(source, **kwargs):
        read.append(source)
        return load_records(source, **kwargs)

    monkeypatch.setattr(sources, "load_records", spy)
    overrides = {"data.eval_source": "builtin:tiny_chat_preferences", "num_steps": 1}
    overrides |= {"normalization.kind": "mean", "normalization.source": "builtin:tiny_sft"}
    config = tiny_config("reward_model", overrides)
    reward_model.run(config, Workdir(tmp_path, config))
    assert read == [
        "builtin:tiny_preferences",
        "builtin:tiny_chat_preferences",
        "builtin:tiny_sft",
    ]
