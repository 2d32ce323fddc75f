"""Reward models: every loss against brute force, scores where they belong, and whole runs."""

import dataclasses
import itertools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import reward_model, sft
from align_jax.algorithms.comparisons import attach, prepare
from align_jax.algorithms.reward_model import make_loss
from align_jax.data.builtin import load_builtin
from align_jax.data.chat import Example
from align_jax.data.formats import DataError
from align_jax.models.heads import ScalarModel, response_scores
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.model import RewardModel
from align_jax.training import loop, offline, pretrained
from align_jax.training.checkpoint import flatten
from align_jax.training.errors import RunError
from align_jax.training.loop import Interrupted
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir

EOS = load_tokenizer("tiny").eos_token_id


@pytest.fixture(scope="module")
def model():
    return ScalarModel(load_model("tiny"), key=jax.random.key(3))


def example(rng, lengths, *, prompt=5, id=0, **extras):
    responses = tuple(rng.integers(8, 264, length).astype(np.int32) for length in lengths)
    return Example(
        id=id,
        prompt=rng.integers(8, 264, prompt).astype(np.int32),
        responses=responses,
        response_masks=tuple(np.ones(length, np.float32) for length in lengths),
        extras={"where": f"file:{id}", **extras},
    )


def score_alone(model, prompt, response):
    """The scalar at the last token of one text, computed by itself."""
    tokens = np.concatenate([prompt, response])[None]
    hidden = np.asarray(model.transformer(tokens), np.float64)[0, -1]
    return float(hidden @ np.asarray(model.head.head_kernel[...]) + model.head.head_bias[...])


def batch_of(examples, *, rows=0):
    data = offline.default_data_config(batch_size=len(examples), rows=rows)
    batch = offline.make_collate(data, attach)(examples)
    return jax.tree.map(jnp.asarray, batch)


# --- scores


def test_the_score_is_that_of_the_last_real_token_for_every_length_with_and_without_eos(model):
    rng = np.random.default_rng(0)
    examples = []
    for length, ends in itertools.product((1, 2, 3, 7, 20), (True, False)):
        one = example(rng, (length, 4), id=len(examples), prompt=1 + length % 3)
        if ends:
            closed = np.append(one.responses[0][:-1], EOS).astype(np.int32)
            one = dataclasses.replace(one, responses=(closed, one.responses[1]))
        examples.append(one)
    expected = [score_alone(model, e.prompt, r) for e in examples for r in e.responses]
    for rows in (0, 3):  # a row each, and packed
        scores = response_scores(model, batch_of(prepare(CONFIG(), examples), rows=rows))
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(model, side):
    text = np.random.default_rng(1).integers(8, 264, 9).astype(np.int32)
    alone = model(text[None])[0, -1]
    padding = np.full(6, EOS, np.int32)
    tokens = np.concatenate([padding, text] if side == "left" else [text, padding])[None]
    real = np.concatenate([np.zeros(6), np.ones(9)][:: 1 if side == "left" else -1])
    scalars = model(tokens, segment_ids=real[None].astype(np.int32))
    np.testing.assert_allclose(scalars[0, -1 if side == "left" else 8], alone, atol=1e-5)


def test_the_head_starts_as_stiennon_says():
    kernels = [ScalarModel(load_model("tiny"), key=key).head for key in jax.random.split(KEY, 40)]
    values = np.concatenate([np.asarray(head.head_kernel[...]) for head in kernels])
    deviation = 1 / math.sqrt(32 + 1)
    assert abs(values.mean()) < 4 * deviation / math.sqrt(len(values))
    assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(values)))
    assert all(float(head.head_bias[...]) == 0 for head in kernels)


KEY = jax.random.key(0)


# --- losses


