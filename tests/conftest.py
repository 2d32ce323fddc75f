"""What tests share: the packaged real model, loaded once."""

import pytest

from align_jax.models.interchange import load_model, load_tokenizer


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return load_tokenizer("smollm2")
