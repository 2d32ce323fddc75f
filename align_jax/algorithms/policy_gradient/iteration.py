"""An iteration of a policy gradient: sample, score, estimate advantages, update, report.

What one iteration knows of its completions is an `Experience`; what an update gets of it is a
`MicroBatch` of `objective.py`.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms.online_preference import Pairs
from align_jax.algorithms.policy_gradient.agent import (
    Agent,
    Scored,
    new_agent,
    score_completions,
    starting_policy,
    values_of,
)
from align_jax.algorithms.policy_gradient.config import Config
from align_jax.algorithms.policy_gradient.objective import (
    Completions,
    Estimate,
    MicroBatch,
    Text,
    aggregation_weights,
    estimate_advantages,
    make_objective,
    with_missing_eos,
)
from align_jax.algorithms.policy_gradient.task import Task
from align_jax.data.loader import Loader, permutation
from align_jax.data.tokenise import Example
from align_jax.distributed.partitioning import replicated
from align_jax.generation import rollout as rollouts
from align_jax.generation.rollout import Layout, Rollout
from align_jax.generation.samples import Sample, sample_lines
from align_jax.losses import policy_gradient as pg
from align_jax.models.frozen import partition
from align_jax.models.heads import ScalarHead
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import scores_and_components
from align_jax.rewards.model import reward_models
from align_jax.training.checkpoint import require_space
from align_jax.training.online import Memory, train_online
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.state import TrainState, init_state
from align_jax.training.step import make_train_step, place_batch


class Collected(NamedTuple):
    """Completions of an iteration's prompts, scored; N completions, prompt by prompt.

    Attributes:
      examples: the prompts.
      rollout: their completions.
      scores: `[N]`, the reward of each text.
      components: `[N]` by name, what a combined reward is made of.
      truncated: `[N]` bool, whether a reward model read a text only in part.
    """

    examples: list[Example]
    rollout: Rollout
    scores: np.ndarray
    components: dict[str, np.ndarray]
    truncated: np.ndarray

    def select(self, indices: Sequence[int]) -> "Collected":
        """Some of the prompts."""
        rows = self.rollout.rows(indices)
        return Collected(
            [self.examples[i] for i in indices],
            self.rollout.select(indices),
            self.scores[rows],
            {name: values[rows] for name, values in self.components.items()},
            self.truncated[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence["Collected"]) -> "Collected":
        """All prompts of several."""
        return Collected(
            [example for part in parts for example in part.examples],
            Rollout.concatenate([part.rollout for part in parts]),
            np.concatenate([part.scores for part in parts]),
            {
                name: np.concatenate([part.components[name] for part in parts])
                for name in parts[0].components
            },
            np.concatenate([part.truncated for part in parts]),
        )


class Evaluated(NamedTuple):
    """What the models say of the N completions before the first update, `[N,T]` each.

    Attributes:
      policy, reference: log-probabilities, see `agent.Scored`.
      values: the critic's; None without one.
    """

    policy: Scored
    reference: Scored
    values: np.ndarray | None


class Experience(NamedTuple):
    """All that an iteration knows of its completions when the updates begin.

    Attributes:
      collected: prompts, completions, raw scores; the sampler's log-probabilities are in there.
      evaluated: log-probabilities of policy and reference, values.
      scores: `[N]`, raw scores after the rule for missing EOS.
      estimate: rewards, advantages, returns.
      pairs: see `online_preference`; None for a loss that compares none.
      importance: `[N,T]`, weights that correct for the sampler; None without `importance_cap`.
      kl_coefficient: of this iteration.
    """

    collected: Collected
    evaluated: Evaluated
    scores: np.ndarray
    estimate: Estimate
    pairs: Pairs | None
    importance: np.ndarray | None
    kl_coefficient: float


class Trainer:
    """One run: its compiled functions, and what an iteration does with them.

    Args:
      directory: the run's; None keeps nothing on disk.
      tokenizer: of the policy.
      task: prompts, rewards and text.
      model: what the policy starts from, with its adapters if it has any, unless `config.init`
        names another; its arrays are kept as they are.
      reference: the model that the KL is taken to; it may share the arrays of `model`.
    """

    def __init__(
        self,
        config: Config,
        directory: Path | None,
        mesh: Mesh,
        tokenizer: Any,
        task: Task,
        model: Transformer,
        reference: Transformer,
    ):
        self.config, self.directory, self.mesh, self.tokenizer = config, directory, mesh, tokenizer
        self.task, self.model, self.reference = task, model, reference
        examples, sampling = task.prompts.examples, config.sampling
        self.prompts = Loader(examples, batch_size=sampling.prompts, seed=config.seed, collate=list)
        self.longest_prompt = max(len(example.prompt) for example in examples)
        shape = (config.micro_batch_prompts * sampling.samples, sampling.max_new_tokens)
        self.score = jax.jit(
            lambda agent, batch: score_completions(
                agent, batch, shape=shape, temperature=sampling.temperature
            ),
            out_shardings=replicated(mesh),
        )
        self.values = jax.jit(
            lambda critic, batch: values_of(critic, batch, shape=shape),
            out_shardings=replicated(mesh),
        )
        self.estimate = jax.jit(lambda *args: estimate_advantages(config, *args))

    def fit(self) -> tuple[Transformer, list[dict[str, float]]]:
        """Trains to the end, from where the run stopped: the policy, and the rows of metrics."""
        config = self.config
        start = starting_policy(config, self.model, self.mesh)
        agent = new_agent(config, start, self.mesh, self.task.reward)
        del start
        optimizer = make_optimizer(config.optimizer, config.num_updates)
        if self.directory is not None:
            shapes = jax.eval_shape(lambda a: (a, optimizer.init(a)), partition(agent)[0])
            require_space(self.directory, shapes)
        state = init_state(agent, optimizer, self.mesh)
        del agent
        self.step = make_train_step(
            make_objective(config),
            optimizer,
            make_schedule(config.optimizer, config.num_updates),
            state,
            self.mesh,
            accumulated=config.data.accumulation > 1,
        )
        memory: Memory = {
            "iteration": 0,
            "next_prompt": 0,
            "next_text": 0,
            "kl_coefficient": config.kl.coefficient,
            "baseline": None,
        }
        state, rows = train_online(
            config,
            self.directory,
            self.mesh,
            state,
            memory,
            self.iterate,
            num_iterations=config.num_iterations,
            description=f"{config.loss}/{config.advantage}",
        )
        return state.model.model, rows

    def iterate(
        self, state: TrainState, memory: Memory, iteration: int
    ) -> tuple[TrainState, Memory, dict[str, float], list[Sample]]:
        """Samples, scores, and updates; see `training.online.fit_online`."""
        begin = time.monotonic()
        collected, memory = self.collect(state.model.model, memory, iteration)
        sampled = time.monotonic()
        rollout = collected.rollout
        layout = rollouts.layout_of(rollout, self.config.data, longest_prompt=self.longest_prompt)
        evaluated = self.evaluate_completions(state.model, rollout, layout)
        experience = self.appraise(collected, evaluated, memory)
        state, memory, steps = self.update(state, memory, experience, layout, iteration)
        metrics = experience_metrics(experience) | update_metrics(steps)
        if reward_models(self.task.reward):
            metrics["reward/truncated"] = float(collected.truncated.sum())
        metrics["episode"] = float((iteration + 1) * len(experience.scores))
        metrics["seconds/sampling"] = sampled - begin
        metrics["seconds/iteration"] = time.monotonic() - begin
        samples = experience_samples(experience, self.task.prompts.records)
        return state, self.remember(memory, experience), metrics, samples

    def collect(
        self, policy: Transformer, memory: Memory, iteration: int
    ) -> tuple[Collected, Memory]:
        """An iteration's prompts, their completions and scores; memory moves on in the prompts.

        With `dynamic_sampling`, prompts whose completions all score the same, from which a group
        learns nothing, are replaced by the next ones, as often as that says (Yu et al. 2025, 3.2).
        """
        config, wanted = self.config, self.config.sampling.prompts
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        kept: list[Collected] = []
        spare: list[Collected] = []
        next_prompt = int(memory["next_prompt"])
        for attempt in range(config.dynamic_sampling + 1):
            examples, _ = self.prompts.batch_at(next_prompt)
            next_prompt += wanted
            drawn = self.sample(policy, examples, jax.random.fold_in(key, attempt))
            for index in range(wanted):
                one = drawn.select([index])
                learnt_from = with_missing_eos(config, one.scores, one.rollout.ended)
                uniform = config.dynamic_sampling and learnt_from.min() == learnt_from.max()
                (spare if uniform else kept).append(one)
            if len(kept) >= wanted:
                break
        chosen = Collected.concatenate((kept + spare)[:wanted])
        return chosen, memory | {"next_prompt": next_prompt}

    def sample(self, policy: Transformer, examples: list[Example], key: jax.Array) -> Collected:
        """Completions of these prompts and their scores."""
        rollout = rollouts.roll_out(
            policy,
            self.mesh,
            self.tokenizer,
            [example.prompt for example in examples],
            self.config.sampling,
            keys=jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(examples))),
        )
        asked = [self.task.prompts.records[example.id] for example in examples]
        repeated = [record for record in asked for _ in range(rollout.samples)]
        scores, components = scores_and_components(self.task.reward, repeated, rollout.texts)
        truncated = np.zeros(len(scores), bool)
        for model in reward_models(self.task.reward):
            truncated |= model.truncated
        return Collected(examples, rollout, scores, components, truncated)

    def evaluate_completions(self, agent: Agent, rollout: Rollout, layout: Layout) -> Evaluated:
        """Log-probabilities and values of all completions, a micro-batch at a time."""
        # Policy and reference go through one executable, so that equal models agree to the bit.
        head = agent.critic if isinstance(agent.critic, ScalarHead) else None
        size, parts = self.config.micro_batch_prompts, []
        for start in range(0, len(rollout.prompts), size):
            batch = rollouts.rollout_batch(rollout, range(start, start + size), layout)
            with jax.set_mesh(self.mesh):
                batch = place_batch(batch, self.mesh, accumulated=False)
                policy = self.score(Agent(agent.model, head), batch)
                values = policy.values
                if agent.critic is not None and head is None:
                    values = self.values(agent.critic, batch)
                reference = self.score(Agent(self.reference, head), batch)
            parts.append(jax.tree.map(np.asarray, Evaluated(policy, reference, values)))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def appraise(self, collected: Collected, evaluated: Evaluated, memory: Memory) -> Experience:
        """What the completions are worth, and who is compared with whom."""
        rollout, baseline = collected.rollout, memory["baseline"]
        scores = with_missing_eos(self.config, collected.scores, rollout.ended)
        estimate = self.estimate(
            scores,
            evaluated.policy.log_probs,
            evaluated.reference.log_probs,
            rollout.mask,
            evaluated.values,
            np.float32(memory["kl_coefficient"]),
            np.float32(np.nan if baseline is None else baseline),
        )
        importance, cap = None, self.config.importance_cap
        if cap:
            old, drawn = evaluated.policy.log_probs, rollout.log_probs
            importance = np.asarray(pg.truncated_importance_weights(old, drawn, cap=cap))
        return Experience(
            collected,
            evaluated,
            scores,
            jax.tree.map(np.asarray, estimate),
            self.config.policy_loss.pairs(scores, rollout.samples),
            importance,
            memory["kl_coefficient"],
        )

    def update(
        self,
        state: TrainState,
        memory: Memory,
        experience: Experience,
        layout: Layout,
        iteration: int,
    ) -> tuple[TrainState, Memory, list[dict[str, float]]]:
        """`epochs` passes over the completions, each in its own order; the metrics of each step."""
        config, steps = self.config, []
        accumulation = config.data.accumulation
        for batch in minibatches(config, experience, layout, iteration):
            if self.task.text is not None:
                batch = batch._replace(text=self._text_batch(memory))
                size = self.task.text.batch_size
                memory = memory | {"next_text": memory["next_text"] + size}
            placed = place_batch(batch, self.mesh, accumulated=accumulation > 1)
            state, metrics = self.step(state, placed)
            steps.append(metrics)
            if 0 < config.max_approx_kl < float(metrics["policy/approxkl_avg"]):
                break
        return state, memory, jax.tree.map(float, jax.device_get(steps))

    def remember(self, memory: Memory, experience: Experience) -> Memory:
        """The memory with the next iteration's baseline and KL coefficient."""
        config, before = self.config, memory["baseline"]
        decay = 0.0 if before is None else config.baseline_decay
        mean = float(experience.estimate.rewards.mean())
        memory = memory | {"baseline": decay * (before or 0.0) + (1 - decay) * mean}
        if config.kl.target > 0:
            coefficient = pg.adaptive_kl_update(
                np.float32(memory["kl_coefficient"]),
                np.float32(mean_kl(experience)),
                target=config.kl.target,
                horizon=config.kl.horizon,
                batch_size=len(experience.scores),
            )
            memory = memory | {"kl_coefficient": float(coefficient)}
        return memory

    def _text_batch(self, memory: Memory) -> Text:
        rows, _ = self.task.text.batch_at(int(memory["next_text"]))
        counted = rows["target_mask"]
        return Text(rows, counted / counted.sum())


