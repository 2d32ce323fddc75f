"""A language small enough to enumerate, and everything about it that is known exactly.

Symbols are EOS = 0 and 1..V; a response is every string that ends in EOS or has `max_length`
symbols, so the probabilities of all N responses to a prompt sum to 1 whatever the policy. Policies
and rewards are `[P,N]` float64 arrays (P prompts), policies as log-probabilities in nats. This
module is NumPy only, so it shares no code with the losses that it judges.
"""

import dataclasses
import functools
import itertools

import numpy as np

Array = np.ndarray
EOS = 0


@dataclasses.dataclass(frozen=True)
class Language:
    """All strings over `num_symbols` symbols and EOS, up to `max_length` with EOS counted."""

    num_symbols: int = 3
    max_length: int = 3
    prompts: tuple[tuple[int, ...], ...] = ((1,), (2, 3), (3,))

    @functools.cached_property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        symbols = range(1, self.num_symbols + 1)
        ended = [
            (*word, EOS)
            for length in range(self.max_length)
            for word in itertools.product(symbols, repeat=length)
        ]
        return (*ended, *itertools.product(symbols, repeat=self.max_length))

    @functools.cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The states in which a symbol is to be chosen, shorter ones first."""
        symbols = range(1, self.num_symbols + 1)
        return tuple(
            word
            for length in range(self.max_length)
            for word in itertools.product(symbols, repeat=length)
        )

    @functools.cached_property
    def lengths(self) -> Array:
        """`[N]` symbols of each response, EOS counted."""
        return np.array([len(response) for response in self.responses])

    @functools.cached_property
    def choices(self) -> tuple[Array, Array, Array]:
        """For every response and place: the prefix's number, the symbol, 1 where there is one."""
        number = {prefix: i for i, prefix in enumerate(self.prefixes)}
        prefix = np.zeros((len(self.responses), self.max_length), int)
        symbol, mask = np.zeros_like(prefix), np.zeros_like(prefix)
        for n, response in enumerate(self.responses):
            for t, token in enumerate(response):
                prefix[n, t], symbol[n, t], mask[n, t] = number[response[:t]], token, 1
        return prefix, symbol, mask

    @functools.cached_property
    def below(self) -> Array:
        """`[prefixes, 1 + num_symbols, N]`: whether a response goes through prefix and symbol."""
        out = np.zeros((len(self.prefixes), self.num_symbols + 1, len(self.responses)), bool)
        prefix, symbol, mask = self.choices
        n, t = np.nonzero(mask)
        out[prefix[n, t], symbol[n, t], n] = True
        return out


@dataclasses.dataclass(frozen=True)
class World:
    """A language with a reference policy `[P,N]`, a reward `[P,N]` and a price of KL."""

    language: Language
    reference: Array
    reward: Array
    beta: float

    @functools.cached_property
    def log_partition(self) -> Array:
        """`[P]` log Z(x) = log E_ref exp(r / beta); beta log Z is the best attainable value."""
        return logsumexp(self.reference + self.reward / self.beta)

    @functools.cached_property
    def optimum(self) -> Array:
        """log of pi_ref exp(r / beta) / Z: Rafailov et al. 2023, eq. 4."""
        return self.reference + self.reward / self.beta - self.log_partition[:, None]

    def value(self, policy: Array) -> Array:
        """`[P]` E_pi[r] - beta KL(pi || ref)."""
        return expectation(policy, self.reward) - self.beta * kl(policy, self.reference)

    def distance(self, policy: Array) -> float:
        """KL(pi* || pi) of the worst prompt, nats."""
        return float(kl(self.optimum, policy).max())


def random_reward(language: Language, seed: int = 0, scale: float = 1.0) -> Array:
    """`[P,N]` independent normal rewards."""
    shape = len(language.prompts), len(language.responses)
    return scale * np.random.default_rng(seed).normal(size=shape)


def logsumexp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def normalized(log_weights: Array) -> Array:
    return log_weights - logsumexp(log_weights)[..., None]


def expectation(policy: Array, values: Array) -> Array:
    return (np.exp(policy) * values).sum(-1)


def kl(p: Array, q: Array) -> Array:
    """`[P]` KL(p || q) in nats. Responses of probability 0 under p add nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(-1)


def total_variation(p: Array, q: Array) -> Array:
    return np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2


def token_policy(language: Language, policy: Array) -> Array:
    """`[P, prefixes, 1 + num_symbols]` next-symbol log-probabilities of a policy."""
    mass = np.where(language.below, np.exp(policy)[:, None, None, :], 0.0).sum(-1)
    with np.errstate(divide="ignore"):
        return np.log(mass) - np.log(mass.sum(-1, keepdims=True))


def from_tokens(language: Language, tokens: Array) -> Array:
    """`[P,N]` log-probabilities of responses from those of symbols: inverts `token_policy`."""
    prefix, symbol, mask = language.choices
    return np.where(mask, tokens[:, prefix, symbol], 0.0).sum(-1)


def action_values(language: Language, policy: Array, values: Array) -> Array:
    """`[P, prefixes, 1 + num_symbols]`: E_pi[values | prefix, symbol]."""
    weights = np.where(language.below, np.exp(policy)[:, None, None, :], 0.0)
    return (weights * values[:, None, None, :]).sum(-1) / weights.sum(-1)


def optimum_by_recursion(world: World) -> Array:
    """The optimum by soft value iteration from the leaves, without a sum over whole responses."""
    language = world.language
    reference = token_policy(language, world.reference)
    number = {prefix: i for i, prefix in enumerate(language.prefixes)}
    leaf = {response: n for n, response in enumerate(language.responses)}
    out = np.zeros_like(reference)
    soft_value = np.zeros(reference.shape[:2])
    for i in reversed(range(len(language.prefixes))):
        q = np.zeros(reference.shape[::2])
        for symbol in range(language.num_symbols + 1):
            after = (*language.prefixes[i], symbol)
            q[:, symbol] = (
                world.reward[:, leaf[after]] if after in leaf else (soft_value[:, number[after]])
            )
        tilted = reference[:, i] + q / world.beta
        soft_value[:, i] = world.beta * logsumexp(tilted)
        out[:, i] = normalized(tilted)
    return from_tokens(language, out)


def bradley_terry(reward: Array) -> Array:
    """`[P,N,N]` probability that i is preferred to j."""
    return 1 / (1 + np.exp(reward[:, None, :] - reward[:, :, None]))


def best_of_n(reference: Array, reward: Array, n: int) -> Array:
    """`[P,N]` log pmf of the draw with the largest reward out of n. Rewards must have no ties."""
    order = np.argsort(reward, -1)
    sorted_log_probs = np.take_along_axis(reference, order, -1)
    below = np.cumsum(np.exp(sorted_log_probs), -1)
    below[..., -1] = 1.0
    before = np.concatenate([np.zeros_like(below[..., :1]), below[..., :-1]], -1)
    out = np.empty_like(reference)
    np.put_along_axis(out, order, np.log(below**n - before**n), -1)
    return out


def rejection_sampling(world: World, ceiling: Array) -> tuple[Array, Array]:
    """Draws from the reference are kept with probability min(1, exp((r - ceiling) / beta)).

    Returns the log pmf `[P,N]` of kept responses, and the share `[P]` of draws that is kept. With
    `ceiling >= max r` the law is the optimum (Liu et al. 2023, RSO, theorem 1).
    """
    accept = np.minimum(0.0, (world.reward - ceiling[:, None]) / world.beta)
    return normalized(world.reference + accept), np.exp(logsumexp(world.reference + accept))
