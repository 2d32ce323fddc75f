"""Sampling as a stage: its file, going on after a kill, and training on what it drew."""

import dataclasses
import json

import numpy as np
import pytest

from align_jax.algorithms import preference, sample, sft
from align_jax.data.dataset import Data
from align_jax.data.samples import pairs_from_samples, read_samples
from align_jax.errors import RewardError, RunError
from align_jax.generation import rollout
from align_jax.generation.rollout import Sampling
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.recipes import stages
from align_jax.rewards.rules import RULES, of_completions
from align_jax.training import phases, pretrained
from align_jax.training import sampling as drawing
from align_jax.training.workdir import Workdir, read_config

LENGTH = of_completions(RULES["length"])
RECORDS = [{"prompt": f"{i} and"} for i in range(5)]


@pytest.fixture
def config(tiny_config):
    return tiny_config("sample", {})


@pytest.fixture
def samples_of(tmp_path):
    def run(config, name="run"):
        summary = sample.run(config, Workdir(tmp_path / name, config))
        return read_samples(tmp_path / name / "samples" / "samples.jsonl"), summary

    return run


def test_a_run_leaves_scored_samples_and_says_what_they_are_worth(config, samples_of, tmp_path):
    samples, summary = samples_of(config)
    assert len(samples) == 18 and [s["sample"] for s in samples] == 6 * [0, 1, 2]
    lengths = np.reshape([len(s["text"]) for s in samples], (6, 3))
    assert [s["scores"] for s in samples] == [{"reward": n} for n in lengths.ravel().tolist()]
    assert summary["prompts"] == 6 and summary["samples"] == 18
    assert summary["scores"]["reward"]["mean"] == pytest.approx(lengths.mean())
    assert summary["scores"]["reward"]["best"] == pytest.approx(lengths.max(1).mean())
    assert sample.evaluate(config, Workdir(tmp_path / "run", config)) == summary
    # Only the file and the seconds are left of the chunks.
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["samples.jsonl", "seconds.json"]


def test_killed_in_any_chunk_it_goes_on_to_the_same_bits(config, samples_of, tmp_path, monkeypatch):
    whole, _ = samples_of(config)

    class Killed(BaseException):
        pass

    write_file, written = phases.write_file, []

    def write_and_die(path, content):
        write_file(path, content)
        written.append(path.name)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases, "write_file", write_and_die)
        for _ in range(3):
            with pytest.raises(Killed):
                samples_of(config, "cut")
    assert written == ["00000.jsonl", "00001.jsonl", "samples.jsonl"]
    # All is there: nothing is drawn and nothing loaded.
    monkeypatch.setattr(rollout, "generate", pytest.fail)
    monkeypatch.setattr(pretrained, "load_model", pytest.fail)
    again, _ = samples_of(config, "cut")
    assert again == whole
    assert not (tmp_path / "cut" / "samples" / ".samples").exists()


def test_a_function_draws_the_same(config, samples_of):
    samples, _ = samples_of(config)
    drawn = sample.draw(
        load_model("tiny"),
        load_tokenizer("tiny"),
        "builtin:review_openings",
        config.sampling,
        reward=LENGTH,
        seed=config.seed,
        data=config.data,
    )
    assert drawn == samples


def test_how_many_prompts_are_taken():
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")

    def prompts(count):
        settings = Sampling(prompts=count, max_new_tokens=4)
        return [s["prompt_id"] for s in sample.draw(model, tokenizer, RECORDS, settings)]

    assert prompts(0) == [0, 1, 2, 3, 4]
    assert prompts(2) == [0, 1]
    with pytest.raises(
        RunError, match="prompts = 9 is more than there are prompts: 5. Set it to 0"
    ):
        prompts(9)


def test_a_comparer_scores_by_its_wins():
    def longer(records, first, second):
        return [float(len(a) > len(b)) for a, b in zip(first, second)]

    settings = Sampling(prompts=0, samples=3, max_new_tokens=8)
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    drawn = sample.draw(model, tokenizer, RECORDS, settings, reward=LENGTH, comparer=longer)
    for start in range(0, len(drawn), 3):
        group = drawn[start : start + 3]
        best = max(group, key=lambda s: s["scores"]["wins"])
        assert best["scores"]["reward"] == max(len(s["text"]) for s in group)
        assert sum(s["scores"]["wins"] for s in group) == pytest.approx(1.5)


