"""Reward models: from and to a directory, and as a reward that gives each completion a number."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import build_batch
from align_jax.data.records import parse_record
from align_jax.data.tokenise import Example, encode_records
from align_jax.distributed import hosts
from align_jax.distributed.partitioning import replicated
from align_jax.errors import ModelError, RewardError
from align_jax.models.export import ClassificationHead, save_directory
from align_jax.models.heads import ScalarModel, response_scores, without_unembedding
from align_jax.models.loading import (
    SafetensorsFiles,
    fill,
    name_in_errors,
    read_transformer,
    runtime_config,
)
from align_jax.models.locate import locate, read_json
from align_jax.models.tokenizers import check_vocabulary, load_tokenizer
from align_jax.rewards.base import Reward
from align_jax.rewards.mixture import Combined

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where a run of the algorithm `reward_model` leaves what it made.
DIRECTORY = "reward_model"

SMALLEST_BUCKET = 32
_log = logging.getLogger(__name__)

# Tokens of a batch, padding included. A batch is always full, so a single text costs as much.
BATCH_TOKENS = {"cpu": 512}
DEFAULT_BATCH_TOKENS = 16_384


@dataclasses.dataclass(frozen=True)
class RewardScale:
    """A reward is `gain * scalar + bias` of the head's scalar; and how texts were cut in training.

    Attributes:
      gain, bias: finite numbers.
      max_length: tokens of prompt and response that texts were cut to in training; None: uncut.
      origin: how gain and bias were found, for the reader.
      max_prompt_length, min_prompt_length: bounds on the tokens of the prompt when texts were cut,
        see docs/data.md. None and 1: no bound.
    """

    gain: float = 1.0
    bias: float = 0.0
    max_length: int | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_prompt_length: int | None = None
    min_prompt_length: int = 1


def save_reward_model(
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerFast,
    path: str | os.PathLike,
    *,
    scale: RewardScale,
) -> None:
    """Writes a reward model as a directory that `AutoModelForSequenceClassification` loads.

    The head's kernel is `score.weight`. That class has no bias, so the head's bias becomes a part
    of the bias in `reward.json`: reward = gain * (what transformers computes) + bias.

    Raises:
      ModelError: as `save_model`.
    """
    head_bias = float(np.asarray(model.head.head_bias[...]))
    scale = dataclasses.replace(scale, bias=scale.gain * head_bias + scale.bias)
    transformer = without_unembedding(model.transformer)
    dtype = transformer.embedding[...].dtype
    kernel = np.asarray(hosts.gathered(model.head.head_kernel[...])).astype(dtype)[None]
    head = ClassificationHead(
        tensors={"score.weight": kernel},
        config={"id2label": {"0": "reward"}, "label2id": {"reward": 0}},
        files={"reward.json": dataclasses.asdict(scale)},
    )
    save_directory(transformer, _with_distinct_padding(tokenizer), path, head=head)


def _with_distinct_padding(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that does not pad with EOS, but with another special token, or with none.

    transformers scores at the last token whose id is not the padding's: with EOS as padding it
    would score before the EOS that ends a response.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        special = {tokenizer.unk_token: tokenizer.unk_token_id}
        special |= {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        free = [token for token, id in special.items() if id is not None and id not in taken]
        tokenizer.pad_token = free[0] if free else None
    return tokenizer


def load_reward_model(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
) -> tuple[ScalarModel, RewardScale]:
    """Reads what `save_reward_model` wrote, or transformers' `...ForSequenceClassification`.

    Returns the model, whose scalar at a response's last token is what transformers computes, and
    the scale that makes a reward of it: gain 1 and bias 0 if there is no `reward.json`. Arguments
    as for `load_model`.

    Raises:
      ModelError: as `load_model`; the directory has no scalar head, or a damaged reward.json.
    """
    location = locate(path, weights=True)
    if location.kind != "directory":
        raise ModelError(f"{path} is not a reward model: expected a directory with score.weight.")
    folder = location.path
    with name_in_errors(folder):
        # A classification model has no projection to the vocabulary, whatever its config says.
        hf_config = read_json(folder / "config.json") | {"tie_word_embeddings": True}
        config = runtime_config(hf_config, compute_dtype=compute_dtype, remat=remat)
        tensors = SafetensorsFiles(folder)
        shape, found = (1, config.hidden_size), tensors.shapes().get("score.weight", "none")
        if found != shape:
            raise ModelError(
                f"{folder} is not a reward model: expected a tensor score.weight of shape {shape}, "
                f"found {found}."
            )
        kernel = tensors.pop("score.weight")[0].astype(np.float32)
        transformer = read_transformer(config, tensors, jnp.dtype(dtype or "float32"), mesh)
    model = ScalarModel(transformer, key=None)
    head = fill(model.head, lambda name, leaf: kernel if name == "head_kernel" else leaf, mesh)
    model.head = head
    return model, _read_scale(folder / "reward.json")


def _read_scale(file: Path) -> RewardScale:
    if not file.is_file():
        return RewardScale()
    content = read_json(file)
    for name in ("gain", "bias"):
        value = content.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{file}: {name!r} must be a finite number, got {value!r}.")
    known = {field.name for field in dataclasses.fields(RewardScale)}
    return RewardScale(**{name: value for name, value in content.items() if name in known})


class RewardModel:
    """A reward model, or the mean of an ensemble, as a reward `(records, completions) -> [N]`.

    Text is tokenised with the model's own tokenizer, closed with EOS and cut as in training, and
    scored at its last token. A prompt is cut first, on the left; where a completion's end is cut,
    too, a warning says so. A text's batch has the number of rows and the length that its own
    length asks for, whatever it is scored together with.

    Args:
      members: each model with its scale; several are an ensemble (Christiano et al. 2017,
        arXiv:1706.03741, section 2.2.3).
      tokenizer: the members'.
      mesh: on which the members lie, if on one.
      directories: where each member was read.

    Attributes:
      components: None, but of an ensemble the function that `base.scores_and_components` asks: the
        reward of each member, `member_0` and so on, and their `disagreement`, the standard
        deviation over them, `[N]` float32 each.
      truncated: `[N]` bool, which texts of the last call were cut: the beginning of the prompt, or
        at the end of the completion.
    """

    def __init__(
        self,
        members: Sequence[tuple[ScalarModel, RewardScale]],
        tokenizer: Any,
        *,
        mesh: Mesh | None = None,
        directories: Sequence[Path] = (),
    ):
        self.members = list(members)
        self.directories = list(directories)
        self.tokenizer = tokenizer
        self._mesh = mesh
        self.components = self._components if len(self.members) > 1 else None
        limits = [scale.max_length for _, scale in self.members if scale.max_length]
        self.max_length = min([*limits, self.members[0][0].config.context_length])
        self.truncated = np.zeros(0, bool)
        name = self.directories[0] if self.directories else "the reward model"
        for model, _ in self.members:
            check_vocabulary(tokenizer, model.config, name)
        scale = self.members[0][1]
        self._bounds = {
            "max_prompt_length": scale.max_prompt_length,
            "min_prompt_length": scale.min_prompt_length,
        }
        placement = None if mesh is None else replicated(mesh)
        self._score = jax.jit(response_scores, out_shardings=placement)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        mesh: Mesh | None = None,
        compute_dtype: str | None = None,
    ) -> RewardModel:
        """Reads a directory of `save_reward_model`, an ensemble of them, or a finished run's.

        Raises:
          ModelError: there is none at `path`, or its run has not finished.
        """
        folders = member_directories(path)
        settings = {"mesh": mesh, "compute_dtype": compute_dtype or "float32"}
        members = [load_reward_model(folder, **settings) for folder in folders]
        return cls(members, load_tokenizer(folders[0]), mesh=mesh, directories=folders)

    def __call__(
        self, records: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> np.ndarray:
        """The reward of each completion, `[N]` float32; of an ensemble the mean."""
        return self.member_scores(records, completions).mean(axis=0)

    def _components(
        self, records: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> dict[str, np.ndarray]:
        scores = self.member_scores(records, completions)
        members = {f"member_{k}": own for k, own in enumerate(scores)}
        return members | {"disagreement": scores.std(axis=0)}

    def combine(
        self, components: Mapping[str, np.ndarray], records: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """The mean of the members among `components`, `[N]` float32."""
        members = [components[f"member_{k}"] for k in range(len(self.members))]
        return np.mean(members, axis=0, dtype=np.float32)

    def member_log_odds(
        self, records: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> np.ndarray:
        """Every member's scalar before gain and bias, `[members, N]` float64.

        Differences of these are the log-odds that the member was fitted to.
        """
        scores = self.member_scores(records, completions).astype(np.float64)
        return np.array([(own - s.bias) / s.gain for own, (_, s) in zip(scores, self.members)])

    def mean_log_odds(self, members: np.ndarray) -> np.ndarray:
        """Gain-weighted mean of `member_log_odds`, `[N]`; it ranks texts as the reward does."""
        gains = [scale.gain for _, scale in self.members]
        return np.average(members, axis=0, weights=gains)

    def member_scores(
        self, records: Sequence[Mapping[str, Any]], completions: Sequence[str]
    ) -> np.ndarray:
        """Every member's reward of each completion, `[members, N]` float32."""
        if not len(completions):
            return np.zeros((len(self.members), 0), np.float32)
        examples = self._encode_texts(records, completions)
        scores = [
            scale.gain * self._scalars(model, examples) + scale.bias
            for model, scale in self.members
        ]
        return np.array(scores, np.float32)

    def _encode_texts(self, records, completions) -> list[Example]:
        pairs = [
            parse_record(
                {"prompt": record["prompt"], "completion": completion},
                kind="sft",
                where=record.get("where", f"record {index}"),
            )
            for index, (record, completion) in enumerate(zip(records, completions, strict=True))
        ]
        examples = encode_records(
            pairs,
            self.tokenizer,
            kind="sft",
            max_length=self.max_length,
            overlong="truncate",
            **self._bounds,
        )
        self.truncated = np.array([one.extras.get("truncated", False) for one in examples])
        # A response that is not cut ends in EOS.
        eos = self.tokenizer.eos_token_id
        unseen = sum(int(example.responses[0][-1]) != eos for example in examples)
        if unseen:
            _log.warning(
                "the reward model does not see the end of %d of %d completions: they are longer "
                "than its max_length = %d tokens leaves room for",
                unseen,
                len(examples),
                self.max_length,
            )
        return examples

    def require_room(
        self, records: Sequence[Mapping[str, Any]], tokenizer: Any, max_new_tokens: int
    ) -> None:
        """Refuses prompts whose completions this model could not read to their end.

        A model with another tokenizer than the policy's reads another number of tokens, which no
        one knows before sampling; its prompts are cut on the left.

        Args:
          records: those to be sampled for.
          tokenizer: the policy's.
          max_new_tokens: of a completion.

        Raises:
          RewardError: the first record whose prompt and completion do not fit `max_length`.
        """
        if not records or tokenizer.get_vocab() != self.tokenizer.get_vocab():
            return
        prompts = [
            parse_record(
                {"prompt": record["prompt"]},
                kind="prompt",
                where=record.get("where", f"record {index}"),
            )
            for index, record in enumerate(records)
        ]
        examples = encode_records(prompts, self.tokenizer, kind="prompt", max_length=2**31)
        for example in examples:
            # One more: a completion that its budget cut short is closed with EOS.
            length = min(len(example.prompt), self._bounds["max_prompt_length"] or 2**31)
            if length + max_new_tokens + 1 > self.max_length:
                raise RewardError(
                    f"{example.extras['where']}: the reward model reads {self.max_length} tokens, "
                    f"and the prompt has {length}, to which config.sampling.max_new_tokens = "
                    f"{max_new_tokens} and EOS are added; lower config.sampling.max_new_tokens or "
                    "config.data.max_length, or take a reward model trained with a larger "
                    "data.max_length."
                )

    def _scalars(self, model: ScalarModel, examples: Sequence[Example]) -> np.ndarray:
        out = np.zeros(len(examples), np.float64)
        buckets: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            length = len(example.prompt) + len(example.responses[0])
            bucket = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
            buckets.setdefault(min(bucket, self.max_length), []).append(index)
        tokens = BATCH_TOKENS.get(jax.default_backend(), DEFAULT_BATCH_TOKENS)
        context = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with context:
            for bucket, indices in sorted(buckets.items()):
                rows = max(1, tokens // bucket)
                for start in range(0, len(indices), rows):
                    chosen = indices[start : start + rows]
                    filled = chosen + chosen[-1:] * (rows - len(chosen))
                    batch = build_batch(
                        [examples[index] for index in filled],
                        rows=rows,
                        length_buckets=(bucket,),
                        target_buckets=(bucket,),
                    )
                    scalars = np.asarray(self._score(model, batch))
                    out[chosen] = scalars[: len(chosen)]
        return out


def reward_models(reward: Reward) -> list[RewardModel]:
    """The reward models that a reward is, or is made of."""
    if isinstance(reward, RewardModel):
        return [reward]
    components = reward.rewards.values() if isinstance(reward, Combined) else ()
    return [model for component in components for model in reward_models(component)]


def loaded_members(reward: Reward) -> dict[Path, tuple[ScalarModel, RewardScale]]:
    """The reward models a reward has read, or those it is made of, by resolved directory."""
    return {
        directory.resolve(): member
        for model in reward_models(reward)
        for directory, member in zip(model.directories, model.members)
    }


def member_directories(path: str | os.PathLike) -> list[Path]:
    """The directories of the members at `path`, which is a reward model, an ensemble or a run.

    Raises:
      ModelError: a run that has not finished, or is none of a reward model.
    """
    folder = Path(path).expanduser()
    if (folder / DIRECTORY).is_dir():
        folder = folder / DIRECTORY
    elif "algorithm" in _content(folder / "config.json"):
        raise ModelError(
            f"{folder} holds a run without a finished reward model: expected its {DIRECTORY}/, "
            "which a run of the algorithm 'reward_model' writes at its end."
        )
    members = _content(folder / "reward.json").get("members")
    return [folder / Path(name).name for name in members] if members else [folder]


def _content(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
