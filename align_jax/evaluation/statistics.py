"""What samples and their rewards say: means, wins, best-of-n and texts, with errors by prompt.

Rewards are [P, K]: K samples for each of P prompts. Samples of one prompt are alike, so the
prompts are the independent units: every standard error here is that of a mean over P prompts.
"""

import collections
import math
import re
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def _as_rewards(name: str, rewards: np.ndarray) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.size == 0:
        raise ValueError(f"{name} must be [prompts, samples], not {list(rewards.shape)}")
    if not np.isfinite(rewards).all():
        prompt, sample = np.argwhere(~np.isfinite(rewards))[0]
        raise ValueError(f"{name}[{prompt}, {sample}] is {rewards[prompt, sample]}")
    return rewards


def _mean_and_error(by_prompt: np.ndarray) -> tuple[float, float]:
    """Mean over prompts and its standard error, nan for a single prompt."""
    count = len(by_prompt)
    error = by_prompt.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return float(by_prompt.mean()), float(error)


def mean_ci95(values_by_prompt: np.ndarray) -> tuple[float, float]:
    """Mean of [P, K] values and the half-width of its 95 % confidence interval by prompt.

    With m_p the mean of prompt p: mean = sum_p m_p / P, half-width = t * sd(m) / sqrt(P), where
    sd divides by P - 1 and t is the 0.975 quantile of Student's t with P - 1 degrees of freedom.
    nan for one prompt.
    """
    by_prompt = _as_rewards("values_by_prompt", values_by_prompt).mean(axis=1)
    mean, error = _mean_and_error(by_prompt)
    return mean, half_width_95(error, len(by_prompt))


def half_width_95(error: float, prompts: int) -> float:
    """Half-width of the 95 % confidence interval of a mean over prompts with a standard error."""
    return float(stdtrit(prompts - 1, 0.975)) * error


