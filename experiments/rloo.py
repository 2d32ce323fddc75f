"""RLOO: REINFORCE with the other samples of a prompt as the baseline (Ahmadian et al. 2024,
arXiv:2402.14740, section 3), on controlled sentiment.

    launch/local.sh experiments/rloo.py --config.kl.coefficient=0.1

As in the paper: the KL penalty in the reward of the whole completion, no critic, no clipping. What
differs: one update for each batch of samples, where its appendix C takes two; SmolLM2, made
openings of film reviews, and VADER as the reward in place of a reward model on TL;DR or HH; 20
updates of 10 prompts with 4 samples.

`scale=small` took 12 minutes on one core, evaluation included. Seed 0, 200 openings
(`--config.data.limit=200`), on 40 held-out ones, the base at 0.154:

    coefficient   mean VADER        win rate   KL nats   distinct-2
    0.02          0.374 +- 0.047    0.648      1.63      0.854
    0.1           0.346 +- 0.056    0.635      0.86      0.895
    0.3           0.262 +- 0.048    0.578      0.28      0.879

docs/results.md compares the methods. `scale=tiny` takes under a minute. `scale=paper` (7B, 512
completions an update, k = 4) has not been run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import policy_gradient
from align_jax.algorithms.policy_gradient import HeldOut, Kl
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.generation.rollout import Sampling
from align_jax.training.optimizer import Optimizer


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = policy_gradient.Config(
        loss="reinforce",
        advantage="rloo",
        aggregation="sum",
        critic="none",
        num_iterations=20,
        epochs=1,
        kl=Kl(coefficient=0.05),
        optimizer=Optimizer(learning_rate=3e-5, eps=1e-5, schedule="linear"),
        data=Data(source="builtin:review_openings", max_length=64),
        sampling=Sampling(prompts=10, samples=4, max_new_tokens=24),
        evaluation=HeldOut(source="builtin:review_openings#held_out"),
    ).to_config_dict()
    if scale == "tiny":
        config.model = "tiny"
        config.reward.kind = "length"
        config.optimizer.learning_rate = 1e-2
        config.data.max_length = 128
        config.sampling.update(prompts=4, max_new_tokens=8)
        config.num_iterations = 2
        config.evaluation.update(prompts=4, trained_samples=4)
    elif scale == "paper":
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.kl.coefficient = 0.1
        config.optimizer.learning_rate = 1e-6
        config.data.update(source="prompts.jsonl", max_length=1024)
        config.sampling.update(prompts=128, max_new_tokens=256)
        config.reward.update(kind="model", path="reward_model")
        config.evaluation.source = ""
        config.num_iterations = 600
    return config