def minibatches(
    config: Config, experience: Experience, layout: Layout, iteration: int
) -> Iterator[MicroBatch]:
    """The batches of an iteration's updates, in order; see `minibatch`."""
    prompts, groups = len(experience.collected.rollout.prompts), []
    for epoch in range(config.epochs):
        # The seed is offset so that this shuffle never equals the prompt loader's, whose key is
        # (seed, epoch).
        order = permutation(prompts, config.seed + 2**32, iteration * config.epochs + epoch)
        groups += np.split(order, config.minibatches)
    for number, chosen in enumerate(groups):
        yield minibatch(config, experience, layout, chosen, on_policy=number == 0)


def minibatch(
    config: Config, experience: Experience, layout: Layout, groups: np.ndarray, *, on_policy: bool
) -> MicroBatch:
    """The batch of one update: `groups` are its prompts.

    With accumulation every array has a leading axis of micro-batches.
    """
    rollout, accumulation = experience.collected.rollout, config.data.accumulation
    completions = _completions(config, experience, rollout.rows(groups))
    parts = []
    for part in np.split(np.asarray(groups), accumulation):
        rows = rollout.rows(part)
        parts.append(
            MicroBatch(
                rollouts.rollout_batch(rollout, part, layout),
                jax.tree.map(lambda x: x[rows], completions),  # noqa: B023
                np.full(len(rows), on_policy, np.float32),
                np.float32(experience.kl_coefficient),
            )
        )
    return parts[0] if accumulation == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)


