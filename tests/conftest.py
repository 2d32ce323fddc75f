"""What tests share: the packaged model, tiny configs, quick compilation, a cache of their own."""

import os
import pathlib
import signal
import tempfile

import jax
import pytest

from align_jax.algorithms import settings_of
from align_jax.config import load_config
from align_jax.models.interchange import load_model, load_tokenizer

# A shell starts background jobs with SIGINT ignored, nohup starts its command with SIGHUP ignored,
# and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tiny models are compiled far longer than they run, in the processes that tests start, too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# The newer of XLA's two ways to fuse on a CPU takes most of the time its compiling takes. From
# 0.11.1 on there is no other, and XLA ends at the flag.
if jax.__version_info__ < (0, 11, 1):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()

# Runs that go on, and runs like others before them, compile the same again. A folder for each
# worker, and the processes it starts: jax writes into it without a lock.
COMPILED = tempfile.TemporaryDirectory(prefix="align_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


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


@pytest.fixture
def tiny_config():
    """Settings of experiments/NAME.py at scale=tiny with overrides `{"data.batch_size": 4}`."""

    def load(name, overrides):
        items = [f"--config.{key}={value}" for key, value in overrides.items()]
        return settings_of(load_config(f"{EXPERIMENTS / name}.py:scale=tiny", items))

    return load
