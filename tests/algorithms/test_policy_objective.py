"""Advantages, weights and losses of policy gradients, against loops and formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms.online_preference import best_against_worst
from align_jax.algorithms.policy_gradient import Config
from align_jax.algorithms.policy_gradient.agent import Agent
from align_jax.algorithms.policy_gradient.objective import (
    Completions,
    MicroBatch,
    Text,
    aggregation_weights,
    estimate_advantages,
    make_objective,
    with_missing_eos,
)
from align_jax.data.batching import build_batch
from align_jax.data.tokenise import Example
from align_jax.losses import policy_gradient as pg
from align_jax.models.heads import ScalarHead, ScalarModel
from align_jax.models.interchange import load_model

T, K = 5, 3
LENGTHS = np.array([5, 1, 3, 2, 4, 5])
MASK = (np.arange(T) < LENGTHS[:, None]).astype(np.float32)
rng = np.random.default_rng(0)
LOG_PROBS, REFERENCE, VALUES = (
    (rng.normal(-2, 1, MASK.shape) * MASK).astype(np.float32) for _ in range(3)
)
SCORES = np.array([0.73, -0.2, 0.5, 0.1, 0.1, 0.4], np.float32)
NO_BASELINE = np.float32(np.nan)


def config_of(**overrides):
    """Settings with K samples of T tokens; a name `kl__target` is that of a field of a part."""
    values = {"epochs": 1, "sampling": {"samples": K, "max_new_tokens": T}}
    for name, value in overrides.items():
        *path, last = name.split("__")
        part = values
        for key in path:
            part = part.setdefault(key, {})
        part[last] = value
    if overrides.get("critic") == "none":
        values.setdefault("advantage", "rloo")
    return Config.from_dict(values)


def advantages(config, *, scores=SCORES, coefficient=0.1, baseline=NO_BASELINE, values=VALUES):
    out = estimate_advantages(
        config, scores, LOG_PROBS, REFERENCE, MASK, values, np.float32(coefficient), baseline
    )
    return jax.tree.map(np.asarray, out)


def penalised(coefficient=0.1):
    return SCORES - coefficient * (LOG_PROBS - REFERENCE).sum(1)


def test_the_score_arrives_at_the_last_real_token_of_every_length():
    """With a discount of 0, no KL and values of 0, the advantage is the token's reward."""
    config = config_of(discount=0.0, whiten_advantages=False)
    out = advantages(config, coefficient=0.0, values=0 * VALUES)
    expected = np.zeros_like(MASK)
    for row, length in enumerate(LENGTHS):
        expected[row, length - 1] = SCORES[row]
    np.testing.assert_array_equal(out.advantages, expected)
    np.testing.assert_array_equal(out.rewards, SCORES)


def test_gae_of_shaped_rewards_is_the_loop():
    config = config_of(whiten_advantages=False, discount=0.9, lambda_=0.8)
    out = advantages(config, coefficient=0.3)
    for row, length in enumerate(LENGTHS):
        reward = -0.3 * (LOG_PROBS - REFERENCE)[row].astype(np.float64)
        reward[length - 1] += SCORES[row]
        advantage = 0.0
        for t in reversed(range(length)):
            after = VALUES[row, t + 1] if t + 1 < length else 0.0
            advantage = reward[t] + 0.9 * after - VALUES[row, t] + 0.9 * 0.8 * advantage
            np.testing.assert_allclose(out.advantages[row, t], advantage, atol=1e-5)
            np.testing.assert_allclose(out.returns[row, t], advantage + VALUES[row, t], atol=1e-5)
        assert not out.advantages[row, length:].any()
    np.testing.assert_allclose(out.rewards, penalised(0.3), atol=1e-5)


def test_whitening_takes_place_after_the_returns_and_over_tokens_alone():
    plain, white = (advantages(config_of(whiten_advantages=w)) for w in (False, True))
    np.testing.assert_array_equal(plain.returns, white.returns)
    counted = white.advantages[MASK > 0]
    assert abs(counted.mean()) < 1e-6 and abs(counted.std() - 1) < 1e-4
    x = plain.advantages[MASK > 0].astype(np.float64)
    np.testing.assert_allclose(counted, (x - x.mean()) / x.std(), atol=1e-4)


