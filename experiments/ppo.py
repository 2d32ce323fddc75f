"""PPO against a fixed reward on controlled sentiment (Ziegler et al. 2019, arXiv:1909.08593, 3.1).

    launch/local.sh experiments/ppo.py --config.kl.coefficient=0.1
    launch/local.sh experiments/ppo.py --config.lora.rank=16

As in the paper: a KL penalty for every token, GAE (lambda 0.95), clipped policy and value losses,
whitened advantages, Adam's epsilon 1e-5, a rate that falls to 0. What differs: SmolLM2, made
openings of film reviews, VADER itself as the reward (the learned one is in
experiments/ziegler2019_sentiment.py), a critic with a trunk of its own, a fixed KL coefficient, two
passes over each iteration's 40 completions (4 of each of 10 openings, as in experiments/rloo.py).

`scale=tiny` takes under a minute; the tests see PPO improve a tiny model on each of 8 seeds.
`scale=small` took 24 minutes on one core, evaluation included. Seed 0, 200 openings
(`--config.data.limit=200`), on 40 held-out ones, the base at 0.154:

    coefficient   mean VADER        win rate   KL nats   distinct-2
    0.02          0.455 +- 0.051    0.716      2.14      0.892
    0.1           0.298 +- 0.051    0.607      0.62      0.897
    0.3           0.229 +- 0.039    0.551      0.22      0.891

docs/results.md compares the methods. `scale=paper` has the sizes of Stiennon et al. 2020 with a
Llama 2 7B; not run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import policy_gradient
from align_jax.algorithms.policy_gradient import HeldOut
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.generation.rollout import Sampling
from align_jax.training.optimizer import Optimizer


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = policy_gradient.Config(
        num_iterations=20,
        epochs=2,
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
        config.sampling.update(prompts=16, samples=1, max_new_tokens=8)
        config.num_iterations = 2
        config.evaluation.update(prompts=4)
    elif scale == "paper":
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.reward.update(kind="model", path="reward_model")
        config.optimizer.learning_rate = 3e-6
        config.data.update(source="prompts.jsonl", max_length=640)
        config.sampling.update(prompts=512, samples=1, max_new_tokens=48)
        config.evaluation.source = ""
        config.update(num_iterations=2000, epochs=4, minibatches=1)
    return config
