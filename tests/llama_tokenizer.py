"""Small tokenizers with the normaliser and decoder of Llama 2's, or those of its successors."""

import functools
import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + m['content'] }}"
    "{{ '\n<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|sep|>")


@functools.cache
def _vocabulary():
    texts = ["Question: what is it? Answer: yes or no, a cat sat on the mat."] * 20
    texts += ["yes no yes no hi [INST] and [/INST] so"] * 10
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    octets = [f"<0x{i:02X}>" for i in range(256)]
    special = [*SPECIAL[:3], *octets]
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def llama_tokenizer(*, start="prepend", template=TEMPLATE):
    """Llama 2's with `start` "prepend"; "first" and "always" are the newer Metaspace schemes."""
    vocabulary, merges = _vocabulary()
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if start == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=start, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
