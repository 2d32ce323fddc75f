"""Run by test_partitioning.py under eight forced CPU devices: loads golden models on meshes."""

import pathlib
import sys

import jax
import numpy as np

from align_jax.distributed.mesh import make_mesh
from align_jax.models.interchange import load_model, load_tokenizer, save_model

# (data, fsdp, tensor) -> a device's share of parameters of llama_untied (D 32, H 4, K 2, d 16).
SHARES = {
    (1, 8, 1): {"query": (2, 4, 4, 16), "key": (2, 4, 2, 16), "unembedding": (96, 4)},
    (2, 2, 2): {"query": (2, 16, 2, 16), "key": (2, 16, 1, 16), "unembedding": (48, 16)},
    # Two key-value heads do not divide over four devices: they stay whole.
    (1, 2, 4): {"query": (2, 16, 1, 16), "key": (2, 16, 2, 16), "unembedding": (24, 16)},
}


def check(path, plain, sizes):
    """The model on a mesh: every parameter bitwise, logits to float32 rounding."""
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    model = load_model(path, mesh=mesh)
    for sharded, whole in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
        assert len(sharded.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(sharded), np.asarray(whole))
    tokens = np.random.default_rng(0).integers(0, 96, (8, 40))
    expected = np.asarray(plain.logits(plain(tokens)))
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda m, t: m.logits(m(t)))(model, tokens)
    difference = np.abs(np.asarray(logits) - expected).max()
    print(path, sizes, difference)
    assert difference < 1e-5 * max(1.0, np.abs(expected).max())
    return model


def main(goldens: pathlib.Path, scratch: pathlib.Path) -> None:
    assert jax.device_count() == 8
    plain = load_model(goldens / "llama_untied")
    for sizes, shares in SHARES.items():
        model = check(goldens / "llama_untied", plain, sizes)
        parameters = {
            "query": model.blocks.attention.query,
            "key": model.blocks.attention.key,
            "unembedding": model.unembedding,
        }
        for name, share in shares.items():
            shards = parameters[name][...].addressable_shards
            assert {shard.data.shape for shard in shards} == {share}, (sizes, name)
    check(goldens / "gpt2_tiny", load_model(goldens / "gpt2_tiny"), (2, 2, 2))
    plain = load_model("tiny")
    save_model(check("tiny", plain, (2, 2, 2)), load_tokenizer("tiny"), scratch / "out")
    for a, b in zip(jax.tree.leaves(load_model(scratch / "out")), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
