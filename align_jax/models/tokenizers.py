"""Tokenizers from a model's directory or its GGUF file, and how text and tokens become each other.

`encode_texts` and `decode_completions` know that a text may continue another one. A SentencePiece
tokenizer (Llama 2, Mistral) puts a space before whatever it encodes and takes the first space from
whatever it decodes, which is right at the start of a sequence and wrong behind a prompt.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align_jax.errors import ModelError
from align_jax.files import irregular
from align_jax.models.gguf import GGUFFile
from align_jax.models.locate import locate, read_json
from align_jax.text import brief, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# For every tokenizer built here: models take no token types, and decoding tidies nothing.
_SETTINGS = {
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}

# What transformers reads beside tokenizer.json, JSON objects all of them.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Token types of GGUF.
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """The tokenizer, chat template included, of whatever `load_model` accepts.

    A tokenizer without a padding token pads with EOS; nothing here finds padding by its id.

    Raises:
      ModelError: no such model, no `tokenizer.json` in it, or a tokenizer this cannot build.
    """
    location = locate(path, weights=False)
    if location.kind == "tiny":
        return tiny_tokenizer()
    if location.kind == "gguf":
        tokenizer = _from_gguf(GGUFFile(location.path))
    else:
        tokenizer = _from_directory(location.path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of the special tokens, which control the model; `<think>` is often none of them.

    A tokenizer turns their text into them wherever it reads it, unless told not to.
    """
    added = {
        str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, behind_text: bool, special: bool = False
) -> list[list[int]]:
    """Token ids of each text, without a BOS.

    Args:
      behind_text: the texts continue a text, such as a prompt; otherwise each starts a sequence.
        Only tokenizers that treat the start of a sequence in another way make a difference.
      special: turns the text of a special token into that token; otherwise it is text like any
        other.
    """
    if not texts:
        return []
    if behind_text and _marks_start(tokenizer):
        return _encode_behind(tokenizer, texts, special)
    return _encode(tokenizer, list(texts), special)


def special_pattern(tokenizer: Any) -> re.Pattern:
    """Finds the texts of special tokens, the longest first; nothing where there are none."""
    texts = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or _NEVER)


def restart_pattern(tokenizer: Any) -> re.Pattern:
    """Finds the end of texts after which another is encoded as if it started a sequence."""
    if not restarts_behind_special(tokenizer):
        return re.compile(_NEVER)
    swallowing = _swallowing(tokenizer)
    ends = [re.escape(t) + r"\s*" * (t in swallowing) for t in special_tokens(tokenizer)]
    return re.compile(f"(?:{'|'.join(ends)})\\Z")


def swallow_pattern(tokenizer: Any) -> re.Pattern:
    """Finds the end of texts after which leading whitespace is a part of a special token."""
    ends = "|".join(map(re.escape, _swallowing(tokenizer)))
    return re.compile(rf"(?:{ends})\s*\Z" if ends else _NEVER)


def restarts_behind_special(tokenizer: Any) -> bool:
    """Whether the text after a special token is encoded as the start of a sequence is."""
    for token, id in special_tokens(tokenizer).items():
        if _encode(tokenizer, token, True) == [id]:
            return _encode(tokenizer, token + "a", True) == [id, *_encode(tokenizer, "a", False)]
    return False


def decode_completions(
    tokenizer: Any,
    completions: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int] | np.ndarray],
) -> list[str]:
    """The text of each completion behind its prompt, without special tokens.

    `encode_texts` with `behind_text` gives the same tokens back where the text has no other
    spelling.
    """
    if not _marks_start(tokenizer):
        return [_decode(tokenizer, tokens) for tokens in completions]
    restarting = restarts_behind_special(tokenizer) and set(special_tokens(tokenizer).values())
    before = _encode(tokenizer, _DECODED_ANCHOR, False)
    cut = len(_decode(tokenizer, before))
    texts = []
    for tokens, prompt in zip(completions, prompts, strict=True):
        starts = len(prompt) == 0 or (restarting and int(prompt[-1]) in restarting)
        text = _decode(tokenizer, tokens if starts else [*before, *tokens])
        texts.append(text if starts else text[cut:])
    return texts