def CONFIG(**overrides):
    config = reward_model.default_reward_model_config()
    config.update(overrides)
    return config


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_k_wise_records_in_one_batch_are_the_brute_force_loop_over_their_pairs(model):
    rng = np.random.default_rng(2)
    all_ranks = [(2, 0, 1, 3), (1, 0), (0, 1, 1), (3, 1, 2, 0, 4), (0, 0)]
    examples = [
        example(rng, rng.integers(1, 9, len(ranks)), id=i, ranks=list(ranks))
        for i, ranks in enumerate(all_ranks)
    ]
    losses, accuracies, margins = [], [], []
    for one, ranks in zip(examples, all_ranks):
        scores = [score_alone(model, one.prompt, response) for response in one.responses]
        pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2)]
        ordered = [scores[i] - scores[j] for i, j in pairs if ranks[i] < ranks[j]]
        if ordered:  # the last record is one tie, and has no say
            losses.append(np.mean([-log_sigmoid(d) for d in ordered]))
            accuracies.append(np.mean([d > 0 for d in ordered]))
            margins.append(np.mean(ordered))
    config = CONFIG(loss="all_pairs")
    prepared = prepare(config, examples)
    sums = make_loss(config)(model, batch_of(prepared, rows=2))
    assert float(sums.weight) == 4
    np.testing.assert_allclose(sums.loss, np.sum(losses), rtol=1e-5)
    np.testing.assert_allclose(sums.metrics["rewards/accuracies"], np.sum(accuracies), rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["rewards/margins"], np.sum(margins), atol=1e-5)
    # Without ties a record of K is weighted by 1 / (K choose 2): the mean over its pairs.
    gradient = jax.grad(lambda m: make_loss(config)(m, batch_of(prepared)).loss)(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient.head.head_kernel[...]).max()) > 1e-3


@pytest.mark.parametrize("loss", ["plackett_luce", "best_of_k"])
def test_losses_over_k_responses_with_different_k_in_one_batch(model, loss):
    rng = np.random.default_rng(3)
    all_ranks = [(2, 0, 1), (1, 0), (3, 2, 1, 0)]
    examples = [
        example(rng, rng.integers(1, 9, len(ranks)), id=i, ranks=list(ranks))
        for i, ranks in enumerate(all_ranks)
    ]
    expected = 0.0
    for one, ranks in zip(examples, all_ranks):
        scores = np.array([score_alone(model, one.prompt, r) for r in one.responses])
        by_rank = scores[np.argsort(ranks)]
        last = len(ranks) - 1 if loss == "plackett_luce" else 1
        expected += sum(np.log(np.exp(by_rank[i:]).sum()) - by_rank[i] for i in range(last))
    config = CONFIG(loss=loss)
    batch = batch_of(prepare(config, examples))
    value, gradient = jax.value_and_grad(lambda m: make_loss(config)(m, batch).loss)(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_a_pair_costs_with_margin_smoothing_and_centre(model):
    rng = np.random.default_rng(4)
    margins = (0.0, 0.5, 2.0)
    examples = [example(rng, (4, 6), id=i, margin=m) for i, m in enumerate(margins)]
    config = CONFIG(label_smoothing=0.1, center_coefficient=0.01)
    sums = make_loss(config)(model, batch_of(prepare(config, examples)))
    expected = 0.0
    for one, margin in zip(examples, margins):
        a, b = (score_alone(model, one.prompt, response) for response in one.responses)
        z = a - b - margin
        expected += -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z) + 0.01 * (a + b) ** 2
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


def test_margins_from_strengths_are_llama_2s_table():
    rng = np.random.default_rng(5)

    def margins(table, strengths):
        examples = [example(rng, (2, 2), strength=s) for s in strengths]
        return [e.extras["margin"] for e in prepare(CONFIG(margins=table), examples)]

    assert margins("llama2_large", [3.0, 2.0, 1.0, 0.0]) == [3, 2, 1, 0]
    assert margins("llama2_small", [3.0, 2.0, 1.0, 0.0]) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    config = reward_model.default_reward_model_config()
    with config.ignore_type():
        config.margins = {"much": 1.5, "2": 0.25}
    named = [example(rng, (2, 2), strength=s) for s in ("much", 2.0)]
    assert [e.extras["margin"] for e in prepare(config, named)] == [1.5, 0.25]
    with pytest.raises(RunError, match="file:0: strength 'some' is not in config.margins"):
        prepare(config, [example(rng, (2, 2), strength="some")])
    with pytest.raises(RunError, match="file:0: no 'strength'"):
        prepare(config, [example(rng, (2, 2))])
    with pytest.raises(RunError, match="'llama3'; expected one of llama2_small"):
        margins("llama3", [3.0])


