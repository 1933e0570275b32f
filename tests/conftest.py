"""Settings of the property tests, and float64 for the tests that compare with it."""

import gc
import os

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

pytest.register_assert_rewrite("support")

from support import launching  # noqa: E402

# The same examples on every run and machine; no deadline, since the first example compiles.
hypothesis.settings.register_profile(
    "attention",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("attention")


def pytest_collection_finish():
    """What is imported is no garbage; going through it all the time costs a tenth of the run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture
def x64():
    """float64 within the test; elsewhere write `with jax.enable_x64(True):`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def keep_compiled(tmp_path_factory):
    """All processes of a run keep for each other what takes long to compile, not among the user's.

    Those that the tests start have a folder of their own: killed, they may leave half a file there,
    and a warning is an error here. A limit of size has JAX write under a lock.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder / "by tests"))
    jax.config.update("jax_compilation_cache_max_size", 2**32)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()  # where collecting the tests has compiled without one
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "by commands"))
        patch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))
        yield


@pytest.fixture
def nothing_kept():
    """What is compiled is not kept on disk, so that compiling again does not load it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)


@pytest.fixture
def config(tmp_path):
    """The file of a small sweep."""
    path = tmp_path / "config.py"
    path.write_text(launching.CONFIG)
    return path