def test_rewards_are_whitened_without_losing_their_mean():
    config = config_of(whiten_rewards=True, whiten_advantages=False, discount=0.0)
    out = advantages(config, values=0 * VALUES)
    reward = -0.1 * (LOG_PROBS - REFERENCE).astype(np.float64)
    reward[np.arange(6), LENGTHS - 1] += SCORES
    counted = reward[MASK > 0]
    expected = ((reward - counted.mean()) / counted.std() + counted.mean()) * MASK
    np.testing.assert_allclose(out.advantages, expected, atol=1e-4)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"advantage": "rloo"}, lambda r: (r - r.mean(1, keepdims=True)) * K / (K - 1)),
        (
            {"advantage": "grpo"},
            lambda r: (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4),
        ),
        (
            {"advantage": "grpo", "scale_rewards": False},
            lambda r: r - r.mean(1, keepdims=True),
        ),
    ],
)
def test_group_advantages_are_the_same_on_every_token(overrides, expected):
    out = advantages(config_of(critic="none", **overrides))
    groups = expected(penalised().astype(np.float64).reshape(-1, K)).ravel()
    np.testing.assert_allclose(out.advantages, groups[:, None] * MASK, rtol=1e-4, atol=1e-5)


def test_a_kl_that_is_in_the_loss_is_not_in_the_reward_too():
    out = advantages(config_of(critic="none", advantage="rloo", kl__placement="loss"))
    np.testing.assert_array_equal(out.rewards, SCORES)


def test_the_moving_baseline_is_the_past_and_at_first_the_others():
    config = config_of(critic="none", advantage="moving_baseline")
    later = advantages(config, baseline=np.float32(0.25))
    np.testing.assert_allclose(later.advantages[:, 0], penalised() - 0.25, atol=1e-5)
    first = advantages(config)
    r = penalised()
    others = [(r.sum() - x) / 5 for x in r]
    np.testing.assert_allclose(first.advantages[:, 0], r - others, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo", "sum"])
def test_weights_add_token_losses_up_as_each_paper_does(aggregation):
    losses = rng.normal(size=MASK.shape)
    weights = aggregation_weights(MASK, method=aggregation, max_length=T)
    sums = (losses * MASK).sum(1)
    expected = {
        "dapo": sums.sum() / LENGTHS.sum(),
        "grpo": (sums / LENGTHS).mean(),
        "dr_grpo": sums.mean() / T,
        "sum": sums.mean(),
    }[aggregation]
    np.testing.assert_allclose((weights * losses).sum(), expected, rtol=1e-5)
    assert not weights[MASK == 0].any()


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo", "sum"])
def test_weights_are_the_derivatives_of_the_librarys_aggregation(aggregation):
    method, max_length = ("dr_grpo", 1) if aggregation == "sum" else (aggregation, T)

    def total(losses):
        return pg.aggregate_token_losses(losses, MASK, method=method, max_length=max_length).mean()

    weights = aggregation_weights(MASK, method=aggregation, max_length=T)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, jax.grad(total)(jnp.zeros(MASK.shape)), rtol=1e-6)


def test_a_missing_stop_token_costs_those_without_one_alone():
    scores, ended = np.array([0.25, 0.5, -2.0], np.float32), np.array([True, False, False])
    for rule, expected in (
        ("ignore", [0.25, 0.5, -2.0]),
        ("replace", [0.25, -1.0, -1.0]),
        ("subtract", [0.25, -0.5, -3.0]),
    ):
        config = config_of(missing_eos=rule)
        np.testing.assert_allclose(with_missing_eos(config, scores, ended), expected)


def test_pairs_are_best_and_worst_and_a_tie_is_none():
    scores = np.array([0.1, 0.9, 0.5, 0.3, 0.3, 0.3])
    pairs = best_against_worst(scores, 3)
    assert pairs.sign.tolist() == [-1, 1, 0, 0, 0, 0]
    assert pairs.weight.tolist() == [0, 1, 0, 0, 0, 0]


