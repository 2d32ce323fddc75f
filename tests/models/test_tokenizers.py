"""Tokenizers: the tiny one, what a directory gives, what goes out, what a GGUF must say."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_jax.errors import ModelError
from align_jax.models.interchange import load_model, load_tokenizer, save_model

TINY = load_tokenizer("tiny")
CHAT = [{"role": "user", "content": "Hi"}]


@given(st.text())
def test_tiny_tokenizer_encodes_every_text_by_its_bytes(text):
    for word in TINY.all_special_tokens:
        text = text.replace(word, "")
    ids = TINY(text).input_ids
    assert len(ids) == len(text.encode("utf-8", "surrogatepass"))
    assert TINY.decode(ids) == text


def test_tiny_tokenizer_fits_the_tiny_models():
    assert len(TINY) == 264 == load_model("tiny").config.vocab_size
    assert len(load_tokenizer("tiny:gpt2")) == load_model("tiny:gpt2").config.vocab_size
    assert (TINY.bos_token_id, TINY.eos_token_id, TINY.pad_token_id) == (1, 2, 2)
    assert len(set(TINY.convert_ids_to_tokens(range(264)))) == 264


def test_tiny_chat_template():
    text = TINY.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = TINY(text, add_special_tokens=False).input_ids
    assert ids[0] == 1 and ids.count(2) == 1


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    save_model(load_model("tiny"), TINY, tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.get_vocab() == TINY.get_vocab()
    assert again.chat_template == TINY.chat_template
    assert again.special_tokens_map == TINY.special_tokens_map
    text = "<|im_start|>Zwölf Boxkämpfer.<|im_end|>"
    assert again(text).input_ids == TINY(text).input_ids


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tmp_path):
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = None
    save_model(load_model("tiny"), tokenizer, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").pad_token == "<|im_end|>"


def write_gguf(path, *, pre="smollm", types=(3, 3, 4, 1, 1, 1), merges=("a b",)):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", "<tool>", "a", "b", "ab"])
    writer.add_token_types(list(types))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_tokenizer_follows_its_metadata(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf"))
    assert tokenizer("<s>abba<tool></s>").input_ids == [0, 5, 4, 3, 2, 1]
    # Control tokens are special, user-defined ones are text of their own.
    assert tokenizer.decode([0, 5, 2, 1], skip_special_tokens=True) == "ab<tool>"
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.unk_token is None and tokenizer.chat_template is None


def test_gguf_tokenizers_that_are_not_known_are_refused(tmp_path):
    with pytest.raises(ModelError, match="pre-tokenizer 'llama-bpe'"):
        load_tokenizer(write_gguf(tmp_path / "x.gguf", pre="llama-bpe"))
    with pytest.raises(ModelError, match="damaged"):
        load_tokenizer(write_gguf(tmp_path / "y.gguf", merges=["a q"]))
