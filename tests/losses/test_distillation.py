"""Distillation losses against float64 loops over the vocabulary, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.losses import distillation

rng = np.random.default_rng(0)


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


def top_k(teacher, k):
    ids = np.argsort(-teacher, axis=-1)[..., :k]
    log_probs = np.take_along_axis(np.log(softmax(teacher)), ids, -1)
    return jnp.asarray(log_probs, jnp.float32), jnp.asarray(ids)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_top_k_kl_is_the_kl_of_coarser_distributions(k, seed):
    generator = np.random.default_rng(seed)
    student, teacher = generator.normal(size=(2, 3, 6), scale=2).astype(np.float32)
    log_probs, ids = top_k(teacher, k)
    loss = distillation.top_k_kl_loss(student, log_probs, ids)
    assert loss.shape == (3,)
    for row in range(3):
        p, q, kept = softmax(teacher)[row], softmax(student)[row], np.asarray(ids)[row]
        coarse_p, coarse_q = ([*x[kept], max(1 - x[kept].sum(), 0)] for x in (p, q))
        if k == 6:
            coarse_p, coarse_q = coarse_p[:-1], coarse_q[:-1]
        np.testing.assert_allclose(loss[row], kl(coarse_p, coarse_q), rtol=1e-4, atol=2e-6)
        assert loss[row] <= kl(p, q) + 1e-5


def test_top_k_kl_is_zero_only_with_the_teachers_top_probabilities():
    teacher = rng.normal(size=(1, 6)).astype(np.float32)
    log_probs, ids = top_k(teacher, 2)
    f = jax.value_and_grad(lambda s: distillation.top_k_kl_loss(s, log_probs, ids).sum())
    value, gradient = f(teacher)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    # Tokens of the tail may be exchanged; one of the top k may not.
    tail = np.setdiff1d(np.arange(6), np.asarray(ids)[0])
    exchanged = teacher.copy()
    exchanged[0, tail[:2]] = exchanged[0, tail[1::-1]]
    np.testing.assert_allclose(f(exchanged)[0], 0, atol=1e-6)
    moved = teacher.copy()
    moved[0, ids[0, 0]] += 0.3
    assert f(moved)[0] > 1e-3


def test_top_k_gradient_is_the_difference_of_coarse_probabilities():
    # d KL / d logit_v = q_v - p_v for kept tokens, and q_v - p_tail q_v / q_tail in the tail.
    student, teacher = rng.normal(size=(2, 6)).astype(np.float32)
    log_probs, ids = top_k(teacher, 2)
    gradient = jax.grad(lambda s: distillation.top_k_kl_loss(s, log_probs, ids))(student)
    p, q, kept = softmax(teacher), softmax(student), np.asarray(ids)
    tail = np.setdiff1d(np.arange(6), kept)
    expected = np.zeros(6)
    expected[kept] = q[kept] - p[kept]
    expected[tail] = q[tail] - p[tail].sum() * q[tail] / q[tail].sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_top_k_kl_is_exact_when_the_students_tail_is_tiny():
    # 1 - (top k) would round to 0 here, and its logarithm to -inf.
    student = jnp.array([0.0, 0.0, -60.0, -60.0])
    teacher_top = jnp.log(jnp.array([0.45, 0.45]))
    loss = distillation.top_k_kl_loss(student, teacher_top, jnp.array([0, 1]))
    log_q_tail = -60.0
    expected = 2 * 0.45 * np.log(0.45 / 0.5) + 0.1 * (np.log(0.1) - log_q_tail)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd_loop(beta):
    student, teacher = rng.normal(size=(2, 4, 6), scale=2).astype(np.float32)
    loss = distillation.generalized_jsd_loss(student, teacher, beta=beta)
    for row, (p, q) in enumerate(zip(softmax(teacher), softmax(student))):
        m = beta * p + (1 - beta) * q
        np.testing.assert_allclose(loss[row], beta * kl(p, m) + (1 - beta) * kl(q, m), rtol=1e-4)


def test_generalized_jsd_ends_are_the_two_kls():
    student, teacher = rng.normal(size=(2, 6)).astype(np.float32)
    p, q = softmax(teacher), softmax(student)
    forward = distillation.generalized_jsd_loss(student, teacher, beta=0.0)
    reverse = distillation.generalized_jsd_loss(student, teacher, beta=1.0)
    np.testing.assert_allclose(forward, kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(reverse, kl(q, p), rtol=1e-5)
    # They are limits: loss / beta at 0 and loss / (1 - beta) at 1.
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (student, teacher)]
        near_0 = distillation.generalized_jsd_loss(*wide, beta=1e-6) / 1e-6
        near_1 = distillation.generalized_jsd_loss(*wide, beta=1 - 1e-6) / 1e-6
        np.testing.assert_allclose([near_0, near_1], [forward, reverse], rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_generalized_jsd_symmetry_bounds_and_zero(beta, seed):
    student, teacher = np.random.default_rng(seed).normal(size=(2, 6), scale=3).astype(np.float32)
    loss = distillation.generalized_jsd_loss(student, teacher, beta=beta)
    swapped = distillation.generalized_jsd_loss(teacher, student, beta=1 - beta)
    np.testing.assert_allclose(loss, swapped, rtol=1e-4, atol=1e-6)
    # The divergence is the information that a sample carries about which of the two it is from.
    entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    assert -1e-6 <= loss <= entropy + 1e-6
    same = distillation.generalized_jsd_loss(student, student + 2.0, beta=beta)
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_forbidden_tokens_change_nothing(beta):
    student, teacher = rng.normal(size=(2, 4)).astype(np.float32)
    padding = jnp.array([-jnp.inf, -jnp.inf])
    wide = [jnp.concatenate([jnp.asarray(x), padding]) for x in (student, teacher)]

    def f(s, t):
        return distillation.generalized_jsd_loss(s, t, beta=beta)

    np.testing.assert_allclose(f(*wide), f(student, teacher), rtol=1e-6)
    gradient = jax.grad(f)(*wide)
    np.testing.assert_allclose(gradient[:4], jax.grad(f)(student, teacher), rtol=1e-5)
    assert not np.any(gradient[4:])


def test_errors():
    logits, top = jnp.zeros((2, 6)), jnp.zeros((2, 3))
    with pytest.raises(TypeError, match="`teacher_top_ids`"):
        distillation.top_k_kl_loss(logits, top, top)
    with pytest.raises(ValueError, match="`teacher_top_ids`"):
        distillation.top_k_kl_loss(logits, top, jnp.zeros((2, 2), int))
    with pytest.raises(ValueError, match="`student_logits`"):
        distillation.top_k_kl_loss(logits[0], top, jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="`beta`"):
        distillation.generalized_jsd_loss(logits, logits, beta=1.5)
    with pytest.raises(ValueError, match="`teacher_logits`"):
        distillation.generalized_jsd_loss(logits, logits[0], beta=0.5)
