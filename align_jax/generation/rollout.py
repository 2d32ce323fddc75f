"""Rollouts: completions of prompts, where they end, and the batches they become."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.data.batching import build_batch
from align_jax.data.dataset import Data
from align_jax.data.tokenise import Example
from align_jax.errors import RunError
from align_jax.generation.sampler import MAX_NEW_TOKENS, MAX_SAMPLES, generate
from align_jax.models.tokenizers import decode_completions, encode_texts
from align_jax.models.transformer import Transformer
from align_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Sampling(Settings, key="config.sampling"):
    """How completions are drawn; lengths are in tokens."""

    prompts: int = 64  # of an iteration; of samples and evaluators how many, and 0 takes all
    samples: int = 1  # of each prompt
    max_new_tokens: int = 64
    temperature: float = 1.0  # 0: always the likeliest token
    batch_prompts: int = 0  # prompts decoded together; 0: all of an iteration
    batch_samples: int = 0  # samples of a prompt that an evaluation draws together; 0: all
    truncate_token: str = ""  # a completion is cut after the first one of this token ...
    truncate_after: int = 0  # ... that stands at this place (from 0) or later

    def __post_init__(self):
        super().__post_init__()
        self.between(1, MAX_SAMPLES, "samples")
        self.between(1, MAX_NEW_TOKENS, "max_new_tokens")
        self.at_least(
            0, "prompts", "temperature", "batch_prompts", "batch_samples", "truncate_after"
        )
        if self.truncate_after and not self.truncate_token:
            raise RunError(
                f"config.sampling.truncate_after = {self.truncate_after} says from where on "
                "config.sampling.truncate_token ends a completion, and that is empty: name a "
                "token, or set config.sampling.truncate_after=0."
            )


class Rollout(NamedTuple):
    """Completions of P prompts, K of each: N = P K rows, prompt by prompt; T = max_new_tokens.

    Attributes:
      prompts: token ids `[.]` int32 of each of the P prompts.
      tokens: `[N,T]` int32, 0 after the end.
      mask: `[N,T]` float32, 1 on the tokens of the completion, its stop token included.
      log_probs: `[N,T]` float32, nats, as the sampler drew them.
      ended: `[N]` bool; False where the token budget cut a completion short.
      texts: N completions without special tokens.
    """

    prompts: list[np.ndarray]
    tokens: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray
    ended: np.ndarray
    texts: list[str]

    @property
    def samples(self) -> int:
        """K."""
        return len(self.texts) // len(self.prompts)

    def group(self, index: int) -> Example:
        """Prompt `index` with its K completions as responses."""
        rows = range(index * self.samples, (index + 1) * self.samples)
        responses = [self.tokens[n][self.mask[n] > 0] for n in rows]
        return Example.of_samples(index, self.prompts[index], responses)

    def select(self, groups: Sequence[int]) -> "Rollout":
        """The rollout of some of its prompts, in the order given."""
        rows = self.rows(groups)
        return Rollout(
            prompts=[self.prompts[g] for g in groups],
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            log_probs=self.log_probs[rows],
            ended=self.ended[rows],
            texts=[self.texts[n] for n in rows],
        )

    def rows(self, groups: Sequence[int]) -> np.ndarray:
        """Indices `[len(groups) K]` of the completions of some prompts."""
        return (np.asarray(groups)[:, None] * self.samples + np.arange(self.samples)).ravel()

    @staticmethod
    def concatenate(parts: Sequence["Rollout"]) -> "Rollout":
        """One rollout of all prompts; the parts have the same K and T."""
        return Rollout(
            prompts=[prompt for part in parts for prompt in part.prompts],
            tokens=np.concatenate([part.tokens for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            log_probs=np.concatenate([part.log_probs for part in parts]),
            ended=np.concatenate([part.ended for part in parts]),
            texts=[text for part in parts for text in part.texts],
        )


def stop_tokens(tokenizer: Any, sampling: Sampling) -> tuple[int, ...]:
    """EOS and `sampling.truncate_token`; `RunError` if that is not one token."""
    stops = (tokenizer.eos_token_id,)
    if not sampling.truncate_token:
        return stops
    (ids,) = encode_texts(tokenizer, [sampling.truncate_token], behind_text=True, special=True)
    if len(ids) != 1:
        raise RunError(
            f"config.sampling.truncate_token is {sampling.truncate_token!r}, which is {len(ids)} "
            "tokens of the model's tokenizer; expected exactly one."
        )
    return (*stops, *ids)


def roll_out(
    model: Transformer,
    mesh: Mesh,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    keys: jax.Array,
    samples: int | None = None,
) -> Rollout:
    """Samples completions of every prompt.

    Args:
      prompts: token ids of each.
      sampling: see `Sampling`.
      keys: one PRNG key a prompt; a completion depends on its prompt's key and number only.
      samples: instead of `sampling.samples`.
    """
    samples = samples or sampling.samples
    stops = stop_tokens(tokenizer, sampling)
    size = sampling.batch_prompts or len(prompts)
    # A token that only ends completions from some place on cannot stop the sampler.
    early = stops if sampling.truncate_after == 0 else stops[:1]
    parts = []
    with jax.set_mesh(mesh):
        for start in range(0, len(prompts), size):
            drawn = generate(
                model,
                [prompt.tolist() for prompt in prompts[start : start + size]],
                key=keys[start : start + size],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                stop_tokens=early,
                samples_per_prompt=samples,
            )
            parts.append([np.asarray(x) for x in jax.device_get(drawn)])
    tokens, mask, log_probs = (np.concatenate(part) for part in zip(*parts, strict=True))
    place = np.arange(tokens.shape[1])
    stopping = (tokens == stops[0]) | (np.isin(tokens, stops) & (place >= sampling.truncate_after))
    stopping &= mask > 0
    # Everything after the first stop token goes, and with it what the sampler went on to draw.
    mask = mask * (np.cumsum(stopping, axis=1) - stopping == 0)
    kept = mask > 0
    completions = [row[keep].tolist() for row, keep in zip(tokens, kept)]
    before = [prompt for prompt in prompts for _ in range(samples)]
    return Rollout(
        [np.asarray(prompt, np.int32) for prompt in prompts],
        np.where(kept, tokens, 0),
        mask.astype(np.float32),
        np.where(kept, log_probs, 0.0).astype(np.float32),
        (stopping & kept).any(axis=1),
        decode_completions(tokenizer, completions, before),
    )


class Layout(NamedTuple):
    """Length of rows and number of targets of every batch made from one rollout: one shape."""

    length: int
    targets: int


def layout_of(rollout: Rollout, data: Data, *, longest_prompt: int) -> Layout:
    """The smallest buckets that hold every group of a rollout, or what any rollout can need.

    Args:
      data: has `length_buckets` and `target_buckets`.
      longest_prompt: tokens, of all the run's prompts.
    """
    samples, budget = rollout.samples, rollout.samples * rollout.tokens.shape[1]
    responses = rollout.mask.sum(1).astype(int).reshape(-1, samples).sum(1)
    lengths = [len(prompt) + total for prompt, total in zip(rollout.prompts, responses)]
    # A bucket beyond the token budget would be padding in every iteration; hardware likes eights.
    most = -(-(longest_prompt + budget) // 8) * 8

    def smallest(length: int, buckets: Sequence[int], most: int) -> int:
        return min([bucket for bucket in buckets if bucket >= length] + [most])

    return Layout(
        smallest(max(lengths), data.length_buckets, most),
        smallest(int(responses.max()), data.target_buckets, budget),
    )


def rollout_batch(rollout: Rollout, groups: Sequence[int], layout: Layout) -> dict[str, np.ndarray]:
    """The batch of some prompts with their completions, one prompt a row."""
    return build_batch(
        [rollout.group(g) for g in groups],
        rows=len(groups),
        length_buckets=(layout.length,),
        target_buckets=(layout.targets,),
    )
