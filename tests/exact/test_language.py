"""The known truth is itself true: each quantity by a second route."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms.preference import preference_loss
from align_jax.data.batching import build_batch
from align_jax.data.tokenise import Example
from align_jax.exact import fixed_points
from align_jax.exact.language import (
    Language,
    World,
    best_of_n,
    bradley_terry,
    expectation,
    from_tokens,
    kl,
    normalized,
    optimum_by_recursion,
    random_reward,
    rejection_sampling,
    token_policy,
)
from align_jax.losses.preference import LOSSES, kto_loss
from align_jax.losses.ranking import minimax_winner
from tests.exact import losses, methods
from tests.exact.training import make_world, pair_batch, random_transformer


@pytest.fixture(scope="module")
def world():
    """A tabular reference; what needs the Transformer makes its own."""
    language = Language()
    reference = normalized(random_reward(language, 7))
    return World(language, reference, random_reward(language, 8), beta=0.5)


@pytest.mark.parametrize("symbols, length, count", [(3, 3, 40), (3, 4, 121), (2, 2, 7)])
def test_a_language_has_every_response_once(symbols, length, count):
    language = Language(num_symbols=symbols, max_length=length)
    assert len(set(language.responses)) == len(language.responses) == count
    assert len(language.prefixes) == sum(symbols**k for k in range(length))


def test_symbol_probabilities_and_response_probabilities_are_each_others_inverse(world):
    tokens = token_policy(world.language, world.reference)
    np.testing.assert_allclose(np.exp(tokens).sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(from_tokens(world.language, tokens), world.reference, atol=1e-12)


def test_the_optimum_by_soft_value_iteration_is_the_tilted_reference(world):
    np.testing.assert_allclose(optimum_by_recursion(world), world.optimum, atol=1e-12)


def test_no_policy_is_worth_more_than_beta_log_z(world):
    best = world.beta * world.log_partition
    np.testing.assert_allclose(world.value(world.optimum), best, atol=1e-12)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.1, 1.0):
        other = normalized(world.optimum + scale * rng.normal(size=world.optimum.shape))
        # The loss of value is exactly beta KL(pi || pi*).
        lost = world.beta * kl(other, world.optimum)
        np.testing.assert_allclose(best - world.value(other), lost, atol=1e-12)


def test_best_of_n_is_the_law_of_the_best_of_all_tuples():
    rng = np.random.default_rng(0)
    log_probs, reward = normalized(rng.normal(size=(1, 6))), rng.normal(size=(1, 6))
    for n in (1, 2, 3):
        law = np.zeros(6)
        for drawn in itertools.product(range(6), repeat=n):
            best = max(drawn, key=lambda y: reward[0, y])
            law[best] += np.exp(log_probs[0, list(drawn)].sum())
        np.testing.assert_allclose(np.exp(best_of_n(log_probs, reward, n))[0], law, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_best_of_n_stays_below_its_bound(world, n):
    exact = kl(best_of_n(world.reference, world.reward, n), world.reference)
    assert (exact <= np.log(n) - (n - 1) / n + 1e-12).all()


def test_the_bound_of_best_of_n_is_the_limit_of_many_equally_likely_responses():
    size, n = 20000, 4
    law = best_of_n(np.full((1, size), -np.log(size)), np.arange(float(size))[None], n)
    bound = np.log(n) - (n - 1) / n
    assert kl(law, np.full((1, size), -np.log(size)))[0] == pytest.approx(bound, abs=1e-4)


def test_rejection_sampling_at_the_right_acceptance_draws_the_optimum(world):
    law, kept = rejection_sampling(world, world.reward.max(-1))
    np.testing.assert_allclose(law, world.optimum, atol=1e-12)
    expected = np.exp(world.log_partition - world.reward.max(-1) / world.beta)
    np.testing.assert_allclose(kept, expected, rtol=1e-12)
    too_low, _ = rejection_sampling(world, world.reward.max(-1) - 1)
    assert world.distance(too_low) > 0.05
    # And drawn: 200,000 proposals, five standard errors.
    rng = np.random.default_rng(0)
    proposals = rng.choice(law.shape[1], size=200_000, p=np.exp(world.reference[0]))
    accept = np.exp((world.reward[0] - world.reward[0].max()) / world.beta)[proposals]
    drawn = proposals[rng.random(len(proposals)) < accept]
    p = np.exp(world.optimum[0])
    error = np.abs(np.bincount(drawn, minlength=len(p)) / len(drawn) - p)
    assert (error < 5 * np.sqrt(p * (1 - p) / len(drawn)) + 1e-12).all()


def test_ipos_closed_form_is_the_least_squares_solution(world):
    wins = bradley_terry(world.reward)
    h = fixed_points.ipo(world) - world.reference
    residual = h[:, :, None] - h[:, None, :] - (2 * wins - 1) / (2 * world.beta)
    # Normal equations: the residuals of each response's comparisons sum to 0.
    np.testing.assert_allclose(residual.sum(-1), 0, atol=1e-10)


def _minimum(world, name):
    makers = {
        "dpo": methods.library("dpo_loss"),
        "ipo": methods.library("ipo_loss"),
        "cpo": methods.cpo,
        "simpo": methods.simpo(0.0),
        "normalized": methods.normalized_dpo,
        "f_dpo": methods.f_dpo("forward_kl"),
    }
    return fixed_points.pair_minimizer(world, makers[name](world))


@pytest.mark.parametrize(
    "name, law",
    [
        ("dpo", lambda w: w.optimum),
        ("ipo", fixed_points.ipo),
        ("cpo", lambda w: normalized(w.reward / w.beta)),
        ("simpo", lambda w: fixed_points.tilted_by_length(w, np.zeros_like(w.reward))),
        ("normalized", lambda w: fixed_points.tilted_by_length(w, w.reference)),
        ("f_dpo", lambda w: fixed_points.f_divergence(w, "forward_kl", 4 * w.beta)),
    ],
)
def test_the_closed_form_is_the_minimiser_of_the_expected_loss(world, name, law):
    assert kl(law(world), _minimum(world, name)).max() < 1e-4


def test_ktos_law_is_where_the_gradient_of_its_loss_vanishes(world):
    """Of the majority's responses; what the others say goes down."""
    law = fixed_points.kto(world)
    wins = bradley_terry(world.reward).mean(-1)
    with jax.enable_x64(True):

        def expected(logits):
            log_probs = jax.nn.log_softmax(logits, -1)
            reference = jnp.asarray(world.reference)
            point = (jnp.exp(log_probs) * (log_probs - reference)).sum(-1, keepdims=True)
            yes, no = (
                kto_loss(log_probs, reference, jnp.full(law.shape, label),
                         jnp.broadcast_to(point, law.shape), beta=world.beta)
                for label in (True, False)
            )  # fmt: skip
            return (wins * yes + (1 - wins) * no).sum()

        gradient = jax.grad(expected)(jnp.maximum(jnp.asarray(law), -100.0))
    kept = wins > 0.5
    np.testing.assert_array_equal(np.isfinite(law), kept)
    np.testing.assert_allclose(gradient[kept], 0, atol=1e-10)
    assert (np.asarray(gradient)[~kept] > 0).all()


