"""What tests share: the packaged model, tiny configs, quick compilation, a cache of their own."""

import pathlib
import signal

import jax
import pytest

from align_jax.config import load_config
from align_jax.models.interchange import load_model, load_tokenizer

# A shell starts background jobs with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"

# Folders whose tests compile quickly; tests elsewhere ask for the fixture by name.
QUICKLY_COMPILED = ("algorithms", "main", "training")


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return load_tokenizer("smollm2")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Nothing is read from or written to the user's cache of reference log-probabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Tiny models are compiled far longer than they run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def _compiled(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def compiled_once(_compiled):
    """For tests whose runs differ in numbers more than in programs: what is compiled is kept."""
    settings = {
        "jax_compilation_cache_dir": _compiled,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def compilation_by_folder(request):
    if request.path.parent.name in QUICKLY_COMPILED:
        request.getfixturevalue("quick_compilation")
        request.getfixturevalue("compiled_once")


@pytest.fixture
def tiny_config():
    """experiments/NAME.py at scale=tiny with overrides `{"data.batch_size": 4}`."""

    def load(name, overrides):
        items = [f"--config.{key}={value}" for key, value in overrides.items()]
        return load_config(f"{EXPERIMENTS / name}.py:scale=tiny", items)

    return load
