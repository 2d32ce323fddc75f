"""What the tests of training share: a mesh and made examples."""

import numpy as np
import pytest

from align_jax.data.tokenise import Example
from align_jax.distributed.mesh import make_mesh


@pytest.fixture(scope="session")
def mesh():
    return make_mesh()


@pytest.fixture
def make_examples():
    """Examples of random tokens; example i has the prompt length and response lengths given."""

    def make(lengths, seed=0):
        rng = np.random.default_rng(seed)
        examples = []
        for index, (prompt, *responses) in enumerate(lengths):
            drawn = tuple(rng.integers(8, 264, size, np.int32) for size in responses)
            examples.append(
                Example(
                    id=index,
                    prompt=rng.integers(8, 264, prompt, np.int32),
                    responses=drawn,
                    response_masks=tuple(np.ones(len(r), np.float32) for r in drawn),
                    extras={},
                )
            )
        return examples

    return make
