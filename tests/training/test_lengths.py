"""Rows of packed examples that no bucket holds are found before anything is computed."""

import dataclasses

import numpy as np
import pytest

from align_jax.algorithms import preference
from align_jax.data import batching
from align_jax.data.dataset import Data
from align_jax.data.loader import Loader
from align_jax.errors import DataError
from align_jax.training import offline, scoring
from align_jax.training.workdir import Workdir

STEPS, SIZE, HUGE = 7, 6, 10**4


@pytest.fixture
def examples(make_examples):
    lengths = np.random.default_rng(0).integers(1, 40, (20, 2))
    return make_examples(lengths.tolist())


def config_of(accumulation, rows):
    data = Data(
        batch_size=SIZE,
        accumulation=accumulation,
        rows=rows,
        length_buckets=(HUGE,),
        target_buckets=(HUGE,),
    )
    return offline.OfflineConfig(data=data)


def with_data(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def widths_of(batches):
    """Tokens and targets of the longest row of all, by laying them all out."""
    tokens = max((batch["segment_ids"] > 0).sum(-1).max() for batch in batches)
    return int(tokens), int(max((batch["target_mask"] > 0).sum(-1).max() for batch in batches))


@pytest.mark.parametrize(("accumulation", "rows"), [(1, 2), (2, 2), (3, 1), (1, 5), (2, 0)])
def test_every_batch_of_a_training_is_looked_at(examples, accumulation, rows):
    config = config_of(accumulation, rows)
    collate = batching.make_collate(config.data)
    loader = Loader(examples, batch_size=SIZE, seed=config.seed, collate=collate)
    widths = widths_of([loader.batch_at(step * SIZE)[0] for step in range(STEPS)])
    if not rows:  # every example is looked at, as each may come to be trained on
        widths = [max(map(max_of, examples)) for max_of in (row_tokens, row_targets)]
    for part, key in enumerate(("length_buckets", "target_buckets")):
        fits = with_data(config, **{key: (widths[part],)})
        offline.check_training_lengths(fits, examples, STEPS)
        narrow = with_data(config, **{key: (widths[part] - 1,)})
        with pytest.raises(DataError, match=f"^{widths[part]} fits in none .* data.{key}"):
            offline.check_training_lengths(narrow, examples, STEPS)


def row_tokens(example):
    return len(example.prompt) + len(example.responses[0])


def row_targets(example):
    return len(example.responses[0])


def test_scoring_looks_at_all_its_batches_before_the_first(examples, mesh):
    """Its last batch has the longest examples."""
    data = config_of(accumulation=2, rows=1).data
    longest = sorted(map(row_tokens, examples))
    # Micro-batches of 3, the last of 2: either may have the longest row.
    width = max(sum(longest[-2:]), sum(longest[-5:-2]))
    scored = []

    def score(batch):
        scored.append(batch["tokens"].shape)
        return np.zeros(SIZE)

    data = dataclasses.replace(data, length_buckets=(width - 1,))
    with pytest.raises(DataError, match=f"^{width} fits in none"):
        scoring.score_responses(score, mesh, examples, data, description="scoring")
    assert not scored
    data = dataclasses.replace(data, length_buckets=(width,))
    scoring.score_responses(score, mesh, examples, data, description="scoring")
    assert scored == [(1, width)] * 7


class Scored(Exception):
    pass


@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_ends_before_the_reference_is_scored(tiny_config, tmp_path, monkeypatch, held_out):
    def score(*args):
        raise Scored

    monkeypatch.setattr(preference, "reference_log_probs", score)
    overrides = {"data.length_buckets": (64,), "data.batch_size": 8, "data.rows": 8}
    if held_out:
        monkeypatch.setattr(offline, "check_training_lengths", lambda *args: None)
        overrides["data.eval_source"] = "builtin:tiny_preferences"
    config = tiny_config("dpo", overrides)
    with pytest.raises(Scored):  # eight rows for eight examples: each fits
        preference.run(config, Workdir(tmp_path / "fits", config))
    config = with_data(config, rows=1)
    with pytest.raises(DataError, match="if data.rows packs examples, raise it"):
        preference.run(config, Workdir(tmp_path / "packed", config))