def test_an_f_divergence_optimum_has_no_better_neighbour(world):
    """f-DPO with the forward KL: the best of E r - beta KL(ref || pi)."""

    def value(policy):
        return expectation(policy, world.reward) - world.beta * kl(world.reference, policy)

    law = fixed_points.f_divergence(world, "forward_kl", world.beta)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.1, 1.0):
        other = normalized(law + scale * rng.normal(size=law.shape))
        assert (value(law) > value(other)).all()


def test_the_cycles_minimax_mixture_is_what_the_library_computes(world):
    preferences, first = fixed_points.cyclic_preferences(world)
    np.testing.assert_allclose(preferences + preferences.T, 1)
    winner = np.asarray(minimax_winner(preferences.astype(np.float32)))
    shares = [winner[first == c].sum() for c in range(4)]
    np.testing.assert_allclose(shares, fixed_points.MINIMAX_CLASSES, atol=1e-4)
    assert fixed_points.exploitability(winner, preferences) < 1e-4


def test_sharing_hidden_states_changes_neither_loss_nor_gradient():
    """`pair_batch` against the data pipeline's rows of prompt + chosen + rejected, repeated."""
    world = make_world()
    pairs = np.array([[0, 3, 17], [0, 17, 3], [1, 0, 39], [2, 5, 6], [0, 3, 5], [2, 6, 39]])
    weight = np.array([3.0, 1.0, 2.0, 1.0, 1.0, 4.0])
    language, p = world.language, pairs[:, 0]

    def example(index, prompt, *responses):
        words = tuple(np.array(language.responses[r], np.int32) for r in responses)
        ones = tuple(np.ones(len(w), np.float32) for w in words)
        return Example(index, np.array(language.prompts[prompt], np.int32), words, ones, {})

    repeated = np.repeat(np.arange(len(pairs)), weight.astype(int))
    examples = [example(k, *pairs[i]) for k, i in enumerate(repeated)]
    ordinary = build_batch(examples, rows=len(examples), length_buckets=(8,), target_buckets=(6,))
    reference = np.stack([world.reference[p, pairs[:, 1]], world.reference[p, pairs[:, 2]]], 1)
    reference = reference.astype(np.float32)
    ordinary["reference_log_probs"] = reference[repeated].ravel()
    shared = pair_batch(language, pairs, weight) | {"reference_log_probs": reference.ravel()}
    loss = preference_loss(LOSSES["dpo"], beta=0.5)

    def per_pair(model, batch):
        sums = loss(model, batch)
        return sums.loss / sums.weight, {k: v / sums.weight for k, v in sums.metrics.items()}

    model = random_transformer(1)
    compute = jax.jit(jax.value_and_grad(per_pair, has_aux=True))
    for batch in (ordinary, shared):
        batch.update({name: jnp.asarray(x) for name, x in batch.items()})
    one, two = compute(model, ordinary), compute(model, shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_the_exact_critic_is_the_mean_of_what_follows(world):
    values = losses.exact_values(world, world.optimum)
    # Under the optimum r - beta log-ratio is beta log Z for every response: no variance at all.
    _, _, mask = world.language.choices
    best = world.beta * world.log_partition
    np.testing.assert_allclose(values[:, :, 0], np.broadcast_to(best[:, None], values.shape[:2]),
                               atol=1e-6)  # fmt: skip
    assert (values[:, mask == 0] == 0).all()
