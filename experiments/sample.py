"""Completions of prompts, scored: what rejection sampling and best-of-K training learn from.

Run it with

    launch/local.sh experiments/sample.py
    launch/local.sh experiments/sample.py --config.model=runs/sft --config.sampling.samples=16

and train on the best (or, with preference.py, on the best against the worst) of each prompt with

    launch/local.sh experiments/sft.py \
        --config.data.source=samples:runs/sample/samples/samples.jsonl

`scale=tiny` takes seconds: random weights and a length reward. `scale=small`, the default, draws 4
completions of 24 tokens for each of 64 openings of film reviews from SmolLM2, scored with VADER: a
minute on 2 cores shared with others. `scale=paper` draws 100 completions a prompt, as many as
figure 7 of Touvron et al. 2023 (arXiv:2307.09288) goes up to; it has not been run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import sample
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.generation.rollout import Sampling


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = sample.Config(
        data=Data(source="builtin:review_openings", limit=64),
        sampling=Sampling(prompts=0, samples=4, max_new_tokens=24, batch_prompts=16),
        reward="vader",
    ).to_config_dict()
    if scale == "tiny":
        config.model = "tiny"
        config.reward = "length"
        config.data.limit = 6
        config.sampling.update(samples=3, max_new_tokens=8, batch_prompts=4)
    elif scale == "paper":
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.data.update(source="prompts.jsonl", limit=0)
        config.sampling.update(samples=100, max_new_tokens=512)
    return config
