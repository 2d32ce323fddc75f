"""Online alignment in rounds: generate, compare, refit the reward model, continue the policy.

Ziegler et al. 2019 (arXiv:1909.08593, section 2.3) collect comparisons of the current policy's
samples all along; Bai et al. 2022 (arXiv:2204.05862, section 4.5) and Touvron et al. 2023
(arXiv:2307.09288, section 3.2) do it in rounds of weeks, as here. Every round

1. samples `samples` completions of each of the next `prompts` prompts from the current policy,
2. has every pair of them compared: by an oracle, by a language model, or by people through files
   (the run then stops and says which file it waits for; the same command goes on),
3. fits a reward model, from its base, to the comparisons of all rounds so far, and to those of
   `config.reward_model.data.source`, if there were any (kind `preference`) before the first round,
4. continues the policy against it, with a new optimizer and critic: the schedule of the learning
   rate starts anew each round, the controller of the KL (`policy.kl.target`) goes on from the
   coefficient it had. The reference of the KL stays `config.policy.model`; the first round's policy
   is `config.policy.init`, "" for the reference.

    WORKDIR/round_0/samples/    sample.jsonl, comparisons.jsonl
    WORKDIR/round_0/labels/     pairs.jsonl, labels.jsonl: with people only
    WORKDIR/round_0/reward/     a run of `reward_model`
    WORKDIR/round_0/policy/     a run of `policy_gradient`

Whatever was interrupted goes on where it was. `comparer` decides pairs; the records the reward
model learns from are rankings by the number of comparisons won, ties shared, in an order drawn for
each round: what `reward_model.held_out` keeps is a fair share of all rounds. The seeds of a round's
two runs come from `config.seed`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align_jax.algorithms import (
    Source,
    errors_in,
    policy_gradient,
    read_sources,
    reward_model,
    reward_normalization,
)
from align_jax.algorithms.policy_gradient import Config as PolicyConfig
from align_jax.algorithms.policy_gradient.task import check_count
from align_jax.algorithms.reward_model import Config as RewardModelConfig
from align_jax.data.dataset import prompts_of
from align_jax.data.loader import permutation
from align_jax.data.sources import load_as_configured
from align_jax.distributed import hosts
from align_jax.errors import RunError
from align_jax.files import write_file
from align_jax.rewards.base import Comparer
from align_jax.rewards.configured import check_comparer, make_comparer
from align_jax.settings import Described, Settings
from align_jax.training import pretrained
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.phases import Phases
from align_jax.training.sampling import comparisons_won, draw_samples
from align_jax.training.workdir import Workdir

# Fields that every comparer's config has, for the command line to change, and whose they are.
_KIND_OF_FIELD = {"reward": "oracle", "model": "judge"}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of rounds of two runs; the last round's policy is the result."""

    seed: int = 0  # the seeds of each round's runs come from it
    rounds: int = 1
    prompts: int = 64  # of a round
    samples: int = 2  # of each prompt, all compared with each other
    # See docs/rewards.md; `reward` is read by the kind `oracle` only, `model` by `judge`; other
    # keys in a config file.
    comparer: Described = dataclasses.field(
        default_factory=lambda: {"kind": "oracle", "reward": "vader", "model": ""}
    )
    reward_model: RewardModelConfig = RewardModelConfig(loss="all_pairs")
    policy: PolicyConfig = PolicyConfig()
    result: str = ""  # where the outcome lies; "" is filled in
    algorithm: str = "online_preferences"

    def __post_init__(self):
        for name, part in (("reward_model", reward_model), ("policy", policy_gradient)):
            if not isinstance(getattr(self, name), Settings):
                with errors_in(name):
                    settings = part.Config.from_dict(getattr(self, name))
                object.__setattr__(self, name, settings)
        super().__post_init__()
        self.at_least(0, "seed")
        self.at_least(1, "rounds", "prompts")
        self.at_least(2, "samples")
        self.at_most(1000, "rounds", "samples")  # every two samples of a prompt are compared
        if not self.reward_model.ranking_loss.ranked:
            raise RunError(
                f"config.reward_model.loss is {self.reward_model.loss!r}, but the rounds make "
                "rankings: expected best_of_k, all_pairs (for two samples the same as pairwise) or "
                "plackett_luce."
            )
        result = f"round_{self.rounds - 1}/policy"
        if self.result not in ("", result):
            raise RunError(
                f"config.result is {self.result!r}; with config.rounds = {self.rounds} it is "
                f"{result}."
            )
        object.__setattr__(self, "result", result)
        check_comparer(_comparer_config(self))
        for name in ("reward_model", "policy"):
            seed = getattr(self, name).seed
            if seed != 0:
                raise RunError(
                    f"config.{name}.seed is {seed}, but each round's seeds come from config.seed: "
                    "set that one, and leave this 0."
                )


