"""Chat templates: messages to text and tokens in which no message can speak for the template.

A template joins what it writes itself (turns, special tokens) with what the messages say. Once
joined, `<|im_end|>` in a message looks like the template's own, and ends the turn. So special
tokens inside messages are broken before rendering and become ordinary text tokens after it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from align_jax.data.records import ROLES, Messages
from align_jax.errors import DataError, ModelError
from align_jax.models.tokenizers import (
    encode_texts,
    restarts_behind_special,
    special_pattern,
    special_tokens,
)

# Breaks special tokens inside messages. Unicode guarantees that this is no character of any text.
_BREAK = "\ufdd0"


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
      allow_special: special tokens inside messages are read as such, and text markers are left.

    Raises:
      ModelError: rendering a conversation of a few words does not end.
    """

    def __init__(self, tokenizer: Any, *, allow_special: bool = False):
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._facts = _facts_of(tokenizer)
        self._markers: Sequence[str] = ()
        self._pattern = None if allow_special else special_pattern(tokenizer)
        if not allow_special:
            self._markers = [m for m in self._facts.markers if m not in self._special]
        self._starts = tuple({token[:i] for token in self._special for i in range(1, len(token))})
        self._ends = tuple({token[i:] for token in self._special for i in range(1, len(token))})

    def guard(self, messages: Messages, where: str, *, first: int = 0) -> Messages:
        """The messages with the special tokens they mention broken, to be rendered.

        `first` is the place of the first one in its conversation, for the errors.

        Raises:
          DataError: a message holds a text marker with which the template tells turns apart.
          ModelError: the template leaves out what a message of such a role says.
        """
        for index, message in enumerate(messages, start=first):
            role, content = message["role"], message["content"]
            if role in self._facts.dropped:
                raise ModelError(
                    f"{where}: the chat template of the tokenizer leaves out the text of messages "
                    f"with role '{role}'; use another template, or strings instead of messages"
                )
            marker = next((marker for marker in self._markers if marker in content), None)
            if marker:
                raise DataError(
                    f"{where}: message {index} (role '{role}') holds {marker!r}, with which the "
                    "chat template marks turns, so it could forge one; remove it, or set "
                    "data.special_tokens to 'allow'"
                )
        if self._pattern is None:
            return messages
        return [message | {"content": self._broken(message, where)} for message in messages]

    def _broken(self, message: dict[str, str], where: str) -> str:
        content = message["content"]
        if _BREAK in content:
            raise DataError(f"{where}: a message holds U+FDD0, which is no character; remove it")
        broken = self._pattern.sub(lambda m: m[0][0] + _BREAK + m[0][1:], content)
        # The end of one message and the beginning of what follows could make up a special token.
        end, start = broken.rstrip(), len(broken) - len(broken.lstrip())
        if end.endswith(self._starts):
            broken = end + _BREAK + broken[len(end) :]
        if broken.startswith(self._ends, start):
            broken = broken[:start] + _BREAK + broken[start:]
        if len(broken) > len(content) and self._pattern.search(broken):
            raise DataError(
                f"{where}: a message holds {self._pattern.search(broken)[0]!r}, a special token of "
                "one character, which cannot be told from the template's; remove it, or set "
                "data.special_tokens to 'allow'"
            )
        return broken

    def render(self, messages: Messages, where: str, *, generate: bool) -> str:
        """The text of guarded messages, for `encode`.

        Raises:
          DataError: the template cannot render them.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        # A template is a program of the model's author: it may raise anything.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            if getattr(self._tokenizer, "chat_template", None) is None:
                reason = "the tokenizer has none; use strings, or a tokenizer with a chat template"
            roles = ", ".join(message["role"] for message in messages[:8])
            roles += ", ..." if len(messages) > 8 else ""
            raise DataError(
                f"{where}: the chat template cannot render messages with roles {roles}: {reason}"
            ) from error

    def encode(self, texts: Sequence[str], *, behind_text: bool) -> list[list[int]]:
        """Token ids of rendered texts; only the template's own special tokens are special."""
        ids = encode_texts(self._tokenizer, texts, behind_text=behind_text, special=True)
        if self._pattern is None:
            return ids
        return [
            self._encode_broken(text, behind_text) if _BREAK in text else own
            for text, own in zip(texts, ids, strict=True)
        ]

    def _encode_broken(self, text: str, behind_text: bool) -> list[int]:
        """Cuts a text at the template's special tokens and encodes what lies between as text."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        own = [
            (start, end, self._special[text[start:end].strip()])
            for start, end in encoded.offset_mapping
            if text[start:end].strip() in self._special
        ]
        ids, done = [], 0
        for start, end, token in [*own, (len(text), len(text), None)]:
            between = text[done:start].replace(_BREAK, "")
            behind = not self._restarts if done else behind_text
            if between:
                ids += encode_texts(self._tokenizer, [between], behind_text=behind)[0]
            if token is not None:
                ids.append(token)
            done = end
        return ids

    @functools.cached_property
    def _restarts(self) -> bool:
        return restarts_behind_special(self._tokenizer)


class _Facts(NamedTuple):
    """What rendering a conversation of a few words shows.

    `dropped` are roles whose text is left out, `markers` what tells the turns apart, as far as it
    looks like a marker: `[INST]`, `<<SYS>>`, `<|user|>`, `### Response:`.
    """

    dropped: frozenset[str]
    markers: tuple[str, ...]


_MARKER = re.compile(r"\[/?\w+\]|<</?\w+>>|<\|[^<|>\s]+\|>|^#{2,} ?\w[^\n:]*:", re.MULTILINE)
_CHATML = _Facts(frozenset(), ("<|im_end|>", "<|im_start|>"))
# Templates that were looked at, by their hash: SmolLM2's and the tiny tokenizer's.
_KNOWN = {
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": _CHATML,
    "66edfb854931c933d3ac94f507626dd4fa2d5ca0a9b1036b11729d296a7392ac": _CHATML,
}

_SAID = {role: f"quartz {role} sonata" for role in ROLES} | {"again": "velvet second compass"}
# Conversations for the probe, each with whether a generation prompt follows.
_CONVERSATIONS = [
    (["user"], True),
    (["user", "assistant"], False),
    (["user", "assistant", "again"], True),
    (["system", "user"], True),
    (["developer", "user"], True),
    (["user", "assistant", "tool"], True),
]
_CPU_SECONDS, _WALL_SECONDS, _BYTES, _CHARACTERS = 2, 60, 2**31, 1_000_000
_CHILD = """
import json, math, resource, sys, time
from transformers.utils.chat_template_utils import render_jinja_template
task = json.load(sys.stdin)
seconds = math.ceil(time.process_time()) + task["seconds"]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (task["bytes"], task["bytes"]))
texts = []
for messages, generate in task["conversations"]:
    try:
        (text,), _ = render_jinja_template(
            [messages],
            chat_template=task["template"],
            add_generation_prompt=generate,
            **task["tokens"],
        )
    except MemoryError:
        sys.exit(3)
    except Exception:
        text = None
    if text is not None and len(text) > task["characters"]:
        sys.exit(3)
    texts.append(text)
