"""PPO, and by its fields RLOO, REINFORCE, GRPO and online DPO, on controlled sentiment.

Ziegler et al. 2019 (arXiv:1909.08593), section 3.1.
"""

from ml_collections import ConfigDict

from align_jax.algorithms.policy_gradient import default_policy_gradient_config
from align_jax.config import parse_scale
from align_jax.training.offline import default_data_config, default_run_config
from align_jax.training.online import default_sampling_config
from align_jax.training.optimizer import default_optimizer_config


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = default_run_config()
    config.update(default_policy_gradient_config())
    config.optimizer = default_optimizer_config(learning_rate=1e-5, eps=1e-5, schedule="linear")
    config.data = default_data_config(source="builtin:review_openings", max_length=64)
    config.evaluation.source = "builtin:review_openings#held_out"
    config.sampling = default_sampling_config(prompts=40, max_new_tokens=24)
    config.num_iterations = 20
    if scale == "tiny":
        config.model = "tiny"
        config.optimizer.learning_rate = 1e-2
        config.reward.kind = "length"
        config.data.max_length = 128
        config.sampling.update(prompts=16, max_new_tokens=8)
        config.num_iterations = 2
        config.evaluation.update(prompts=4)
    return config
