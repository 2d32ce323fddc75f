"""Known truths that are no policy in one table: rewards, teachers, cycles, a KL that is held."""

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.exact.fixed_points import cyclic_preferences
from align_jax.exact.language import Array, World, kl, normalized, token_policy
from align_jax.losses import policy_gradient as pg
from align_jax.losses import ranking
from align_jax.models.heads import ScalarModel
from tests.exact import losses
from tests.exact.training import (
    Run,
    enumeration,
    policy_of,
    random_transformer,
    train,
    trained,
)

# Sets are in order of rank.
SET_LOSSES = {
    "pairwise": (lambda r, b: ranking.bradley_terry_loss(r[:, 0], r[:, 1])),
    "pairwise, known handicaps as margins": (
        lambda r, b: ranking.bradley_terry_loss(r[:, 0], r[:, 1], margin=b["margin"])
    ),
    "best of 4": (
        lambda r, b: ranking.best_of_k_loss(r, jnp.zeros(len(r), jnp.int32))
    ),
    "all pairs of 3": (
        lambda r, b: ranking.all_pairs_loss(r, jnp.broadcast_to(jnp.arange(3), r.shape))
    ),
    "Plackett-Luce of 3": (
        lambda r, b: ranking.plackett_luce_loss(r, jnp.broadcast_to(jnp.arange(3), r.shape))
    ),
    "pairwise, margin 1 on every pair": (
        lambda r, b: ranking.bradley_terry_loss(r[:, 0], r[:, 1], margin=1.0)
    ),
}  # fmt: skip
RECOVERING = list(SET_LOSSES)[:5]


def comparison_sets(world: World, name: str):
    if name == "best of 4":
        return losses.ranked_sets(world, 4, whole=False)
    if name in ("all pairs of 3", "Plackett-Luce of 3"):
        return losses.ranked_sets(world, 3, whole=True)
    if "handicap" in name:
        x = np.random.default_rng(1).normal(size=(*world.reward.shape, world.reward.shape[1]))
        return losses.pair_sets(world, x - x.swapaxes(1, 2))
    return losses.pair_sets(world)


def fit_reward(world: World, name: str, *, transformer: bool, run: Run) -> Array:
    """`[P,N]` fitted rewards, shifted to the known reward's mean for each prompt."""
    batch = enumeration(world.language) | comparison_sets(world, name)
    if transformer:
        model = ScalarModel(random_transformer(1), key=jax.random.key(2))
    else:
        model = losses.RewardTable(world.reward.size)
    model = trained(losses.reward_model(SET_LOSSES[name]), model, batch, run)
    fitted = np.asarray(losses.scores(model, batch), np.float64).reshape(world.reward.shape)
    return fitted + (world.reward - fitted).mean(-1, keepdims=True)


def reward_distance(world: World, fitted: Array) -> tuple[float, float]:
    """Largest error of a reward; KL(pi* || the policy that is optimal for the fit), nats."""
    implied = normalized(world.reference + fitted / world.beta)
    return float(np.abs(fitted - world.reward).max()), world.distance(implied)


def distil(world: World, k: int, run: Run) -> tuple[float, float]:
    """The top-k loss and KL(teacher || student) of a student trained on it."""
    prefix, _, _ = world.language.choices
    teacher = token_policy(world.language, world.reference)[:, prefix]
    batch = losses.policy_batch(world)
    batch["teacher"] = teacher.reshape(len(batch["tokens"]), -1).astype(np.float32)
    loss = losses.distil(world, k)
    model = trained(loss, random_transformer(5), batch, run)
    value = float(loss(model, {name: jnp.asarray(x) for name, x in batch.items()}).loss)
    student = policy_of(model, world.language)
    return value / len(world.reward), float(kl(world.reference, student).max())


def play_cycle(world: World, run: Run, *, price: float, every: int) -> tuple[Array, Array]:
    """SPO on cyclic preferences: the last policy and the mixture of all, `[N]`, first prompt.

    Each `every` steps the reference becomes the current policy: a proximal-point method, whose last
    policy converges. Without a price of KL, self-play goes round the cycle.
    """
    preferences, _ = cyclic_preferences(world)
    loss = losses.self_play(world, preferences, price)
    score = jax.jit(losses.log_probs_of)
    batch = losses.policy_batch(world)

    def refresh(step, model):
        return None if step % every else {"sequence_reference": score(model, batch)}

    seen = []
    for step, model in enumerate(train(loss, random_transformer(0), batch, run, refresh)):
        if step % 10 == 0:
            seen.append(np.exp(policy_of(model, world.language))[0])
    return seen[-1], np.mean(seen, 0)


def fit_cycle(world: World, run: Run) -> Array:
    """`[N]` Bradley-Terry rewards of the cyclic preferences, all pairs equally often."""
    preferences, _ = cyclic_preferences(world)
    batch = enumeration(world.language) | losses.pair_sets(world)
    p, i, j = losses.all_pairs(world.language).T
    batch["weight"] = (preferences[i, j] / len(i)).astype(np.float32)
    model = losses.RewardTable(world.reward.size)
    model = trained(losses.reward_model(SET_LOSSES["pairwise"]), model, batch, run)
    return np.asarray(model.bias[...], np.float64).reshape(world.reward.shape)[0]


def hold_kl(world: World, target: float, run: Run) -> tuple[float, float, Array]:
    """REINFORCE under the adaptive controller: last mean KL, coefficient and policy."""
    coefficient = world.beta

    def refresh(step, model):
        nonlocal coefficient
        current = kl(policy_of(model, world.language), world.reference).mean()
        coefficient = float(
            pg.adaptive_kl_update(coefficient, current, target=target, horizon=10, batch_size=1)
        )
        return {"kl_coefficient": jnp.array([coefficient], jnp.float32)}

    batch = losses.policy_batch(world)
    model = trained(losses.reinforce(world), random_transformer(0), batch, run, refresh)
    policy = policy_of(model, world.language)
    return float(kl(policy, world.reference).mean()), coefficient, policy
