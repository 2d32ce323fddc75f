"""The project's own train step on the enumerated language: exact expectations as one batch."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from align_jax.data.batching import build_batch, separate_responses
from align_jax.data.tokenise import Example
from align_jax.distributed.mesh import make_mesh
from align_jax.exact.language import Language, World, normalized, random_reward
from align_jax.models.config import TransformerConfig
from align_jax.models.transformer import Transformer
from align_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from align_jax.training.scoring import sum_by_response, target_log_probs
from align_jax.training.state import init_state
from align_jax.training.step import Batch, LossFunction, LossSums, make_train_step, place_batch

# Learned positions: without a BOS, rotary attention gives "1", "11" and "111" one hidden state
# (averages of equal values), so the optimum would be out of reach.
CONFIG = TransformerConfig(
    vocab_size=4,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_size=128,
    context_length=8,
    learned_positions=True,
    tie_embeddings=False,
)


@functools.cache
def mesh():
    return make_mesh()


def random_transformer(seed: int = 0, *, scale: float = 4.0) -> Transformer:
    """A Transformer whose next-symbol distributions are far from uniform."""
    model = Transformer(CONFIG, key=jax.random.key(seed))
    return jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, model)


def enumeration(language: Language) -> Batch:
    """Every response to every prompt, one a row: row p N + i is the i-th response to prompt p."""
    examples = [
        Example.of_samples(p, prompt, language.responses)
        for p, prompt in enumerate(language.prompts)
    ]
    rows = separate_responses(examples)
    return build_batch(
        rows,
        rows=len(rows),
        length_buckets=(max(map(len, language.prompts)) + language.max_length,),
        target_buckets=(language.max_length,),
    )


def pair_batch(language: Language, pairs: np.ndarray, weight: np.ndarray) -> Batch:
    """Comparisons `[M,3]` (prompt, chosen, rejected) with weights `[M]`, for `preference_loss`.

    Row by row the enumeration, in which the targets of a response are repeated for every pair it
    is in: its hidden states are computed once. `test_language.py` holds this to the ordinary batch
    of pairs.
    """
    batch, n = enumeration(language), len(language.responses)
    rows = np.stack([pairs[:, 0] * n + pairs[:, 1], pairs[:, 0] * n + pairs[:, 2]], 1).ravel()
    order = np.argsort(rows, kind="stable")
    place = np.arange(len(rows)) - np.searchsorted(rows[order], rows[order])
    uses, length = place.max() + 1, language.max_length
    lay = {
        name: np.zeros((len(batch["tokens"]), uses, length), batch[name].dtype)
        for name in ("predict_from", "targets", "target_mask", "target_response")
    }
    for name in ("predict_from", "targets", "target_mask"):
        lay[name][rows[order], place] = batch[name][rows[order]]
    lay["target_response"][rows[order], place] = order[:, None]
    flat = {name: x.reshape(len(x), -1) for name, x in lay.items()}
    return batch | flat | {"weight": (weight * (len(weight) / weight.sum())).astype(np.float32)}


def all_pairs(language: Language) -> np.ndarray:
    """`[P N (N-1), 3]`: prompt, chosen, rejected."""
    p, i, j = np.indices((len(language.prompts), len(language.responses), len(language.responses)))
    keep = i != j
    return np.stack([p[keep], i[keep], j[keep]], 1)


def log_probs_of(model: Transformer, batch: Batch) -> jax.Array:
    """`[R]` log-probability of each response of an enumeration."""
    values, _ = target_log_probs(model, batch)
    return sum_by_response(values, batch, batch["tokens"].shape[0])


@functools.cache
def _scorer():
    return jax.jit(log_probs_of)


def policy_of(model: Transformer, language: Language) -> np.ndarray:
    """`[P,N]` float64 log-probabilities of a model, which sum to 1 but for rounding."""
    values = np.asarray(_scorer()(model, enumeration(language)), np.float64)
    values = values.reshape(len(language.prompts), -1)
    assert np.abs(np.exp(values).sum(-1) - 1).max() < 1e-5
    return normalized(values)


def make_world(max_length: int = 3, beta: float = 0.5, seed: int = 0) -> World:
    """A language, its random Transformer as the reference, a random reward."""
    language = Language(max_length=max_length)
    reference = policy_of(random_transformer(seed), language)
    return World(language, reference, random_reward(language, seed), beta)


@dataclasses.dataclass
class Run:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    schedule: str = "cosine"

    def optimizer_config(self) -> Optimizer:
        return Optimizer(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            max_grad_norm=1e9,
            b2=0.99,
        )


Batches = Callable[[int, Transformer], Batch | None]


def train(
    loss_function: LossFunction,
    model: Transformer,
    batch: Batch,
    run: Run,
    refresh: Batches | None = None,
) -> Iterator[Transformer]:
    """Steps of `make_train_step` from a copy of `model`; yields the model before each and at last.

    `refresh(step, model)` returns arrays that replace the batch's (what a policy-gradient loop
    recomputes from its current policy), or None.
    """
    model = jax.tree.map(jnp.copy, model)
    optimizer = make_optimizer(run.optimizer_config(), run.steps)
    state = init_state(model, optimizer, mesh())
    schedule = make_schedule(run.optimizer_config(), run.steps)
    step = make_train_step(loss_function, optimizer, schedule, state, mesh(), accumulated=False)
    placed = place_batch(batch, mesh(), accumulated=False)
    for i in range(run.steps):
        yield state.model
        new = refresh(i, state.model) if refresh else None
        if new:
            placed = placed | new
        state, _ = step(state, placed)
    yield state.model


def trained(*args, **kwargs) -> Transformer:
    """The model `train` ends with."""
    return collections.deque(train(*args, **kwargs), maxlen=1).pop()


def mean(values: jax.Array) -> LossSums:
    """An exact expectation, already weighted, as what the train step wants."""
    return LossSums(values.sum(), jnp.float32(1.0), {})
