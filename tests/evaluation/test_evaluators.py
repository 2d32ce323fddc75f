"""Evaluators of a finished run: their settings, their numbers by hand, and what a run shows."""

import json
import math

import numpy as np
import pytest

from align_jax import main as command_line
from align_jax.algorithms import policy_gradient, preference, reward_model, sample, sft
from align_jax.data.dataset import Data
from align_jax.data.samples import read_samples
from align_jax.data.sources import load_records
from align_jax.errors import DataError, RewardError, RunError
from align_jax.evaluation import evaluators, statistics
from align_jax.evaluation.evaluators import Context, parse_evaluators, run_evaluators
from align_jax.generation import rollout
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.training import pretrained
from align_jax.training.optimizer import Optimizer
from align_jax.training.workdir import Workdir

SOURCE = "builtin:tiny_sft"
SAMPLING = {"prompts": 4, "samples": 3, "max_new_tokens": 6}
ON_SAMPLES = {"source": SOURCE, "sampling": SAMPLING}
ALL = (
    {"kind": "loss", "source": SOURCE, "limit": 4},
    {"kind": "samples", "reward": "length", **ON_SAMPLES},
    {"kind": "win_rate", "reward": "length", **ON_SAMPLES},
    {"kind": "win_rate", "name": "judged", "comparer": "tests.evaluation.test_evaluators:longer"}
    | ON_SAMPLES,
    {"kind": "kl", **ON_SAMPLES},
)


