"""AdamW in float32 with a schedule, from a config."""

import dataclasses

import jax
import optax

from align_jax.errors import RunError
from align_jax.settings import Settings

SCHEDULES = ("constant", "linear", "cosine")

# Norms and biases are not decayed: pulling a scale towards 0 is no prior worth having.
NOT_DECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True)
class Optimizer(Settings, key="config.optimizer"):
    """AdamW and its schedule."""

    learning_rate: float = 1e-6  # 0 trains nothing
    schedule: str = "constant"  # "constant" | "linear" | "cosine": what follows the warm-up
    warmup_steps: int = 0  # at most the steps of the run
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm; 0: not at all

    def __post_init__(self):
        super().__post_init__()
        self.one_of(SCHEDULES, "schedule")
        self.at_least(0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        self.at_least(0, "b1", "b2")
        self.below(1, "b1", "b2")  # at 1 a moment never moves from 0
        self.above(0, "eps")

    def check_steps(self, num_steps: int) -> None:
        """Raises `RunError` for a warm-up longer than a run of `num_steps`."""
        if self.warmup_steps > num_steps:
            raise RunError(
                f"config.optimizer.warmup_steps = {self.warmup_steps} is more than the steps of "
                f"the run, {num_steps}: the rate would never reach "
                f"config.optimizer.learning_rate. Lower the warm-up, or train longer."
            )


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
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with decoupled decay.

    The state has the same structure with and without clipping.
    """
    norm = config.max_grad_norm

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(path[-2].name.endswith(name) for name in NOT_DECAYED), params
        )

    return optax.chain(
        optax.clip_by_global_norm(norm) if norm > 0 else optax.identity(),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
