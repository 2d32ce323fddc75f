"""Loss functions for `make_train_step`: the library's losses under exact expectations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import stop_gradient

from align_jax import losses
from align_jax.algorithms import preference
from align_jax.algorithms.policy_gradient import Config, Kl
from align_jax.algorithms.policy_gradient.agent import Agent
from align_jax.algorithms.policy_gradient.objective import (
    Completions,
    MicroBatch,
    aggregation_weights,
    estimate_advantages,
    make_objective,
)
from align_jax.exact.fixed_points import label_weights, win_rates
from align_jax.exact.language import World, action_values, bradley_terry, token_policy
from align_jax.losses import policy_gradient as pg
from align_jax.models.heads import ScalarModel, response_scores
from align_jax.models.transformer import Transformer
from align_jax.training.scoring import target_log_probs
from align_jax.training.step import Batch, LossFunction, LossSums
from tests.exact.training import (
    all_pairs,
    enumeration,
    log_probs_of,
    mean,
    pair_batch,
    policy_of,
)

# Preferences.


def preference_batch(world: World, flip_rate: float = 0.0) -> Batch:
    """All ordered pairs, each weighted by the probability of its label."""
    pairs = all_pairs(world.language)
    p, chosen, rejected = pairs.T
    batch = pair_batch(world.language, pairs, label_weights(world, flip_rate)[p, chosen, rejected])
    reference = np.stack([world.reference[p, chosen], world.reference[p, rejected]], 1)
    return batch | {"reference_log_probs": reference.ravel().astype(np.float32)}


def trainer_loss(name: str, beta: float, **options: float | str) -> LossFunction:
    """`algorithms.preference.preference_loss`."""
    return preference.preference_loss(losses.preference.LOSSES[name], beta=beta, **options)


def kto_batch(world: World, flip_rate: float = 0.0) -> Batch:
    desirable = (1 - 2 * flip_rate) * win_rates(world) + flip_rate
    return policy_batch(world) | {"desirable": desirable.ravel().astype(np.float32)}


def kto(world: World) -> LossFunction:
    """Every response equally often, desirable as often as it beats a uniform other one."""

    def loss_sums(model, batch):
        log_probs, reference = log_probs_of(model, batch), batch["sequence_reference"]
        ratios = (log_probs - reference).reshape(world.reward.shape)
        kl = (jnp.exp(log_probs).reshape(ratios.shape) * ratios).sum(-1)
        kl = jnp.repeat(kl, ratios.shape[1])
        labelled = [
            losses.preference.kto_loss(
                log_probs, reference, jnp.full(log_probs.shape, label), kl, beta=world.beta
            )
            for label in (True, False)
        ]
        wins = batch["desirable"]
        return mean((wins * labelled[0] + (1 - wins) * labelled[1]) / len(world.reward))

    return loss_sums


# Policy gradients.


def policy_batch(world: World) -> Batch:
    """The enumeration with each response's reward and the reference's log-probabilities."""
    batch = enumeration(world.language)
    return batch | {
        "reward": world.reward.ravel().astype(np.float32),
        "sequence_reference": world.reference.ravel().astype(np.float32),
        "reference": token_log_probs(world, world.reference),
        "kl_coefficient": np.array([world.beta], np.float32),
    }


def token_log_probs(world: World, policy: np.ndarray) -> np.ndarray:
    """`[P N, max_length]` log-probability of each symbol, 0 past the end."""
    prefix, symbol, mask = world.language.choices
    tokens = token_policy(world.language, policy)[:, prefix, symbol]
    return np.where(mask, tokens, 0.0).reshape(-1, mask.shape[1]).astype(np.float32)


def policy_config(world: World, *, kl: dict | None = None, samples: int = 1, **fields) -> Config:
    """Settings of `algorithms.policy_gradient`: sums over a response unless `fields` say else.

    `kl` is set past the checks of `Config`, which refuses k1 in the loss: the table shows why.
    """
    config = Config.from_dict(
        {
            "aggregation": "sum",
            "epochs": 1,
            "sampling": {"max_new_tokens": world.language.max_length, "samples": samples},
        }
        | fields
    )
    object.__setattr__(config, "kl", Kl(**kl or {}))
    return config


def objective(config: Config):
    """The trainer's own loss under an exact expectation: `(model, batch, law, more) -> LossSums`.

    `law` `[P N]` is the probability of each response, hence its weight; `more` has what the loss
    reads: `advantages`, `[P N, max_length]`, and `old_log_probs` where they are not the model's.
    """
    loss, budget = make_objective(config), config.sampling.max_new_tokens

    def loss_sums(model: Transformer, batch: Batch, law: jax.Array, more: Batch) -> LossSums:
        mask = batch["target_mask"]
        # The mean over responses that are all there once becomes their expectation.
        weights = aggregation_weights(mask, method=config.aggregation, max_length=budget)
        weights = weights * mask.shape[0] * law[:, None]
        made = {
            "mask": mask,
            "old_log_probs": jnp.zeros_like(mask),
            "ref_log_probs": batch["reference"],
            "weights": weights,
            "mean_weights": weights,
        }
        known = MicroBatch(
            batch,
            Completions(**(made | more)),
            jnp.full(mask.shape[0], "old_log_probs" not in more, jnp.float32),
            batch["kl_coefficient"][0],
        )
        return mean(loss(Agent(model, None), known).loss)

    return loss_sums


def on_policy(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The model's log-probabilities `[P N, max_length]` and law `[P N]`, as constants."""
    mask = batch["target_mask"]
    log_probs, _ = target_log_probs(model, batch)
    log_probs = stop_gradient(jnp.where(mask > 0, log_probs, 0.0))
    return log_probs, jnp.exp(log_probs.sum(-1))


