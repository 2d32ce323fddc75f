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
    CISPO       loss=cispo      advantage=grpo             aggregation=dapo, kl.coefficient=0,
                                                           clip_range=1 (the weight has no lower
                                                           bound), clip_range_high=4; MiniMax 2025
    online DPO  loss=dpo        beta is kl.coefficient     Guo et al. 2024 (OAIF); in
                                                           algorithms/online_preference.py

Old, new and reference log-probabilities are all taken at the sampling temperature. The old ones are
the trainer's own, computed before the first update; `val/sampler_gap` says how far the sampler's
were from them. The KL that is logged (`objective/kl`) is the one in the objective: old minus
reference log-probabilities, summed over a completion.

    config.py      the settings, and what goes together
    methods.py     token losses and advantage estimators, an object each
    task.py        prompts, rewards and text, read and checked
    agent.py       policy, critic, reference
    objective.py   advantages of an iteration, loss of a micro-batch
    iteration.py   sample, score, update, report
    comparison.py  held-out samples before and after training
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from align_jax.algorithms import Source
from align_jax.algorithms.policy_gradient.agent import reference_of, starting_policy
from align_jax.algorithms.policy_gradient.comparison import HeldOutSamples, write_report
from align_jax.algorithms.policy_gradient.config import Config, HeldOut, Kl, Ptx
from align_jax.algorithms.policy_gradient.iteration import Trainer
from align_jax.algorithms.policy_gradient.task import Task, read_task, text_data
from align_jax.data.dataset import RawRecords
from align_jax.errors import RunError
from align_jax.evaluation.evaluators import Context, run_evaluators, sources_of
from align_jax.evaluation.policies import summarise
from align_jax.evaluation.report import format_summary
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Reward
from align_jax.training import offline, pretrained
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.metrics import read_metrics
from align_jax.training.phases import Phases
from align_jax.training.workdir import Result, Workdir

__all__ = ["Config", "HeldOut", "Kl", "Ptx", "Task", "evaluate", "run", "sources", "train"]


def train(
    model: Transformer,
    tokenizer: Any,
    records: RawRecords | Task,
    config: Config,
    *,
    reward: Reward | None = None,
    held_out: RawRecords = (),
    workdir: Workdir | str | None = None,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> Result:
    """Trains a policy on completions that it samples.

    Args:
      model: what the policy starts as and, its adapters off, the reference.
      records: prompts (docs/data.md, kind `prompt`): a list of dicts, a source, or a task that
        `read_task` has made, which has `reward` and `held_out` in it.
      reward: any callable `(records, completions) -> [N]`; None makes `config.reward`.
      held_out: prompts that base and trained policy are sampled on; the comparison is the summary.
      workdir: keeps checkpoints, metrics, samples and the report, so that the same call goes on
        where it was stopped. Without one nothing is left behind.
      mesh: where to train; None keeps the model's placement.
      donate: changes nothing here, since the reference needs the model's arrays to the end.

    Raises:
      RunError: sizes that do not fit data, model or machine; a metric that is not finite.
      RewardError: a reward that cannot be made, or fails.
      DataError: a record that cannot be used.
    """
    mesh = mesh or pretrained.mesh_of(model)
    task = records
    if not isinstance(task, Task):
        task = read_task(config, tokenizer, mesh, task, held_out, reward=reward)
    offline.check_context(config.data, model)
    folder = Workdir.of(workdir, config)
    directory = folder and folder.path
    # The policy copies what it trains: the arrays of `model` are the reference's.
    model, mesh = pretrained.as_configured(
        config, model, tokenizer, mesh, donate=True, directory=directory
    )
    reference = reference_of(model, mesh)
    trainer = Trainer(config, directory, mesh, tokenizer, task, model, reference)
    phases = Phases(directory)
    fitted = []

    def fit() -> list[dict[str, float]]:
        fitted.append(trainer.fit())
        return fitted[0][1][-1:]

    [last] = phases.run("train", fit)
    if fitted:
        policy, metrics = fitted.pop()
    else:  # a run that was stopped after training
        assert directory is not None  # without one every phase is run
        policy = _trained_policy(directory, starting_policy(config, model, mesh))
        metrics = read_metrics(directory)
    summary = {"train": last}
    if task.held_out.examples:
        samples = HeldOutSamples(config, mesh, tokenizer, task)
        base = phases.run("sample_base", lambda: samples.of_base(reference))
        trained = phases.run("sample_trained", lambda: samples.of_trained(policy, reference))
        summary |= samples.compare(base, trained)
        summary |= {"seconds": phases.seconds, "seed": config.seed, "config": config.to_dict()}
        if directory is not None:
            write_report(config, directory, summary, base, trained)
    context = Context(task.measured, policy, tokenizer, mesh, reference, seed=config.seed)
    context = dataclasses.replace(context, directory=directory)
    summary |= run_evaluators(config, context, report="report/evaluators")
    return Result(policy, metrics, summary, directory)


def _trained_policy(directory: Path, start: Transformer) -> Transformer:
    checkpointer = Checkpointer(directory / "checkpoints")
    try:
        return checkpointer.restore_model(start)
    finally:
        checkpointer.close()


def sources(config: Config) -> list[Source]:
    """Where records come from."""
    prompts = (config.data.source, config.evaluation.source)
    text = (config.ptx.source, "sft", text_data(config))
    prompts = [(source, "prompt", config.data) for source in prompts]
    return [*prompts, text, *sources_of(config, kind="prompt")]


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """`train` with the model, the prompts and the reward that the config names; the summary."""
    tokenizer = pretrained.load_pretrained_tokenizer(config.model)
    mesh = pretrained.open_mesh(config)
    task = read_task(config, tokenizer, mesh, config.data.source, config.evaluation.source)
    model = pretrained.load_pretrained(config, config.model, mesh)
    result = train(model, tokenizer, task, config, workdir=workdir, mesh=mesh, donate=True)
    if task.held_out.examples:
        print(format_summary(result.summary))
        print(f"\nReport: {workdir.path / 'report' / 'index.html'}")
    return result.summary


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The numbers of a finished run, from its samples."""
    if not config.evaluation.source:
        finished = workdir.finished() or {}
        if "evaluators" in finished:
            return {"evaluators": finished["evaluators"]}
        raise RunError("the run's config has no evaluation.source, so it has no held-out samples.")
    phases = Phases(workdir.path)
    base, trained = (phases.read(name) for name in ("sample_base", "sample_trained"))
    return summarise(base, trained)
