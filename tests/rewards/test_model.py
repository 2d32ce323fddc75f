"""A reward model as a reward: a text's score is its own, whatever it is scored together with."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from align_jax.data.builtin import load_builtin
from align_jax.errors import ModelError, RewardError
from align_jax.models.heads import ScalarModel
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.base import checked_scores, scores_and_components
from align_jax.rewards.mixture import Combined
from align_jax.rewards.model import RewardModel, RewardScale, reward_models, save_reward_model
from tests.llama_tokenizer import llama_tokenizer

SCALE = RewardScale(gain=1.7, bias=-0.3)


@pytest.fixture(scope="module")
def model():
    return ScalarModel(load_model("tiny"), key=jax.random.key(5))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def reward(model, tokenizer):
    return RewardModel([(model, SCALE)], tokenizer)


@jax.jit
def hidden_states(transformer, tokens):
    return transformer(tokens)


def alone(model, tokens):
    # What stands to the right of a text cannot change it: one length, one compilation.
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = np.asarray(hidden_states(model.transformer, padded), np.float64)[0, len(tokens) - 1]
    raw = hidden @ np.asarray(model.head.head_kernel[...], np.float64)
    return 1.7 * raw - 0.3


TEXTS = [
    "",
    " a",
    " 21 22 23",
    " x" * 20,
    " a long one" * 12,
    " yes!",
    " \u00e9\u00e8",
    " 21 22 23",
]
RECORDS = [{"prompt": f"Count {3 + i} from 20:", "answer": "unused"} for i in range(len(TEXTS))]


def test_the_score_is_that_of_prompt_completion_and_eos_at_the_eos(reward, model, tokenizer):
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    expected = [
        alone(model, [*ids(record["prompt"]), *ids(text), tokenizer.eos_token_id])
        for record, text in zip(RECORDS, TEXTS)
    ]
    scores = reward(RECORDS, TEXTS)
    assert scores.dtype == np.float32 and scores.shape == (len(TEXTS),)
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.std(expected) > 0.1
    np.testing.assert_array_equal(checked_scores(reward, RECORDS, TEXTS), scores)


def test_a_score_depends_on_nothing_else_in_the_call_not_even_in_its_last_bit(reward):
    together = reward(RECORDS, TEXTS)
    one_by_one = [reward([record], [text])[0] for record, text in zip(RECORDS, TEXTS)]
    np.testing.assert_array_equal(together, one_by_one)
    order = np.random.default_rng(0).permutation(3 * len(TEXTS)) % len(TEXTS)
    shuffled = reward([RECORDS[i] for i in order], [TEXTS[i] for i in order])
    np.testing.assert_array_equal(shuffled, together[order])


def test_few_shapes_are_compiled_however_many_lengths_there_are(model, tokenizer):
    reward = RewardModel([(model, SCALE)], tokenizer)
    shapes = set()
    score = reward._score
    reward._score = lambda model, batch: shapes.add(batch["tokens"].shape) or score(model, batch)
    texts = [" a" * n for n in range(1, 120, 3)]
    reward([{"prompt": "b"}] * len(texts), texts)
    assert shapes == {(16, 32), (8, 64), (4, 128), (2, 256)}


def test_messages_are_rendered_by_the_models_own_template(reward, model, tokenizer):
    [raw] = load_builtin("tiny_chat_preferences")[:1]
    answer = raw["chosen"][0]["content"]
    text = tokenizer.apply_chat_template(
        [*raw["prompt"], {"role": "assistant", "content": answer}], tokenize=False
    ).rstrip("\n")
    assert text.endswith("<|im_end|>")
    expected = alone(model, tokenizer(text, add_special_tokens=False).input_ids)
    np.testing.assert_allclose(reward([raw], [answer]), [expected], atol=2e-5)


def test_texts_are_cut_as_in_training(model, tokenizer):
    short = RewardModel([(model, dataclasses.replace(SCALE, max_length=20))], tokenizer)
    record, text = {"prompt": "0123456789" * 5}, "abcdefgh"
    ids = tokenizer(record["prompt"][-11:] + text, add_special_tokens=False).input_ids
    expected = alone(model, [*ids, tokenizer.eos_token_id])
    np.testing.assert_allclose(short([record], [text]), [expected], atol=2e-5)
    # A response that leaves the prompt no room is cut at its end.
    assert np.isfinite(short([record], ["x" * 100])).all()


def test_prompts_are_bounded_as_in_training(model, tokenizer):
    record, text = {"prompt": "0123456789" * 5}, "abcdefgh" * 3
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    prompt, response = ids(record["prompt"]), [*ids(text), tokenizer.eos_token_id]

    def score(**bounds):
        scale = dataclasses.replace(SCALE, **bounds)
        return RewardModel([(model, scale)], tokenizer)([record], [text])

    expected = alone(model, [*prompt[-7:], *response])
    np.testing.assert_allclose(score(max_prompt_length=7), [expected], atol=2e-5)
    # The prompt keeps 16 tokens, so the response loses its end, EOS included.
    expected = alone(model, [*prompt[-16:], *response[:16]])
    bounds = {"max_length": 32, "min_prompt_length": 16}
    np.testing.assert_allclose(score(**bounds), [expected], atol=2e-5)


def test_what_a_reward_model_does_not_see_is_counted_and_said(model, tokenizer, caplog):
    short = RewardModel([(model, dataclasses.replace(SCALE, max_length=20))], tokenizer)
    same = "x" * 19
    scores = short([{"prompt": "0"}] * 3, [same + "a" * 9, same + "b" * 9, "c"])
    assert scores[0] == scores[1]
    assert short.truncated.sum() == 2
    assert "does not see the end of 2 of 3 completions" in caplog.text
    caplog.clear()
    short([{"prompt": "0123456789" * 5}], ["abc"])
    assert short.truncated.sum() == 1 and not caplog.text
    short([{"prompt": "0"}], ["a"])
    assert short.truncated.sum() == 0


def test_completions_that_cannot_fit_are_refused_before_sampling(model, tokenizer):
    short = RewardModel([(model, dataclasses.replace(SCALE, max_length=20))], tokenizer)
    records = [{"prompt": "0"}, {"prompt": "0123456789", "where": "f:2"}]
    short.require_room(records, tokenizer, 9)
    with pytest.raises(RewardError, match="f:2: the reward model reads 20 .*has 10, .*tokens = 10"):
        short.require_room(records, tokenizer, 10)
    # How many tokens another tokenizer makes of a completion is not known; its prompts are cut.
    short.require_room(records, llama_tokenizer(), 10)
    assert reward_models(short) == [short]
    mixture = Combined({"a": short}, relative=False)
    assert reward_models(mixture) == [short]


def test_a_tokenizer_the_model_has_no_embeddings_for_is_refused(model):
    with pytest.raises(ModelError, match="the reward model: the tokenizer has ids up to .*is 264"):
        RewardModel([(model, SCALE)], llama_tokenizer())


def test_no_completions_and_unequal_lists(reward):
    assert reward([], []).shape == (0,)
    with pytest.raises(ValueError):
        reward(RECORDS[:1], TEXTS[:2])


def test_it_loads_a_directory_an_ensemble_and_a_runs_workdir(reward, model, tokenizer, tmp_path):
    run = tmp_path / "run"
    (run / "reward_model").mkdir(parents=True)
    (run / "config.json").write_text('{"algorithm": "reward_model"}')
    for name in ("0", "1"):
        save_reward_model(model, tokenizer, run / "reward_model" / name, scale=SCALE)
    (run / "reward_model" / "reward.json").write_text(json.dumps({"members": ["0", "1"]}))
    expected = reward(RECORDS[:3], TEXTS[:3])
    for path in (run / "reward_model" / "1", run / "reward_model", run, str(run)):
        loaded = RewardModel.load(path)
        np.testing.assert_allclose(loaded(RECORDS[:3], TEXTS[:3]), expected, atol=1e-6)
    assert len(loaded.members) == 2


def test_an_ensemble_tells_its_members_and_where_they_disagree(model, tokenizer):
    scales = [SCALE, dataclasses.replace(SCALE, gain=-0.5 * SCALE.gain, bias=SCALE.bias + 1)]
    ensemble = RewardModel([(model, scale) for scale in scales], tokenizer)
    single = [RewardModel([(model, scale)], tokenizer) for scale in scales]
    first, second = (one(RECORDS, TEXTS) for one in single)
    scores, components = scores_and_components(ensemble, RECORDS, TEXTS)
    np.testing.assert_allclose(scores, (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(scores, ensemble(RECORDS, TEXTS), atol=1e-6)
    assert list(components) == ["member_0", "member_1", "disagreement"]
    np.testing.assert_allclose(components["member_1"], second, atol=1e-6)
    np.testing.assert_allclose(components["disagreement"], abs(first - second) / 2, atol=1e-6)
    assert components["disagreement"].std() > 0.01
    assert scores_and_components(single[0], RECORDS, TEXTS)[1] == {}


def test_log_odds_are_what_stood_before_gain_and_bias(model, tokenizer):
    scales = [SCALE, dataclasses.replace(SCALE, gain=3 * SCALE.gain, bias=SCALE.bias - 2)]
    ensemble = RewardModel([(model, scale) for scale in scales], tokenizer)
    members = ensemble.member_log_odds(RECORDS, TEXTS)
    expected = RewardModel([(model, RewardScale())], tokenizer)(RECORDS, TEXTS)
    for own in members:
        np.testing.assert_allclose(own, expected, atol=1e-5)
    # Of members that differ, the mean orders texts as the reward does.
    members = members * [[1.0], [-0.6]]
    reward = sum(s.gain * own + s.bias for own, s in zip(members, scales)) / 2
    order = np.argsort(ensemble.mean_log_odds(members))
    np.testing.assert_array_equal(order, np.argsort(reward))


def test_a_run_that_has_not_finished_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"algorithm": "reward_model"}')
    with pytest.raises(ModelError, match="without a finished reward model"):
        RewardModel.load(tmp_path)