def _completions(config: Config, experience: Experience, rows: np.ndarray) -> Completions:
    """All completions of an iteration, with the weights that those in `rows` have together."""
    evaluated, rollout = experience.evaluated, experience.collected.rollout
    mask = np.zeros_like(rollout.mask)
    mask[rows] = rollout.mask[rows]
    weights, budget = np.zeros_like(mask), config.sampling.max_new_tokens
    weights[rows] = aggregation_weights(mask[rows], method=config.aggregation, max_length=budget)
    pairs = experience.pairs
    return Completions(
        mask=rollout.mask,
        old_log_probs=evaluated.policy.log_probs,
        ref_log_probs=evaluated.reference.log_probs,
        weights=weights,
        mean_weights=mask / mask.sum(),
        importance=experience.importance,
        advantages=experience.estimate.advantages,
        old_values=evaluated.values,
        returns=experience.estimate.returns,
        pairs=pairs and pairs.in_minibatch(rows),
    )


def mean_kl(experience: Experience) -> float:
    """The KL to the reference in nats a completion: the mean of the log-ratios of the samples."""
    evaluated = experience.evaluated
    ratios = evaluated.policy.log_probs - evaluated.reference.log_probs
    return float(ratios.sum(1).mean())


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Metrics of the completions: what they scored, and what the policy was when it drew them."""
    collected, scores = experience.collected, experience.scores
    rollout, old = collected.rollout, experience.evaluated.policy.log_probs
    kl, coefficient = mean_kl(experience), experience.kl_coefficient
    metrics = {
        "objective/kl": kl,
        "objective/entropy": float(-old.sum(1).mean()),
        "objective/scores": float(scores.mean()),
        "objective/raw_scores": float(collected.scores.mean()),
        "objective/non_score_reward": float(-coefficient * kl),
        "objective/rlhf_reward": float(scores.mean() - coefficient * kl),
        "objective/kl_coefficient": float(coefficient),
        "val/num_eos_tokens": float(rollout.ended.sum()),
        "val/completion_tokens": float(rollout.mask.sum(1).mean()),
        "val/sampler_gap": float(np.abs(old - rollout.log_probs).max()),
    }
    components = collected.components.items()
    return metrics | {f"objective/scores/{name}": float(x.mean()) for name, x in components}


def update_metrics(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over an iteration's updates, and how many there were."""
    metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
    # Before the first update nothing has moved yet, so the two passes must agree.
    return metrics | {"val/old_gap": steps[0]["val/old_gap"], "val/updates": float(len(steps))}


def experience_samples(experience: Experience, records: Sequence[Any]) -> list[Sample]:
    """The completions as samples, with `ref_log_prob`: `log_prob` under the reference."""
    collected, evaluated = experience.collected, experience.evaluated
    lines = sample_lines(
        collected.rollout,
        [records[example.id] for example in collected.examples],
        prompt_ids=[example.id for example in collected.examples],
        log_prob=evaluated.policy.untempered.sum(1),
        scores=collected.components | {"reward": collected.scores},
    )
    reference = evaluated.reference.untempered.sum(1)
    return [line | {"ref_log_prob": float(x)} for line, x in zip(lines, reference, strict=True)]
