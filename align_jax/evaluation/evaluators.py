"""Evaluators: what is measured of a trained model at the end of a run, whatever trained it.

`config.evaluators` is a tuple of mappings, each with a `kind` and that kind's settings:

    loss         the algorithm's own loss and metrics on held-out records
    samples      mean reward and distinct-2 of completions of held-out prompts
    win_rate     how often such a completion beats one of the base model, by a reward or a comparer
    kl           nats to the base model, on such completions
    calibration  accuracy and calibration of the rewards of held-out pairs

The base is the model that training started from. Evaluators with the same `source` and `sampling`
measure the same completions, which are drawn once. Results are `summary["evaluators"]`, a table on
the terminal, and `report/`.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import by_length, check_lengths
from align_jax.data.dataset import Data, examples_of, prompts_of
from align_jax.data.records import Record
from align_jax.data.samples import Sample, by_prompt
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.evaluation import statistics
from align_jax.evaluation.calibration import calibrate
from align_jax.evaluation.policies import (
    distinct_2,
    log_ratios,
    scores_by_prompt,
    side_by_side,
    texts_by_prompt,
)
from align_jax.evaluation.report import OF_EVALUATOR, format_summary, write_report
from align_jax.generation.rollout import Sampling
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Comparer, Reward, check_records, checked_probabilities
from align_jax.rewards.configured import check_comparer, check_reward, make_comparer, make_reward
from align_jax.settings import Described, Settings
from align_jax.text import nearest
from align_jax.training.metrics import read_metrics
from align_jax.training.phases import Phases
from align_jax.training.sampling import draw_samples, with_log_probs_under, with_scores

# A row of the table for each policy that was measured: {"trained": {field: number}, "base": ...}.
Rows = dict[str, dict[str, Any]]

# Of an evaluator's key: evaluators' samples have keys that no training and no other phase has.
_FOLD = 2**30


class HasEvaluators(Protocol):
    """The settings of a run that may have evaluators: what of them is read here."""

    offered_evaluators: ClassVar[tuple[str, ...]]

    @property
    def algorithm(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def data(self) -> Data: ...
    @property
    def evaluators(self) -> tuple[Mapping[str, Any], ...]: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Evaluator(Settings, key="config.evaluators"):
    """What every kind sets.

    Class attributes say whether the kind compares with the base model, and the kind of record that
    it reads ("": that of the algorithm).
    """

    needs_base: ClassVar[bool] = False
    records: ClassVar[str] = ""

    kind: str = ""
    name: str = ""  # what its results are called; "": its kind
    source: str = ""  # held-out records, see docs/data.md

    def __post_init__(self):
        super().__post_init__()
        if not self.source:
            raise RunError(f"{self.key}.source is empty: name the held-out records.")

    @property
    def label(self) -> str:
        """What its results are called."""
        return self.name or self.kind

    def load(self, tokenizer: Any, data: Data, kind: str) -> Any:
        """Its held-out data, checked and tokenised; `kind` is that of the algorithm's records."""
        raise NotImplementedError

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        """What it measures on what `load` returned."""
        raise NotImplementedError


def _examples(source: str, tokenizer: Any, data: Data, limit: int, kind: str) -> list[Example]:
    """Held-out examples that fit the buckets, in their order and in that of scoring."""
    data = dataclasses.replace(data, eval_source=source, limit=limit)
    examples = examples_of(source, tokenizer, data, kind=kind)
    check_lengths(data, examples, range(len(examples)))
    check_lengths(data, examples, by_length(examples))
    return examples


@dataclasses.dataclass(frozen=True)
class HeldOutLoss(Evaluator):
    """The loss of the algorithm and its metrics."""

    kind: str = "loss"
    limit: int = 0  # records to read; 0 reads all

    def load(self, tokenizer: Any, data: Data, kind: str) -> list[Example]:
        return _examples(self.source, tokenizer, data, self.limit, kind)

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        assert context.loss is not None
        return {"trained": context.loss(held_out)}


