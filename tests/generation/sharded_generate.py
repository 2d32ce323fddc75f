"""Run by test_sampler.py under eight forced CPU devices: the same samples on any mesh."""

import jax
import numpy as np

from align_jax.distributed.mesh import make_mesh
from align_jax.generation import generate
from align_jax.models.interchange import load_model

MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


def sharper(model):
    return jax.tree.map(lambda x: 3 * x, model)


def main() -> None:
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 264, length).tolist() for length in (3, 16, 1, 9, 5, 8, 12, 2)]

    def draw(model, temperature):
        return generate(
            model,
            prompts,
            key=jax.random.key(0),
            max_new_tokens=12,
            temperature=temperature,
            samples_per_prompt=2,
            stop_tokens=[5, 6],
        )

    plain = sharper(load_model("tiny"))
    expected = {temperature: draw(plain, temperature) for temperature in (0.0, 0.7)}
    assert len({tuple(row) for row in np.asarray(expected[0.0].tokens)}) == 8
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        model = sharper(load_model("tiny", mesh=mesh))
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(model))
        # Sampling compiles as long again as greedy decoding: on the last mesh only.
        temperatures = (0.0, 0.7) if sizes == MESHES[-1] else (0.0,)
        for temperature, reference in ((t, expected[t]) for t in temperatures):
            with jax.set_mesh(mesh):
                out = draw(model, temperature)
            np.testing.assert_array_equal(out.tokens, reference.tokens)
            np.testing.assert_array_equal(out.mask, reference.mask)
            np.testing.assert_allclose(out.log_probs, reference.log_probs, atol=1e-5)


if __name__ == "__main__":
    main()
