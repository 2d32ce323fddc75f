"""Controlled sentiment: pairs and summary against hand-computed values, and the whole, tiny."""

import json
import math

import pytest

from align_jax.algorithms.controlled_sentiment import evaluate, run
from align_jax.data.samples import read_samples
from align_jax.errors import RunError
from align_jax.evaluation.policies import summarise
from align_jax.generation import rollout as rollouts
from align_jax.training import phases, pretrained
from align_jax.training.metrics import read_metrics
from align_jax.training.workdir import Workdir


def sample(score, *, prompt_id=0, log_probs=(-1.0,), **more):
    return {
        "prompt_id": prompt_id,
        "prompt": "p",
        "text": f"text {score}",
        "log_probs": list(log_probs),
        "scores": {"reward": score},
        **more,
    }


def test_the_summary_of_made_samples():
    """Two prompts, base scores 1..16 and all 0, trained scores above and below them."""
    base = [sample(float(i), text=f"a b{i}") for i in range(1, 17)]
    base += [sample(0.0, text="c d", prompt_id=1) for _ in range(16)]
    scores, gains = [17, 17, 8.5, 8.5, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 1, 1]
    trained = [
        sample(
            score,
            text="so good !",
            prompt_id=i // 4,
            log_probs=(-0.5, -1.5),
            base_log_prob=-2.0 - gain,
        )
        for i, (score, gain) in enumerate(zip(scores, gains))
    ]
    summary = summarise(base, trained)
    assert summary.keys() == {"base", "best_of_4", "trained", "exploitation"}

    t = 12.706204736  # the 0.975 quantile of Student's t with one degree of freedom
    assert summary["base"]["reward_mean"] == pytest.approx((8.5 + 0) / 2)
    assert summary["base"]["reward_ci95"] == pytest.approx(t * 8.5 / 2, rel=1e-6)
    assert summary["base"]["win_rate"] == 0.5 and summary["base"]["kl"] == 0.0
    # Four texts a prompt: "a b1" ... "a b4" and four times "c d": 5 of 8 pairs of words differ.
    assert summary["base"]["distinct_2"] == pytest.approx(5 / 8)

    # The mean of the largest of 4 from 1..16 is 4 (16 + 1) / 5.
    assert summary["best_of_4"]["reward_mean"] == pytest.approx((4 * 17 / 5 + 0) / 2)
    assert summary["best_of_4"]["win_rate"] == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert summary["best_of_4"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    # The best of each consecutive four are b4, b8, b12, b16.
    assert summary["best_of_4"]["distinct_2"] == pytest.approx(5 / 8)

    assert summary["trained"]["reward_mean"] == pytest.approx((51 / 4 + 0) / 2)
    # 17 beats all 16, 8.5 half of them; 0 ties with every 0.
    assert summary["trained"]["win_rate"] == pytest.approx(((1 + 0.5) / 2 + 0.5) / 2)
    assert summary["trained"]["kl"] == pytest.approx(12 / 8)
    assert summary["trained"]["distinct_2"] == pytest.approx(2 / 16)
    assert summary["exploitation"]["exclamation"] == [0.0, 1.0]


# --- the whole


@pytest.fixture
def config(tiny_config):
    return tiny_config(
        "quickstart", {"sampling.max_new_tokens": 16, "optimizer.learning_rate": 3e-3}
    )


def without_seconds(summary):
    return {name: value for name, value in summary.items() if name != "seconds"}


def test_the_whole_runs_is_not_run_again_and_survives_an_interruption_anywhere(
    config, tmp_path, monkeypatch, capsys
):
    workdir = Workdir(tmp_path / "whole", config)
    summary = run(config, workdir)
    printed = capsys.readouterr().out
    assert "best of 4" in printed and str(workdir.path / "report" / "index.html") in printed
    names = {path.name for path in (workdir.path / "report").iterdir()}
    assert names == {"index.html", "summary.json", "curves.png", "rewards.png", "frontier.png"}
    written = json.loads((workdir.path / "report" / "summary.json").read_text())
    for policy in ("base", "best_of_4", "trained"):
        row = written[policy]
        assert row.keys() == {"reward_mean", "reward_ci95", "win_rate", "kl", "distinct_2"}
    assert written["seconds"].keys() >= {"sample", "sample_base", "train", "sample_trained"}
    assert min(written["seconds"].values()) > 0
    assert written["seed"] == 0 and written["pairs"] == summary["pairs"] > 8
    assert written["config"]["sampling"]["samples"] == 4

    # The base's samples carry their own log-probabilities: DPO starts at ln 2, and KL is near 0
    # only as long as nothing is learnt.
    rows = read_metrics(workdir.path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(rows) == round(summary["pairs"] / config.data.batch_size)
    assert abs(written["trained"]["kl"]) < 5

    lines = read_samples(workdir.path / "samples" / "sample_trained.jsonl")
    assert lines[0].keys() >= {"prompt_id", "tokens", "mask", "log_prob", "base_log_prob"}
    assert lines[0]["scores"] == {"reward": len(lines[0]["text"])}

    evaluated = evaluate(config, workdir)
    for policy in ("base", "best_of_4", "trained"):
        assert evaluated[policy] == pytest.approx(summary[policy])

    # Run again, nothing is computed: every phase is there.
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "generate", pytest.fail)
        patch.setattr(pretrained, "load_model", pytest.fail)
        assert without_seconds(run(config, workdir)) == without_seconds(summary)

    # Interrupted after each phase in turn, it goes on to the same summary.
    class Killed(BaseException):
        pass

    cut = Workdir(tmp_path / "cut", config)
    write_file, written_files = phases.write_file, []

    def write_and_die(path, content):
        write_file(path, content)
        written_files.append(path.stem)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases, "write_file", write_and_die)
        for _ in range(4):
            with pytest.raises(Killed):
                run(config, cut)
    assert written_files == ["sample", "sample_base", "train", "sample_trained"]
    again = run(config, cut)
    assert without_seconds(again) == without_seconds(summary)
    assert again["seconds"].keys() == summary["seconds"].keys()


def test_evaluating_an_unfinished_run_names_the_phase(config, tmp_path):
    with pytest.raises(
        RunError, match="sample_base.jsonl is not there.*has not finished its phase"
    ):
        evaluate(config, Workdir(tmp_path, config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reward": "joy"}, "config.reward is 'joy'; expected one of .*'vader'"),
        ({"loss": "dpoo"}, "config.loss is 'dpoo'"),
        ({"sampling.samples": 1}, "config.sampling.samples is 1; expected at least 2"),
        ({"sampling.temperature": 0.7}, "config.sampling.temperature is 0.7; expected 1.0"),
        ({"evaluation.base_samples": 15}, "base_samples is 15; expected at least 16"),
        ({"evaluation.trained_samples": 3}, "trained_samples is 3; expected at least 4"),
        ({"optimizer.schedule": "cosin"}, "config.optimizer.schedule is 'cosin'"),
        ({"data.batch_size": 17}, "batch_size = 17 is more than there are examples: 16"),
    ],
)
def test_a_wrong_config_is_refused_before_sampling(
    tiny_config, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(rollouts, "generate", pytest.fail)
    with pytest.raises(RunError, match=message):
        config = tiny_config("quickstart", overrides)
        run(config, Workdir(tmp_path, config))
    assert not list(tmp_path.glob("samples/*"))
