"""Reward models from comparisons (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

Run it with

    launch/local.sh experiments/reward_model.py
    launch/local.sh experiments/reward_model.py --config.data.source=pairs.jsonl \
        --config.held_out=300

The first is built-in data. A measured one, on pairs whose truth is known:

    python benchmarks/sentiment_pairs.py --to=runs/sentiment_pairs
    launch/local.sh experiments/reward_model.py --workdir=runs/reward_model \
        --config.data.source=runs/sentiment_pairs/train.jsonl \
        --config.data.eval_source=runs/sentiment_pairs/held_out.jsonl --config.data.max_length=64

`scale=tiny` takes seconds; the tests check that it learns. `scale=small` trains SmolLM2: one epoch
of 2,000 of these pairs takes 18 minutes of CPU time (evaluation and saving included) and 6 GiB. On
the 500 held-out pairs, 497 openings, with 95 % intervals over openings (seed 0):

    accuracy   0.888 (0.862 to 0.916); differences of VADER of 1 and more 0.976, of 0.5 to 1 0.919,
               below 0.696
    ECE        0.048 (0.021 to 0.076); a calibrated model's on as many pairs would be 0.026
    Brier      0.083 (0.065 to 0.101);  0.277 nats a pair

It is somewhat too sure of itself. On harder pairs (first against third of 4, second against fourth)
and at 5e-5 it came to 0.748 with an ECE of 0.037.

On Anthropic's harmless pairs (`--config.data.invalid=drop --config.held_out=300
--config.optimizer.learning_rate=5e-5`: 1,498 to train on, 300 to test, 45 minutes on one core):

    accuracy   0.663 (0.610 to 0.717)
    ECE        0.058 (0.000 to 0.125); a calibrated model's on as many pairs would be 0.058
    Brier      0.218 (0.199 to 0.235);  0.646 nats a pair

`benchmarks/reward_models.py` runs both and writes them, with the reliability plots, to
docs/results.md.

`scale=paper` follows InstructGPT as the comments say; it has not been run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import reward_model
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.training.optimizer import Optimizer


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = reward_model.Config(
        optimizer=Optimizer(learning_rate=1e-4, schedule="linear", warmup_steps=10),
        data=Data(
            source="builtin:tiny_chat_preferences",
            batch_size=16,
            rows=4,
            max_length=256,
            overlong="truncate",
            length_buckets=tuple(32 * i for i in range(1, 257)),
            target_buckets=(8192,),  # no loss reads targets here: one width for all batches
        ),
    ).to_config_dict()
    if scale == "tiny":
        config.model = "tiny"
        config.optimizer.update(learning_rate=3e-3, warmup_steps=0)
        config.data.update(source="builtin:tiny_preferences", batch_size=8, rows=0)
    elif scale == "paper":
        # Section 3.5 and appendix C.2: K = 4 to 9 responses ranked by a person, all pairs of a
        # prompt in one batch element, 64 prompts a batch, one epoch (more overfits), 9e-6 falling
        # by a cosine (there to a tenth, here to 0).
        config.model = "meta-llama/Llama-2-7b-hf"
        config.loss = "all_pairs"
        config.compute_dtype = "bfloat16"
        config.optimizer.update(learning_rate=9e-6, schedule="cosine", warmup_steps=0)
        config.data.update(source="ranked.jsonl", batch_size=64, rows=0, max_length=2048)
        config.data.length_buckets = tuple(1024 * i for i in range(1, 19))
        config.data.target_buckets = (18 * 1024,)
    return config
