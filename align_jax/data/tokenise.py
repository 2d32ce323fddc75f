"""Tokenisation: records to prompt and response tokens, with the boundary between them kept.

Prompt and response are tokenised apart, as generation sees them, so no token spans the boundary.
Every response ends in one EOS. Prompts are cut on the left, at turn boundaries while that is
possible.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from align_jax.data.records import HUMAN, Messages, Record
from align_jax.errors import DataError

# Raised whenever the same record gives other tokens: what was computed from the old is not used.
ENCODER_VERSION = 1
OVERLONG = ("error", "truncate", "drop")
_CHUNK = 256
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised record.

    Attributes:
      id: the record's number in its source.
      prompt: `[P]` int32.
      responses: each `[L]` int32; of a preference chosen before rejected, of a prompt none.
      response_masks: each `[L]` float32, the weight of a token: 1 where it is trained on.
      extras: `where` and what else the record had: `margin`, `strength`, `label`, `ranks`.
      token_extras: more values of each response's tokens by name, one array `[L, ...]` a response;
        `build_batch` lays them out as it does `targets`.
    """

    id: int
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    response_masks: tuple[np.ndarray, ...]
    extras: dict[str, Any]
    token_extras: dict[str, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_samples(
        cls,
        id: int,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        *,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> Example:
        """A prompt with responses that a policy drew.

        `masks` are 1 on the tokens that it drew and 0 on those it was given, which do not count;
        None if it drew all of them.
        """
        tokens = tuple(np.asarray(response, np.int32) for response in responses)
        if masks is None:
            masks = [np.ones(len(response)) for response in tokens]
        weights = tuple(np.asarray(mask, np.float32) for mask in masks)
        return cls(id, np.asarray(prompt, np.int32), tokens, weights, {})


def encode_record(
    record: Record,
    tokenizer: Any,
    *,
    id: int,
    kind: str,
    max_length: int,
    max_prompt_length: int | None = None,
    min_prompt_length: int = 1,
    overlong: str = "error",
    append_eos: bool = True,
) -> Example | None:
    """Tokenises one record of `load_records`; limits and errors as in `encode_records`.

    Returns None if the record has a response over the limit and `overlong` is "drop".
    """
    limits = (max_length, max_prompt_length, min_prompt_length)
    encoder = _Encoder(tokenizer, kind, *limits, overlong, append_eos)
    return encoder.encode([(id, record)])[0]


def encode_records(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    kind: str,
    max_length: int,
    max_prompt_length: int | None = None,
    min_prompt_length: int = 1,
    overlong: str = "error",
    append_eos: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> list[Example]:
    """Tokenises records; the id of an example is its record's index.

    `max_length` bounds prompt + longest response in tokens, EOS included; a prompt is cut on the
    left to the room its longest response leaves (and to `max_prompt_length`). A response that
    leaves its prompt less than `min_prompt_length` tokens (or than half of `max_length`, or the
    prompt's own length if that is shorter) is an error, is cut at its end and gets no EOS
    ("truncate"), or its record is left out ("drop"). `progress` is called with the number of
    records just done.

    Raises DataError for a response over the limit, a template that cannot render a record, a
    tokenizer without EOS, or if nothing is left.
    """
    limits = (max_length, max_prompt_length, min_prompt_length)
    encoder = _Encoder(tokenizer, kind, *limits, overlong, append_eos)
    examples: list[Example] = []
    for start in range(0, len(records), _CHUNK):
        chunk = list(enumerate(records[start : start + _CHUNK], start=start))
        examples += [example for example in encoder.encode(chunk) if example is not None]
        if progress is not None:
            progress(len(chunk))
    if not examples:
        raise DataError(
            f"no example is left: all {len(records)} records have a response over data.max_length "
            f"= {max_length} tokens and data.overlong is 'drop'; raise data.max_length"
            if records
            else "there are no records to tokenise"
        )
    if len(examples) < len(records):
        _log.warning(
            "left out %d of %d records: a response is longer than data.max_length = %d tokens",
            len(records) - len(examples),
            len(records),
            max_length,
        )
    return examples


# A response before tokenisation: pieces of text, each trained on or not.
_Pieces = tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A record as text; `shorter` yields the prompt with fewer and fewer of its oldest turns."""

    id: int
    prompt: str
    shorter: Callable[[], Iterator[str]]
    responses: tuple[_Pieces, ...]
    extras: dict[str, Any]
    is_chat: bool


class _Encoder:
    def __init__(
        self,
        tokenizer,
        kind,
        max_length,
        max_prompt_length,
        min_prompt_length,
        overlong,
        append_eos,
    ):
        if max_length < 2:
            raise DataError(f"data.max_length is {max_length}; expected at least 2 tokens")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise DataError(f"data.max_prompt_length is {max_prompt_length}; expected at least 1")
        if min_prompt_length < 1:
            raise DataError(f"data.min_prompt_length is {min_prompt_length}; expected at least 1")
        if overlong not in OVERLONG:
            raise DataError(f"data.overlong is {overlong!r}; expected one of {', '.join(OVERLONG)}")
        self.eos = tokenizer.eos_token_id
        if append_eos and self.eos is None:
            raise DataError("the tokenizer has no EOS token: set its eos_token")
        self.tokenizer = tokenizer
        self.kind = kind
        self.max_length = max_length
        self.max_prompt_length = max_length if max_prompt_length is None else max_prompt_length
        self.min_prompt_length = min_prompt_length
        self.overlong = overlong
        self.append_eos = append_eos
        # Plain text gets the BOS that the tokenizer itself would add; a chat template writes its
        # own.
        leading = tokenizer("", add_special_tokens=True).input_ids[:1]
        has_bos = leading and leading[0] == getattr(tokenizer, "bos_token_id", None)
        self.bos = list(leading) if has_bos else []

    def encode(self, numbered: list[tuple[int, Record]]) -> list[Example | None]:
        drafts = [self._draft(id, record) for id, record in numbered]
        pieces = (piece for draft in drafts for response in draft.responses for piece in response)
        texts = list({text for text, _ in pieces} | {draft.prompt for draft in drafts})
        token_lists = self.tokenizer(texts, add_special_tokens=False).input_ids
        tokens = dict(zip(texts, token_lists, strict=True))
        return [self._finish(draft, tokens) for draft in drafts]

    def _draft(self, id: int, record: Record) -> _Draft:
        extras = {
            name: record[name]
            for name in ("where", "margin", "strength", "label", "ranks")
            if name in record
        }
        where = record.get("where", f"record {id}")
        extras["where"] = where
        if "text" in record:
            prompt, answers = "", [record["text"]]
        elif "messages" in record:
            first = [message["role"] for message in record["messages"]].index("assistant")
            prompt, answers = record["messages"][:first], [record["messages"][first:]]
        else:
            prompt, answers = record["prompt"], _answers(record, self.kind)
        if isinstance(prompt, str):
            pieces = tuple(((answer, True),) for answer in answers)
            return _Draft(
                id, prompt, functools.partial(_later_turns, prompt), pieces, extras, False
            )
        prompt_text = self._render(prompt, where, generate=True)
        pieces = tuple(self._response_pieces(prompt, prompt_text, a, where) for a in answers)
        shorter = functools.partial(self._later_messages, prompt, where)
        return _Draft(id, prompt_text, shorter, pieces, extras, True)

    def _render(self, messages: Messages, where: str, *, generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        # A template is a program of the model's author: it may raise anything.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            if getattr(self.tokenizer, "chat_template", None) is None:
                reason = "the tokenizer has none; use strings, or a tokenizer with a chat template"
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where}: the chat template cannot render messages with roles {roles}: {reason}"
            ) from error

    def _response_pieces(
        self, prompt: Messages, prompt_text: str, answer: Messages, where: str
    ) -> _Pieces:
        """What the template renders after the prompt; of several turns, the assistant's count."""
        full = self._render(prompt + answer, where, generate=False)
        if len(answer) == 1:
            if not full.startswith(prompt_text):
                return ((answer[0]["content"], True),)
            return ((self._until_eos(full[len(prompt_text) :]), True),)
        pieces, end = [], len(prompt_text)
        for index, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            so_far = prompt + answer[:index]
            before = self._render(so_far, where, generate=True)
            after = self._render([*so_far, message], where, generate=False)
            if not (full.startswith(before) and full.startswith(after) and len(before) >= end):
                raise DataError(
                    f"{where}: field 'messages': the chat template renders the turns up to "
                    f"messages[{index + len(prompt)}] otherwise once later turns follow, so no "
                    "mask fits; write each turn as its own 'prompt' + 'completion' record"
                )
            text = self._until_eos(after[len(before) :])
            pieces += [(full[end : len(before)], False), (text, True)]
            end = len(before) + len(text)
        return tuple(piece for piece in pieces if piece[0])

    def _until_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        end = text.rfind(eos) if eos else -1
        return text[: end + len(eos)] if end >= 0 else text.rstrip("\n")

    def _later_messages(self, messages: Messages, where: str) -> Iterator[str]:
        """The prompt from each later user turn on, with the system message while that fits."""
        system = messages[:1] if messages[0]["role"] in ("system", "developer") else []
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for start in turns[1:]:
            yield self._render(system + messages[start:], where, generate=True)
        if system and turns:
            yield self._render(messages[turns[-1] :], where, generate=True)

    def _finish(self, draft: _Draft, tokens: dict[str, list[int]]) -> Example | None:
        bos = [] if draft.is_chat else self.bos
        prompt = _with_bos(bos, tokens[draft.prompt])
        responses, masks = [], []
        for pieces in draft.responses:
            ids = [token for text, _ in pieces for token in tokens[text]]
            mask = [float(counts) for text, counts in pieces for _ in tokens[text]]
            if bos and not draft.prompt and ids[:1] == bos:
                del ids[0], mask[0]
            if self.append_eos and ids[-1:] != [self.eos]:
                ids.append(self.eos)
                mask.append(1.0)
            if not ids:
                raise DataError(f"{draft.extras['where']}: a response is empty and gets no EOS")
            responses.append(ids)
            masks.append(mask)
        longest = max(map(len, responses), default=0)
        half = min(len(prompt), self.max_prompt_length, self.max_length // 2)
        kept = min(half, self.min_prompt_length)
        limit = self.max_length - kept
        if longest > limit:
            if self.overlong == "drop":
                return None
            if self.overlong == "error":
                raise DataError(
                    f"{draft.extras['where']}: a response of {longest} tokens is over the limit of "
                    f"{limit} (data.max_length = {self.max_length}"
                    f"{f', less {kept} for the prompt' if kept else ''}): raise data.max_length, "
                    "or set data.overlong to 'truncate' or 'drop'"
                )
            # The prompt keeps up to half: a cut response is of use, one without its prompt is not.
            limit = self.max_length - half
            responses = [ids[:limit] for ids in responses]
            masks = [mask[:limit] for mask in masks]
            longest = max(map(len, responses))
        room = min(self.max_length - longest, self.max_prompt_length)
        return Example(
            id=draft.id,
            prompt=np.array(self._fit(draft, prompt, bos, room), np.int32),
            responses=tuple(np.array(ids, np.int32) for ids in responses),
            response_masks=tuple(np.array(mask, np.float32) for mask in masks),
            extras=draft.extras,
        )

    def _fit(self, draft: _Draft, prompt: list[int], bos: list[int], room: int) -> list[int]:
        if len(prompt) <= room:
            return prompt
        for text in draft.shorter():
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            prompt = _with_bos(bos, ids)
            if len(prompt) <= room:
                return prompt
        kept = prompt[len(prompt) - room + len(bos) :] if room > len(bos) else prompt[-room:]
        return bos + kept if room > len(bos) else kept


def _answers(record: Record, kind: str) -> list[Any]:
    if kind == "preference":
        return [record["chosen"], record["rejected"]]
    if kind == "ranked":
        return record["completions"]
    return [] if kind == "prompt" else [record["completion"]]


def _with_bos(bos: list[int], ids: list[int]) -> list[int]:
    return list(ids) if ids[:1] == bos else bos + list(ids)


def _later_turns(prompt: str) -> Iterator[str]:
    """A `\\n\\nHuman:` dialogue from each later human turn on."""
    start = prompt.find(HUMAN, 1)
    while start >= 0:
        yield prompt[start:]
        start = prompt.find(HUMAN, start + 1)
