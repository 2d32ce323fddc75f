"""REINFORCE with a moving-average baseline (Williams 1992) on controlled sentiment.

    launch/local.sh experiments/reinforce.py --config.kl.coefficient=0.1

The simplest member of the family (section 3 of the paper; for language models Ahmadian et al. 2024,
arXiv:2402.14740, section 3.1 with eq. 6): a completion's KL-penalised reward is compared with the
mean of what came before (decay 0.9; in the first iteration with the other completions). What
differs from Williams: the completion is one action and the reward comes at its end, updates are
Adam's. Everything else is as in experiments/rloo.py, so the two differ in their baselines only.

`scale=small` took 12 minutes on one core, evaluation included. Seed 0, 200 openings
(`--config.data.limit=200`), on 40 held-out ones, the base at 0.154:

    coefficient   mean VADER        win rate   KL nats   distinct-2
    0.02          0.392 +- 0.052    0.674      1.41      0.871
    0.1           0.360 +- 0.047    0.645      0.84      0.893
    0.3           0.255 +- 0.043    0.573      0.31      0.906

docs/results.md compares the methods. `scale=tiny` takes under a minute; `scale=paper` is that of
experiments/rloo.py with one sample a prompt and has not been run.
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
        advantage="moving_baseline",
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
        config.sampling.update(prompts=8, samples=1, max_new_tokens=8)
        config.num_iterations = 2
        config.evaluation.update(prompts=4, trained_samples=4)
    elif scale == "paper":
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.kl.coefficient = 0.1
        config.optimizer.learning_rate = 1e-6
        config.data.update(source="prompts.jsonl", max_length=1024)
        config.sampling.update(prompts=512, samples=1, max_new_tokens=256)
        config.reward.update(kind="model", path="reward_model")
        config.evaluation.source = ""
        config.num_iterations = 600
    return config