@dataclasses.dataclass(frozen=True)
class Calibration(Evaluator):
    """Accuracy, ECE, Brier score and nats of held-out pairs (evaluation/calibration.py)."""

    records: ClassVar[str] = "preference"

    kind: str = "calibration"
    limit: int = 0  # pairs to read; 0 reads all

    def load(self, tokenizer: Any, data: Data, kind: str) -> list[Example]:
        return _examples(self.source, tokenizer, data, self.limit, self.records)

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        assert context.pair_rewards is not None
        chosen, rejected = context.pair_rewards(held_out)
        found = calibrate(
            chosen,
            rejected,
            groups=[example.prompt.tolist() for example in held_out],
            strengths=[example.extras.get("strength") for example in held_out],
        )
        return {"trained": found}


@dataclasses.dataclass(frozen=True)
class OnSamples(Evaluator):
    """An evaluator of completions of held-out prompts."""

    records: ClassVar[str] = "prompt"

    # `prompts`: the first ones of the source, 0 takes all; `samples` of each, by each policy.
    sampling: Sampling = Sampling(prompts=40, samples=4)

    def load(self, tokenizer: Any, data: Data, kind: str) -> tuple[list[Record], list[Example]]:
        data = dataclasses.replace(data, limit=self.sampling.prompts)
        budget = self.sampling.max_new_tokens
        return prompts_of(self.source, tokenizer, data, max_new_tokens=budget)


@dataclasses.dataclass(frozen=True)
class Samples(OnSamples):
    """Mean reward with its 95 % interval by prompt, and distinct-2."""

    kind: str = "samples"
    reward: Described = ""  # "": none, only distinct-2

    def __post_init__(self):
        super().__post_init__()
        if self.reward:
            check_reward(self.reward, key=f"{self.key}.reward")

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        rows = {}
        for policy in samples.policies(self):
            rows[policy] = row = {
                "distinct_2": distinct_2(texts_by_prompt(samples.of(self, policy)))
            }
            if self.reward:
                mean, half_width = statistics.mean_ci95(samples.rewards(self, policy))
                row |= {"reward_mean": mean, "reward_ci95": half_width}
        return rows


@dataclasses.dataclass(frozen=True)
class WinRate(OnSamples):
    """The probability that a sample beats one of the base for its prompt, with its 95 % interval.

    By a reward all pairs of a prompt's samples are compared; a comparer is asked about as many
    pairs as there are samples, in a random order of the two.
    """

    needs_base: ClassVar[bool] = True

    kind: str = "win_rate"
    reward: Described = ""
    comparer: Described = ""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.reward) == bool(self.comparer):
            raise RunError(f"{self.key} (kind 'win_rate') needs a reward or a comparer: one.")
        if self.reward:
            check_reward(self.reward, key=f"{self.key}.reward")
        else:
            check_comparer(self.comparer, key=f"{self.key}.comparer")

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        if self.reward:
            trained, base = (samples.rewards(self, policy) for policy in ("trained", "base"))
            wins, error = statistics.win_rate(trained, base)
            half_width = statistics.half_width_95(error, samples.count(self))
        else:
            first, second = (samples.of(self, policy) for policy in ("trained", "base"))
            comparer, records = samples.comparer(self), samples.records(self)
            shares = _won(comparer, first, second, records, seed=context.seed)
            wins, half_width = statistics.mean_ci95(shares)
        found = {"win_rate": wins, "win_rate_ci95": half_width}
        return {"trained": found, "base": {"win_rate": 0.5}}


@dataclasses.dataclass(frozen=True)
class Divergence(OnSamples):
    """KL to the base, nats a completion, at the sampling temperature, with its 95 % interval."""

    needs_base: ClassVar[bool] = True

    kind: str = "kl"

    def measure(self, held_out: Any, context: "Context", samples: "SharedSamples") -> Rows:
        ratios = np.reshape(log_ratios(samples.of(self, "trained")), (samples.count(self), -1))
        mean, half_width = statistics.mean_ci95(ratios)
        return {"trained": {"kl": mean, "kl_ci95": half_width}, "base": {"kl": 0.0}}