def test_later_stages_train_on_the_tokens_that_were_drawn(
    config, samples_of, tiny_config, tmp_path
):
    samples, _ = samples_of(config)
    source = f"samples:{tmp_path / 'run' / 'samples' / 'samples.jsonl'}"
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    data = Data(source=source, batch_size=2, max_length=128)
    result = sft.train(model, tokenizer, source, sft.Config(num_steps=2, data=data))
    assert [row["step"] for row in result.metrics] == [1, 2]
    # The sampler's log-probabilities are the reference's: DPO starts at ln 2 with them.
    examples, reference = pairs_from_samples(samples)
    settings = preference.Config(num_steps=1, data=data)
    own = preference.train(model, tokenizer, source, settings)
    given = preference.train(model, tokenizer, examples, settings, reference=reference)
    assert given.metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert given.metrics[0]["loss"] == pytest.approx(own.metrics[0]["loss"], abs=1e-4)


def test_a_tempered_sample_has_its_log_probability_at_temperature_1(monkeypatch):
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    settings = Sampling(prompts=0, max_new_tokens=4, temperature=0.5)
    tempered = sample.draw(model, tokenizer, RECORDS, settings)
    assert all(abs(s["log_prob"] - sum(s["log_probs"])) > 1e-3 for s in tempered)
    # At temperature 1 the sampler has it already.
    monkeypatch.setattr(drawing, "compute_log_probs", pytest.fail)
    sample.draw(model, tokenizer, RECORDS, Sampling(prompts=0, max_new_tokens=4))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"reward": "vadre"}, RewardError, "config.reward: there is no kind 'vadre'.*'vader'"),
        ({"comparer": "oracl"}, RewardError, "config.comparer: there is no kind 'oracl'"),
        (
            {"comparer": "people", "sampling.samples": 1},
            RunError,
            "config.sampling.samples is 1; expected at least 2",
        ),
        ({"lora.rank": 4}, RunError, "config.lora is .* but sampling trains nothing"),
        ({"data.eval_source": "x.jsonl"}, RunError, "config.data.eval_source is 'x.jsonl'"),
        ({"sampling.samples": 0}, RunError, "config.sampling.samples is 0; expected from 1"),
    ],
)
def test_a_wrong_config_is_refused(tiny_config, overrides, error, message):
    with pytest.raises(error, match=message):
        tiny_config("sample", overrides)


def test_without_prompts_it_says_what_to_name(tiny_config, tmp_path):
    config = tiny_config("sample", {"data.source": ""})
    with pytest.raises(RunError, match="config.data.source is empty"):
        sample.run(config, Workdir(tmp_path, config))


def test_people_are_waited_for_and_nothing_is_drawn_twice(tiny_config, samples_of, tmp_path):
    config = tiny_config("sample", {"reward": "", "comparer": "people"})
    with pytest.raises(RewardError, match="waiting for people"):
        samples_of(config)
    labels = tmp_path / "run" / "labels"
    pairs = [json.loads(line) for line in (labels / "pairs.jsonl").read_text().splitlines()]
    answers = "".join(json.dumps({"id": pair["id"], "preferred": "first"}) + "\n" for pair in pairs)
    (labels / "labels.jsonl").write_text(answers)
    samples, summary = samples_of(config)
    assert [s["scores"]["wins"] for s in samples[:3]] == [1.0, 0.5, 0.0]
    assert summary["scores"]["wins"]["mean"] == pytest.approx(0.5)


def test_stages_hand_samples_on_and_can_be_moved(tiny_config, tmp_path):
    training = tiny_config("sft", {"num_steps": 1, "data.batch_size": 2, "data.source": ""})
    source = "samples:stage:draws/samples/samples.jsonl"
    data = dataclasses.replace(training.data, source=source)
    config = stages.Config.of(
        draws=tiny_config("sample", {}), best=dataclasses.replace(training, data=data)
    )
    workdir = Workdir(tmp_path / "whole", config)
    summary = stages.run(config, workdir)
    assert summary["draws"]["samples"] == 18
    stored = json.loads((tmp_path / "whole" / "best" / "config.json").read_text())
    assert stored["data"]["source"] == "samples:workdir:../draws/samples/samples.jsonl"
    (tmp_path / "whole").rename(tmp_path / "moved")
    found = read_config(tmp_path / "moved" / "best")["data"]["source"]
    assert found == f"samples:{tmp_path / 'moved' / 'draws' / 'samples' / 'samples.jsonl'}"
    with pytest.raises(RunError, match="config.best refers to .*the stages before it are none"):
        stages.Config.of(best=dataclasses.replace(training, data=data))
