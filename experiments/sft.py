"""Supervised fine-tuning on demonstrations (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

Run it with

    launch/local.sh experiments/sft.py
    launch/local.sh experiments/sft.py --config.data.source=demonstrations.jsonl

`scale=tiny` takes 12 s on 2 cores, compilation included; the tests check that it learns.
`scale=small`, the default, trains SmolLM2 on built-in data (128 records, 16 steps): 3 minutes on 2
cores shared with others, 50 s of them computing. The loss falls from 1.99 to 0.08 nats a token,
after which "Count 4 from 33:" is continued with " 34 35 36 37". `scale=paper` follows the paper as
the comments in it say; it has not been run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import sft
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.training.optimizer import Optimizer


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = sft.Config(
        optimizer=Optimizer(learning_rate=2e-5, schedule="cosine"),
        data=Data(source="builtin:tiny_sft", batch_size=8, rows=2, max_length=256),
    ).to_config_dict()
    if scale == "tiny":
        config.model = "tiny"
        config.optimizer.learning_rate = 1e-3
        config.data.rows = 0
    elif scale == "paper":
        # Appendix C.1: 16 epochs, cosine decay; batch 32 and 9.65e-6 at 6.7 billion parameters.
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.num_epochs = 16.0
        config.optimizer.learning_rate = 9.65e-6
        config.data.update(
            source="demonstrations.jsonl",
            overlong="truncate",
            batch_size=32,
            rows=0,
            max_length=2048,
        )
    return config
