"""Tokenisation: records to prompt and response tokens, with the boundary between them kept.

Prompt and response are tokenised apart, as generation sees them, so no token spans the boundary;
a response is tokenised as the continuation of a text. Every response ends in one EOS. Prompts are
cut on the left, at turn boundaries while that is possible. The text of a special token inside a
record is text, unless the caller says otherwise: it can neither end a turn nor begin one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_jax.data.records import HUMAN, Messages, Record
from align_jax.data.templates import ChatTemplate
from align_jax.errors import DataError
from align_jax.models.tokenizers import (
    encode_texts,
    restart_pattern,
    special_pattern,
    swallow_pattern,
)

# Raised whenever the same record gives other tokens: what was computed from the old is not used.
ENCODER_VERSION = 1
OVERLONG = ("error", "truncate", "drop")
SPECIAL_TOKENS = ("text", "allow")
# Assistant turns that one record may have. Finding what to train on takes time that grows as their
# square: about 2 seconds for these.
MAX_TURNS = 500
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
      extras: `where` and what else the record had: `margin`, `strength`, `label`,
        `ranks`; `truncated` is there, and true, where a limit cut it.
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
        prompt: Sequence[int] | np.ndarray,
        responses: Sequence[Sequence[int] | np.ndarray],
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
    special_tokens: str = "text",
) -> Example | None:
    """Tokenises one record of `load_records`; limits and errors as in `encode_records`.

    Returns None if the record has a response over the limit and `overlong` is "drop".
    """
    limits = (max_length, max_prompt_length, min_prompt_length)
    encoder = _Encoder(tokenizer, kind, *limits, overlong, append_eos, special_tokens)
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
    special_tokens: str = "text",
    progress: Callable[[int], Any] | None = None,
) -> list[Example]:
    """Tokenises records; the id of an example is its record's index.

    `max_length` bounds prompt + longest response in tokens, EOS included; a prompt is cut on the
    left to the room its longest response leaves (and to `max_prompt_length`). A response that
    leaves its prompt less than `min_prompt_length` tokens (or than half of `max_length`, or the
    prompt's own length if that is shorter) is an error, is cut at its end and gets no EOS
    ("truncate"), or its record is left out ("drop"). `special_tokens` says what the text of a
    special token inside a record is: "text" like any other, or that token ("allow"). `progress` is
    called with the number of records just done.

    Raises DataError for a response over the limit, a template that cannot render a record, a
    tokenizer without EOS, or if nothing is left; ModelError for a template that does not end, or
    leaves out what a message says.
    """
    limits = (max_length, max_prompt_length, min_prompt_length)
    encoder = _Encoder(tokenizer, kind, *limits, overlong, append_eos, special_tokens)
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
    if encoder.mentions:
        _log.warning(
            "%d of %d records hold the text of special tokens, the first is %s: it is read as "
            "text; to read it as the tokens, set data.special_tokens to 'allow'",
            len(encoder.mentions),
            len(records),
            encoder.mentions[0],
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


class _Text(NamedTuple):
    """A text to tokenise: rendered by the chat template or plain, behind another text or not."""

    text: str
    is_chat: bool
    behind: bool


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A record as text; `shorter` gives the prompt with fewer and fewer of its oldest turns."""

    id: int
    prompt: str
    shorter: Callable[[], list[Callable[[], str]]]
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
        special,
    ):
        if max_length < 2:
            raise DataError(f"data.max_length is {max_length}; expected at least 2 tokens")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise DataError(f"data.max_prompt_length is {max_prompt_length}; expected at least 1")
        if min_prompt_length < 1:
            raise DataError(f"data.min_prompt_length is {min_prompt_length}; expected at least 1")
        if overlong not in OVERLONG:
            raise DataError(f"data.overlong is {overlong!r}; expected one of {', '.join(OVERLONG)}")
        if special not in SPECIAL_TOKENS:
            raise DataError(f"data.special_tokens is {special!r}; expected 'text' or 'allow'")
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

        self.allow_special = special == "allow"
        self.special = special_pattern(tokenizer)
        self.restart = restart_pattern(tokenizer)
        self.swallow = swallow_pattern(tokenizer)
        self.mentions: list[str] = []  # where records hold the text of special tokens, as text

    @functools.cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, allow_special=self.allow_special)

    def encode(self, numbered: list[tuple[int, Record]]) -> list[Example | None]:
        drafts = [self._draft(id, record) for id, record in numbered]
        tokens = self._tokenise({text for draft in drafts for text in self._texts(draft)})
        return [self._finish(draft, tokens) for draft in drafts]

    def _texts(self, draft: _Draft) -> list[_Text]:
        """The prompt, then the pieces of every response."""
        texts = [_Text(draft.prompt, draft.is_chat, False)]
        for pieces in draft.responses:
            before = draft.prompt
            for text, _ in pieces:
                texts.append(self._following(before, text, draft.is_chat))
                before = text
        return texts

    def _following(self, before: str, text: str, is_chat: bool) -> _Text:
        """A text as `before` has it read: as its continuation, or behind a special token."""
        # In plain text the text of a special token is none.
        end = before[-100:] if is_chat or self.allow_special else ""
        if self.swallow.search(end):
            text = text.lstrip()
        return _Text(text, is_chat, bool(before) and not self.restart.search(end))

    def _encode_plain(self, texts: Sequence[str], *, behind_text: bool) -> list[list[int]]:
        allow = self.allow_special
        return encode_texts(self.tokenizer, texts, behind_text=behind_text, special=allow)

    def _tokenise(self, texts: Iterable[_Text]) -> dict[_Text, list[int]]:
        tokens, groups = {}, {}
        for one in texts:
            groups.setdefault(one[1:], []).append(one)
        for (is_chat, behind), group in groups.items():
            encode = self.template.encode if is_chat else self._encode_plain
            ids = encode([one.text for one in group], behind_text=behind)
            tokens |= zip(group, ids, strict=True)
        return tokens

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
        is_chat = not isinstance(prompt, str)
        said = [prompt, *answers]
        if is_chat:
            said = [message["content"] for messages in said for message in messages]
        if not self.allow_special and any(map(self.special.search, said)):
            self.mentions.append(where)
        if not is_chat:
            pieces = tuple(((answer, True),) for answer in answers)
            shorter = functools.partial(_later_turns, prompt)
            return _Draft(id, prompt, shorter, pieces, extras, False)
        prompt = self.template.guard(prompt, where)
        turns = len(prompt)
        answers = [self.template.guard(answer, where, first=turns) for answer in answers]
        prompt_text = self.template.render(prompt, where, generate=True)
        pieces = tuple(self._response_pieces(prompt, prompt_text, a, where) for a in answers)
        shorter = functools.partial(self._later_messages, prompt, where)
        return _Draft(id, prompt_text, shorter, pieces, extras, True)

    def _response_pieces(
        self, prompt: Messages, prompt_text: str, answer: Messages, where: str
    ) -> _Pieces:
        """What the template renders after the prompt; of several turns, the assistant's count."""
        render = functools.partial(self.template.render, where=where)
        turns = sum(message["role"] == "assistant" for message in answer)
        if turns > MAX_TURNS:
            raise DataError(
                f"{where}: field 'messages' has {turns} assistant turns, more than the "
                f"{MAX_TURNS} that one record may have; split it into several records"
            )
        full = render(prompt + answer, generate=False)
        if len(answer) == 1:
            if not full.startswith(prompt_text):
                return ((answer[0]["content"], True),)
            return ((self._until_eos(full[len(prompt_text) :]), True),)
        pieces, end = [], len(prompt_text)
        for index, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            so_far = prompt + answer[:index]
            before = render(so_far, generate=True)
            after = render([*so_far, message], generate=False)
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

    def _later_messages(self, messages: Messages, where: str) -> list[Callable[[], str]]:
        """The prompt from each later user turn on, with the system message while that fits."""
        system = messages[:1] if messages[0]["role"] in ("system", "developer") else []
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]

        def rendered(system: Messages, start: int) -> str:
            return self.template.render(system + messages[start:], where, generate=True)

        shorter = [functools.partial(rendered, system, start) for start in turns[1:]]
        if system and turns:
            shorter.append(functools.partial(rendered, [], turns[-1]))
        return shorter

    def _finish(self, draft: _Draft, tokens: dict[_Text, list[int]]) -> Example | None:
        bos = [] if draft.is_chat else self.bos
        texts = iter(self._texts(draft))
        prompt = _with_bos(bos, tokens[next(texts)])
        responses, masks = [], []
        for pieces in draft.responses:
            ids, mask = [], []
            for _, counts in pieces:
                own = tokens[next(texts)]
                ids += own
                mask += [float(counts)] * len(own)
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
            draft.extras["truncated"] = True
        room = min(self.max_length - longest, self.max_prompt_length)
        if len(prompt) > room:
            draft.extras["truncated"] = True
            prompt = self._fit(draft, prompt, bos, room)
        return Example(
            id=draft.id,
            prompt=np.array(prompt, np.int32),
            responses=tuple(np.array(ids, np.int32) for ids in responses),
            response_masks=tuple(np.array(mask, np.float32) for mask in masks),
            extras=draft.extras,
        )

    def _fit(self, draft: _Draft, prompt: list[int], bos: list[int], room: int) -> list[int]:
        """The prompt without as few of its oldest turns as fits, or else the end of the last."""
        shorter = draft.shorter()

        @functools.cache
        def encoded(index: int) -> list[int]:
            text = _Text(shorter[index](), draft.is_chat, False)
            return _with_bos(bos, self._tokenise([text])[text])

        # The later a prompt begins the shorter it is, so a few of them need to be made.
        places = range(len(shorter))
        fitting = bisect.bisect_left(places, True, key=lambda i: len(encoded(i)) <= room)
        if fitting < len(shorter):
            return encoded(fitting)
        if shorter:
            prompt = encoded(len(shorter) - 1)
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


def _later_turns(prompt: str) -> list[Callable[[], str]]:
    """A `\\n\\nHuman:` dialogue from each later human turn on."""
    starts = [found.start() for found in re.finditer(re.escape(HUMAN), prompt) if found.start()]
    return [functools.partial(prompt.__getitem__, slice(start, None)) for start in starts]