KINDS: dict[str, type[Evaluator]] = {
    "loss": HeldOutLoss,
    "samples": Samples,
    "win_rate": WinRate,
    "kl": Divergence,
    "calibration": Calibration,
}


def parse_evaluators(
    described: Sequence[Mapping[str, Any]], *, offered: Iterable[str] = tuple(KINDS)
) -> list[Evaluator]:
    """The typed settings of `config.evaluators`; needs no model and no data.

    Args:
      offered: the kinds that the algorithm can have.

    Raises:
      RunError: an unknown kind or key (the nearest is named), a value refused, two evaluators of
        one name.
      RewardError: a reward or a comparer that does not exist.
    """
    evaluators: list[Evaluator] = []
    offered = tuple(offered)
    for index, one in enumerate(described):
        key, kind = f"config.evaluators[{index}]", one.get("kind")
        if kind not in KINDS:
            raise RunError(f"{key}.kind is {kind!r}.{nearest(str(kind), offered)}")
        if kind not in offered:
            raise RunError(
                f"{key}.kind is {kind!r}, which this algorithm cannot have; it has "
                f"{', '.join(offered)}."
            )
        # A class of its own, since messages call settings by the key of their class.
        evaluator = _keyed(KINDS[kind], key).from_dict(one)
        if evaluator.label in [other.label for other in evaluators]:
            raise RunError(
                f"{key}: there is an evaluator {evaluator.label!r} already: give one of them "
                "another `name`."
            )
        evaluators.append(evaluator)
    return evaluators


@functools.cache
def _keyed(cls: type[Evaluator], key: str) -> type[Evaluator]:
    return type(cls.__name__, (cls,), {"__module__": cls.__module__}, key=key)


def check_evaluators(config: HasEvaluators) -> None:
    """`parse_evaluators` of a config, for the checks of its class; it keeps nothing."""
    parse_evaluators(config.evaluators, offered=config.offered_evaluators)


def needs_base(config: HasEvaluators) -> bool:
    """Whether an evaluator compares with the base, which training must then not consume."""
    return any(one.needs_base for one in parse_evaluators(config.evaluators))


def load_held_out(config: HasEvaluators, tokenizer: Any, *, kind: str) -> list[Any]:
    """The held-out data of every evaluator, read before anything is computed.

    Args:
      kind: of the algorithm's records.

    Raises:
      DataError, RunError: data that cannot be used.
    """
    return [one.load(tokenizer, config.data, kind) for one in parse_evaluators(config.evaluators)]


def sources_of(config: HasEvaluators, *, kind: str) -> list[tuple[str, str, Data]]:
    """What evaluators read: sources, the kinds of their records, and how they are read."""
    return [
        (one.source, one.records or kind, dataclasses.replace(config.data, eval_source=one.source))
        for one in parse_evaluators(config.evaluators)
    ]


@dataclasses.dataclass
class Context:
    """What evaluators measure, and by what.

    Attributes:
      held_out: of `load_held_out`.
      model: the trained model.
      base: the model that training started from; None unless `needs_base`.
      loss: the algorithm's loss and metrics of examples.
      pair_rewards: rewards `[N]` of chosen and rejected of pairs, on the scale of log-odds; None if
        the algorithm has none.
      seed: of the samples.
      directory: the run's; None leaves nothing behind. Samples that are there are not drawn again.
    """

    held_out: list[Any]
    model: Any
    tokenizer: Any
    mesh: Mesh
    base: Transformer | None = None
    loss: Callable[[list[Example]], dict[str, float]] | None = None
    pair_rewards: Callable[[list[Example]], tuple[np.ndarray, np.ndarray]] | None = None
    seed: int = 0
    directory: Any = None


