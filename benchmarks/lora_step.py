"""One DPO step of SmolLM2 with every parameter trained and with adapters: memory and seconds.

    python benchmarks/lora_step.py

Each is a process of its own. A batch is 4 pairs of random tokens, prompt 128 and responses 64 each,
one pair a row (the prompt is computed once); float32, AdamW, `remat="linear"`. Memory is the
compiler's own account of the step: arguments and results (a donated buffer counted once) and
temporaries.
"""

import json
import subprocess
import sys
import time

MODEL, PAIRS, PROMPT, RESPONSE, STEPS = "smollm2", 4, 128, 64, 5
RANKS = (0, 16)  # 0: every parameter


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    columns = ("trained", "state_mib", "temporaries_mib", "peak_mib", "seconds", "cpu_seconds")
    print(f"{'':12}" + "".join(f"{name:>18}" for name in columns))
    for rank in RANKS:
        done = subprocess.run([sys.executable, __file__, str(rank)], stdout=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"rank {rank} failed; its error is above")
        row = json.loads(done.stdout.splitlines()[-1])
        name = f"LoRA r={rank}" if rank else "everything"
        print(f"{name:12}" + "".join(f"{row[column]:>18,.6g}" for column in columns), flush=True)


def measure(rank: int) -> dict[str, float]:
    """Number of trained parameters, memory in MiB, and median seconds of a step."""
    import jax
    import numpy as np

    from align_jax.algorithms import preference
    from align_jax.data import batching
    from align_jax.data.dataset import Data
    from align_jax.data.tokenise import Example
    from align_jax.losses.preference import LOSSES
    from align_jax.models.frozen import partition
    from align_jax.training import pretrained
    from align_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
    from align_jax.training.state import init_state
    from align_jax.training.step import make_train_step, place_batch

    length = PROMPT + 2 * RESPONSE
    config = preference.Config(
        model=MODEL,
        lora=pretrained.Lora(rank=rank),
        optimizer=Optimizer(learning_rate=1e-6),
        data=Data(
            batch_size=PAIRS,
            max_length=length,
            length_buckets=(length,),
            target_buckets=(2 * RESPONSE,),
        ),
    )
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(100, 40_000, size).astype(np.int32)  # noqa: E731
    masks = (np.ones(RESPONSE, np.float32),) * 2
    examples = [
        Example(i, draw(PROMPT), (draw(RESPONSE), draw(RESPONSE)), masks, {}) for i in range(PAIRS)
    ]
    reference = np.full((PAIRS, 2), -600.0, np.float32)
    collate = batching.make_collate(config.data, preference.attach_reference(examples, reference))
    model, mesh = pretrained.open_model(config)
    trained = sum(leaf.size for leaf in jax.tree.leaves(partition(model)[0]))
    optimizer = make_optimizer(config.optimizer, STEPS)
    schedule = make_schedule(config.optimizer, STEPS)
    state = init_state(model, optimizer, mesh)
    del model
    loss = preference.preference_loss(LOSSES[config.loss], beta=config.beta)
    step = make_train_step(loss, optimizer, schedule, state, mesh, accumulated=False)
    with jax.set_mesh(mesh):
        batch = place_batch(collate(examples), mesh, accumulated=False)
        compiled = step.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        seconds, cpu_seconds = [], []
        for _ in range(STEPS + 1):
            started, cpu_started = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    outside = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    return {
        "trained": trained,
        "state_mib": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20,
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
        "peak_mib": (outside + memory.temp_size_in_bytes) / 2**20,
        # The first one compiles. Other load on the machine shows in the seconds, hardly in those
        # of the processor.
        "seconds": float(np.median(seconds[1:])),
        "cpu_seconds": float(np.median(cpu_seconds[1:])),
    }


if __name__ == "__main__":
    main()
