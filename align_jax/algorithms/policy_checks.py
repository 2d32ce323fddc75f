"""What a policy-gradient config must not say; the fields are told in `policy_gradient.py`."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from align_jax.errors import RunError
from align_jax.evaluation.policies import DISTINCT_SAMPLES
from align_jax.rewards.configured import check_reward
from align_jax.training.optimizer import make_schedule

CHOICES = {
    "loss": ("ppo", "reinforce", "gspo", "cispo", "dpo"),
    "advantage": ("gae", "rloo", "grpo", "moving_baseline"),
    "aggregation": ("dapo", "grpo", "dr_grpo", "sum"),
    "critic": ("none", "separate", "shared"),
    "missing_eos": ("ignore", "replace", "subtract"),
    "kl.placement": ("reward", "loss"),
    "kl.estimator": ("k1", "k2", "k3"),
}


def check(config: ConfigDict) -> None:
    """Looks for fields that say nothing we know or do not go together.

    Raises:
      RunError: there are such fields.
      RewardError: there are in `config.reward` or `config.evaluation.reward`.
    """
    _check_values(config)
    for wrong, message in _combinations(config):
        if wrong:
            raise RunError(message)
    check_reward(config.reward)
    if config.evaluation.reward:
        check_reward(config.evaluation.reward, key="config.evaluation.reward")
    make_schedule(config.optimizer, 1)


def _check_values(config: ConfigDict) -> None:
    """Fields that are wrong by themselves."""
    for name, choices in CHOICES.items():
        value = _field(config, name)
        if value not in choices:
            raise RunError(f"config.{name} is {value!r}; expected one of {', '.join(choices)}.")
    least = {"dynamic_sampling": 0, "importance_cap": 0, "sampling.truncate_after": 0}
    for name in ("num_iterations", "checkpoint_every", "epochs", "minibatches"):
        least[name] = 1
    for name in ("data.accumulation", "sampling.prompts", "sampling.max_new_tokens"):
        least[name] = 1
    grouped = config.loss == "dpo" or config.advantage in ("rloo", "grpo")
    least["sampling.samples"] = 2 if grouped else 1
    if config.evaluation.source:
        least["evaluation.base_samples"] = 4 * DISTINCT_SAMPLES
        least["evaluation.trained_samples"] = DISTINCT_SAMPLES
    for name, bound in least.items():
        value = _field(config, name)
        if value < bound:
            raise RunError(f"config.{name} is {value}; expected at least {bound}.")
    if config.sampling.temperature <= 0:
        raise RunError(
            f"config.sampling.temperature is {config.sampling.temperature}; a policy gradient "
            "needs samples, so expected more than 0."
        )
    if config.dual_clip and config.dual_clip <= 1:
        raise RunError(
            f"config.dual_clip is {config.dual_clip}; expected more than 1, for at 1 and below it "
            "would cut off ratios that have not moved, or 0 for none."
        )


def _combinations(config: ConfigDict) -> Iterator[tuple[bool, str]]:
    """Whether fields contradict each other, or one would be ignored in silence; and what to do."""
    sampling, kl, dpo = config.sampling, config.kl, config.loss == "dpo"
    parts = config.minibatches * config.data.accumulation
    updates = config.epochs * config.minibatches
    yield (
        sampling.prompts % parts != 0,
        f"config.sampling.prompts = {sampling.prompts} is no multiple of config.minibatches x "
        f"config.data.accumulation = {parts}.",
    )
    gae = config.advantage == "gae" and not dpo
    yield (
        gae and config.critic == "none",
        "config.advantage=gae needs a critic: set config.critic to separate or shared.",
    )
    method = "config.loss=dpo" if dpo else f"config.advantage={config.advantage}"
    yield (
        not gae and config.critic != "none",
        f"config.critic is {config.critic!r}, but {method} has none; set config.critic=none.",
    )
    yield (
        bool(config.critic_init) and config.critic != "separate",
        f"config.critic_init = {config.critic_init} is where a critic with a trunk of its own "
        f"starts, and config.critic is {config.critic!r}: set config.critic=separate, or "
        "config.critic_init=''.",
    )
    yield (
        config.whiten_rewards and not gae,
        f"config.whiten_rewards is for config.advantage=gae; {method} would ignore it: set "
        "config.whiten_rewards=False.",
    )
    yield (
        dpo and kl.coefficient <= 0,
        f"config.kl.coefficient = {kl.coefficient} is the beta of config.loss=dpo, whose gradient "
        "it multiplies: expected more than 0.",
    )
    yield (
        kl.target > 0 and dpo,
        f"config.kl.target = {kl.target} needs another config.loss than dpo, whose beta is fixed: "
        "set config.kl.target=0.",
    )
    yield (
        kl.target > 0 and kl.coefficient <= 0,
        f"config.kl.target = {kl.target} is held by multiplying config.kl.coefficient, which at "
        f"{kl.coefficient} never moves: set that above 0, or config.kl.target=0.",
    )
    yield (
        config.dual_clip > 0 and config.loss != "ppo",
        f"config.dual_clip is for config.loss=ppo; config.loss={config.loss} would ignore it: set "
        "config.dual_clip=0.",
    )
    yield (
        config.clip_range_high > 0 and config.loss in ("reinforce", "dpo"),
        f"config.clip_range_high bounds a ratio, of which config.loss={config.loss} has none: set "
        "config.clip_range_high=0.",
    )
    yield (
        not config.scale_rewards and (dpo or config.advantage != "grpo"),
        f"config.scale_rewards=False leaves out a division that is config.advantage=grpo's; "
        f"{method} has none: set config.scale_rewards=True.",
    )
    yield (
        config.importance_cap > 0 and dpo,
        "config.importance_cap weighs token losses, of which config.loss=dpo has none: set "
        "config.importance_cap=0.",
    )
    yield (
        config.loss == "reinforce" and updates > 1,
        f"config.epochs = {config.epochs} and config.minibatches = {config.minibatches}: "
        "config.loss=reinforce does not correct for a policy that has moved on; set both to 1, "
        "or config.loss=ppo.",
    )
    yield (
        config.max_approx_kl > 0 and updates <= 2,
        f"config.max_approx_kl ends an iteration after its second update at the earliest, and "
        f"config.epochs x config.minibatches = {updates}: raise one of them, or set "
        "config.max_approx_kl=0.",
    )
    yield (
        config.advantage == "moving_baseline" and sampling.prompts * sampling.samples < 2,
        "config.advantage=moving_baseline needs two completions in the first iteration: raise "
        "config.sampling.prompts or config.sampling.samples.",
    )
    yield (
        config.dynamic_sampling > 0 and sampling.samples == 1,
        "config.dynamic_sampling replaces groups whose completions all score the same, and with "
        "config.sampling.samples=1 every group does: raise that, or set config.dynamic_sampling=0.",
    )
    yield (
        sampling.truncate_after > 0 and not sampling.truncate_token,
        f"config.sampling.truncate_after = {sampling.truncate_after} says from where on "
        "config.sampling.truncate_token ends a completion, and that is empty: name a token, or set "
        "config.sampling.truncate_after=0.",
    )
    yield (
        bool(config.ptx.source) and config.ptx.batch_size % config.data.accumulation != 0,
        f"config.ptx.batch_size = {config.ptx.batch_size} is no multiple of "
        f"config.data.accumulation = {config.data.accumulation}.",
    )
    yield (
        bool(config.data.eval_source),
        f"config.data.eval_source = {config.data.eval_source} is not read by a policy gradient: "
        "its held-out prompts are config.evaluation.source.",
    )


def _field(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