def reinforce(world: World) -> LossFunction:
    """E_pi of REINFORCE with the KL in the reward, against a baseline of 0."""
    config = policy_config(world, loss="reinforce", advantage="moving_baseline", critic="none")
    expected = objective(config)

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        log_probs, law = on_policy(model, batch)
        made = estimate_advantages(
            config,
            batch["reward"],
            log_probs,
            batch["reference"],
            batch["target_mask"],
            None,
            batch["kl_coefficient"][0],
            jnp.float32(0.0),
        )
        return expected(model, batch, law, {"advantages": made.advantages})

    return loss_sums


def ppo(world: World) -> LossFunction:
    """E under the old policy of PPO's clipped loss; `ppo_refresh` renews what is old."""
    expected = objective(policy_config(world, loss="ppo"))

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        old = batch["old_log_probs"]
        more = {"old_log_probs": old, "advantages": batch["advantages"]}
        return expected(model, batch, jnp.exp(old.sum(-1)), more)

    return loss_sums


def ppo_refresh(world: World, every: int, *, lambda_: float = 0.95):
    """Old log-probabilities, and GAE advantages with the exact value function, each `every` steps.

    V(s) = E_pi[r - beta log-ratio of what follows s | s], by enumeration.
    """
    mask = world.language.choices[2]
    flat_mask = np.tile(mask, (len(world.reward), 1))
    reference = token_log_probs(world, world.reference)
    score = world.reward.ravel().astype(np.float32)

    config = policy_config(world, advantage="gae", lambda_=lambda_, whiten_advantages=False)

    @jax.jit
    def estimate(old, values):
        made = estimate_advantages(
            config, score, old, reference, flat_mask, values, world.beta, jnp.nan
        )
        return made.advantages

    def refresh(step: int, model: Transformer):
        if step % every:
            return None
        policy = policy_of(model, world.language)
        old = token_log_probs(world, policy)
        values = exact_values(world, policy).reshape(flat_mask.shape).astype(np.float32)
        return {"old_log_probs": jnp.asarray(old), "advantages": estimate(old, values)}

    return refresh


def exact_values(world: World, policy: np.ndarray) -> np.ndarray:
    """`[P,N,max_length]` value of the prefix before each symbol under KL-shaped rewards."""
    language = world.language
    prefix, symbol, mask = language.choices
    spent = world.beta * (token_log_probs(world, policy) - token_log_probs(world, world.reference))
    spent = spent.astype(np.float64).reshape(*policy.shape, -1)
    whole = action_values(language, policy, world.reward - spent.sum(-1))
    tokens = np.exp(token_policy(language, policy))
    state = (tokens * whole).sum(-1)[:, prefix]
    return np.where(mask, state + np.cumsum(spent, -1) - spent, 0.0)


def group_of_two(world: World, **fields) -> LossFunction:
    """E over groups of two completions, all N^2 of them, of a group-relative loss.

    `fields` are the trainer's: `advantage`, `scale_rewards`, `aggregation`, `kl`.
    """
    config = policy_config(world, samples=2, critic="none", **fields)
    expected = objective(config)
    prompts, n = world.reward.shape
    first, second = np.indices((n, n)).reshape(2, -1)
    pairs = np.stack([first, second], 1).ravel()
    rows = (np.arange(prompts)[:, None] * n + pairs).ravel()

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        log_probs, law = on_policy(model, batch)
        mask = batch["target_mask"]
        made = estimate_advantages(
            config,
            batch["reward"][rows],
            log_probs[rows],
            batch["reference"][rows],
            mask[rows],
            None,
            batch["kl_coefficient"][0],
            jnp.float32(jnp.nan),
        )
        # Both places of a group have the same law: the mean over the first one's partner.
        of_first = made.advantages.reshape(prompts, n, n, 2, -1)[:, :, :, 0]
        advantages = jnp.einsum("pijt,pj->pit", of_first, law.reshape(prompts, n))
        more = {"advantages": advantages.reshape(mask.shape)}
        return expected(model, batch, law, more)

    return loss_sums


