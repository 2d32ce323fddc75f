"""The law each method converges to on infinite data, in closed form or by a minimiser.

Comparisons are between all unordered pairs of different responses, equally often, and labelled by
Bradley-Terry with the known reward. Policies are `[P,N]` log-probabilities, float64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq, minimize

from align_jax.exact.language import (
    EOS,
    Array,
    World,
    bradley_terry,
    kl,
    logsumexp,
    normalized,
    token_policy,
)


def label_weights(world: World, flip_rate: float = 0.0) -> Array:
    """`[P,N,N]` share of a prompt's comparisons in which i is chosen over j."""
    wins = (1 - 2 * flip_rate) * bradley_terry(world.reward) + flip_rate
    n = wins.shape[-1]
    return wins * (1 - np.eye(n)) / (n * (n - 1) / 2)


def win_rates(world: World) -> Array:
    """`[P,N]` P(i beats a uniformly drawn response), itself (1/2) included."""
    return bradley_terry(world.reward).mean(-1)


def solve_normalizer(log_weights: Callable[[float], Array], low: float, high: float) -> Array:
    """`log_weights(c)` at the c in [low, high] where the weights sum to 1."""
    total = lambda c: logsumexp(log_weights(c))  # noqa: E731
    return log_weights(brentq(total, low, high, xtol=1e-14, rtol=1e-14))


def ipo(world: World) -> Array:
    """Azar et al. 2023: (h_i - h_j) regressed on (2 p_ij - 1) / (2 beta), whose solution over all
    pairs is h_i = win rate_i / beta + const (eq. 10 with a uniform second response)."""
    return normalized(world.reference + win_rates(world) / world.beta)


def tilted_by_length(world: World, log_base: Array) -> Array:
    """log pi(y) = log_base + |y| (r / beta + c), the limit of length-normalised losses.

    Such a loss leaves one constant c per token free, and c makes the probabilities sum to 1. beta
    is on nats per token here: the world's times `max_length`.
    """
    lengths = world.language.lengths
    beta = world.beta * world.language.max_length
    return np.stack(
        [
            solve_normalizer(lambda c, b=b, r=r: b + lengths * (r / beta + c), -99.0, 99.0)
            for b, r in zip(log_base, world.reward)
        ]
    )


def f_divergence(world: World, divergence: str, beta: float) -> Array:
    """argmax E[r] - beta D_f(pi || ref): f'(pi / ref) = (r - c) / beta (Wang et al. 2023)."""

    def ratio(score):  # log u with f'(u) = score < 0
        if divergence == "forward_kl":
            return -np.log(-score)
        return score - np.log(-np.expm1(score))

    return np.stack(
        [
            solve_normalizer(
                lambda c, ref=ref, r=r: ref + ratio((r - r.max() - c) / beta), 1e-12, 1e3
            )
            for ref, r in zip(world.reference, world.reward)
        ]
    )


def kto(world: World) -> Array:
    """KTO's stationary law, desirable with probability w = the win rate, z0 = KL(pi || ref).

    The loss of y is -(2 w - 1) sigmoid(z) + const: below w = 1/2 nothing holds a response, and its
    probability goes to 0; the others have
    (2 w - 1) sigmoid'(beta (log u - z0)) = C u with u = pi / ref, for equally frequent responses
    C pi, that is with 1 / N on the left and C pi on the right. Flipping a share of all labels
    multiplies every 2 w - 1, and C, by one factor: the law stays.
    """
    out = []
    for ref, wins in zip(world.reference, win_rates(world)):
        kept = wins > 0.5
        gain = np.log(2 * wins[kept] - 1)

        def log_policy(c, z0, ref=ref[kept], gain=gain):
            # Solve gain + log sigmoid'(beta (x - ref - z0)) = c + x for x = log pi by bisection.
            low, high = np.full_like(ref, -200.0), np.full_like(ref, 200.0)
            for _ in range(100):
                x = (low + high) / 2
                z = world.beta * (x - ref - z0)
                excess = gain - np.logaddexp(0, z) - np.logaddexp(0, -z) - c - x
                low, high = np.where(excess > 0, x, low), np.where(excess > 0, high, x)
            return x

        z0 = 0.0
        for _ in range(200):
            x = solve_normalizer(lambda c, z0=z0: log_policy(c, z0), -50.0, 50.0)
            point = max((np.exp(x) * (x - ref[kept])).sum(), 0.0)
            if abs(point - z0) < 1e-12:
                break
            z0 = 0.5 * z0 + 0.5 * point
        full = np.full_like(ref, -np.inf)
        full[kept] = x
        out.append(full)
    return np.stack(out)


def best_response(world: World) -> Array:
    """Log-probabilities of the policy that always gives the response of the largest reward."""
    best = world.reward == world.reward.max(-1, keepdims=True)
    return np.where(best, 0.0, -np.inf)


