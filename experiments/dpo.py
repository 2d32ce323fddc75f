"""DPO on preference pairs (Rafailov et al. 2023, arXiv:2305.18290).

Run it with

    launch/local.sh experiments/dpo.py
    launch/local.sh experiments/dpo.py --config.data.source=pairs.jsonl --config.beta=0.05

`scale=tiny` takes 12 s on 2 cores, compilation included; the tests check that it learns.
`scale=small`, the default, trains SmolLM2 on built-in data (128 pairs, 16 steps): 10 minutes on 2
cores shared with others, 2.5 of them computing. From 0.693 the loss falls to 0.23 (the last four
steps' mean), with all pairs of every batch in the right order from the second step on and a margin
of 1.5; so few steps leave what the model writes greedily nearly as it was. `scale=paper` follows
the paper as the comments in it say; it has not been run.

`--config.loss=` names any loss of docs/preference.md, `--config.loss_options.NAME=` sets an option
of it. Losses on averages per token want a larger beta: SimPO 2, with `loss_options.gamma` 1;
length-normalised DPO 5. `kto` and `bco_unpaired` take labelled records.
"""

from ml_collections import ConfigDict

from align_jax.algorithms import preference
from align_jax.config import parse_scale
from align_jax.data.dataset import Data
from align_jax.training.optimizer import Optimizer


def get_config(arg: str = "scale=small") -> ConfigDict:
    scale = parse_scale(arg)
    config = preference.Config(
        loss="dpo",
        beta=0.1,
        optimizer=Optimizer(learning_rate=5e-6, schedule="linear"),
        data=Data(source="builtin:tiny_chat_preferences", batch_size=8, rows=2, max_length=256),
    ).to_config_dict()
    if scale == "tiny":
        config.model = "tiny"
        config.optimizer.learning_rate = 1e-3
        config.data.update(source="builtin:tiny_preferences", rows=0)
    elif scale == "paper":
        # Section 6.2 and appendix B: Anthropic's dialogues, batch 64, 150 steps of warm-up,
        # constant.
        config.model = "meta-llama/Llama-2-7b-hf"
        config.compute_dtype = "bfloat16"
        config.optimizer.update(learning_rate=1e-6, schedule="constant", warmup_steps=150)
        config.data.update(
            source="hf:Anthropic/hh-rlhf#train",
            eval_source="hf:Anthropic/hh-rlhf#test",
            invalid="drop",
            overlong="truncate",
            batch_size=64,
            rows=0,
            max_length=512,
        )
    return config
