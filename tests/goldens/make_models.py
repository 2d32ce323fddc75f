"""Makes the tiny checkpoints beside it, and the logits transformers' torch models give for them.

    python tests/goldens/make_models.py     (needs torch and transformers; the package no torch)

`versions.json` says with what it was last run. Every checkpoint is written by transformers itself,
`llama_untied` in several files. Parameters are random everywhere, norms and biases too, and large
enough for attention to be sharp.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
LENGTHS = (1, 7, 40, 150)
PADDED_LENGTHS = (3, 24, 11)

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def configs() -> dict[str, transformers.PreTrainedConfig]:
    llama, mistral, gpt2 = (
        transformers.LlamaConfig,
        transformers.MistralConfig,
        transformers.GPT2Config,
    )
    return {
        "llama_tiny": llama(**LLAMA),
        "llama3_rope": llama(**LLAMA, rope_parameters=LLAMA3_ROPE),
        "llama_untied": llama(
            **{**LLAMA, "tie_word_embeddings": False},
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
        "mistral_tiny": mistral(**LLAMA, sliding_window=16),
        "gpt2_tiny": gpt2(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    }


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if norm else 0.2 * noise


@torch.no_grad()
def reference(model, generator: torch.Generator) -> dict[str, np.ndarray]:
    arrays = {}
    for length in LENGTHS:
        tokens = torch.randint(0, 96, (1, length), generator=generator)
        arrays[f"tokens_{length}"] = tokens.numpy().astype(np.int32)
        arrays[f"logits_{length}"] = model(tokens).logits.numpy()
    longest = max(PADDED_LENGTHS)
    tokens = torch.randint(0, 96, (len(PADDED_LENGTHS), longest), generator=generator)
    mask = torch.tensor([[int(i >= longest - n) for i in range(longest)] for n in PADDED_LENGTHS])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    arrays["tokens_padded"] = tokens.numpy().astype(np.int32)
    arrays["mask_padded"] = mask.numpy().astype(np.int32)
    arrays["logits_padded"] = (logits * mask[..., None]).numpy()
    return arrays


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for name, config in configs().items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        randomize(model, generator)
        size = "24KB" if name == "llama_untied" else "1GB"
        model.save_pretrained(folder, max_shard_size=size)
        np.savez_compressed(folder / "logits.npz", **reference(model, generator))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
