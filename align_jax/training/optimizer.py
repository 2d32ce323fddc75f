"""AdamW in float32 with a schedule, from a config."""

import dataclasses

import jax
import optax

from align_jax.settings import Settings

SCHEDULES = ("constant", "linear", "cosine")

# Norms and biases are not decayed: pulling a scale towards 0 is no prior worth having.
NOT_DECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True)
class Optimizer(Settings, key="config.optimizer"):
    """AdamW and its schedule."""

    learning_rate: float = 1e-6
    schedule: str = "constant"  # "constant" | "linear" | "cosine": what follows the warm-up
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm

    def __post_init__(self):
        super().__post_init__()
        self.one_of(SCHEDULES, "schedule")
        self.at_least(0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        self.between(0, 1, "b1", "b2")
        self.above(0, "eps")


def make_schedule(config: Optimizer, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, or falling to 0 at `num_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    remaining = max(num_steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining),
    }
    if warmup == 0:
        return after[config.schedule]()
    # The first step already moves: a rate of 0 would waste a batch.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after[config.schedule]()], [warmup])


def make_optimizer(config: Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with decoupled decay."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(path[-2].name.endswith(name) for name in NOT_DECAYED), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
