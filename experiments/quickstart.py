"""Controlled sentiment with DPO on SmolLM2-135M-Instruct (DPO paper, section 6.1), in minutes on a CPU.

    launch/local.sh experiments/quickstart.py
    launch/local.sh experiments/quickstart.py --workdir=runs/seed1 --config.seed=1
"""

from ml_collections import ConfigDict

from align_jax.training.offline import default_data_config, default_run_config
from align_jax.training.optimizer import default_optimizer_config


def get_config(arg: str = "scale=small") -> ConfigDict:
    config = default_run_config()
    config.algorithm = "controlled_sentiment"
    config.loss = "dpo"
    config.beta = 0.1
    config.reward = "vader"
    config.optimizer = default_optimizer_config(learning_rate=5e-5, warmup_steps=2)
    config.data = default_data_config(batch_size=16, rows=4, max_length=64)
    config.sampling = ConfigDict(
        {
            "prompts": 160,
            "samples": 4,
            "max_new_tokens": 24,
            "temperature": 1.0,
            "batch_prompts": 40,
            "batch_samples": 4,
        }
    )
    config.evaluation = ConfigDict({"prompts": 40, "base_samples": 20, "trained_samples": 8})
    return config