def test_batches_of_any_mixture_of_k_share_one_compilation(model):
    rng = np.random.default_rng(6)
    config = CONFIG(loss="all_pairs")
    records = [example(rng, (3,) * k, id=k, ranks=list(range(k))) for k in (2, 3, 4, 2, 4, 4)]
    prepared = prepare(config, records)
    step = jax.jit(make_loss(config))
    for start in (0, 2, 4):
        step(model, batch_of(prepared[start : start + 2]))
    assert step._cache_size() == 1


def test_ranks_that_say_nothing_are_refused():
    with pytest.raises(RunError, match="all 1 records rank all of their completions alike"):
        prepare(CONFIG(loss="all_pairs"), [example(np.random.default_rng(0), (2, 2), ranks=[1, 1])])
    examples = [example(np.random.default_rng(0), (2, 2, 2), ranks=[0, 0, 1])]
    with pytest.raises(RunError, match="file:0: 2 completions have rank 0"):
        prepare(CONFIG(loss="best_of_k"), examples)


# --- whole runs

FAST = {"num_steps": 200, "data.batch_size": 16, "optimizer.learning_rate": 1e-2}


def test_a_run_starts_at_log_2_learns_saves_and_evaluates(tiny_config, tmp_path, capsys):
    config = tiny_config("reward_model", FAST | {"held_out": 28})
    workdir = Workdir(tmp_path / "run", config)
    summary = reward_model.run(config, workdir)["eval"]
    rows = read_metrics(workdir.path)
    assert len(rows) == 200 and 0.3 < rows[0]["loss"] < 1.5
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


def test_an_ensemble_has_members_of_its_own_and_their_mean_counts(tiny_config, tmp_path):
    config = tiny_config("reward_model", FAST | {"ensemble": 2, "held_out": 28, "num_steps": 30})
    workdir = Workdir(tmp_path, config)
    summary = reward_model.run(config, workdir)["eval"]
    assert len(summary["ensemble"]["accuracy"]) == 2
    assert summary["ensemble"]["disagreement"] > 0.01
    reward = RewardModel.load(workdir.path)
    records = load_builtin("tiny_preferences")[:5]
    texts = [record["chosen"] for record in records]
    each = reward.member_scores(records, texts)
    assert each.shape == (2, 5) and (each[0] != each[1]).all()
    np.testing.assert_allclose(reward(records, texts), each.mean(0), rtol=1e-6)
    expected = np.abs(each[0] - each[1]) / 2
    np.testing.assert_allclose(reward.disagreement(records, texts), expected, rtol=1e-4)
    again = reward_model.evaluate(config, workdir)["eval"]
    assert numbers(again) == pytest.approx(numbers(summary), rel=1e-4)


def test_interrupted_while_training_and_while_saving_it_ends_with_the_same_model(
    tiny_config, tmp_path, monkeypatch
):
    config = tiny_config("reward_model", {"num_steps": 8, "checkpoint_every": 3, "held_out": 28})
    whole = Workdir(tmp_path / "whole", config)
    summary = reward_model.run(config, whole)
    cut = Workdir(tmp_path / "cut", config)
    place_batch, seen = loop.place_batch, []

    def stop_at_the_fifth(batch, mesh, *, accumulated):
        seen.append(None)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return place_batch(batch, mesh, accumulated=accumulated)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "place_batch", stop_at_the_fifth)
        with pytest.raises(Interrupted):
            reward_model.run(config, cut)
    assert not (cut.path / "reward_model").exists()
    with monkeypatch.context() as patch:
        patch.setattr(reward_model.os, "replace", killed)
        with pytest.raises(Killed):
            reward_model.run(config, cut)
    assert not (cut.path / "reward_model").exists()
    assert reward_model.run(config, cut) == summary
    for name in ("model.safetensors", "reward.json"):
        a, b = (run.path / "reward_model" / name for run in (whole, cut))
        assert a.read_bytes() == b.read_bytes()
    # Killed after that and before it was finished, it trains nothing again.
    monkeypatch.setattr(offline, "train", pytest.fail)
    again = reward_model.run(config, cut)
    assert numbers(again) == pytest.approx(numbers(summary), rel=1e-4)


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


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
        ({"data.eval_source": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_computed(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(pretrained, "open_model", pytest.fail)
    config = tiny_config("reward_model", overrides)
    with pytest.raises((RunError, DataError), match=message):
        reward_model.run(config, Workdir(tmp_path, config))
