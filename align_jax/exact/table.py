"""A table policy: one free logit per prefix and symbol, and exact expectations under it.

Logits are `[..., prefixes, 1 + num_symbols]`; functions are differentiable, and exact under x64.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from align_jax.exact.language import Array, Language, World, normalized, token_policy

TokenLoss = Callable[..., jax.Array]


def token_log_probs(language: Language, logits: jax.Array) -> jax.Array:
    """`[..., N, T]` log-probability of every symbol of every response, 0 past the end."""
    prefix, symbol, mask = language.choices
    return jnp.where(mask > 0, jax.nn.log_softmax(logits)[..., prefix, symbol], 0.0)


def policy_of(language: Language, logits: Array) -> Array:
    """`[P,N]` float64 log-probabilities of all responses."""
    with jax.enable_x64(True):
        return normalized(np.asarray(token_log_probs(language, jnp.asarray(logits)).sum(-1)))


def expected_reward(language: Language, logits: jax.Array, reward: jax.Array) -> jax.Array:
    """The mean over prompts of E_pi[r]; `reward` is `[..., N]`."""
    total = token_log_probs(language, logits).sum(-1)
    return (jnp.exp(total) * reward).sum(-1).mean()


def expected_kl(language: Language, logits: jax.Array, reference: jax.Array) -> jax.Array:
    """The mean over prompts of KL(pi || ref), nats; `reference` is `[..., N]`."""
    total = token_log_probs(language, logits).sum(-1)
    return (jnp.exp(total) * (total - reference)).sum(-1).mean()


def expected_loss(
    world: World, loss: TokenLoss, group_size: int
) -> Callable[[jax.Array], jax.Array]:
    """E over what is sampled of `loss(log_probs, old, ref, rewards, mask)`, as it is trained on.

    A batch is a group of K = `group_size` responses to each of the P prompts. All N^(P K) batches
    are enumerated. The arrays are `[P,K,T]`, rewards `[P,K]`; `old` is the policy itself. Gradients
    flow through `log_probs` alone: not through the probability of a batch, nor through `old`.
    """
    language = world.language
    prompts, count = world.reward.shape
    draws = np.array(list(itertools.product(range(count), repeat=prompts * group_size)))
    draws = draws.reshape(-1, prompts, group_size)

    def of_draws(values):
        return values[np.arange(prompts)[:, None], draws]

    with np.errstate(invalid="ignore"):
        tokens = token_policy(language, world.reference)
    prefix, symbol, mask = language.choices
    reference = of_draws(np.where(mask, tokens[:, prefix, symbol], 0.0))
    rewards = of_draws(world.reward)
    masks = np.asarray(mask, np.float64)[draws]

    def expected(logits):
        log_probs = of_draws(token_log_probs(language, logits))
        old = stop_gradient(log_probs)
        weights = jnp.exp(old.sum((-3, -2, -1)))
        values = jax.vmap(loss)(log_probs, old, reference, rewards, masks)
        return (weights * values).sum()

    return expected


def descend(
    gradient: Callable[[jax.Array], jax.Array],
    start: Array,
    *,
    steps: int = 2000,
    learning_rate: float = 0.05,
) -> Array:
    """The table at which Adam on `gradient(logits)` ends, its rate decayed to 0 by a cosine.

    `gradient` may be one of no function, as that of a sampled loss is.
    """

    def step(carry, t):
        logits, mean, square = carry
        g = gradient(logits)
        mean = 0.9 * mean + 0.1 * g
        square = 0.99 * square + 0.01 * g**2
        rate = learning_rate * (1 + jnp.cos(jnp.pi * t / steps)) / 2
        corrected = jnp.sqrt(square / (1 - 0.99 ** (t + 1))) + 1e-12
        moved = logits - rate * mean / (1 - 0.9 ** (t + 1)) / corrected
        return (moved, mean, square), None

    with jax.enable_x64(True):
        x = jnp.asarray(start)
        carry = x, jnp.zeros_like(x), jnp.zeros_like(x)
        (x, _, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(carry)
    return np.asarray(x)


def relative(estimate: Array, exact: Array) -> float:
    """|estimate - exact| / |exact|."""
    return float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))


def rescaled(estimate: Array, exact: Array) -> float:
    """`relative` after the factor that makes it smallest: what no learning rate undoes."""
    return relative((estimate * exact).sum() / (estimate**2).sum() * estimate, exact)