def run(config: Config, workdir: Workdir) -> dict[str, Any]:
    """Runs the rounds that are not finished; returns the summaries of each round's two runs."""
    read_sources(sources(config))
    # A comparer that cannot be made stops the run before anything is sampled for it.
    _comparer(config, workdir.path)
    summaries: dict[str, Any] = {}
    for number in range(config.rounds):
        folder = workdir.directory(f"round_{number}")
        folder.mkdir(exist_ok=True)
        phases = Phases(folder)
        before = config.policy.init
        if number:
            before = str(workdir.directory(f"round_{number - 1}/policy"))
        phases.run("sample", lambda: _sample(config, before, number))  # noqa: B023
        phases.run("comparisons", lambda: _compare(config, phases.read("sample"), folder))  # noqa: B023
        reward = _reward_config(config, folder.parent, number)
        policy = _policy_config(config, folder, before, number)
        for name, algorithm, stage in (
            ("reward", reward_model, reward),
            ("policy", policy_gradient, policy),
        ):
            stage_workdir = workdir.part(f"round_{number}/{name}", stage)
            if stage_workdir.finished() is None:
                print(f"Round {number}, {name}: {stage_workdir.path}")
                stage_workdir.finish(algorithm.run(stage, stage_workdir))
            summaries[f"round_{number}/{name}"] = stage_workdir.finished()
    return summaries


def evaluate(config: Config, workdir: Workdir) -> dict[str, Any]:
    """The summaries of the finished runs."""
    files = sorted(workdir.path.glob("round_*/*/finished.json"))
    return {
        "/".join(file.parts[-3:-1]): json.loads(file.read_text(encoding="utf-8")) for file in files
    }


def rank_by_wins(wins: np.ndarray) -> list[int]:
    """Ranks, 0 the best, of K completions by comparisons won `[K]`; equal numbers share a rank."""
    return [int((wins > own).sum()) for own in wins]


def sources(config: Config) -> list[Source]:
    """Where records come from, beside the comparisons, which are its own."""
    reward = config.reward_model
    return [
        *policy_gradient.sources(config.policy),
        *reward_normalization.sources(reward.normalization, reward.data),
        (reward.data.source, "preference", reward.data),
    ]


def _comparer_config(config: Config) -> dict[str, Any]:
    """The comparer's config without what is there for other kinds."""
    comparer = config.comparer
    if isinstance(comparer, str):
        return {"kind": comparer}
    kind = comparer.get("kind")
    return {k: x for k, x in comparer.items() if _KIND_OF_FIELD.get(k, kind) == kind}


def _comparer(config: Config, directory: Path) -> Comparer:
    return make_comparer(
        _comparer_config(config),
        directory=directory,
        tokenizer=pretrained.load_pretrained_tokenizer(config.policy.model),
        mesh=pretrained.open_mesh(config.policy),
    )