def test_pairs_weigh_the_same_within_a_minibatch():
    pairs = best_against_worst(np.array([0.1, 0.9, 0.3, 0.3, 2.0, 1.0]), 2)
    assert pairs.weight.tolist() == [0, 0.5, 0, 0, 0.5, 0]
    assert pairs.in_minibatch(np.arange(4)).weight[:4].tolist() == [0, 1, 0, 0]


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


def batch_of(*, on_policy=True, **known):
    """Two prompts with K completions each, whose lengths are LENGTHS, and made values.

    `known` replaces some of those.
    """
    draw = np.random.default_rng(1)
    examples = []
    for p in range(2):
        responses = tuple(draw.integers(8, 264, n, np.int32) for n in LENGTHS[p * K : (p + 1) * K])
        prompt = draw.integers(8, 264, 2 + p, np.int32)
        masks = tuple(np.ones(len(r), np.float32) for r in responses)
        examples.append(Example(p, prompt, responses, masks, {}))
    batch = build_batch(examples, rows=2, length_buckets=(24,), target_buckets=(16,))
    n = len(LENGTHS)
    completions = Completions(
        mask=MASK,
        old_log_probs=LOG_PROBS,
        ref_log_probs=REFERENCE,
        weights=MASK / MASK.sum(),
        mean_weights=MASK / MASK.sum(),
        advantages=(draw.normal(size=MASK.shape) * MASK).astype(np.float32),
        old_values=VALUES,
        returns=VALUES + 0.5 * MASK,
        pairs=best_against_worst(SCORES, K),
    )
    made = MicroBatch(
        batch, completions._replace(**known), np.full(n, on_policy, np.float32), np.float32(0.2)
    )
    return jax.tree.map(jnp.asarray, made)


def passes_by_hand(model, batch, temperature=1.0):
    """Of each completion n on its own with its prompt: (n, its tokens, hidden states, log p).

    The last two are before each of its tokens, `[., D]` and over the whole vocabulary, `[., V]`.
    """
    tokens, branch = np.asarray(batch.rows["tokens"]), np.asarray(batch.rows["branch_ids"])
    segment = np.asarray(batch.rows["segment_ids"])
    for n in range(len(LENGTHS)):
        row, k = divmod(n, K)
        prompt = tokens[row][(branch[row] == 0) & (segment[row] > 0)]
        response = tokens[row][branch[row] == k + 1]
        text = jnp.asarray(np.concatenate([prompt, response])[None])
        hidden = model(text)
        log_p = jax.nn.log_softmax(model.logits(hidden) / temperature)
        before = slice(len(prompt) - 1, text.shape[1] - 1)
        yield n, response, np.asarray(hidden[0, before]), np.asarray(log_p[0, before])


def log_probs_by_hand(model, batch, temperature=1.0):
    """`[N,T]` from whole-vocabulary logits of each prompt and completion on its own."""
    out = np.zeros(MASK.shape)
    for n, response, _, log_p in passes_by_hand(model, batch, temperature):
        out[n, : len(response)] = log_p[np.arange(len(response)), response]
    return out


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
def test_at_the_first_update_the_ratio_is_exactly_1(model, critic):
    heads = {
        "none": None,
        "shared": ScalarHead(model.config.hidden_size, key=None),
        "separate": ScalarModel(model, key=jax.random.key(0)),
    }
    agent = Agent(model, heads[critic])
    sums = jax.jit(make_objective(config_of(critic=critic)))(agent, batch_of())
    np.testing.assert_allclose(sums.metrics["val/ratio"], 1.0, atol=1e-6)  # a mean of exact ones
    assert sums.metrics["policy/approxkl_avg"] == 0 and sums.metrics["policy/clipfrac_avg"] == 0


