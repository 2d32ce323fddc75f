"""Run by test_hosts.py in one process, or in two, the hosts of one run: reward model, then RLOO.

hosts.py WORKDIR
"""

import pathlib
import sys

import jax

from align_jax.algorithms import algorithm_of, settings_of
from align_jax.config import load_config
from align_jax.distributed.mesh import initialize_distributed
from align_jax.training.workdir import Workdir

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
RUNS = {
    "reward_model": {"num_steps": 2, "held_out": 20, "optimizer.learning_rate": 1e-2},
    "rloo": {
        "reward.kind": "model",
        "reward.path": "reward_model",  # in the workdir
        "evaluation.source": "",
        "sampling.prompts": 4,
        "sampling.max_new_tokens": 4,
        "num_iterations": 1,
    },
}


def run(workdir: pathlib.Path) -> None:
    initialize_distributed()
    assert jax.device_count() == 4
    for name, settings in RUNS.items():
        overrides = []
        for key, value in settings.items():
            value = workdir / value if key == "reward.path" else value
            overrides.append(f"--config.{key}={value}")
        config = settings_of(load_config(f"{EXPERIMENTS / name}.py:scale=tiny", overrides))
        algorithm_of(config).run(config, Workdir(workdir / name, config))


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]))