def _sample(config: Config, before: str, number: int) -> list[dict[str, Any]]:
    """Completions of this round's prompts by the current policy."""
    policy = config.policy
    tokenizer = pretrained.load_pretrained_tokenizer(policy.model)
    records, examples = prompts_of(
        policy.data.source,
        tokenizer,
        policy.data,
        max_new_tokens=policy.sampling.max_new_tokens,
    )
    first = number * config.prompts
    check_count(policy, examples)
    # Seed and key are not those of the policy's iterations, so prompts and draws differ.
    order = [
        permutation(len(examples), config.seed + 2**34, epoch)[place]
        for epoch, place in (divmod(i, len(examples)) for i in range(first, first + config.prompts))
    ]
    model, mesh = pretrained.open_model(dataclasses.replace(policy, model=before or policy.model))
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 + 1)
    asked = [records[examples[i].id] for i in order]
    samples = draw_samples(
        model,
        mesh,
        tokenizer,
        asked,
        [examples[i].prompt for i in order],
        count=config.samples,
        sampling=policy.sampling,
        key=jax.random.fold_in(key, number),
        description=f"sampling, round {number}",
    )
    return [s | {"record": asked[i // config.samples]} for i, s in enumerate(samples)]


def _compare(config: Config, samples: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """A ranking of each prompt's completions."""
    groups = [samples[i : i + config.samples] for i in range(0, len(samples), config.samples)]
    comparer = _comparer(config, folder / "labels")
    asked = [group[0]["record"] for group in groups]
    texts = [[one["text"] for one in group] for group in groups]
    records = []
    for group, wins in zip(groups, comparisons_won(comparer, asked, texts)):
        records.append(
            {
                "prompt": group[0]["prompt"],
                "completions": [_completion(group[0]["prompt"], one["text"]) for one in group],
                "ranks": rank_by_wins(wins),
            }
        )
    return records


def _completion(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _reward_config(config: Config, folder: Path, number: int) -> reward_model.Config:
    """This round's reward model, on every comparison so far that decides anything."""
    compared = [*_earlier_comparisons(config)]
    compared += [
        record
        for past in range(number + 1)
        for record in Phases(folder / f"round_{past}").read("comparisons")
    ]
    records = [record for record in compared if len(set(record["ranks"])) > 1]
    if config.reward_model.ranking_loss.only_best:
        # A shared first place names no best one.
        records = [record for record in records if record["ranks"].count(0) == 1]
    if left_out := len(compared) - len(records):
        print(f"Round {number}: {left_out} of {len(compared)} rankings decide nothing: left out.")
    if not records:
        raise RunError(
            f"every comparison of round {number} is a tie, so there is nothing to learn from: "
            "look at config.comparer, or raise config.samples."
        )
    file = folder / f"round_{number}" / "all_comparisons.jsonl"
    records = _shuffled(records, config.seed + 2**35, number)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    hosts.on_first_host(lambda: file.exists() or write_file(file, lines.encode("utf-8")))
    model = config.reward_model
    data = dataclasses.replace(model.data, source=str(file), limit=0)
    return dataclasses.replace(model, seed=_seed(config, number, part=0), data=data)


def _shuffled(records: list[dict[str, Any]], *key: int) -> list[dict[str, Any]]:
    """In a fixed random order of prompts: the last ones, which may be held out, are of all kinds.

    The records of one prompt stay together, so that few prompts are on both sides.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_prompt.setdefault(json.dumps(record["prompt"]), []).append(record)
    groups = list(by_prompt.values())
    return [record for place in permutation(len(groups), *key) for record in groups[place]]


def _earlier_comparisons(config: Config) -> list[dict[str, Any]]:
    """Rankings of two: the pairs there were before the first round."""
    data = config.reward_model.data
    if not data.source:
        return []
    pairs = load_as_configured(data, data.source, kind="preference")
    return [
        {
            "prompt": pair["prompt"],
            "completions": [pair["chosen"], pair["rejected"]],
            "ranks": [0, 1],
        }
        for pair in pairs
    ]


def _policy_config(
    config: Config, folder: Path, before: str, number: int
) -> policy_gradient.Config:
    """This round's policy: from the last round's, against this round's reward model."""
    policy = dataclasses.replace(
        config.policy,
        reward={"kind": "model", "path": str(folder / "reward")},
        init=before,
        seed=_seed(config, number, part=1),
    )
    if number and policy.kl.target > 0:
        kl = dataclasses.replace(policy.kl, coefficient=_last_kl_coefficient(Path(before)))
        policy = dataclasses.replace(policy, kl=kl)
    return policy


def _last_kl_coefficient(policy: Path) -> float:
    """Where the controller of a finished policy run stood, its last update included."""
    checkpointer = Checkpointer(policy / "checkpoints")
    try:
        return checkpointer.restore_data()["kl_coefficient"]
    finally:
        checkpointer.close()


def _seed(config: Config, number: int, *, part: int) -> int:
    """One of its own for each round's reward model (part 0) and policy (part 1)."""
    return 2 * (config.seed * config.rounds + number) + part
