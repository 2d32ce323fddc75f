"""What tests of policy-gradient runs share beside the fixture `new_trainer`."""

import json

import jax
import jax.numpy as jnp


def digits(records, completions):
    """The share of digits in the first eight characters: the tiny model writes 1 in 26."""
    return [sum(c in "0123456789" for c in text[:8]) / 8 for text in completions]


METHODS = {
    "ppo": {"minibatches": 2, "epochs": 2},
    "ppo, shared trunk": {"critic": "shared"},
    "reinforce": {"loss": "reinforce", "advantage": "moving_baseline", "critic": "none"},
    "rloo": {"loss": "reinforce", "advantage": "rloo", "critic": "none", "sampling.samples": 2},
    "grpo": {"advantage": "grpo", "critic": "none", "sampling.samples": 2, "kl.placement": "loss"},
    "online dpo": {"loss": "dpo", "critic": "none", "sampling.samples": 2},
}


def samples_of(directory):
    files = sorted((directory / "samples").glob("iteration_*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def other_model(base, scale=0.5):
    """A policy that is not its reference."""
    keys = iter(jax.random.split(jax.random.key(5), 200))
    return jax.tree.map(
        lambda x: x + scale * x.std() * jax.random.normal(next(keys), x.shape), base
    )


@jax.jit
def all_log_probs(model, tokens):
    return jax.nn.log_softmax(model.logits(model(tokens)))


def log_probs_by_hand(model, sample, tokenizer):
    """Log-probability of a saved sample from logits over the whole vocabulary, nats."""
    prompt = tokenizer(sample["prompt"], add_special_tokens=False).input_ids
    text = prompt + sample["tokens"]
    # What stands to the right of a text cannot change it: one length, one compilation.
    log_p = all_log_probs(model, jnp.asarray([text + [0] * (128 - len(text))]))[0]
    return sum(float(log_p[len(prompt) + t - 1, token]) for t, token in enumerate(sample["tokens"]))
