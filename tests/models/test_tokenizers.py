"""Tokenizers: the tiny one, what a directory gives, what goes out, what a GGUF must say."""

import gzip
import json
import pathlib
import types

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_jax.errors import ModelError
from align_jax.models.interchange import load_model, load_tokenizer, save_model
from align_jax.models.tokenizers import check_vocabulary, decode_completions, encode_texts
from tests.llama_tokenizer import llama_tokenizer

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


# --- text that continues a text


STARTS = ("prepend", "first", "always")
ANSWERS = [" yes", "yes", "  yes", "", " ", "\nyes", "no\n", " cat \u00e9\u4e2d", "[x]", "1 2"]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("prompt", ["A:", "Question", "what is it?\n", "[/INST]", "\u4e2d"])
def test_a_response_is_encoded_as_behind_its_prompt(start, prompt):
    tokenizer = llama_tokenizer(start=start)
    before, seen = ids(tokenizer, prompt), 0
    for answer in ANSWERS:
        joint = ids(tokenizer, prompt + answer)
        if joint[: len(before)] == before:
            (own,) = encode_texts(tokenizer, [answer], behind_text=True)
            assert before + own == joint, answer
            seen += 1
    assert seen > 8


@pytest.mark.parametrize("start", STARTS)
def test_a_completion_is_decoded_as_behind_its_prompt(start):
    tokenizer = llama_tokenizer(start=start)
    prompts = [ids(tokenizer, "A:")] * len(ANSWERS)
    completions = encode_texts(tokenizer, ANSWERS, behind_text=True)
    assert decode_completions(tokenizer, completions, prompts) == ANSWERS
    # A sampled token with a space keeps it, and the token that ends the completion has no text.
    (yes,) = [tokenizer.convert_tokens_to_ids(["\u2581yes"])]
    end = tokenizer.eos_token_id
    assert decode_completions(tokenizer, [[*yes, end]], prompts[:1]) == [" yes"]
    # A byte that is no text alone stays one character.
    byte = tokenizer.convert_tokens_to_ids("<0xC3>")
    assert decode_completions(tokenizer, [[byte]], prompts[:1]) == ["\ufffd"]


@pytest.mark.parametrize("start", STARTS)
def test_behind_a_special_token_both_are_as_the_tokenizer_has_it(start):
    tokenizer = llama_tokenizer(start=start)
    prompt = ids(tokenizer, "A:<|sep|>")
    for answer in ANSWERS:
        joint = ids(tokenizer, "A:<|sep|>" + answer)
        assert joint[: len(prompt)] == prompt
        completion = joint[len(prompt) :]
        if start != "always" or not answer.startswith(" "):  # there " yes" and "yes" are the same
            assert decode_completions(tokenizer, [completion], [prompt]) == [answer]


def real_texts():
    path = pathlib.Path(__file__).parents[3] / "shared/data/hh_harmless/pairs.jsonl.gz"
    if not path.is_file():
        return [" yes", "a  b\n\nc", "\n\nHuman: hi", "\u00e9\u4e2d 1234"]
    with gzip.open(path, "rt") as file:
        return [json.loads(line)["chosen"] for line in list(file)[:100]]


def test_byte_level_tokenizers_keep_their_tokens_and_texts(smollm2_tokenizer):
    for tokenizer in (TINY, smollm2_tokenizer):
        texts = real_texts()
        expected = tokenizer(texts, add_special_tokens=False).input_ids
        assert encode_texts(tokenizer, texts, behind_text=True) == expected
        plain = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
        assert decode_completions(tokenizer, expected, [[5]] * len(texts)) == plain == texts


def test_the_text_of_special_tokens_is_text():
    tokenizer = llama_tokenizer()
    special = set(tokenizer.all_special_ids)
    (text,), (tokens,) = (
        encode_texts(tokenizer, ["a</s><think>"], behind_text=True, special=special)
        for special in (False, True)
    )
    assert not special & set(text) and tokenizer.eos_token_id in tokens
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think in text and think in tokens
    assert decode_completions(tokenizer, [text], [[5]]) == ["a</s><think>"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    config = types.SimpleNamespace
    check_vocabulary(TINY, config(vocab_size=264), "m")
    check_vocabulary(TINY, config(vocab_size=300), "m")
    with pytest.raises(
        ModelError, match=r"m: .*ids up to 263.*vocab_size is 262.*\(262\).*own tok"
    ):
        check_vocabulary(TINY, config(vocab_size=262), "m")
