"""The memory of chunked log-probabilities, read off jaxprs and compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses.log_probs import chunked_token_log_probs, token_log_probs
from tests.jaxprs import equations

LARGE = {"B": 2, "T": 48, "V": 1000, "D": 4}  # B*T*V is by far the largest product


def largest_array(function, *args):
    """Most elements that any value computed on the way has, and all shapes."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    shapes = {variable.aval.shape for e in equations(jaxpr) for variable in e.outvars}
    return max(map(np.prod, shapes)), shapes


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"]
)
def test_no_array_of_the_size_of_the_logits(differentiate, wrap):
    b, t, v, d = LARGE.values()
    hidden, unembedding, tokens = jnp.ones((b, t, d)), jnp.ones((v, d)), jnp.zeros((b, t), int)

    def unchunked(hidden, unembedding):
        logits = jnp.einsum("btd,vd->btv", hidden, unembedding)
        return token_log_probs(logits, tokens).sum()

    def chunked(hidden, unembedding):
        log_probs, entropy = chunked_token_log_probs(
            hidden, unembedding, tokens, chunk_size=8, logit_softcap=5.0
        )
        return log_probs.sum() + entropy.sum()

    def flattened(hidden, unembedding):
        return unchunked(hidden.reshape(1, b * t, d), unembedding)

    def inside_a_loop(hidden, unembedding):
        return jax.lax.map(lambda h: unchunked(h, unembedding), hidden[None])[0]

    def prepare(function):
        function = wrap(function)
        return jax.grad(function, (0, 1)) if differentiate else function

    largest, shapes = largest_array(prepare(chunked), hidden, unembedding)
    assert largest < b * t * v / 2
    assert (b, 8, v) in shapes  # the walk does reach the loop's body
    for holds_them in (unchunked, inside_a_loop):
        largest, shapes = largest_array(prepare(holds_them), hidden, unembedding)
        assert largest >= b * t * v and (b, t, v) in shapes
    tokens = tokens.reshape(1, b * t)
    assert largest_array(prepare(flattened), hidden, unembedding)[0] >= b * t * v


def test_compiled_gradient_needs_less_memory_and_no_entropy_when_unused():
    b, t, v, d = LARGE.values()
    hidden, unembedding, tokens = jnp.ones((b, t, d)), jnp.ones((v, d)), jnp.zeros((b, t), int)

    def compiled(with_entropy):
        def loss(hidden, unembedding):
            out = chunked_token_log_probs(hidden, unembedding, tokens, chunk_size=2)
            return out[0].sum() + (out[1].sum() if with_entropy else 0.0)

        # As in a train step: the function that takes the loss is itself jitted.
        gradient = jax.jit(jax.grad(jax.jit(loss), (0, 1)))
        return gradient.lower(hidden, unembedding).compile()

    without, with_entropy = compiled(False), compiled(True)
    assert without.memory_analysis().temp_size_in_bytes < 4 * b * t * v / 2
    assert without.cost_analysis()["flops"] < with_entropy.cost_analysis()["flops"]