def self_play(world: World, preferences: np.ndarray, price: float) -> LossFunction:
    """SPO: REINFORCE on the preference against another sample of the same policy, all N^2 pairs.

    `price` is that of the KL to `sequence_reference`, in the reward.
    """
    shape = world.reward.shape
    matrix = jnp.asarray(preferences, jnp.float32)
    # Groups of two: [N, N, 2, 2], so that the library's own reward is what is enumerated.
    groups = jnp.stack(
        [
            jnp.stack([jnp.full_like(matrix, 0.5), matrix], -1),
            jnp.stack([matrix.T, jnp.full_like(matrix, 0.5)], -1),
        ],
        -2,
    )
    rewards = pg.spo_rewards(groups)[..., 0]

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        log_probs = log_probs_of(model, batch).reshape(shape)
        weight = stop_gradient(jnp.exp(log_probs))
        moved = stop_gradient(log_probs) - batch["sequence_reference"].reshape(shape)
        advantages = (rewards[None] * weight[:, None, :]).sum(-1) - 0.5 - price * moved
        return mean(weight * pg.reinforce_loss(log_probs, advantages))

    return loss_sums


# Distillation.


def distil(world: World, k: int) -> LossFunction:
    """E over the reference's own strings of the top-k loss, the reference being the teacher."""

    def loss_sums(model: Transformer, batch: Batch) -> LossSums:
        hidden = model(batch["tokens"], positions=batch["positions"])
        hidden = jnp.take_along_axis(hidden, batch["predict_from"][..., None], axis=1)
        top = jax.lax.top_k(batch["teacher"].reshape(*hidden.shape[:2], -1), k)
        token_losses = losses.distillation.top_k_kl_loss(model.logits(hidden), *top)
        weight = jnp.exp(batch["sequence_reference"])
        return mean(weight * (token_losses * batch["target_mask"]).sum(-1))

    return loss_sums


# Reward models.


class RewardTable(nnx.Module):
    """One free reward per response."""

    def __init__(self, size: int):
        self.bias = nnx.Param(jnp.zeros(size))


def scores(model: RewardTable | ScalarModel, batch: Batch) -> jax.Array:
    """`[P N]` rewards."""
    return model.bias[...] if isinstance(model, RewardTable) else response_scores(model, batch)


def reward_model(set_loss) -> LossFunction:
    """Expected `set_loss(rewards [M,K], batch)` of sets of K responses to one prompt."""

    def loss_sums(model, batch: Batch) -> LossSums:
        values = set_loss(scores(model, batch)[batch["sets"]], batch)
        return mean(batch["weight"] * values)

    return loss_sums


def pair_sets(world: World, handicap: np.ndarray | float = 0.0) -> Batch:
    """Ordered pairs; `handicap` `[P,N,N]`, antisymmetric, is what the first response must lead by.

    Then P(i wins) = sigmoid(r_i - r_j - handicap_ij).
    """
    pairs = all_pairs(world.language)
    p, i, j = pairs.T
    handicap = np.broadcast_to(handicap, bradley_terry(world.reward).shape)[p, i, j]
    lead = world.reward[p, i] - world.reward[p, j] - handicap
    n = world.reward.shape[1]
    return {
        "sets": (pairs[:, 1:] + n * p[:, None]).astype(np.int32),
        "weight": (1 / (1 + np.exp(-lead)) / len(pairs)).astype(np.float32),
        "margin": handicap.astype(np.float32),
    }


def ranked_sets(world: World, size: int, *, whole: bool, seed: int = 0) -> Batch:
    """Random sets of `size`, one for every place of every response, with every outcome.

    The law is Plackett-Luce; an outcome is a whole order, or (`whole` false) who came first.
    `sets` are in order of rank.
    """
    rng = np.random.default_rng(seed)
    count, n = world.reward.shape
    rows, weights = [], []
    orders = list(itertools.permutations(range(size)))
    if not whole:
        orders = [(k, *(i for i in range(size) if i != k)) for k in range(size)]
    for p in range(count):
        for start in [rng.permutation(n) for _ in range(4)]:
            for shift in range(n):
                members = np.roll(start, shift)[:size]
                for order in orders:
                    ranked = members[list(order)]
                    r = world.reward[p, ranked]
                    log_p = sum(
                        r[k] - np.logaddexp.reduce(r[k:]) for k in range(size if whole else 1)
                    )
                    rows.append(ranked + n * p)
                    weights.append(np.exp(log_p))
    return {
        "sets": np.array(rows, np.int32),
        "weight": (np.array(weights) / np.sum(weights)).astype(np.float32),
    }
