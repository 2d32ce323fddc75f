"""A helpful and harmless assistant (Bai et al. 2022, arXiv:2204.05862, sections 3 and 4).

    launch/local.sh experiments/hh_rlhf.py
    launch/local.sh experiments/hh_rlhf.py --config.harmless.data.source=harmless.jsonl.gz \
        --config.helpful.data.source=helpful.jsonl.gz --config.ppo.data.source=prompts.jsonl \
        --config.harmless.normalization.source=prompts.jsonl \
        --config.helpful.normalization.source=prompts.jsonl

Two preference models, one on comparisons for helpfulness and one on red-teaming dialogues, and PPO
against r_PM - lambda_KL KL with their sum as r_PM. As in the paper: lambda_KL = 0.001. What
differs: the paper trains one preference model on the mixture of the data; two models whose scores
are added let the metrics show either (`objective/scores/helpful`, `/harmless`), and each is
normalised to mean 0 and standard deviation 1 on the policy's samples first, so that weights mean
what they say. Its online training is in rounds of weeks: `experiments/ziegler2019_sentiment.py`
has the rounds. At `small`: SmolLM2, built-in made data by default.

`scale=tiny` takes about a minute; `scale=small` has not been measured yet; `scale=paper` is the
hub's data with a Llama 2 7B; not run.
"""

from ml_collections import ConfigDict

from align_jax.algorithms.policy_gradient import default_policy_gradient_config
from align_jax.algorithms.reward_model import default_reward_model_config
from align_jax.algorithms.stages import make_stages_config
from align_jax.config import parse_scale
from align_jax.training.offline import default_data_config, default_run_config
from align_jax.training.online import default_sampling_config
from align_jax.training.optimizer import default_optimizer_config

PROMPTS = "builtin:tiny_chat_preferences"


def preference_model(source: str) -> ConfigDict:
    config = default_run_config()
    config.update(default_reward_model_config())
    config.optimizer = default_optimizer_config(
        learning_rate=2e-5, schedule="linear", warmup_steps=10
    )
    config.data = default_data_config(
        source=source, batch_size=8, rows=4, max_length=256, invalid="drop", overlong="truncate"
    )
    config.normalization.update(
        kind="mean_std", source=PROMPTS, policy="smollm2", limit=64, max_new_tokens=32
    )
    return config


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    helpful = preference_model("builtin:tiny_chat_preferences")
    harmless = preference_model("builtin:tiny_chat_preferences")
    harmless.seed = 1
    ppo = default_run_config()
    ppo.update(default_policy_gradient_config())
    ppo.reward = ConfigDict(
        {
            "kind": "mixture",
            "components": {
                name: {"weight": 1.0, "reward": {"kind": "model", "path": f"stage:{name}"}}
                for name in ("helpful", "harmless")
            },
        }
    )
    ppo.optimizer = default_optimizer_config(learning_rate=1e-5, eps=1e-5, schedule="linear")
    ppo.data = default_data_config(source=PROMPTS, max_length=128)
    ppo.sampling = default_sampling_config(prompts=32, max_new_tokens=32)
    ppo.kl.coefficient = 0.001
    ppo.update(num_iterations=8, epochs=1, minibatches=4)
    if scale == "tiny":
        for config in (helpful, harmless, ppo):
            config.model = "tiny"
            config.optimizer.learning_rate = 1e-3
            config.data.max_length = 320
        for config in (helpful, harmless):
            config.normalization.update(policy="tiny", limit=8, max_new_tokens=8)
        ppo.sampling.update(prompts=8, max_new_tokens=8)
        ppo.update(num_iterations=2, minibatches=2)
    elif scale == "paper":
        for config in (helpful, harmless, ppo):
            config.model = "meta-llama/Llama-2-7b-chat-hf"
            config.compute_dtype = "bfloat16"
            config.data.update(max_length=2048, rows=0)
        # The files of Anthropic/hh-rlhf on the hub, as they lie there.
        for name, config in (("helpful-base", helpful), ("harmless-base", harmless)):
            config.data.update(source=f"{name}/train.jsonl.gz", batch_size=64)
            config.normalization.update(policy=config.model, limit=1024, max_new_tokens=128)
            config.normalization.source = "prompts.jsonl"
        ppo.data.source = "prompts.jsonl"
        ppo.sampling.update(prompts=512, max_new_tokens=512)
        ppo.update(num_iterations=500, minibatches=8)
    return make_stages_config(helpful=helpful, harmless=harmless, ppo=ppo)
