"""Every notebook runs from top to bottom on the public API, and is committed without outputs."""

import ast
import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def execute(path: Path, *, result: str | None = None):
    """Runs a notebook's cells in a kernel; the JSON of the expression `result` afterwards."""
    notebook = nbformat.read(path, as_version=4)
    if result is not None:
        notebook.cells.append(
            nbformat.v4.new_code_cell(f"print(__import__('json').dumps({result}))")
        )
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()
    return json.loads(notebook.cells[-1].outputs[0].text) if result else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_has_no_outputs_and_imports_nothing_of_the_tests(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] != "tests"
                    assert not any(name.name.startswith("_") for name in node.names)


def test_what_each_method_converges_to():
    """The notebook's table has the distances its text claims."""
    path = next(p for p in NOTEBOOKS if p.stem == "what_each_method_converges_to")
    to_promise, to_optimum = execute(path, result="[to_promise, to_optimum]")
    reached = {"DPO", "robust DPO, 20% flipped", "IPO", "REINFORCE", "RLOO", "PPO"}
    assert all(abs(to_promise[name]) < 1e-3 for name in reached)
    elsewhere = ("IPO", "DPO, 20% flipped", "SimPO", "KTO", "GRPO (paper)")
    assert all(to_optimum[name] > 0.1 for name in elsewhere)


def test_training_from_python():
    """The notebook trains: the loss falls below that of no preference, the reward rises."""
    path = next(p for p in NOTEBOOKS if p.stem == "train_from_python")
    found = "[[row['loss'] for row in dpo.metrics], score, reward.summary['eval']['accuracy']]"
    losses, scores, accuracy = execute(path, result=found)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.5
    assert sum(scores[-3:]) > sum(scores[:3])
    assert accuracy > 0.75