def check_vocabulary(tokenizer: Any, config: Any, where: Any) -> None:
    """Refuses a tokenizer whose ids the model of `config` has no embedding for.

    A model may have more tokens than its tokenizer: vocabularies are often padded.

    Args:
      where: the model, for the message.

    Raises:
      ModelError: which tokens are beyond `config.vocab_size`, and what to do.
    """
    size = config.vocab_size
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= size)
    if beyond:
        named = ", ".join(f"{token!r} ({id})" for id, token in beyond[:3])
        named += f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise ModelError(
            f"{where}: the tokenizer has ids up to {beyond[-1][0]}, and the model's vocab_size is "
            f"{size}: it has no embedding for {named}. Take the model's own tokenizer, or remove "
            "the tokens that were added to it."
        )


_NEVER = r"(?!)"

# Texts that another one can be put behind: the first that a tokenizer keeps as it is.
_ANCHORS = ("\n", ".", "a")
# Decoded before a completion: a letter, since a byte before others could be read as one of them.
_DECODED_ANCHOR = "a"


def _encode(tokenizer: Any, text: str | list[str], special: bool) -> Any:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids


def _encode_behind(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """What encoding an anchor and each text adds to encoding the anchor alone."""
    found: dict[str, list[int]] = {}
    for anchor in _ANCHORS:
        head = _encode(tokenizer, anchor, False)
        left = [text for text in texts if text not in found]
        joined = _encode(tokenizer, [anchor + text for text in left], special) if left else []
        for text, ids in zip(left, joined, strict=True):
            # Some tokens of the text may merge with the anchor; then the next one is tried.
            if ids[: len(head)] == head:
                found[text] = ids[len(head) :]
    return [found[t] if t in found else _encode(tokenizer, t, special) for t in texts]


def _marks_start(tokenizer: Any) -> bool:
    """Whether a text's first token is another one where the text starts a sequence."""
    probes = ["a", "1"]
    return _encode(tokenizer, probes, False) != _encode_behind(tokenizer, probes, False)


def _swallowing(tokenizer: Any) -> set[str]:
    """Special tokens that take the whitespace after them, such as Phi-3's."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special and token.rstrip}


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


def _from_directory(folder: pathlib.Path) -> "PreTrainedTokenizerFast":
    if not os.path.lexists(folder / "tokenizer.json"):
        raise ModelError(
            f"{folder} has no tokenizer.json. Other formats (tokenizer.model, vocab.json) must be "
            "converted first: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    described = read_json(folder / "tokenizer.json")
    if not isinstance(described.get("model"), dict):
        raise ModelError(f"{folder / 'tokenizer.json'} holds no tokenizer: it has no 'model'.")
    for name in _BESIDE:
        if os.path.lexists(folder / name):
            read_json(folder / name)
    if what := irregular(folder / "chat_template.jinja"):
        raise ModelError(f"{folder / 'chat_template.jinja'} {what}; expected a regular file.")
    try:
        # This class and no other: the file says what the tokenizer is, and no repository code runs.
        return _fast_tokenizer_class().from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"{folder}: the tokenizer of tokenizer.json and what is beside it cannot be read: "
            f"{one_line(str(error))}"
        ) from error


def _from_gguf(file: GGUFFile) -> "PreTrainedTokenizerFast":
    """Byte-level BPE from the vocabulary and merges that llama.cpp keeps in the metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    data = file.metadata
    model, pre = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise ModelError(
            f"{file.path}: its tokenizer (model {model!r}, pre-tokenizer {pre!r}) is not "
            "supported, only 'gpt2' with 'smollm' is; use the model's Hugging Face directory."
        )
    try:
        tokens, types = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        if len(types) != len(tokens):
            raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"{file.path}: the tokenizer in its metadata is damaged: {one_line(repr(error))}"
        ) from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = data.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise ModelError(
                    f"{file.path}: the tokenizer in its metadata is damaged: its {theirs} token is "
                    f"number {brief(index)} of {len(tokens)}."
                )
            special[f"{ours}_token"] = tokens[index]
    return _fast_tokenizer_class()(
        tokenizer_object=tokenizer,
        chat_template=data.get("tokenizer.chat_template"),
        **_SETTINGS,
        **special,
    )


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """256 bytes and 8 special tokens, 264 in all, with a ChatML template; needs no files.

    Like SmolLM2's it pads with EOS, so what works with it does not confuse the two.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|reserved_{i}|>" for i in range(5)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return _fast_tokenizer_class()(
        tokenizer_object=tokenizer,
        chat_template=CHATML,
        **_SETTINGS,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def _fast_tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    # Without torch transformers says on import that it has no models; they are not wanted from it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast
