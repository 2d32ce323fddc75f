"""`from align_jax import losses` brings jax along and nothing else."""

import ast
import pathlib
import subprocess
import sys

import pytest

import align_jax.losses

FOLDER = pathlib.Path(align_jax.losses.__file__).parent
STANDARD = {"collections", "dataclasses", "difflib", "functools", "math", "typing"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.name} has a relative import, which this test cannot read"
            )
            yield node.module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_a_file_imports_only_jax_and_its_neighbours(path):
    modules = list(imported_modules(path))
    assert modules
    for module in modules:
        ours = module == "align_jax.losses" or module.startswith("align_jax.losses.")
        assert ours or module.split(".")[0] in {"jax", *STANDARD}, module


def test_a_fresh_process_loads_nothing_heavy_and_nothing_else_of_ours():
    script = (
        "import sys\nimport jax, jax.numpy\nbefore = set(sys.modules)\n"
        "from align_jax import losses\nlosses.preference.dpo_loss, losses.log_probs\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    new, all_packages = (line.split() for line in run.stdout.splitlines())
    assert "align_jax.losses.preference" in new
    ours = [name for name in new if name.startswith("align_jax")]
    assert all(name == "align_jax" or name.startswith("align_jax.losses") for name in ours)
    third_party = [name for name in new if not name.startswith(("align_jax", "jax"))]
    assert set(third_party) <= set(sys.stdlib_module_names), third_party
    assert not {"flax", "optax", "transformers", "torch", "orbax"} & set(all_packages)