def win_rate(candidate: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Probability that a candidate beats a base sample of its prompt, and its standard error.

    candidate [P, K], base [P, M]; win = mean over p, i, j of [c_pi > b_pj] + [c_pi = b_pj] / 2,
    over all K * M pairs. The standard error is that of the mean over prompts (nan for one
    prompt).
    """
    candidate, base = _as_rewards("candidate", candidate), _as_rewards("base", base)
    if len(candidate) != len(base):
        raise ValueError(f"candidate has {len(candidate)} prompts and base has {len(base)}")
    wins = np.empty(len(base))
    for prompt, pool in enumerate(np.sort(base, axis=1)):
        below = np.searchsorted(pool, candidate[prompt], side="left")
        not_above = np.searchsorted(pool, candidate[prompt], side="right")
        wins[prompt] = (below + not_above).mean() / (2 * len(pool))
    return _mean_and_error(wins)


def _check_n(n: int, largest: int, pool_size: int) -> None:
    if not 1 <= n <= largest:
        raise ValueError(f"n must be 1 to {largest} for {pool_size} samples a prompt, not {n}")


def best_of_n(rewards: np.ndarray, n: int) -> np.ndarray:
    """Expected reward of the best of n samples, [P]: pool [P, M], drawn without replacement.

    E_p = sum_{i=n..M} C(i-1, n-1) / C(M, n) * r_p(i), r_p(i) the i-th smallest: the i-th is the
    best of n when the other n - 1 come from the i - 1 below it. This averages all C(M, n)
    subsets, and so is unbiased for n fresh samples. For its mean and interval:
    mean_ci95(best_of_n(rewards, n)[:, None]).
    """
    rewards = _as_rewards("rewards", rewards)
    size = rewards.shape[1]
    _check_n(n, size, size)
    subsets = math.comb(size, n)
    weights = np.array([math.comb(i, n - 1) / subsets for i in range(size)])
    return np.sort(rewards, axis=1) @ weights


def best_of_n_win_rate(rewards: np.ndarray, n: int) -> tuple[float, float]:
    """Win rate of the best of n against another sample of the same pool, and its standard error.

    n + 1 distinct samples are drawn from the M of a prompt, so the opponent is never among the n;
    ties count half. With L_j (E_j) of the others below (not above) opponent j: win = 1 - mean_j
    [C(L_j, n) + C(E_j, n)] / (2 C(M-1, n)). It averages all such draws, and so is unbiased for
    fresh samples; without ties it is n / (n+1) exactly.
    """
    rewards = _as_rewards("rewards", rewards)
    size = rewards.shape[1]
    _check_n(n, size - 1, size)
    draws = 2 * math.comb(size - 1, n)
    lost = np.array([math.comb(others, n) / draws for others in range(size)])
    wins = np.empty(len(rewards))
    for prompt, pool in enumerate(np.sort(rewards, axis=1)):
        below = np.searchsorted(pool, pool, side="left")
        not_above = np.searchsorted(pool, pool, side="right") - 1
        wins[prompt] = 1 - (lost[below] + lost[not_above]).mean()
    return _mean_and_error(wins)


def best_of_n_choices(rewards: np.ndarray, n: int) -> np.ndarray:
    """Samples that best-of-n would have kept, as indices [P, M // n] into the pool [P, M].

    The pool is cut into consecutive groups of n and the best of each (the first, if tied) is
    kept: actual best-of-n samples, for statistics of their texts. A remainder of fewer than n is
    left out.
    """
    rewards = _as_rewards("rewards", rewards)
    prompts, size = rewards.shape
    _check_n(n, size, size)
    groups = size // n
    best = rewards[:, : groups * n].reshape(prompts, groups, n).argmax(axis=2)
    return best + n * np.arange(groups)


def best_of_n_kl_bound(n: int) -> float:
    """KL of best-of-n to its base, in nats, at most: log n - (n - 1) / n.

    Reached where ties have probability 0. Source: Beirami et al. 2024, "Theoretical guarantees on
    the best-of-n alignment policy", which shows that it is a bound.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return math.log(n) - (n - 1) / n


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of words in the corpus; nan if it has none.

    Words are what whitespace separates, in lower case; no n-gram crosses two texts. The value
    falls as a corpus grows: compare corpora of equal size, as many texts of each. Source: Li et
    al. 2016, "A diversity-promoting objective function for neural conversation models".
    """
    seen, count = set(), 0
    for text in texts:
        words = text.lower().split()
        ngrams = list(zip(*(words[offset:] for offset in range(n)), strict=False))
        seen.update(ngrams)
        count += len(ngrams)
    return len(seen) / count if count else math.nan


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def exploitation(
    texts_base: Sequence[str], texts_trained: Sequence[str], *, top_words: int = 6
) -> dict[str, object]:
    """What the trained policy writes more of than the base, as numbers and as one English `line`.

    A word's share is the share of samples that contain it. `words` are the up to `top_words`
    whose share rose most, among those whose rise exceeds 4 standard errors of a difference of two
    shares: several thousand words are compared, so less would name words that rose by chance.
    Each is {word, base, trained}. The pairs [base, trained] beside them are in shares of samples
    (`exclamation`, `any_top_word`) and in words a sample (`mean_words`). Raises ValueError if
    either list of texts is empty.
    """
    if not len(texts_base) or not len(texts_trained):
        raise ValueError("exploitation compares samples: neither list of texts may be empty")
    both = (texts_base, texts_trained)
    sets = [[set(_words(text)) for text in texts] for texts in both]
    base, trained = (collections.Counter(word for words in side for word in words) for side in sets)
    count_base, count_trained = len(texts_base), len(texts_trained)

    risen = []
    for word, count in trained.items():
        rise = count / count_trained - base[word] / count_base
        pooled = (count + base[word]) / (count_trained + count_base)
        error = math.sqrt(pooled * (1 - pooled) * (1 / count_base + 1 / count_trained))
        if rise > 4 * error:
            risen.append((-rise, word))
    words = [word for _, word in sorted(risen)[:top_words]]

    any_top_word = [_share([not own.isdisjoint(words) for own in side]) for side in sets]
    exclamation = [_share(["!" in text for text in texts]) for texts in both]
    mean_words = [float(np.mean([len(_words(text)) for text in texts])) for texts in both]
    if words:
        leaning = (
            f"The trained policy leans on {', '.join(words)}: {any_top_word[1]:.0%} of its samples "
            f"contain at least one, against {any_top_word[0]:.0%} of the base's."
        )
    else:
        leaning = "No word became more frequent than chance explains."
    line = (
        f"{leaning} Samples with an exclamation mark: {exclamation[1]:.0%} "
        f"(base {exclamation[0]:.0%}). Mean length: {mean_words[1]:.1f} words "
        f"(base {mean_words[0]:.1f})."
    )
    return {
        "line": line,
        "words": [
            {
                "word": word,
                "base": base[word] / count_base,
                "trained": trained[word] / count_trained,
            }
            for word in words
        ],
        "any_top_word": any_top_word,
        "exclamation": exclamation,
        "mean_words": mean_words,
    }
