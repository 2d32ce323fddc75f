"""Controlled sentiment with DPO on SmolLM2-135M-Instruct, in minutes on a CPU.

launch/local.sh experiments/quickstart.py
launch/local.sh experiments/quickstart.py --workdir=runs/seed1 --config.seed=1
"""

from ml_collections import ConfigDict

from align_jax.config import parse_scale
from align_jax.training.offline import default_data_config, default_run_config
from align_jax.training.optimizer import default_optimizer_config


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
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
            "batch_prompts": 40,  # prompts and samples of each that are decoded together
            "batch_samples": 4,
        }
    )
    config.evaluation = ConfigDict({"prompts": 40, "base_samples": 20, "trained_samples": 8})
    if scale == "tiny":
        config.model = "tiny"
        config.reward = "length"
        config.optimizer.learning_rate = 1e-2
        config.data.update(batch_size=4, rows=4, max_length=128)
        config.sampling.update(prompts=16, batch_prompts=8)
        config.evaluation.update(prompts=4, base_samples=16, trained_samples=4)
    elif scale == "paper":
        config.model = "gpt2-large"
        config.compute_dtype = "bfloat16"
        config.optimizer.update(learning_rate=1e-6, warmup_steps=150)
        config.data.update(batch_size=64, rows=0)
        config.sampling.update(prompts=1920, batch_prompts=160)
        config.evaluation.update(prompts=256, base_samples=32, trained_samples=8)
    return config