def kl_in_loss(
    world: World, utility: Callable[[Array], Array], *, estimator: str, price: float
) -> Array:
    """Where sampled policy gradients of `utility(pi)` plus price x k2 or k3 per token are 0.

    The penalty's gradient stops at its own token, so a prefix pays nothing for where it leads:
    with Q(s, a) = E[utility | s, a], k2 gives pi(a|s) = ref(a|s) exp(Q / price) / Z(s), and k3,
    whose expected gradient is that of KL(ref || pi), pi(a|s) = price ref(a|s) / (c(s) - Q).
    """
    language = world.language
    reference = token_policy(language, world.reference)
    number = {prefix: i for i, prefix in enumerate(language.prefixes)}
    leaf = {response: n for n, response in enumerate(language.responses)}
    policy = world.reference
    for _ in range(300):
        values, previous = utility(policy), policy
        state_value = np.zeros(reference.shape[:2])
        tokens = np.zeros_like(reference)
        for i in reversed(range(len(language.prefixes))):
            after = [(*language.prefixes[i], s) for s in range(language.num_symbols + 1)]
            q = np.stack(
                [values[:, leaf[a]] if a in leaf else state_value[:, number[a]] for a in after], -1
            )
            if estimator == "k2":
                tokens[:, i] = normalized(reference[:, i] + q / price)
            else:
                for p, (ref, row) in enumerate(zip(reference[:, i], q)):
                    tokens[p, i] = solve_normalizer(
                        lambda c, ref=ref, row=row: ref - np.log((row.max() + c - row) / price),
                        1e-12,
                        1e3,
                    )
            state_value[:, i] = (np.exp(tokens[:, i]) * q).sum(-1)
        prefix, symbol, mask = language.choices
        new = np.where(mask, tokens[:, prefix, symbol], 0.0).sum(-1)
        policy = normalized(0.5 * previous + 0.5 * new)
        if kl(previous, policy).max() < 1e-13:
            break
    return policy


def grpo_utility(world: World, *, scale: bool) -> Callable[[Array], Array]:
    """GRPO's advantage in a group of K = 2, its expectation over the other sample."""
    difference = world.reward[:, :, None] - world.reward[:, None, :]
    advantage = difference / 2
    if scale:
        advantage = advantage / (np.abs(difference) / np.sqrt(2) + 1e-4)
    return lambda policy: (advantage * np.exp(policy)[:, None, :]).sum(-1)


PairLoss = Callable[..., jax.Array]


def minimizer(expected: Callable[[jax.Array], jax.Array], start: Array) -> Array:
    """Where L-BFGS in float64 ends on `expected(x) -> scalar`, from `start`.

    That is a minimum; it is the minimum where `expected` is convex. A function without a minimum is
    left after 20,000 iterations; where one is nan, so is the result.
    """
    with jax.enable_x64(True):
        gradient = jax.jit(jax.value_and_grad(lambda x: expected(x.reshape(start.shape))))
        result = minimize(
            lambda x: tuple(np.asarray(v, np.float64) for v in gradient(jnp.asarray(x))),
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10},
        )
    return np.where(np.isfinite(result.fun), result.x, np.nan).reshape(start.shape)


def of_pairs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `[P N N]` values of the first and of the second response of all pairs, from `[P,N]`."""
    shape = (*x.shape, x.shape[-1])
    first, second = x[:, :, None], x[:, None, :]
    return jnp.broadcast_to(first, shape).ravel(), jnp.broadcast_to(second, shape).ravel()


def pair_minimizer(world: World, pair_loss: PairLoss, flip_rate: float = 0.0) -> Array:
    """The policy of least expected `pair_loss(log pi_i, log pi_j, log ref_i, log ref_j, |i|, |j|)`.

    The loss is called with `[B]` arrays of all pairs and returns `[B]`. One free logit per
    response; L-BFGS starts at the reference.
    """
    lengths = np.broadcast_to(np.asarray(world.language.lengths, float), world.reward.shape)
    weights = label_weights(world, flip_rate).ravel()

    def expected(logits):
        values = jax.nn.log_softmax(logits, -1), world.reference, lengths
        return (weights * pair_loss(*(x for value in values for x in of_pairs(value)))).sum()

    return normalized(minimizer(expected, world.reference))


def reward_minimizer(world: World, reward_loss: PairLoss) -> Array:
    """`[P,N]` free rewards of least expected `reward_loss(chosen [B], rejected [B]) -> [B]`.

    L-BFGS starts at 0.
    """
    weights = label_weights(world).ravel()

    def expected(rewards):
        return (weights * reward_loss(*of_pairs(rewards))).sum()

    return minimizer(expected, np.zeros_like(world.reward))


def cyclic_preferences(world: World) -> tuple[Array, Array]:
    """`[N,N]` preferences by first symbol, 1 > 2 (0.9) > 3 (0.8) > 1 (0.7), all > EOS (0.9).

    Returns also the class `[N]` of each response, 0 for the empty one. With stakes 0.4, 0.3 and 0.2
    the minimax mixture of the classes 1, 2, 3 is (3, 2, 4) / 9.
    """
    by_class = np.full((4, 4), 0.5)
    for winner, loser, share in [
        (1, 2, 0.9), (2, 3, 0.8), (3, 1, 0.7), (1, 0, 0.9), (2, 0, 0.9), (3, 0, 0.9),
    ]:  # fmt: skip
        by_class[winner, loser], by_class[loser, winner] = share, 1 - share
    first = np.array([response[0] for response in world.language.responses])
    assert EOS == 0
    return by_class[first][:, first], first


MINIMAX_CLASSES = np.array([0.0, 3.0, 2.0, 4.0]) / 9


def exploitability(probabilities: Array, preferences: Array) -> float:
    """By how much the best reply beats a mixture `[N]`: max_j P(j > mixture) - 1/2."""
    return float((preferences @ probabilities).max() - 0.5)
