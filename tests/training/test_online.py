"""The online loop: where it begins and ends, what it saves, and what ends it."""

import types

import numpy as np
import pytest

from align_jax.errors import RunError
from align_jax.training.online import fit_online


class _Recorder:
    """Stands in for checkpoints and metrics."""

    def __init__(self):
        self.saved, self.rows, self.samples = [], [], []

    def save(self, state, memory):
        self.saved.append(dict(memory))

    def wait(self):
        pass

    def write(self, step, metrics):
        self.rows.append((step, metrics))


def run_loop(iterate, recorder, mesh, **settings):
    state = types.SimpleNamespace(step=0)
    return fit_online(
        state,
        {"iteration": settings.pop("first", 0)},
        iterate,
        mesh=mesh,
        num_iterations=5,
        checkpointer=settings.pop("checkpointer", recorder),
        writer=recorder,
        save_samples=lambda iteration, samples: recorder.samples.append(iteration),
        checkpoint_every=2,
        description="test",
        **settings,
    )


def test_the_loop_goes_on_from_its_memory_and_saves_the_last_state(mesh):
    recorder, seen = _Recorder(), []

    def iterate(state, memory, iteration):
        seen.append((iteration, memory.get("kept")))
        return types.SimpleNamespace(step=state.step + 3), memory | {"kept": iteration}, {}, []

    state = run_loop(iterate, recorder, mesh, first=1)
    assert seen == [(1, None), (2, 1), (3, 2), (4, 3)] and state.step == 12
    assert [memory["iteration"] for memory in recorder.saved] == [2, 4, 5]
    assert recorder.samples == [1, 2, 3, 4]


def test_a_metric_that_is_not_finite_ends_the_run_unsaved(mesh):
    recorder = _Recorder()
    broken = lambda state, memory, _: (state, memory, {"loss": np.nan}, [{"prompt_id": 4}])  # noqa: E731
    with pytest.raises(RunError, match=r"loss not finite in iteration 0, on the prompts \[4\]"):
        run_loop(broken, recorder, mesh)
    assert not recorder.saved and not recorder.rows


@pytest.mark.parametrize(
    ("name", "iterations", "updates", "cause"),
    [
        ("objective/kl", 0, 4, "the learning rate is not the cause"),
        ("loss", 0, 1, "the learning rate is not the cause"),
        ("loss", 0, 4, "lower config.optimizer.learning_rate"),
        ("objective/kl", 1, 1, "lower config.optimizer.learning_rate"),
    ],
)
def test_the_learning_rate_is_blamed_for_what_came_after_an_update(
    mesh, name, iterations, updates, cause
):
    """What is measured of the samples comes before the updates of its iteration."""

    def iterate(state, memory, iteration):
        metrics = {name: np.nan if iteration == iterations else 1.0}
        return types.SimpleNamespace(step=state.step + updates), memory, metrics, []

    with pytest.raises(RunError, match=f"{name} not finite in iteration {iterations}.*{cause}"):
        run_loop(iterate, _Recorder(), mesh)


def test_without_a_checkpointer_nothing_is_saved(mesh):
    recorder = _Recorder()
    step = lambda state, memory, _: (types.SimpleNamespace(step=state.step + 1), memory, {}, [])  # noqa: E731
    state = run_loop(step, recorder, mesh, checkpointer=None)
    assert state.step == 5 and not recorder.saved and len(recorder.rows) == 5
