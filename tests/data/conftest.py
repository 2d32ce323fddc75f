"""A small byte-level tokenizer with a ChatML template, as the real one but for the vocabulary."""

import gzip
import json

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, template=CHATML, adds_bos=False):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One merge, so that text tokenised in one piece differs from the same text in two.
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ab"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<s>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if adds_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    # As SmolLM2 has it: the padding token is the EOS token.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if adds_bos else "<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records, and lines given as text, to a file of JSON lines; returns its path."""

    def write(records, name="data.jsonl"):
        lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
        data = ("\n".join(lines) + "\n" if lines else "").encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write
