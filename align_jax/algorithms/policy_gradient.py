"""Policies from rewards, online: PPO, REINFORCE, RLOO, GRPO and its kin, online DPO.

One iteration samples completions of a batch of prompts, scores them, and takes `epochs` passes of
`minibatches` updates each over what it sampled. What the methods share is that the policy is to
maximise

    E[ r(x, y) - beta KL(pi(.|x) || pi_ref(.|x)) ]        (Ziegler et al. 2019, eq. 2)

They differ in three choices, each a field of the config: `loss` (what a token's loss is),
`advantage` (what a sampled token is compared with) and `aggregation` (how token losses add up).

    PPO         loss=ppo        advantage=gae              a critic; Schulman et al. 2017
    PPO-ptx     and ptx.source, ptx.gamma                  Ouyang et al. 2022, eq. 2
    REINFORCE   loss=reinforce  advantage=moving_baseline  aggregation=sum; Williams 1992
    RLOO        loss=reinforce  advantage=rloo             aggregation=sum; Ahmadian et al. 2024
    GRPO        loss=ppo        advantage=grpo             aggregation=grpo, kl.placement=loss; Shao
                                                           et al. 2024
    Dr. GRPO    and scale_rewards=False, aggregation=dr_grpo      Liu et al. 2025
    DAPO        and aggregation=dapo, clip_range_high=0.28, dynamic_sampling, kl.coefficient=0
    GSPO        loss=gspo       and GRPO's, clip_range=3e-4, clip_range_high=4e-4: of the ratio of a
                                                           whole completion; Zheng et al. 2025
    CISPO       loss=cispo      and GRPO's, clip_range=1, clip_range_high=4: of the weight, no lower
                                                           bound; MiniMax 2025
    online DPO  loss=dpo        beta is kl.coefficient     Guo et al. 2024 (OAIF)

Old, new and reference log-probabilities are all taken at the sampling temperature. The old ones are
the trainer's own, computed before the first update; `val/sampler_gap` says how far the sampler's
were from them. The KL that is logged (`objective/kl`) is the one in the objective: old minus
reference log-probabilities, summed over a completion.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from align_jax.algorithms import Source
from align_jax.algorithms.policy_checks import check
from align_jax.algorithms.policy_objective import critic_directory
from align_jax.algorithms.policy_trainer import Trainer
from align_jax.data.records import Record
from align_jax.data.sources import load_as_configured
from align_jax.data.tokenise import Example, encode_records
from align_jax.errors import ModelError, RunError
from align_jax.evaluation.policies import (
    Sample,
    draw_samples,
    summarise,
    with_log_probs_under,
    write_comparison,
)
from align_jax.evaluation.report import format_summary
from align_jax.generation import rollout as rollouts
from align_jax.generation.rollout import default_sampling_config
from align_jax.models.locate import locate
from align_jax.models.lora import without_adapters
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import check_records, checked_scores
from align_jax.rewards.configured import make_reward
from align_jax.training import offline, pretrained
from align_jax.training.phases import Phases
from align_jax.training.workdir import Workdir


def default_policy_gradient_config() -> ConfigDict:
    """The fields of a policy-gradient config beside `data` and `optimizer`.

    The defaults are PPO's as in Stiennon et al. 2020 and Huang et al. 2024 (arXiv:2403.17031).
    """
    config = pretrained.default_run_config()
    config.update(
        {
            "algorithm": "policy_gradient",
            # `path` is for the kind `model`; other keys, see docs/rewards.md, in a config file.
            "reward": {"kind": "vader", "path": ""},
            "init": "",  # model the policy starts from; "": config.model, which is the reference
            "num_iterations": 100,
            "checkpoint_every": 10,  # iterations
            "sampling": default_sampling_config(),
            "epochs": 4,  # passes over the completions of an iteration
            "minibatches": 1,  # updates of a pass
            "loss": "ppo",
            "advantage": "gae",
            "aggregation": "dapo",  # "dapo": mean over tokens; "sum": over a completion's tokens
            "kl": {
                "coefficient": 0.05,
                "placement": "reward",
                "estimator": "k3",  # of the loss term; the reward has k1
                "target": 0.0,  # nats a completion; 0: the coefficient is fixed
                "horizon": 10_000,  # completions
            },
            "clip_range": 0.2,
            "clip_range_high": 0.0,  # 0: clip_range
            "dual_clip": 0.0,  # 0: off
            # approxkl above which an iteration's updates end; 0: never. It is measured before an
            # update that is applied all the same, and is 0 before the first: 2 are always made.
            "max_approx_kl": 0.0,
            "importance_cap": 0.0,  # of trainer over sampler probabilities; 0: no correction
            "scale_rewards": True,  # GRPO's division by the group's standard deviation
            "dynamic_sampling": 0,  # times that groups of equal rewards are replaced
            "baseline_decay": 0.9,
            "entropy_coefficient": 0.0,
            "critic": "separate",
            "critic_init": "",  # a reward model, or its run; "": the policy, with a head of zeros
            "value_coefficient": 0.1,
            "value_clip_range": 0.2,
            "discount": 1.0,
            "lambda_": 0.95,
            "whiten_rewards": False,
            "whiten_advantages": True,
            "missing_eos": "ignore",  # what a completion without stop token gets: "ignore": its
            "missing_eos_score": -1.0,  # score; "replace": this score; "subtract": minus |this|
            "ptx": {"source": "", "gamma": 27.8, "batch_size": 8},  # of an update; "": off
            # Held-out prompts, and samples of each before and after training; "": none.
            "evaluation": {
                "source": "",
                "reward": "",  # a kind without keys, or package.module:function; "": config.reward
                "prompts": 40,
                "base_samples": 16,
                "trained_samples": 8,
            },
        }
    )
    return config


def sources(config: ConfigDict) -> list[Source]:
    """Where records come from."""
    prompts = (config.data.source, config.evaluation.source)
    text = (config.ptx.source, "sft", ConfigDict(config.data.to_dict() | {"limit": 0}))
    return [*((source, "prompt", config.data) for source in prompts), text]


def load_prompts(
    data: ConfigDict, source: str, tokenizer: Any, *, max_new_tokens: int
) -> tuple[list[Record], list[Example]]:
    """Records of kind `prompt` and their tokens; an example's id is its record's index."""
    records = load_as_configured(data, source, kind="prompt")
    room = data.max_length - max_new_tokens
    if room < 1:
        raise RunError(
            f"config.data.max_length = {data.max_length} leaves no room for a prompt beside "
            f"config.sampling.max_new_tokens = {max_new_tokens}."
        )
    longest = min(data.max_prompt_length or room, room)
    examples = encode_records(
        records,
        tokenizer,
        kind="prompt",
        max_length=data.max_length,
        max_prompt_length=longest,
    )
    return records, examples


def check_count(config: ConfigDict, examples: Sequence[Example]) -> None:
    """Raises `RunError` if there are fewer prompts than one iteration takes."""
    if config.sampling.prompts > len(examples):
        raise RunError(
            f"config.sampling.prompts = {config.sampling.prompts} is more than there are prompts "
            f"in {config.data.source}: {len(examples)}."
        )


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Trains a policy, samples it on held-out prompts if there are any, and writes the report."""
    check(config)
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    sampling, held_out = config.sampling, config.evaluation
    rollouts.stop_tokens(tokenizer, sampling)
    load = lambda source: load_prompts(  # noqa: E731
        config.data, source, tokenizer, max_new_tokens=sampling.max_new_tokens
    )
    records, examples = load(config.data.source)
    check_count(config, examples)
    mesh = pretrained.open_mesh(config)
    reward = make_reward(config.reward, tokenizer=tokenizer, mesh=mesh)
    check_records(reward, records)
    judged_by = reward
    if held_out.reward:
        judged_by = make_reward(
            held_out.reward,
            tokenizer=tokenizer,
            mesh=mesh,
            key="config.evaluation.reward",
        )
    if held_out.source and getattr(judged_by, "relative", False):
        raise RunError(
            "config.reward is standardised over the completions scored together, so held-out "
            "samples before and after training cannot be compared by it: name another reward in "
            "config.evaluation.reward, or set config.evaluation.source='' for no such samples."
        )
    if config.init and pretrained.run_at(config.init) is None:
        try:
            locate(config.init, weights=True)
        except ModelError as error:
            raise RunError(f"config.init: {error}") from error
    if config.critic_init:
        critic_directory(config)
    phases = Phases(workdir.path)
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
    if held_out.source:
        held_out_records, held_out_examples = load(held_out.source)
        for one in (reward, judged_by):
            check_records(one, held_out_records)
    model, mesh = pretrained.open_model(config)
    offline.check_context(config, model)
    reference = without_adapters(model)
    trainer = Trainer(
        config, workdir.path, mesh, tokenizer, model, reference, reward, records, examples
    )
    del model
    rows = phases.run("train", lambda: [trainer.fit()])
    if not held_out.source:
        return {"train": rows[0]}
    # The base is sampled last, since the reference is there anyway: what is wrong with the training
    # shows first.
    count = min(held_out.prompts, len(held_out_examples))
    held_out_examples = held_out_examples[:count]

    # Standardised in a call, the scores of base and trained samples are no numbers to compare.
    relative = getattr(reward, "relative", False)

    def draw(name: str, policy: Transformer, samples: int, fold: int) -> list[Sample]:
        prompts = [held_out_records[example.id] for example in held_out_examples]
        drawn = draw_samples(
            policy,
            mesh,
            tokenizer,
            prompts,
            [example.prompt for example in held_out_examples],
            count=samples,
            sampling=sampling,
            reward=judged_by,
            key=jax.random.fold_in(key, fold),
            description=name,
        )
        if not held_out.reward or relative:
            return drawn
        repeated = [record for record in prompts for _ in range(samples)]
        trained_on = checked_scores(reward, repeated, [sample["text"] for sample in drawn])
        return [s | {"training_score": float(x)} for s, x in zip(drawn, trained_on)]

    base_samples = phases.run(
        "sample_base", lambda: draw("sampling base", reference, held_out.base_samples, 0)
    )

    def sample_trained() -> list[Sample]:
        policy = pretrained.restored_model(config, workdir.path, mesh)
        samples = draw("sampling trained", policy, held_out.trained_samples, 1)
        return with_log_probs_under(
            reference,
            mesh,
            samples,
            held_out.trained_samples,
            config.data,
            temperature=sampling.temperature,
        )

    trained_samples = phases.run("sample_trained", sample_trained)
    summary = summarise(base_samples, trained_samples, held_out)
    summary |= {"train": rows[0], "seconds": phases.seconds, "seed": config.seed}
    if held_out.reward and not relative:
        # Beside the reward of the report: whether what was trained on is what was wanted.
        summary["training_reward"] = {
            name: float(np.mean([sample["training_score"] for sample in samples]))
            for name, samples in (("base", base_samples), ("trained", trained_samples))
        }
    summary["config"] = config.to_dict()
    title = f"{config.loss}/{config.advantage} on {config.data.source}: {config.model}"
    write_comparison(workdir.path, title, summary, base_samples, trained_samples, held_out)
    print(format_summary(summary))
    print(f"\nReport: {workdir.path / 'report' / 'index.html'}")
    return summary


def evaluate(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished run, from its samples."""
    if not config.evaluation.source:
        raise RunError("the run's config has no evaluation.source, so it has no held-out samples.")
    phases = Phases(workdir.path)
    base, trained = (phases.read(name) for name in ("sample_base", "sample_trained"))
    return summarise(base, trained, config.evaluation)
