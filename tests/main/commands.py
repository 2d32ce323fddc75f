"""Commands, their settings and what they leave, for the tests of the command line."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"

EVALUATED = {
    "sft": "data.eval_source=builtin:tiny_sft",
    "dpo": "data.eval_source=builtin:tiny_preferences",
}

SETTINGS = ("num_steps=12", "data.limit=16", "optimizer.learning_rate=0.01")


def train_arguments(name, workdir, *overrides):
    arguments = ["train", f"--config={EXPERIMENTS / name}.py:scale=tiny", f"--workdir={workdir}"]
    return arguments + [f"--config.{override}" for override in overrides]


def snapshot(folder):
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