def longer(records, first, second):
    return [0.5 + 0.5 * np.sign(len(a) - len(b)) for a, b in zip(first, second)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of sft with every evaluator that it can have; its directory and result."""
    directory = tmp_path_factory.mktemp("run")
    data = Data(batch_size=4, max_length=64)
    config = sft.Config(num_steps=2, model="tiny", data=data, evaluators=ALL)
    records = [{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(8)]
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    return directory, sft.train(model, tokenizer, records, config, workdir=directory)


def test_each_evaluator_measures_what_it_says(trained):
    directory, result = trained
    found = result.summary["evaluators"]
    assert list(found) == ["loss", "samples", "win_rate", "judged", "kl"]
    assert found["loss"]["perplexity"] == pytest.approx(math.exp(found["loss"]["loss"]))
    own, base = (
        read_samples(directory / "samples" / f"evaluators_0_{policy}.jsonl")
        for policy in ("trained", "base")
    )
    assert len(own) == len(base) == 12
    lengths, of_base = (
        np.reshape([len(s["text"]) for s in samples], (4, 3)) for samples in (own, base)
    )
    mean, half_width = statistics.mean_ci95(lengths)
    assert found["samples"]["reward_mean"] == pytest.approx(mean)
    assert found["samples"]["reward_ci95"] == pytest.approx(half_width)
    assert found["samples"]["base"]["reward_mean"] == pytest.approx(of_base.mean())
    assert 0 < found["samples"]["distinct_2"] <= 1
    wins, error = statistics.win_rate(lengths, of_base)
    assert found["win_rate"]["win_rate"] == pytest.approx(wins)
    # Student's t with 3 degrees of freedom.
    assert found["win_rate"]["win_rate_ci95"] == pytest.approx(3.182446 * error, rel=1e-6)
    # A comparer is asked about as many pairs as there are samples.
    by_comparer = np.mean(0.5 + 0.5 * np.sign(lengths - of_base))
    assert found["judged"]["win_rate"] == pytest.approx(by_comparer)
    gains = [sum(s["log_probs"]) - s["base_log_prob"] for s in own]
    assert found["kl"]["kl"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert found["kl"]["base"] == {"kl": 0.0} and found["win_rate"]["base"] == {"win_rate": 0.5}


def test_the_report_has_a_column_for_what_was_measured(trained):
    directory, _ = trained
    summary = json.loads((directory / "report" / "summary.json").read_text())
    assert summary["trained"].keys() >= {
        "reward_mean",
        "win_rate",
        "judged: win_rate",
        "kl",
        "loss",
    }
    assert summary["base"]["loss"] is None and summary["base"]["win_rate"] == 0.5
    page = (directory / "report" / "index.html").read_text()
    for heading in ("mean reward", "win rate", "judged: win rate", "KL (nats)", "loss"):
        assert f">{heading}</th>" in page
    names = {path.name for path in (directory / "report").iterdir()}
    assert names >= {"rewards.png", "frontier.png", "curves.png"}


def test_samples_that_are_there_are_not_drawn_again(trained, monkeypatch):
    directory, result = trained
    content = json.loads((directory / "config.json").read_text())
    config = sft.Config.from_dict(content)
    monkeypatch.setattr(rollout, "generate", pytest.fail)
    again = sft.evaluate(config, Workdir(directory, config))
    for label, numbers in result.summary["evaluators"].items():
        for name, value in numbers.items():
            assert again["evaluators"][label][name] == pytest.approx(value, rel=1e-5)


def test_a_run_without_win_rates_has_no_such_column_and_keeps_no_base(capsys, tmp_path):
    config = sft.Config(
        num_steps=1,
        model="tiny",
        data=Data(source=SOURCE, limit=8, batch_size=4, max_length=64),
        evaluators=({"kind": "samples", **ON_SAMPLES},),
    )
    assert not evaluators.needs_base(config)
    summary = sft.run(config, Workdir(tmp_path, config))
    assert summary["evaluators"]["samples"].keys() == {"distinct_2"}
    printed = capsys.readouterr().out
    assert "distinct-2" in printed and "win rate" not in printed and "base" not in printed
    page = (tmp_path / "report" / "index.html").read_text()
    assert "win rate" not in page and ">score</th>" not in page
    assert not (tmp_path / "report" / "frontier.png").exists()


def test_calibration_is_that_of_the_rewards_of_pairs():
    config = preference.Config(
        evaluators=({"kind": "calibration", "source": "builtin:tiny_preferences", "limit": 6},)
    )
    tokenizer = load_tokenizer("tiny")
    held_out = evaluators.load_held_out(config, tokenizer, kind="sft")
    assert len(held_out[0]) == 6 and len(held_out[0][0].responses) == 2
    chosen = np.array([1.0, 2.0, 0.5, -1.0, 0.0, 3.0])
    context = Context(
        held_out, None, tokenizer, None, pair_rewards=lambda pairs: (chosen, np.zeros(len(pairs)))
    )
    found = run_evaluators(config, context)["evaluators"]["calibration"]
    assert found["accuracy"] == pytest.approx(4.5 / 6) and found["pairs"] == 6


def test_a_preference_runs_rewards_are_those_of_its_loss(tmp_path):
    config = preference.Config(
        num_steps=2,
        model="tiny",
        optimizer=Optimizer(learning_rate=1e-3),
        data=Data(source="builtin:tiny_preferences", limit=8, batch_size=4, max_length=128),
        evaluators=tuple(
            {"kind": kind, "source": "builtin:tiny_preferences", "limit": 6}
            for kind in ("loss", "calibration")
        ),
    )
    found = preference.run(config, Workdir(tmp_path, config))["evaluators"]
    assert found["calibration"]["accuracy"] == pytest.approx(found["loss"]["rewards/accuracies"])
    assert found["calibration"]["nll"] == pytest.approx(found["loss"]["loss"], abs=1e-5)
    rewards = found["calibration"]["rewards"]
    assert rewards["chosen"]["mean"] == pytest.approx(found["loss"]["rewards/chosen"], abs=1e-5)
    again = preference.evaluate(config, Workdir(tmp_path, config))["evaluators"]
    assert again["loss"]["loss"] == pytest.approx(found["loss"]["loss"], rel=1e-5)
    with pytest.raises(RunError, match="config.loss = 'kto' has no pairs for 'calibration'"):
        preference.Config(loss="kto", evaluators=config.evaluators)


def test_a_run_that_has_evaluators_is_one_that_others_can_start_from(tmp_path):
    held_out = {"kind": "loss", "source": "builtin:tiny_sft"}
    Workdir(tmp_path / "run", sft.Config(model="tiny", evaluators=(held_out,)))
    assert pretrained.run_at(tmp_path / "run").config.model == "tiny"


def test_an_algorithm_that_offers_none_refuses_them():
    with pytest.raises(RunError, match="config.evaluators is .* this algorithm has no evaluators"):
        sample.Config(evaluators=({"kind": "loss", "source": SOURCE},))


def test_a_base_that_training_consumes_cannot_be_compared_with():
    config = sft.Config(num_steps=1, data=Data(batch_size=2, max_length=64), evaluators=(ALL[4],))
    records = [{"prompt": "a", "completion": "b"}] * 2
    with pytest.raises(RunError, match="config.evaluators compare with the base.*donate=False"):
        sft.train(load_model("tiny"), load_tokenizer("tiny"), records, config, donate=True)


@pytest.mark.parametrize(
    ("described", "error", "message"),
    [
        ({"kind": "los"}, RunError, r"evaluators\[0\].kind is 'los'. Did you mean 'loss'"),
        ({"source": SOURCE}, RunError, r"config.evaluators\[0\].kind is None. There are: "),
        (
            {"kind": "calibration", "source": SOURCE},
            RunError,
            r"evaluators\[0\].kind is 'calibration', which this algorithm cannot have; it has",
        ),
        ({"kind": "loss"}, RunError, r"evaluators\[0\].source is empty"),
        (
            {"kind": "loss", "sorce": SOURCE},
            RunError,
            r"evaluators\[0\] has no field 'sorce'. Did you mean 'source'",
        ),
        (
            {"kind": "loss", "source": SOURCE, "limit": "4"},
            RunError,
            r"\[0\].limit is '4'; expected",
        ),
        (
            {"kind": "samples", "reward": "vadre", **ON_SAMPLES},
            RewardError,
            r"evaluators\[0\].reward: there is no kind 'vadre'",
        ),
        ({"kind": "win_rate", **ON_SAMPLES}, RunError, r"\[0\].* needs a reward or a comparer"),
        (
            {"kind": "win_rate", "reward": "length", "comparer": "people", **ON_SAMPLES},
            RunError,
            r"\[0\].* needs a reward or a comparer: one",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_the_config(described, error, message):
    with pytest.raises(error, match=message):
        sft.Config(evaluators=(described,))


def test_two_evaluators_of_a_kind_need_names():
    twice = ({"kind": "loss", "source": SOURCE}, {"kind": "loss", "source": "other.jsonl"})
    with pytest.raises(RunError, match=r"evaluators\[1\]: there is an evaluator 'loss' already"):
        parse_evaluators(twice)
    first, second = parse_evaluators((twice[0], twice[1] | {"name": "shifted"}))
    assert [first.label, second.label] == ["loss", "shifted"]


def test_a_wrong_source_is_found_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "load_model", pytest.fail)
    config = sft.Config(
        model="tiny",
        data=Data(source=SOURCE, max_length=256),
        evaluators=({"kind": "loss", "source": "nowhere.jsonl"},),
    )
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        sft.run(config, Workdir(tmp_path, config))


def test_from_the_command_line(tmp_path, capsys):
    described = str(({"kind": "loss", "source": SOURCE, "limit": 2},))
    arguments = [
        "train",
        "--config=experiments/sft.py:scale=tiny",
        f"--workdir={tmp_path / 'run'}",
        "--config.num_steps=1",
        f"--config.evaluators={described}",
    ]
    assert command_line.main(arguments) == 0
    assert "loss" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert summary["evaluators"]["loss"]["loss"] > 0
    assert command_line.main(["evaluate", f"--workdir={tmp_path / 'run'}"]) == 0


def test_a_policy_gradient_and_a_reward_model_have_evaluators_too(tmp_path):
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    prompts = [{"prompt": f"{i}:"} for i in range(8)]
    config = policy_gradient.Config(
        model="tiny",
        loss="reinforce",
        advantage="rloo",
        critic="none",
        epochs=1,
        num_iterations=1,
        data=Data(max_length=64),
        sampling={"prompts": 4, "samples": 2, "max_new_tokens": 4},
        optimizer=Optimizer(learning_rate=1e-2),
        evaluators=tuple(one for one in ALL if one["kind"] in ("samples", "win_rate", "kl")),
    )
    result = policy_gradient.train(model, tokenizer, prompts, config, reward=longest)
    found = result.summary["evaluators"]
    assert list(found) == ["samples", "win_rate", "judged", "kl"]
    assert 0 <= found["win_rate"]["win_rate"] <= 1 and math.isfinite(found["kl"]["kl"])

    pairs = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no"} for i in range(8)]
    calibration = {"kind": "calibration", "source": "builtin:tiny_preferences", "limit": 6}
    loss = {"kind": "loss", "source": "builtin:tiny_preferences", "limit": 6}
    config = reward_model.Config(
        model="tiny",
        num_steps=2,
        ensemble=2,
        data=Data(batch_size=4, max_length=128),
        evaluators=(calibration, loss),
    )
    held_out = load_records("builtin:tiny_preferences", kind="preference", limit=6)
    result = reward_model.train(
        model, tokenizer, pairs, config, held_out=held_out, workdir=tmp_path / "run"
    )
    found, expected = result.summary["evaluators"], result.summary["eval"]
    # What the run itself says of the same pairs, scored as texts.
    for name in ("accuracy", "nll", "brier"):
        assert found["calibration"][name] == pytest.approx(expected[name], abs=1e-5)
    assert found["loss"]["rewards/accuracies"] >= 0
    assert (tmp_path / "run/report/evaluators/index.html").is_file()


def longest(records, completions):
    return [float(len(text)) for text in completions]