def run_evaluators(
    config: HasEvaluators, context: Context, *, report: str = "report"
) -> dict[str, Any]:
    """Runs `config.evaluators`, prints their table and writes the report, if there is a directory.

    Args:
      report: the report's folder in the run's directory.

    Returns:
      {"evaluators": {label: what was measured of the trained model, and of the `base`}}, or nothing
      without evaluators.
    """
    evaluators = parse_evaluators(config.evaluators)
    if not evaluators:
        return {}
    samples = SharedSamples(config, context, evaluators)
    results, seconds = {}, {}
    table: Rows = {}
    for evaluator, held_out in zip(evaluators, context.held_out, strict=True):
        started = time.monotonic()
        rows = evaluator.measure(held_out, context, samples)
        seconds[evaluator.label] = time.monotonic() - started
        others = {policy: row for policy, row in rows.items() if policy != "trained"}
        results[evaluator.label] = rows["trained"] | others
        for policy, row in rows.items():
            table.setdefault(policy, {}).update(_columns(evaluator, row))
    fields = [f for row in table.values() for f in row if not f.endswith("_ci95")]
    summary: dict[str, Any] = {policy: dict.fromkeys(fields) | row for policy, row in table.items()}
    summary["seconds"] = seconds
    print(format_summary(summary))
    if context.directory is not None:
        # The members of an ensemble have metrics of their own.
        has_curves = (context.directory / "metrics.jsonl").exists()
        page = write_report(
            context.directory / report,
            title=f"{config.algorithm}: {config.model}",
            summary=summary | {"evaluators": results, "config": config.to_dict()},
            curves=read_metrics(context.directory) if has_curves else (),
            rewards=samples.scored,
            samples=samples.shown(),
        )
        print(f"\nReport: {page}")
    return {"evaluators": results}


