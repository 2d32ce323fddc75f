"""A policy-gradient run: its compiled functions, and what an iteration does with them.

The methods and the fields of the config are told in `policy_gradient.py`.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax.algorithms.policy_objective import (
    Agent,
    advantages_of,
    critic_values,
    make_loss,
    new_agent,
    pair_weights,
    score_completions,
    token_weights,
    with_missing_eos,
)
from align_jax.data import batching, dataset
from align_jax.data.loader import Loader, permutation
from align_jax.data.records import Record
from align_jax.data.tokenise import Example
from align_jax.distributed.partitioning import replicated
from align_jax.errors import RunError
from align_jax.files import write_file
from align_jax.generation import rollout as rollouts
from align_jax.generation.rollout import Rollout
from align_jax.losses import policy_gradient as pg
from align_jax.models.frozen import partition
from align_jax.models.heads import ScalarHead
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Reward, scores_and_components
from align_jax.training import online, pretrained
from align_jax.training.checkpoint import Checkpointer, require_space
from align_jax.training.metrics import MetricWriter, read_metrics
from align_jax.training.online import Memory
from align_jax.training.optimizer import make_optimizer, make_schedule
from align_jax.training.state import TrainState, init_state
from align_jax.training.step import make_train_step, place_batch


class Trainer:
    """One run: its compiled functions, and what an iteration does with them.

    Args:
      model: what the policy starts from, with its adapters if it has any, unless `config.init`
        names another.
      reference: the model the KL is taken to; kept as it is. It shares the arrays of `model`.
      reward: scores completions of `records`.
      records, examples: the prompts, as text and as tokens.
    """

    def __init__(
        self,
        config: ConfigDict,
        directory: Path,
        mesh: Mesh,
        tokenizer: Any,
        model: Transformer,
        reference: Transformer,
        reward: Reward,
        records: list[Record],
        examples: list[Example],
    ):
        self.config, self.directory, self.mesh, self.tokenizer = config, directory, mesh, tokenizer
        self.reference, self.reward, self.records = reference, reward, records
        sampling = config.sampling
        self.prompts = Loader(examples, batch_size=sampling.prompts, seed=config.seed, collate=list)
        self.longest_prompt = max(len(example.prompt) for example in examples)
        self.micro = sampling.prompts // (config.minibatches * config.data.accumulation)
        completions = (self.micro * sampling.samples, sampling.max_new_tokens)
        self.score = jax.jit(
            lambda agent, batch: score_completions(
                agent, batch, shape=completions, temperature=sampling.temperature
            ),
            out_shardings=replicated(mesh),
        )
        self.values = jax.jit(
            lambda critic, batch: critic_values(critic, batch, shape=completions),
            out_shardings=replicated(mesh),
        )
        self.advantages = jax.jit(lambda *args: advantages_of(config, *args))
        self.weights = jax.jit(lambda mask: token_weights(config, mask))
        self.updates = config.num_iterations * config.epochs * config.minibatches
        self.text = _text_loader(config, tokenizer, self.updates)
        self.model: Transformer | None = model

    def fit(self) -> dict[str, float]:
        """Trains to the end, from where the run stopped; the last iteration's metrics."""
        config = self.config
        model, self.model = self._start(), None
        agent = new_agent(config, model, self.mesh, self.reward)
        del model
        optimizer = make_optimizer(config.optimizer, self.updates)
        shapes = jax.eval_shape(lambda a: (a, optimizer.init(a)), partition(agent)[0])
        require_space(self.directory, shapes)
        state = init_state(agent, optimizer, self.mesh)
        del agent
        self.step = make_train_step(
            make_loss(config),
            optimizer,
            make_schedule(config.optimizer, self.updates),
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
        checkpointer = Checkpointer(self.directory / "checkpoints", clean=True)
        try:
            resumed = checkpointer.latest_step()
            if resumed is not None:
                state, memory = checkpointer.restore(state)
            (self.directory / "samples").mkdir(exist_ok=True)
            with MetricWriter(
                self.directory, resume_step=resumed, wandb_project=config.wandb_project or None
            ) as writer:
                state = online.fit(
                    state,
                    memory,
                    self.iterate,
                    mesh=self.mesh,
                    num_iterations=config.num_iterations,
                    checkpointer=checkpointer,
                    writer=writer,
                    save_samples=self._save_samples,
                    checkpoint_every=config.checkpoint_every,
                    description=f"{config.loss}/{config.advantage}",
                )
        finally:
            checkpointer.close()
        return read_metrics(self.directory)[-1]

    def iterate(
        self, state: TrainState, memory: Memory, iteration: int
    ) -> tuple[TrainState, Memory, dict[str, float], list[dict[str, Any]]]:
        """Samples, scores, and updates; see `online.fit`."""
        config, begin = self.config, time.monotonic()
        examples, rollout, scores, memory = self.collect(state.model.model, memory, iteration)
        raw = scores.pop("")
        sampled = time.monotonic()
        layout = rollouts.layout_of(rollout, config.data, longest_prompt=self.longest_prompt)
        values = self.evaluate_completions(state.model, rollout, layout)
        components, scores = scores, with_missing_eos(config, raw, rollout.ended)
        baseline = memory["baseline"]
        computed = self.advantages(
            scores,
            values["old_log_probs"],
            values["ref_log_probs"],
            rollout.mask,
            values.get("old_values"),
            np.float32(memory["kl_coefficient"]),
            np.float32(np.nan if baseline is None else baseline),
        )
        computed = {name: np.asarray(x) for name, x in computed.items()}
        rewards = computed.pop("rewards")
        count = len(scores)
        values |= computed | {
            "mask": rollout.mask,
            "pairs": pair_weights(scores, rollout.samples),
            "kl_coefficient": np.full(count, memory["kl_coefficient"], np.float32),
        }
        state, memory, steps = self._update(state, memory, rollout, layout, values, iteration)

        mean_kl = float((values["old_log_probs"] - values["ref_log_probs"]).sum(1).mean())
        gap = np.abs(values["old_log_probs"] - rollout.log_probs).max()
        metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        metrics |= {
            # Before the first update nothing has moved yet, so the two passes must agree.
            "val/old_gap": steps[0]["val/old_gap"],
            "objective/kl": mean_kl,
            "objective/entropy": float(-values["old_log_probs"].sum(1).mean()),
            "objective/scores": float(scores.mean()),
            "objective/raw_scores": float(raw.mean()),
            "objective/non_score_reward": float(-memory["kl_coefficient"] * mean_kl),
            "objective/rlhf_reward": float(scores.mean() - memory["kl_coefficient"] * mean_kl),
            "objective/kl_coefficient": float(memory["kl_coefficient"]),
            "val/num_eos_tokens": float(rollout.ended.sum()),
            "val/completion_tokens": float(rollout.mask.sum(1).mean()),
            "val/sampler_gap": float(gap),
            "val/updates": float(len(steps)),
            "episode": float((iteration + 1) * count),
            "seconds/sampling": sampled - begin,
            "seconds/iteration": time.monotonic() - begin,
        }
        metrics |= {f"objective/scores/{name}": float(x.mean()) for name, x in components.items()}
        prompts = [self.records[example.id] for example in examples]
        samples = [
            {
                "prompt_id": int(examples[n // rollout.samples].id),
                "prompt": prompts[n // rollout.samples]["prompt"],
                "completion": rollout.texts[n],
                "tokens": rollout.tokens[n][rollout.mask[n] > 0].tolist(),
                "ended": bool(rollout.ended[n]),
                "score": float(raw[n]),
                "log_prob": float(values["old_log_probs"][n].sum()),
                "ref_log_prob": float(values["ref_log_probs"][n].sum()),
            }
            for n in range(count)
        ]
        decay = 0.0 if baseline is None else config.baseline_decay
        baseline = decay * (baseline or 0.0) + (1 - decay) * float(rewards.mean())
        memory = memory | {"baseline": baseline}
        if config.kl.target > 0:
            coefficient = pg.adaptive_kl_update(
                np.float32(memory["kl_coefficient"]),
                np.float32(mean_kl),
                target=config.kl.target,
                horizon=config.kl.horizon,
                batch_size=count,
            )
            memory = memory | {"kl_coefficient": float(coefficient)}
        return state, memory, metrics, samples

    def collect(
        self, policy: Transformer, memory: Memory, iteration: int
    ) -> tuple[list[Example], Rollout, dict[str, np.ndarray], Memory]:
        """An iteration's prompts, their completions and scores `[N]`.

        The scores are under "", what a combined reward is made of under the names of its parts.

        With `dynamic_sampling`, prompts whose completions all score the same, from which a group
        learns nothing, are replaced by the next ones, as often as that says (Yu et al. 2025, 3.2).
        """
        config, wanted = self.config, self.config.sampling.prompts
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        kept: list[tuple[Example, Rollout, dict[str, np.ndarray]]] = []
        spare: list[tuple[Example, Rollout, dict[str, np.ndarray]]] = []
        next_prompt = int(memory["next_prompt"])
        for attempt in range(config.dynamic_sampling + 1):
            examples, _ = self.prompts.batch_at(next_prompt)
            next_prompt += wanted
            attempt_key = jax.random.fold_in(key, attempt)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(attempt_key, np.arange(wanted))
            rollout = rollouts.roll_out(
                policy,
                self.mesh,
                self.tokenizer,
                [example.prompt for example in examples],
                config.sampling,
                keys=keys,
            )
            records = [self.records[e.id] for e in examples for _ in range(rollout.samples)]
            scores, components = scores_and_components(self.reward, records, rollout.texts)
            for index, example in enumerate(examples):
                rows = rollout.rows([index])
                own = {name: x[rows] for name, x in ({"": scores} | components).items()}
                learnt_from = with_missing_eos(config, own[""], rollout.ended[rows])
                uniform = config.dynamic_sampling and learnt_from.min() == learnt_from.max()
                (spare if uniform else kept).append((example, rollout.select([index]), own))
            if len(kept) >= wanted:
                break
        chosen = (kept + spare)[:wanted]
        return (
            [example for example, _, _ in chosen],
            Rollout.concatenate([rollout for _, rollout, _ in chosen]),
            {name: np.concatenate([own[name] for _, _, own in chosen]) for name in chosen[0][2]},
            memory | {"next_prompt": next_prompt},
        )

    def evaluate_completions(
        self, agent: Agent, rollout: Rollout, layout: rollouts.Layout
    ) -> dict[str, np.ndarray]:
        """`old_log_probs`, `ref_log_probs`, `sampler_log_probs` and `old_values`, `[N,T]` each."""
        # Policy and reference go through one executable, so that equal models agree to the bit.
        shared = agent.critic if isinstance(agent.critic, ScalarHead) else None
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(rollout.prompts), self.micro):
            groups = range(start, start + self.micro)
            batch = rollouts.rollout_batch(rollout, groups, {}, layout)
            with jax.set_mesh(self.mesh):
                batch = place_batch(batch, self.mesh, accumulated=False)
                own = self.score(Agent(agent.model, shared), batch)
                part = {
                    "old_log_probs": own["log_probs"],
                    "ref_log_probs": self.score(Agent(self.reference, shared), batch)["log_probs"],
                }
                if shared is not None:
                    part["old_values"] = own["values"]
                elif agent.critic is not None:
                    part["old_values"] = self.values(agent.critic, batch)
            parts.append({name: np.asarray(x) for name, x in part.items()})
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return out | {"sampler_log_probs": rollout.log_probs}

    def _update(
        self,
        state: TrainState,
        memory: Memory,
        rollout: Rollout,
        layout: rollouts.Layout,
        values: dict[str, np.ndarray],
        iteration: int,
    ) -> tuple[TrainState, Memory, list[dict[str, float]]]:
        """`epochs` passes over the completions, each in its own order."""
        config, steps = self.config, []
        accumulation = config.data.accumulation
        minibatches: list[np.ndarray] = []
        for epoch in range(config.epochs):
            # Of its own kind of key: the order of the prompts in the data has (seed, epoch).
            order = permutation(
                len(rollout.prompts), config.seed + 2**32, iteration * config.epochs + epoch
            )
            minibatches += np.split(order, config.minibatches)
        # All before the first update: on the device, each would wait for the update before it.
        weights = [
            self._weights(rollout, values, groups, on_policy=number == 0)
            for number, groups in enumerate(minibatches)
        ]
        for groups, own in zip(minibatches, weights):
            batch = rollouts.rollout_batch(
                rollout, groups, values | own, layout, parts=accumulation
            )
            if self.text is not None:
                batch |= self._text_batch(memory)
                memory = memory | {"next_text": memory["next_text"] + self.text.batch_size}
            placed = place_batch(batch, self.mesh, accumulated=accumulation > 1)
            state, metrics = self.step(state, placed)
            steps.append(metrics)
            if 0 < config.max_approx_kl < float(metrics["policy/approxkl_avg"]):
                break
        return state, memory, _floats(steps)

    def _weights(self, rollout, values, groups, on_policy) -> dict[str, np.ndarray]:
        """`[N,...]` arrays by which the parts of one minibatch add up to its mean."""
        config, rows = self.config, rollout.rows(groups)
        mask = np.zeros_like(rollout.mask)
        mask[rows] = rollout.mask[rows]
        weights = np.zeros_like(mask)
        weights[rows] = self.weights(mask[rows])
        if config.importance_cap:
            weights *= pg.truncated_importance_weights(
                values["old_log_probs"], values["sampler_log_probs"], cap=config.importance_cap
            )
        chosen = values["pairs"] > 0
        return {
            "weights": weights,
            "mean_weights": mask / mask.sum(),
            "pair_weights": (chosen / max(chosen[rows].sum(), 1)).astype(np.float32),
            "on_policy": np.full(len(mask), on_policy, np.float32),
        }

    def _text_batch(self, memory: Memory) -> dict[str, np.ndarray]:
        batch, _ = self.text.batch_at(int(memory["next_text"]))
        counted = batch["target_mask"]
        batch = batch | {"weights": counted / counted.sum()}
        return {f"ptx_{name}": value for name, value in batch.items()}

    def _start(self) -> Transformer:
        """The model the policy starts as."""
        if not self.config.init:
            return self.model
        model, _ = pretrained.open_model(_with(self.config, model=self.config.init))
        if model.config != self.reference.config:
            raise RunError(
                f"config.init = {self.config.init} is a model of another shape than config.model = "
                f"{self.config.model}."
            )
        return model

    def _save_samples(self, iteration: int, samples: list[dict[str, Any]]) -> None:
        if jax.process_index() == 0:
            lines = "".join(json.dumps(sample) + "\n" for sample in samples)
            file = self.directory / "samples" / f"iteration_{iteration:06d}.jsonl"
            write_file(file, lines.encode("utf-8"))


def _with(config: ConfigDict, **values: Any) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.update(values)
    return changed


def _floats(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{k: float(x) for k, x in step.items()} for step in jax.device_get(steps)]


def _text_loader(config: ConfigDict, tokenizer: Any, updates: int) -> Loader | None:
    """Batches of PPO-ptx's text, one an update."""
    if not config.ptx.source:
        return None
    data = _with(config.data, batch_size=config.ptx.batch_size, limit=0)
    examples = dataset.load_examples(data, config.ptx.source, tokenizer, kind="sft")
    loader = Loader(
        examples,
        batch_size=data.batch_size,
        seed=config.seed + 2**33,
        collate=batching.make_collate(data),
    )
    batching.check_lengths(data, examples, loader.places(0, updates * data.batch_size))
    return loader
