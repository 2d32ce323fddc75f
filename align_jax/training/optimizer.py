"""AdamW in float32 with a schedule, from a config."""

import jax
import optax
from ml_collections import ConfigDict

from align_jax.errors import RunError

# Norms and biases are not decayed: pulling a scale towards 0 is no prior worth having.
NOT_DECAYED = ("scale", "bias")


def default_optimizer_config(**overrides) -> ConfigDict:
    """The fields `make_optimizer` reads; every experiment starts from these."""
    config = ConfigDict(
        {
            "learning_rate": 1e-6,
            "schedule": "constant",  # "constant" | "linear" | "cosine": what follows the warm-up
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }
    )
    config.update(overrides)
    return config


def make_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, or falling to 0 at `num_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    remaining = max(num_steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining),
    }
    if config.schedule not in after:
        raise RunError(
            f"config.optimizer.schedule is {config.schedule!r}; expected one of {sorted(after)}."
        )
    if warmup == 0:
        return after[config.schedule]()
    # The first step already moves: a rate of 0 would waste a batch.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after[config.schedule]()], [warmup])


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
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
