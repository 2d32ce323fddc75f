"""The trained policy beside its reference, on samples of held-out prompts."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.algorithms.policy_gradient.config import Config
from align_jax.algorithms.policy_gradient.task import Prompts, Task
from align_jax.data.samples import Sample
from align_jax.evaluation.policies import summarise, write_comparison
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import checked_scores
from align_jax.training.sampling import draw_samples, with_log_probs_under


class HeldOutSamples(NamedTuple):
    """Samples of the held-out prompts of a task, and what they say."""

    config: Config
    mesh: Mesh
    tokenizer: Any
    task: Task

    @property
    def prompts(self) -> Prompts:
        """The held-out prompts that are sampled."""
        chosen = self.task.held_out.examples[: self.config.evaluation.prompts]
        return Prompts([self.task.held_out.records[one.id] for one in chosen], chosen)

    @property
    def also_trained_on(self) -> bool:
        """Whether samples get the training reward, too, beside that of the judge.

        Standardised in a call, the scores of base and trained samples are no numbers to compare.
        """
        relative = getattr(self.task.reward, "relative", False)
        return bool(self.config.evaluation.reward) and not relative

    def of_base(self, reference: Transformer) -> list[Sample]:
        """Samples of the reference."""
        count = self.config.evaluation.base_samples
        return self._draw("sampling base", reference, count, fold=0)

    def of_trained(self, policy: Transformer, reference: Transformer) -> list[Sample]:
        """Samples of the trained policy, with their log-probabilities under the reference."""
        count = self.config.evaluation.trained_samples
        return with_log_probs_under(
            reference,
            self.mesh,
            self._draw("sampling trained", policy, count, fold=1),
            self.config.data,
            temperature=self.config.sampling.temperature,
        )

    def _draw(self, name: str, policy: Transformer, count: int, *, fold: int) -> list[Sample]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31)
        records, examples = self.prompts
        drawn = draw_samples(
            policy,
            self.mesh,
            self.tokenizer,
            records,
            [example.prompt for example in examples],
            count=count,
            sampling=self.config.sampling,
            reward=self.task.judge,
            key=jax.random.fold_in(key, fold),
            description=name,
        )
        if not self.also_trained_on:
            return drawn
        repeated = [record for record in records for _ in range(count)]
        texts = [sample["text"] for sample in drawn]
        scores = checked_scores(self.task.reward, repeated, texts)
        return [s | {"training_score": float(x)} for s, x in zip(drawn, scores)]

    def compare(self, base: list[Sample], trained: list[Sample]) -> dict[str, Any]:
        """What the samples of base and trained policy say about the training."""
        summary = summarise(base, trained)
        if self.also_trained_on:
            # Beside the reward of the report: whether what was trained on is what was wanted.
            summary["training_reward"] = {
                name: float(np.mean([sample["training_score"] for sample in samples]))
                for name, samples in (("base", base), ("trained", trained))
            }
        return summary


def write_report(
    config: Config,
    directory: Path,
    summary: dict[str, Any],
    base: list[Sample],
    trained: list[Sample],
) -> None:
    """Writes `report/` in the run's directory."""
    title = f"{config.loss}/{config.advantage} on {config.data.source}: {config.model}"
    write_comparison(directory, title, summary, base, trained)