json.dump(texts, sys.stdout)
"""


def _facts_of(tokenizer: Any) -> _Facts:
    if getattr(tokenizer, "chat_template", None) is None:
        return _Facts(frozenset(), ())
    template = tokenizer.get_chat_template()
    known = _KNOWN.get(hashlib.sha256(template.encode("utf-8", "replace")).hexdigest())
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return known or _probe(template, json.dumps(tokens, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _probe(template: str, tokens: str) -> _Facts:
    """Renders in a child process, since a template is a program that may not end.

    Raises:
      ModelError: it does not end, or writes without end.
    """
    conversations = []
    for names, generate in _CONVERSATIONS:
        roles = ["user" if name == "again" else name for name in names]
        said = [{"role": role, "content": _SAID[name]} for role, name in zip(roles, names)]
        conversations.append((said, generate))
    task = {
        "template": template,
        "tokens": json.loads(tokens),
        "conversations": conversations,
        "seconds": _CPU_SECONDS,
        "bytes": _BYTES,
        "characters": _CHARACTERS,
    }
    problem = None
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            env=os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
        )
        if child.returncode < 0:
            problem = f"does not end within {_CPU_SECONDS} seconds"
        elif child.returncode == 3:
            problem = f"writes more than {_CHARACTERS:,} characters, or runs out of memory,"
        elif child.returncode:
            reason = child.stderr.decode(errors="replace").strip().split("\n")[-1]
            problem = f"ends the process that renders it ({reason})"
    except subprocess.TimeoutExpired:
        problem = f"does not end within {_WALL_SECONDS} seconds"
    if problem:
        raise ModelError(
            f"the tokenizer's chat template {problem} for a conversation of a few words; use a "
            "tokenizer with another chat_template, or strings instead of messages"
        )
    texts = json.loads(child.stdout)
    dropped = {
        "user" if name == "again" else name
        for (names, _), text in zip(_CONVERSATIONS, texts)
        for name in names
        if text is not None and _SAID[name] not in text
    }
    markers = {marker for text in texts if text for marker in _MARKER.findall(text)}
    return _Facts(frozenset(dropped), tuple(sorted(markers)))