def _columns(evaluator: Evaluator, row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, and their intervals, under the names of the table's columns."""
    prefix = evaluator.name and evaluator.name + OF_EVALUATOR
    return {
        prefix + field: value
        for field, value in row.items()
        if isinstance(value, int | float) or field.endswith("_ci95")
    }


class SharedSamples:
    """Samples of held-out prompts by the trained model and by the base, drawn when first wanted."""

    def __init__(self, config: HasEvaluators, context: Context, evaluators: Sequence[Evaluator]):
        self._config, self._context = config, context
        self._data: dict[tuple[str, Sampling], tuple[list[Record], list[Example]]] = {}
        self._kinds: dict[tuple[str, Sampling], set[str]] = {}
        for one, held_out in zip(evaluators, context.held_out):
            if isinstance(one, OnSamples):
                place = one.source, one.sampling
                self._data[place] = held_out
                self._kinds.setdefault(place, set()).add(one.kind)
        self._drawn: dict[tuple[Any, str], list[Sample]] = {}
        self._made: dict[str, Reward] = {}
        self._rewards: dict[tuple[str, Any, str], np.ndarray] = {}
        self.scored: dict[str, np.ndarray] = {}  # by policy, of the first reward that scored it

    def policies(self, evaluator: OnSamples) -> tuple[str, ...]:
        """Whose samples there are: the base's if their wins are counted."""
        compared = "win_rate" in self._kinds[evaluator.source, evaluator.sampling]
        return ("trained", "base") if compared else ("trained",)

    def count(self, evaluator: OnSamples) -> int:
        """How many prompts there are."""
        return len(self._data[evaluator.source, evaluator.sampling][0])

    def records(self, evaluator: OnSamples) -> list[Record]:
        """The prompt of each sample."""
        records, _ = self._data[evaluator.source, evaluator.sampling]
        return [record for record in records for _ in range(evaluator.sampling.samples)]

    def of(self, evaluator: OnSamples, policy: str) -> list[Sample]:
        """The samples of a policy, `sampling.samples` of each prompt."""
        place = evaluator.source, evaluator.sampling
        if (place, policy) not in self._drawn:
            number = list(self._data).index(place)
            self._drawn[place, policy] = Phases(self._context.directory).run(
                f"evaluators_{number}_{policy}", lambda: self._draw(place, policy, number)
            )
        return self._drawn[place, policy]

    def _model(self, policy: str) -> Transformer:
        model = self._context.model if policy == "trained" else self._context.base
        assert model is not None  # `needs_base`
        return model

    def _draw(self, place: tuple[str, Sampling], policy: str, number: int) -> list[Sample]:
        context, (_, sampling) = self._context, place
        records, examples = self._data[place]
        key = jax.random.fold_in(jax.random.key(context.seed), _FOLD + number)
        samples = draw_samples(
            self._model(policy),
            context.mesh,
            context.tokenizer,
            records,
            [example.prompt for example in examples],
            count=sampling.samples,
            sampling=sampling,
            key=jax.random.fold_in(key, int(policy == "base")),
            description=f"sampling {policy}",
        )
        if policy == "base" or "kl" not in self._kinds[place]:
            return samples
        return with_log_probs_under(
            self._model("base"),
            context.mesh,
            samples,
            self._config.data,
            temperature=sampling.temperature,
        )

    def rewards(self, evaluator: "Samples | WinRate", policy: str) -> np.ndarray:
        """The evaluator's reward of the samples of a policy, `[prompts, samples]`."""
        described = json.dumps(evaluator.reward, sort_keys=True)
        place = evaluator.source, evaluator.sampling
        if (described, place, policy) not in self._rewards:
            records, reward = self.records(evaluator), self._reward(evaluator, described)
            check_records(reward, records)
            scored = with_scores(self.of(evaluator, policy), reward, records)
            self._rewards[described, place, policy] = rewards = scores_by_prompt(scored)
            if self.scored.setdefault(policy, rewards) is rewards:
                self._drawn[place, policy] = scored
        return self._rewards[described, place, policy]

    def _reward(self, evaluator: "Samples | WinRate", described: str) -> Reward:
        if described not in self._made:
            context, key = self._context, f"{evaluator.key}.reward"
            settings = {"tokenizer": context.tokenizer, "mesh": context.mesh, "key": key}
            self._made[described] = reward = make_reward(evaluator.reward, **settings)
            if getattr(reward, "relative", False):
                raise RunError(
                    f"{key} is standardised over the completions scored together, so two policies "
                    "cannot be compared by it: name another reward."
                )
        return self._made[described]

    def comparer(self, evaluator: WinRate) -> Comparer:
        """The evaluator's comparer; people find their pairs in the run's directory."""
        context = self._context
        directory = context.directory and context.directory / "labels" / evaluator.label
        return make_comparer(
            evaluator.comparer,
            directory=directory,
            tokenizer=context.tokenizer,
            mesh=context.mesh,
            key=f"{evaluator.key}.comparer",
        )

    def shown(self) -> list[dict[str, Any]]:
        """Samples of the first prompts for the report: the trained model's, and the base's."""
        for place in self._data:
            trained = self._drawn.get((place, "trained"))
            if trained is None:
                continue
            base = self._drawn.get((place, "base"))
            rows = side_by_side(base or trained, trained)
            if base is None:
                rows = [{k: v for k, v in row.items() if not k.startswith("base")} for row in rows]
            return rows
        return []


def _won(
    comparer: Comparer,
    trained: Sequence[Sample],
    base: Sequence[Sample],
    records: Sequence[Record],
    *,
    seed: int,
) -> np.ndarray:
    """Probabilities `[prompts, samples]` that a sample is better than its counterpart."""
    texts = np.array([[b["text"], t["text"]] for b, t in zip(base, trained)])
    # Comparers, people above all, may favour a place.
    first = np.random.default_rng(seed).integers(0, 2, len(texts))
    rows = np.arange(len(texts))
    better = checked_probabilities(
        comparer, records, texts[rows, first].tolist(), texts[rows, 1 - first].tolist()
    )
    shares = np.where(first == 1, better, 1 - better)
    return shares.reshape(len(by_prompt(trained)), -1)
