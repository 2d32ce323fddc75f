"""Tokenizers from a model's directory or its GGUF file, and the tiny one of the tests."""

import os
import pathlib
from typing import TYPE_CHECKING

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