def test_the_first_gradient_of_ppo_is_that_of_reinforce(model):
    batch = batch_of()

    def gradient(loss):
        total = lambda agent: make_objective(config_of(loss=loss))(agent, batch).loss  # noqa: E731
        return jax.grad(total)(Agent(model, None))

    gradients = [gradient("ppo"), gradient("reinforce")]
    for a, b in zip(*map(jax.tree.leaves, gradients)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "reinforce"])
def test_the_loss_off_policy_is_the_formula(model, loss, temperature):
    batch = batch_of(on_policy=False)
    new = log_probs_by_hand(model, batch, temperature)
    old = (new + rng.normal(0, 0.3, MASK.shape)) * MASK
    batch = batch_of(on_policy=False, old_log_probs=old.astype(np.float32))
    high = {} if loss == "reinforce" else {"clip_range_high": 0.28}
    config = config_of(loss=loss, kl__coefficient=0.0, sampling__temperature=temperature, **high)
    sums = make_objective(config)(Agent(model, None), batch)
    a = np.asarray(batch.completions.advantages, np.float64)
    ratio = np.exp(new - old)
    if loss == "gspo":
        ratio = np.exp(((new - old) * MASK).sum(1) / LENGTHS)[:, None] * np.ones_like(MASK)
    surrogate = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a)
    expected = {
        "ppo": surrogate,
        "gspo": surrogate,
        "cispo": -np.clip(ratio, 0.8, 1.28) * a * new,
        "reinforce": -a * new,
    }[loss]
    np.testing.assert_allclose(sums.loss, (expected * MASK).sum() / MASK.sum(), rtol=1e-4)
    upper = 1.2 if loss == "reinforce" else 1.28
    clipped = ((ratio < 0.8) | (ratio > upper)) & (MASK > 0)
    np.testing.assert_allclose(
        sums.metrics["policy/clipfrac_avg"], clipped.sum() / MASK.sum(), rtol=1e-6
    )
    approx = ((new - old) ** 2 / 2 * MASK).sum() / MASK.sum()
    np.testing.assert_allclose(sums.metrics["policy/approxkl_avg"], approx, rtol=1e-3)
    gap = (np.abs(new - old) * MASK).sum() / MASK.sum()
    np.testing.assert_allclose(sums.metrics["val/old_gap"], gap, rtol=1e-3)


def test_the_old_gap_shows_what_the_ratio_of_a_first_update_cannot(model):
    batch = batch_of()
    new = log_probs_by_hand(model, batch)
    for moved in (0.0, 0.125):
        batch = batch_of(old_log_probs=((new + moved) * MASK).astype(np.float32))
        sums = make_objective(config_of())(Agent(model, None), batch)
        np.testing.assert_allclose(sums.metrics["val/old_gap"], moved, atol=2e-5)
        assert sums.metrics["policy/approxkl_avg"] == 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_kl_entropy_and_value_terms_are_added(model, critic):
    config = config_of(
        critic=critic,
        kl__placement="loss",
        entropy_coefficient=0.05,
        value_coefficient=0.3,
        value_clip_range=0.2,
        sampling__temperature=0.6,
    )
    head = ScalarHead(model.config.hidden_size, key=jax.random.key(3))
    agent = Agent(model, head)
    if critic == "separate":
        agent = Agent(model, ScalarModel(model, key=None))
        agent.critic.head = head
    batch = batch_of()
    new = log_probs_by_hand(model, batch, temperature=0.6)
    entropies, values = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for n, response, hidden, log_p in passes_by_hand(model, batch, temperature=0.6):
        entropies[n, : len(response)] = -(np.exp(log_p) * log_p).sum(-1)
        values[n, : len(response)] = hidden @ np.asarray(head.head_kernel[...])
    # Moved by less than the clip range and by more, to either side, towards the return and away.
    draw = np.random.default_rng(2)
    old_values = values + draw.choice([-0.7, -0.1, 0.1, 0.7], MASK.shape)
    returns = values + draw.normal(size=MASK.shape)
    batch = batch_of(
        old_values=(old_values * MASK).astype(np.float32),
        returns=(returns * MASK).astype(np.float32),
    )
    clipped = np.clip(values, old_values - 0.2, old_values + 0.2)
    plain, held = (values - returns) ** 2, (clipped - returns) ** 2
    for case in (held > plain, held < plain, clipped == values):
        assert case[MASK > 0].sum() >= 3
    mean = lambda x: (x * MASK).sum() / MASK.sum()  # noqa: E731
    value_loss, entropy = mean(np.maximum(plain, held) / 2), mean(entropies)

    parts = make_objective(config)(agent, batch)
    np.testing.assert_allclose(parts.metrics["loss/value_avg"], value_loss, rtol=1e-4)
    np.testing.assert_allclose(parts.metrics["policy/entropy_avg"], entropy, rtol=1e-4)
    d = np.where(MASK > 0, new - REFERENCE, 0)
    np.testing.assert_allclose(
        parts.metrics["loss/kl_avg"], ((np.exp(-d) - 1 + d) * MASK).sum() / MASK.sum(), rtol=1e-4
    )
    expected = (
        -mean(np.asarray(batch.completions.advantages))  # the ratio is 1
        + 0.2 * mean(np.exp(-d) - 1 + d)
        - 0.05 * entropy
        + 0.3 * value_loss
    )
    np.testing.assert_allclose(parts.loss, expected, rtol=1e-4)


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_the_samplers_correction_weighs_the_policys_loss_alone(model, loss):
    config = config_of(
        loss=loss,
        critic="shared",
        kl__placement="loss",
        entropy_coefficient=0.05,
        value_coefficient=0.3,
    )
    agent = Agent(model, ScalarHead(model.config.hidden_size, key=jax.random.key(3)))
    importance = (np.random.default_rng(4).uniform(0.2, 2, MASK.shape) * MASK).astype(np.float32)
    plain, weighed = (
        make_objective(config)(agent, batch)
        for batch in (batch_of(), batch_of(importance=importance))
    )
    mean = lambda x: (x * MASK).sum() / MASK.sum()  # noqa: E731
    advantages = np.asarray(batch_of().completions.advantages)
    # The ratio is 1, so the loss of a token is minus its advantage; CISPO's has log p as a factor.
    token = -advantages
    if loss == "cispo":
        token = token * log_probs_by_hand(model, batch_of())
    for sums, factor in ((plain, 1.0), (weighed, importance)):
        np.testing.assert_allclose(sums.metrics["loss/policy_avg"], mean(factor * token), rtol=1e-4)
    rest = [sums.loss - sums.metrics["loss/policy_avg"] for sums in (plain, weighed)]
    np.testing.assert_allclose(rest[0], rest[1], rtol=1e-5)
    assert plain.metrics["loss/kl_avg"] == weighed.metrics["loss/kl_avg"]


def test_online_dpo_is_the_loss_of_the_pairs(model):
    batch = batch_of()
    sums = make_objective(config_of(loss="dpo", critic="none", kl__coefficient=0.3))(
        Agent(model, None), batch
    )
    gain = (log_probs_by_hand(model, batch) - REFERENCE).sum(1).reshape(-1, K)
    groups = SCORES.reshape(-1, K)
    margins = [g[s.argmax()] - g[s.argmin()] for g, s in zip(gain, groups)]
    expected = np.mean([np.log1p(np.exp(-0.3 * margin)) for margin in margins])
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-4)


def test_ppo_ptx_adds_gamma_times_the_likelihood_of_text(model):
    batch, agent = batch_of(), Agent(model, None)
    counted = batch.rows["target_mask"].at[0].set(0.0)
    text = Text(batch.rows | {"target_mask": counted}, counted / counted.sum())
    plain = make_objective(config_of())(agent, batch)
    config = config_of(ptx__gamma=2.0, ptx__source="some text")
    both = make_objective(config)(agent, batch._replace(text=text))
    second = log_probs_by_hand(model, batch)[K:]
    expected = -2.0 * second.sum() / LENGTHS[K:].sum()
    np.testing.assert_allclose(both.loss - plain.loss, expected, rtol=1e-4)
    np.testing.assert_allclose(both.metrics["loss/ptx_avg"], expected, rtol=1e-4)
