"""Settings of the property tests, and float64 for the tests that compare with it."""

import gc
import os

import hypothesis
import jax
import pytest

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
def compiled_folder(tmp_path_factory):
    """What takes long to compile is kept for all processes of the run, not among the user's.

    For commands that a test starts all is kept, as they ask for.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def config(tmp_path):
    """The file of a small sweep."""
    path = tmp_path / "config.py"
    path.write_text(launching.CONFIG)
    return path
