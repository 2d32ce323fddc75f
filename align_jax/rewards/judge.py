"""Who compares two completions: a language model, or an oracle made of a reward.

Comparers, `(records, first, second) -> [N]` float32 probabilities that the first is better; people
are in `people.py`. Swapping first and second gives one minus the answer: the oracle's to the bit,
the language model's to float32's rounding.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align_jax.data.tokenise import encode_records
from align_jax.distributed.partitioning import replicated
from align_jax.errors import RewardError
from align_jax.generation.sampler import prompt_bucket
from align_jax.models.tokenizers import check_vocabulary, encode_texts
from align_jax.models.transformer import Transformer
from align_jax.rewards.base import Records, Reward, checked_scores, text_of

TEMPLATE = """Here are a prompt and two responses to it.

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

{question}"""
QUESTION = "Which response is more helpful, honest and harmless? Answer with A or B."
ANSWER = "The better response is"
OPTIONS = (" A", " B")

_SLOTS = ("prompt", "first", "second", "question")


class LanguageModelJudge:
    """Soft preferences of a language model, from the probabilities of two option tokens.

    With l the logits of the option tokens after the template, and sigmoid(l_A - l_B) the softmax
    over the two:

        p(first, second) = (P(A | first as A, second as B) + P(B | second as A, first as B)) / 2

    averaged over both orders, which cancels what the model likes about a place, and over the
    questions.

    Args:
      model, tokenizer: any language model; its chat template is used if it has one, and then
        `template` is the user's message and `answer` begins the assistant's.
      questions: what to ask; several are the principles of a constitution, averaged over.
      template: holds `{prompt}`, `{first}`, `{second}` and `{question}`, each once.
      answer: how the model's answer begins, up to the option.
      options: how the answer goes on for the first and the second. They differ in one token, their
        last (tokens that both begin with are given to the model).
      batch_size: prompts in one forward pass; two for each comparison and question.
      mesh: the one the model lies on.

    Raises:
      ValueError: a template without one of its slots, options that differ in more than one token,
        no question, a batch size below 1.
      ModelError: a tokenizer with ids that the model does not have.

    Source: Lee et al. 2023 (RLAIF, arXiv:2309.00267), section 2; Bai et al. 2022 (Constitutional
    AI, arXiv:2212.08073), section 4.1.
    """

    name = "judge"

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        *,
        questions: Sequence[str] = (QUESTION,),
        template: str = TEMPLATE,
        answer: str = ANSWER,
        options: Sequence[str] = OPTIONS,
        batch_size: int = 8,
        mesh: Mesh | None = None,
    ):
        for slot in _SLOTS:
            if template.count(f"{{{slot}}}") != 1:
                raise ValueError(f"template: it must hold {{{slot}}} once: {template!r}.")
        if isinstance(questions, str) or not questions:
            raise ValueError(f"questions: {questions!r} is no list of one or more questions.")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is below 1.")
        check_vocabulary(tokenizer, model.config, "the judge")
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._questions, self._template = tuple(questions), template
        self._begun, self._option_ids = _option_tokens(tokenizer, answer, options)
        self._batch_size = batch_size
        sharding = None if mesh is None else replicated(mesh)
        self._run = jax.jit(_option_logits, out_shardings=sharding)

    def __call__(self, records: Records, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        asked = []
        for question in self._questions:
            for pair in (first, second), (second, first):
                for record, a, b in zip(records, *pair, strict=True):
                    text = self._fill_template(text_of(record["prompt"]), a, b, question)
                    asked.append((record, text))
        if not asked:
            return np.zeros(0, np.float32)
        shape = (len(self._questions), 2, len(records))
        given, swapped = self._probabilities(asked).reshape(shape).mean(0)
        return ((given + (1.0 - swapped)) / 2).astype(np.float32)

    def _fill_template(self, prompt: str, first: str, second: str, question: str) -> str:
        texts = {"prompt": prompt, "first": first, "second": second, "question": question}
        # In one pass, so that a completion that says "{second}" is quoted as it is.
        slots = re.compile("{(" + "|".join(_SLOTS) + ")}")
        return slots.sub(lambda slot: texts[slot[1]].strip(), self._template)

    def _probabilities(self, asked: Sequence[tuple[Any, str]]) -> np.ndarray:
        """P(first option) of each filled template, `[M]` float64."""
        prompts = self._encode_prompts(asked)
        # Rows and length are those that a prompt's own length asks for: what else is compared
        # changes no number.
        buckets: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            buckets.setdefault(prompt_bucket(len(prompt)), []).append(index)
        out = np.zeros(len(prompts))
        on_mesh = jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()
        with on_mesh:
            for bucket, indices in sorted(buckets.items()):
                for start in range(0, len(indices), self._batch_size):
                    chosen = indices[start : start + self._batch_size]
                    tokens = np.zeros((self._batch_size, bucket), np.int32)
                    lengths = np.ones(self._batch_size, np.int32)
                    for row, index in enumerate(chosen):
                        lengths[row] = len(prompts[index])
                        tokens[row, : lengths[row]] = prompts[index]
                    logits = self._run(self._model, tokens, lengths, self._option_ids)
                    a, b = np.asarray(logits, np.float64)[: len(chosen)].T
                    out[chosen] = _sigmoid(a - b)
        return out

    def _encode_prompts(self, asked: Sequence[tuple[Any, str]]) -> list[list[int]]:
        """Tokens up to where the option stands, by the rules of `data/tokenise.py`."""
        is_chat = bool(getattr(self._tokenizer, "chat_template", None))
        raw = [
            {
                "prompt": [{"role": "user", "content": text}] if is_chat else f"{text}\n\n",
                "where": record.get("where", "a comparison"),
            }
            for record, text in asked
        ]
        limit = self._model.config.context_length
        # Not cut to the limit: what would be lost is the beginning, where the prompt stands.
        examples = encode_records(raw, self._tokenizer, kind="prompt", max_length=2**31)
        prompts = [[*example.prompt.tolist(), *self._begun] for example in examples]
        for (record, _), prompt in zip(asked, prompts):
            if len(prompt) > limit:
                raise RewardError(
                    f"{record.get('where', 'a comparison')}: the judge needs {len(prompt)} tokens "
                    f"for the prompt and both completions, and its model has {limit}; limit their "
                    "lengths, or take a judge with a longer context."
                )
        return prompts


def _option_tokens(
    tokenizer: Any, answer: str, options: Sequence[str]
) -> tuple[list[int], np.ndarray]:
    """The tokens that begin every answer, and the two that tell the options apart."""
    if isinstance(options, str) or len(options) != 2:
        raise ValueError(f"options: {options!r} are not two texts.")
    encode = functools.partial(encode_texts, tokenizer, behind_text=True)
    a, b = encode(options)
    if len(a) != len(b) or not a or a[:-1] != b[:-1] or a[-1] == b[-1]:
        raise ValueError(
            f"options: {options[0]!r} and {options[1]!r} are the tokens {a} and {b}; expected two "
            "that differ in their last token only."
        )
    begun = encode([answer])[0] if answer else []
    return begun + list(a[:-1]), np.array([a[-1], b[-1]], np.int32)


def _option_logits(model: Transformer, tokens, lengths, options):
    """Logits `[B,2]` of the options as next tokens of `[B,T]` right-padded prompts."""
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    hidden = model(tokens, segment_ids=segment_ids)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last)[:, options]


class OracleJudge:
    """A comparer that knows the reward: the better one, or a draw from Bradley-Terry.

    At temperature 0 the one with the higher reward is better (0.5 for a tie). Above it the first
    wins with probability sigmoid((r(first) - r(second)) / temperature): the answer is 0 or 1, drawn
    once for each pair of texts. A draw depends on the seed and the pair alone, so the same question
    gets the same answer, in either order and after an interruption.

    Args:
      reward: the truth.
      temperature: at least 0, in units of the reward.
      seed: another seed is another annotator.
    """

    name = "oracle"

    def __init__(self, reward: Reward, *, temperature: float = 0.0, seed: int = 0):
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not number or not math.isfinite(temperature) or temperature < 0:
            raise ValueError(f"temperature: {temperature!r} is no number of at least 0.")
        self._reward, self._temperature, self._seed = reward, temperature, seed

    def __call__(self, records: Records, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        # One call, so that rewards relative to their batch compare like with like.
        scores = checked_scores(self._reward, [*records, *records], [*first, *second])
        gaps = scores[: len(records)].astype(np.float64) - scores[len(records) :]
        if self._temperature == 0:
            return ((np.sign(gaps) + 1) / 2).astype(np.float32)
        draws = [self._draw(*pair) for pair in zip(records, first, second, strict=True)]
        wins = np.array(draws) < _sigmoid(gaps / self._temperature)
        same = np.array([a == b for a, b in zip(first, second, strict=True)], bool)
        return np.where(same, 0.5, wins).astype(np.float32)

    def _draw(self, record: Any, first: str, second: str) -> float:
        """Uniform in (0, 1); swapping the texts gives one minus it."""
        content = [self._seed, record["prompt"], *sorted((first, second))]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
        # 2^52 cells, and of each the middle: exact in float64, and so is one minus it.
        uniform = ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
        return uniform if first <= second else 1.0 - uniform


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # By tanh, so that sigmoid(x) + sigmoid(-x) is 1 to the last bit and nothing overflows.
    return 0.5 + 0.5 * np.tanh(0.5 * x)
