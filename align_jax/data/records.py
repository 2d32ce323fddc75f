"""The record formats on disk: validation and one normal form, before any compute is spent.

A record is a dict of JSON values. Text is a string, or a list of `{"role", "content"}` messages.
A record that cannot be used raises `DataError` naming the file, the line and the field.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

from align_jax.errors import DataError
from align_jax.text import brief

ROLES = ("system", "developer", "user", "assistant", "tool")
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# Fields of each kind; a tuple of alternatives where a kind has several forms.
REQUIRED = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "preference": (("chosen", "rejected"),),
    "ranked": (("prompt", "completions", "ranks"), ("prompt", "completions", "best")),
    "labelled": (("prompt", "completion", "label"),),
    "prompt": (("prompt",),),
}
OPTIONAL = {
    "preference": ("prompt", "margin", "strength"),
    "prompt": ("answer", "safety"),
}
KINDS = tuple(REQUIRED)

# What other tools call our fields and roles: difflib alone would not find them.
_FIELD_SYNONYMS = {
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
    "output": "completion",
    "response": "completion",
    "answer": "completion",
    "conversations": "messages",
    "conversation": "messages",
    "dialogue": "messages",
    "accepted": "chosen",
    "preferred": "chosen",
    "dispreferred": "rejected",
    "responses": "completions",
    "replies": "completions",
    "rankings": "ranks",
}
_ROLE_SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
}

# What to do about records that are well formed and teach nothing.
_LEAVE_OUT = "remove the record, or set config.data.invalid=drop, which leaves such records out"

Record = dict[str, Any]
Messages = list[dict[str, str]]


def parse_record(raw: Any, *, kind: str, where: str) -> Record:
    """Validates one raw record and returns its normal form.

    Kinds: `sft` (`text` | `messages` | `prompt` + `completion`), `preference` (`chosen` +
    `rejected`, with `prompt` or whole dialogues, + `margin`, + `strength`), `ranked` (`prompt` +
    `completions`, + `ranks`, 0 is best, or `best`, the best one's place from 0), `labelled`
    (`prompt` + `completion` + `label`), `prompt` (+ `answer`, a string or a number, + `safety`, a
    boolean: what rewards look at).
    In the normal form a preference always has its `prompt`, a ranking its `ranks`, a response to a
    message prompt is a list of one assistant message, fields the kind does not use are gone, and
    `where` is kept for later messages.

    Raises DataError naming `where`, the field, what was found and what was expected.
    """
    if kind not in REQUIRED:
        raise DataError(f"unknown kind of record {kind!r}: expected one of {', '.join(KINDS)}")
    if not isinstance(raw, dict):
        raise DataError(f"{where}: found {_show(raw)}, expected an object with named fields")
    for name in raw:
        if not isinstance(name, str):
            raise DataError(f"{where}: found {_show(name)} as a field's name, expected a string")
    # Columnar files write a field that is absent in one row as null.
    fields = {name: value for name, value in raw.items() if value is not None}
    form = _find_form(fields, kind, where)
    _reject_misspelt(fields, kind, form, where)
    record = _PARSERS[kind](fields, where)
    return {**record, "where": where}


def split_dialogue(text: str, field: str, where: str) -> tuple[str, str]:
    """Splits a whole Anthropic dialogue at its last `\\n\\nAssistant:`.

    The prompt ends with the marker. Raises DataError if the text holds no marker.
    """
    cut = text.rfind(ASSISTANT)
    if cut < 0:
        raise DataError(
            f"{where}: the record has no 'prompt', and field '{field}' holds no {ASSISTANT!r} to "
            f"split at: found {_show(text)}; expected a 'prompt' field, or a whole "
            r"'\n\nHuman: ... \n\nAssistant: ...' dialogue"
        )
    cut += len(ASSISTANT)
    return text[:cut], text[cut:]


def _show(value: Any) -> str:
    return f"{type(value).__name__} {brief(value)}"


def _wrong(where: str, field: str, found: Any, expected: str) -> DataError:
    return DataError(f"{where}: field '{field}': found {_show(found)}, expected {expected}")


def _find_form(fields: Record, kind: str, where: str) -> tuple[str, ...]:
    forms = REQUIRED[kind]
    present = [form for form in forms if all(name in fields for name in form)]
    if len(present) == 1:
        return present[0]
    if present:
        names = " and ".join(" + ".join(repr(name) for name in form) for form in present)
        raise DataError(f"{where}: the record has {names}: keep the one that is to be trained on")
    # Report against the form the record comes nearest to.
    nearest = max(forms, key=lambda form: sum(name in fields for name in form))
    begun = any(name in fields for name in nearest)
    missing = [name for name in nearest if name not in fields]
    wanted = missing if begun or len(forms) == 1 else [name for form in forms for name in form]
    hints = [
        f"did you mean {brief(wrong)} as '{name}'?" for wrong, name in _near(fields, wanted, 0.6)
    ]
    if not hints:
        hints = [
            f"it looks like a record of kind '{other}'"
            for other, forms_ in REQUIRED.items()
            if other != kind and any(all(name in fields for name in form) for form in forms_)
        ][:1]
    if begun or len(forms) == 1:
        names = " and ".join(f"'{name}'" for name in missing)
        what = f"fields {names} are missing" if len(missing) > 1 else f"field {names} is missing"
    else:
        what = "none of " + " | ".join(" + ".join(form) for form in forms) + " is there"
    raise DataError(
        "; ".join([f"{where}: {what} (kind '{kind}'; the record has {_names(fields)})", *hints])
    )


def _reject_misspelt(fields: Record, kind: str, form: tuple[str, ...], where: str) -> None:
    """A misspelt optional field would otherwise be ignored in silence."""
    absent = [name for name in OPTIONAL.get(kind, ()) if name not in fields]
    known = {*form, *OPTIONAL.get(kind, ())}
    unknown = [name for name in fields if name not in known]
    for wrong, name in _near(unknown, absent, 0.85, synonyms=False):
        raise DataError(f"{where}: unknown field {brief(wrong)}; did you mean '{name}'?")


def _near(
    found: Any, wanted: Any, cutoff: float, *, synonyms: bool = True
) -> list[tuple[str, str]]:
    pairs = []
    for name in wanted:
        near = [wrong for wrong in found if synonyms and _FIELD_SYNONYMS.get(wrong) == name]
        near = near or difflib.get_close_matches(name, list(found), n=1, cutoff=cutoff)
        pairs += [(wrong, name) for wrong in near[:1]]
    return pairs


def _names(fields: Record) -> str:
    names = [brief(name) for name in fields]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return shown or "no fields"


def _text(value: Any, field: str, where: str, *, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise _wrong(where, field, value, expected)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{field}': character {error.start + 1} is "
            f"{ascii(value[error.start])[1:-1]}, half of a surrogate pair, which no tokenizer "
            "reads; expected Unicode text: write the whole character, or leave it out"
        ) from error
    return value


def _messages(value: Any, field: str, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise _wrong(where, field, value, "a list of {role, content} messages, not empty")
    messages = []
    for index, message in enumerate(value):
        at = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise _wrong(where, at, message, "an object with 'role' and 'content'")
        for name, foreign in (("role", ("from",)), ("content", ("value", "text"))):
            if message.get(name) is None:
                used = next((other for other in foreign if other in message), None)
                hint = f"; did you mean '{used}' as '{name}'?" if used else ""
                raise DataError(
                    f"{where}: field '{at}': '{name}' is missing (the message has "
                    f"{_names(message)}){hint}"
                )
        role = message["role"]
        if role not in ROLES:
            called = role.lower() if isinstance(role, str) else ""
            near = _ROLE_SYNONYMS.get(called) or next(
                iter(difflib.get_close_matches(called, ROLES, n=1)), None
            )
            hint = f"; did you mean '{near}'?" if near else ""
            raise _wrong(where, f"{at}.role", role, "one of " + ", ".join(ROLES) + hint)
        if message.get("tool_calls"):
            raise DataError(
                f"{where}: field '{at}': 'tool_calls' are not rendered, so what the message says "
                "would be lost; write the call into 'content'"
            )
        content = _text(message["content"], f"{at}.content", where)
        messages.append({"role": role, "content": content})
    return messages


def _text_or_messages(value: Any, field: str, where: str) -> str | Messages:
    if isinstance(value, list):
        return _messages(value, field, where)
    return _text(value, field, where, expected="a string or a list of {role, content} messages")


def _prompt(value: Any, where: str) -> str | Messages:
    prompt = _text_or_messages(value, "prompt", where)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: field 'prompt': its last message has role 'assistant'; expected 'user': "
            "the answer belongs in the response"
        )
    return prompt


def _response(value: Any, prompt: str | Messages, field: str, where: str) -> str | Messages:
    """A response in the style of its prompt: a string, or a list of one assistant message."""
    response = _text_or_messages(value, field, where)
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise _wrong(
                where, field, value, "a string, since 'prompt' is one (or make both messages)"
            )
        return response
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    if len(response) > len(prompt) and response[: len(prompt)] == prompt:
        response = response[len(prompt) :]
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise _wrong(where, field, value, "one message with role 'assistant'")
    return response


def _parse_sft(fields: Record, where: str) -> Record:
    if "messages" in fields:
        return {"messages": _conversation(fields["messages"], where)}
    if "text" in fields:
        text = _text(fields["text"], "text", where)
        if not text.strip():
            raise _wrong(where, "text", text, "text to learn from")
        return {"text": text}
    prompt = _prompt(fields["prompt"], where)
    return {
        "prompt": prompt,
        "completion": _response(fields["completion"], prompt, "completion", where),
    }


def _conversation(value: Any, where: str) -> Messages:
    messages = _messages(value, "messages", where)
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" or roles[-1] != "assistant":
        raise DataError(
            f"{where}: field 'messages': the roles are {', '.join(roles)}; expected the first from "
            "the user or the system and the last from the assistant"
        )
    return messages


def _parse_preference(fields: Record, where: str) -> Record:
    chosen, rejected = (_text_or_messages(fields[n], n, where) for n in ("chosen", "rejected"))
    prompt = _prompt(fields["prompt"], where) if "prompt" in fields else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _wrong(where, "rejected", fields["rejected"], "the same type as 'chosen'")
    if isinstance(prompt, str) and not isinstance(chosen, str):
        # The field also ships prompt as a string beside two whole conversations that begin with it.
        if not all(prompt in [m["content"] for m in side[:-1]] for side in (chosen, rejected)):
            raise _wrong(
                where, "chosen", chosen, "a string, since 'prompt' is one (or make all messages)"
            )
        prompt = None
    if prompt is not None:
        record = {
            "prompt": prompt,
            "chosen": _response(chosen, prompt, "chosen", where),
            "rejected": _response(rejected, prompt, "rejected", where),
        }
    elif isinstance(chosen, str):
        record = _split_pair(
            split_dialogue(chosen, "chosen", where),
            split_dialogue(rejected, "rejected", where),
            where,
        )
    else:
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if len(side) < 2 or side[-1]["role"] != "assistant":
                raise DataError(
                    f"{where}: the record has no 'prompt' list, and field '{name}' is no whole "
                    f"conversation (roles: {', '.join(m['role'] for m in side)}); expected at "
                    "least one message and then the assistant's"
                )
        record = _split_pair((chosen[:-1], chosen[-1:]), (rejected[:-1], rejected[-1:]), where)
        _prompt(record["prompt"], where)
    if record["chosen"] == record["rejected"]:
        raise DataError(
            f"{where}: fields 'chosen' and 'rejected' are the same, {brief(record['chosen'])}, so "
            f"neither is preferred; {_LEAVE_OUT}"
        )
    if "margin" in fields:
        record["margin"] = _number(fields["margin"], "margin", where)
    if "strength" in fields:
        strength = fields["strength"]
        read = _text if isinstance(strength, str) else _number
        record["strength"] = read(strength, "strength", where)
    return record


def _split_pair(chosen: tuple, rejected: tuple, where: str) -> Record:
    if chosen[0] != rejected[0]:
        a, b = chosen[0], rejected[0]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        same = min(len(a), len(b)) if same is None else same
        unit = "character" if isinstance(a, str) else "message"
        raise DataError(
            f"{where}: fields 'chosen' and 'rejected' answer different prompts: up to the last "
            f"assistant turn they are {len(a)} and {len(b)} {unit}s long and differ from {unit} "
            f"{same} on ({_show(a[same : same + 40])} against {_show(b[same : same + 40])}); "
            "expected one prompt"
        )
    return {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}


def _number(value: Any, field: str, where: str) -> float:
    try:
        if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond every float
        pass
    raise _wrong(where, field, value, "a finite number")


def _parse_ranked(fields: Record, where: str) -> Record:
    prompt = _prompt(fields["prompt"], where)
    completions = fields["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise _wrong(where, "completions", completions, "a list of two or more completions")
    completions = [
        _response(one, prompt, f"completions[{index}]", where)
        for index, one in enumerate(completions)
    ]
    if "best" in fields:
        best = fields["best"]
        if type(best) is not int or not 0 <= best < len(completions):
            raise _wrong(where, "best", best, f"the place of the best, 0 to {len(completions) - 1}")
        ranks = [int(place != best) for place in range(len(completions))]
        return {"prompt": prompt, "completions": completions, "ranks": ranks}
    ranks = fields["ranks"]
    if not isinstance(ranks, list) or not all(
        type(rank) is int and 0 <= rank < 2**31 for rank in ranks
    ):
        raise _wrong(where, "ranks", ranks, "a list of integers from 0, which is the best")
    if len(ranks) != len(completions):
        raise _wrong(where, "ranks", ranks, f"{len(completions)} ranks, one for each completion")
    if len(set(ranks)) == 1:
        raise DataError(
            f"{where}: field 'ranks': they are all the same, {brief(ranks)}, so no completion is "
            f"better than another; {_LEAVE_OUT}"
        )
    return {"prompt": prompt, "completions": completions, "ranks": list(ranks)}


def _parse_labelled(fields: Record, where: str) -> Record:
    prompt = _prompt(fields["prompt"], where)
    if not isinstance(fields["label"], bool):
        raise _wrong(where, "label", fields["label"], "true or false")
    completion = _response(fields["completion"], prompt, "completion", where)
    return {"prompt": prompt, "completion": completion, "label": fields["label"]}


def _parse_prompt(fields: Record, where: str) -> Record:
    prompt = _prompt(fields["prompt"], where)
    if isinstance(prompt, str) and not prompt.strip():
        raise _wrong(where, "prompt", prompt, "text to continue")
    record = {"prompt": prompt}
    if "answer" in fields:
        answer = fields["answer"]
        if not isinstance(answer, str | int | float) or isinstance(answer, bool):
            raise _wrong(where, "answer", answer, "a string or a number")
        read = _text if isinstance(answer, str) else _number
        read(answer, "answer", where)
        record["answer"] = answer  # as it is: a whole number stays one, and 0.1 is not rounded
    if "safety" in fields:
        if not isinstance(fields["safety"], bool):
            raise _wrong(where, "safety", fields["safety"], "true or false")
        record["safety"] = fields["safety"]
    return record


_PARSERS = {
    "sft": _parse_sft,
    "preference": _parse_preference,
    "ranked": _parse_ranked,
    "labelled": _parse_labelled,
    "prompt": _parse_prompt,
}
