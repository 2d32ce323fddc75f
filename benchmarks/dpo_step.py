"""One DPO step, ours and TRL's, side by side on the same pairs: real tokens/s and peak memory.

    python benchmarks/dpo_step.py --pairs=PAIRS.jsonl.gz --peer_python=PEER_VENV/bin/python

PAIRS holds `chosen` and `rejected` dialogues (Anthropic's HH format); the peer's environment needs
torch, transformers and trl. Both sides get the same token ids, cut to --max_length, in batches of
--batch_size, float32, AdamW, no gradient checkpointing for TRL, reference log-probabilities
precomputed. Each side is a process of its own that waits while the other one works; they take
turns batch by batch, so that a noisy machine disturbs both alike. Real tokens: both sequences of a
pair, prompt counted twice, padding not at all, the same number for both sides.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What launch/local.sh sets; the peer gets it too.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs")
    parser.add_argument("--peer_python")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        step = {"ours": _ours, "trl": _trl}[arguments.worker](Path(arguments.inputs))
        _serve(step)
    elif arguments.pairs and arguments.peer_python:
        _compare(arguments)
    else:
        parser.error("--pairs and --peer_python are needed")


def _compare(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        batches = _prepare(arguments, Path(folder))
        pythons = {"ours": sys.executable, "trl": arguments.peer_python}
        workers = {
            name: subprocess.Popen(
                [python, __file__, f"--worker={name}", f"--inputs={folder}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ALLOCATOR,
            )
            for name, python in pythons.items()
        }
        ask = lambda name, message: _ask(workers[name], message)  # noqa: E731
        for name in workers:
            print(f"{name}: ready after {ask(name, 'ready')['seconds']:.0f} s", flush=True)
        # Ours compiles once per shape, so every batch warms it up; torch is warm after two.
        for index in range(len(batches)):
            ask("ours", str(index))
        for index in range(2):
            ask("trl", str(index))
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for index, batch in enumerate(batches):
            for name in workers:
                seconds[name].append(ask(name, str(index))["seconds"])
            tokens = _real_tokens(batch)
            line = "  ".join(f"{name} {tokens / seconds[name][-1]:6.1f} tok/s" for name in workers)
            print(f"batch {index:2d}  {tokens:5d} real tokens  {line}", flush=True)
        peaks = {name: ask(name, "stop")["peak_gib"] for name in workers}
    total = sum(map(_real_tokens, batches))
    speed = {name: total / sum(seconds[name]) for name in workers}
    print(f"\n{'':6}{'real tok/s':>12}{'s a step':>10}{'peak GiB':>10}")
    for name in workers:
        per_step = sum(seconds[name]) / len(batches)
        print(f"{name:6}{speed[name]:12.1f}{per_step:10.2f}{peaks[name]:10.2f}")
    print(
        f"ratio: {speed['ours'] / speed['trl']:.2f} times the tokens per second, "
        f"{peaks['ours'] / peaks['trl']:.2f} of the peak memory"
    )


def _real_tokens(batch: list[dict]) -> int:
    return sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"] + p["rejected_ids"]) for p in batch)


def _prepare(arguments: argparse.Namespace, folder: Path) -> list[list[dict]]:
    """Token ids for both sides, and the model as a directory that transformers loads."""
    from align_jax.data.sources import load_records
    from align_jax.data.tokenise import encode_records
    from align_jax.models.interchange import load_model, load_tokenizer, save_model

    tokenizer = load_tokenizer("smollm2")
    count = arguments.batches * arguments.batch_size
    records = load_records(arguments.pairs, kind="preference", limit=2 * count, invalid="drop")
    examples = encode_records(
        records, tokenizer, kind="preference", max_length=arguments.max_length, overlong="drop"
    )
    pairs = [
        {
            "prompt_ids": example.prompt.tolist(),
            "chosen_ids": example.responses[0].tolist(),
            "rejected_ids": example.responses[1].tolist(),
        }
        for example in examples[:count]
    ]
    size = arguments.batch_size
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    (folder / "batches.json").write_text(json.dumps(batches))
    save_model(load_model("smollm2"), tokenizer, folder / "model")
    return batches


def _ask(worker: subprocess.Popen, message: str) -> dict:
    worker.stdin.write(message + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a worker ended early; its error is above")


def _serve(step) -> None:
    """Runs a batch per line of standard input and answers with its seconds."""
    for line in sys.stdin:
        message, started = line.strip(), time.perf_counter()
        answer = {}
        if message.isdigit():
            step(int(message))
        elif message == "stop":
            answer["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(answer | {"seconds": time.perf_counter() - started}), flush=True)
        if message == "stop":
            return


def _ours(folder: Path):
    import jax
    import numpy as np

    from align_jax.algorithms import preference
    from align_jax.data import batching
    from align_jax.data.dataset import Data
    from align_jax.data.tokenise import Example
    from align_jax.losses.preference import LOSSES
    from align_jax.training import pretrained
    from align_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
    from align_jax.training.reference import compute_log_probs
    from align_jax.training.state import init_state
    from align_jax.training.step import make_train_step, place_batch

    batches = json.loads((folder / "batches.json").read_text())
    buckets = tuple(range(32, 1024, 32))
    config = preference.Config(
        model=str(folder / "model"),
        optimizer=Optimizer(learning_rate=1e-6),
        data=Data(
            batch_size=len(batches[0]), rows=2, length_buckets=buckets, target_buckets=buckets
        ),
    )
    examples = []
    for number, pair in enumerate(pair for batch in batches for pair in batch):
        responses = tuple(
            np.array(pair[f"{side}_ids"], np.int32) for side in ("chosen", "rejected")
        )
        masks = tuple(np.ones(len(response), np.float32) for response in responses)
        prompt = np.array(pair["prompt_ids"], np.int32)
        examples.append(Example(number, prompt, responses, masks, {}))
    model, mesh = pretrained.open_model(config)
    reference = compute_log_probs(model, mesh, examples, config.data)
    attach = preference.attach_reference(examples, reference)
    collate = batching.make_collate(config.data, attach)
    optimizer = make_optimizer(config.optimizer, len(batches))
    state = init_state(model, optimizer, mesh)
    del model
    train_step = make_train_step(
        preference.preference_loss(LOSSES[config.loss], beta=config.beta),
        optimizer,
        make_schedule(config.optimizer, len(batches)),
        state,
        mesh,
        accumulated=False,
    )
    size = config.data.batch_size

    def step(index: int) -> None:
        nonlocal state
        batch = collate(examples[index * size : (index + 1) * size])
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, place_batch(batch, mesh, accumulated=False))
        jax.block_until_ready((state, metrics))

    return step


def _trl(folder: Path):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    batches = json.loads((folder / "batches.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    placeholder = {"prompt": "a", "chosen": " b", "rejected": " c"}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=len(batches[0]),
            max_length=None,  # the pairs are cut already
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            learning_rate=1e-6,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([placeholder] * len(batches[0])),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # set by trainer.train()
    for batch in batches:
        with torch.no_grad():
            chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator(batch))
        for pair, a, b in zip(batch, chosen.tolist(), rejected.tolist()):
            pair["ref_chosen_logps"], pair["ref_rejected_logps"] = a, b

    def step(index: int) -> None:
        model.train()
        trainer.training_step(model, trainer.data_collator(batches[index]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
