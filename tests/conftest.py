"""Every test runs on four CPU devices and under JAX's strictest promotion rules."""

import gc
import os
import signal
import types

import flax.core.scope
import jax
import pytest

from repjax import timing

# What a shell starts in the background ignores Ctrl-C, and so would the programs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of the time goes into tracing, which makes objects by the million, and into compiling.
gc.set_threshold(100_000, 20, 20)
jax.config.update("jax_traceback_in_locations_limit", 0)
if jax.__version_info__ < (0, 11):  # later ones do not know the flag, and end on it
  # Programs are small: parts that compile in parallel cost more than they give.
  flags = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
  os.environ.setdefault("XLA_FLAGS", " ".join(flags))

# Programs run once or twice here, so that compiling well costs more than it gives; see `optimized`.
jax.config.update("jax_disable_most_optimizations", True)


def _remembering(eval_shape):
  """Returns `jax.eval_shape` with a memory for functions without arguments, by their closures."""
  known = {}

  def hashable(value):
    value = tuple(value.items()) if isinstance(value, dict) else value
    return tuple(map(hashable, value)) if isinstance(value, tuple | list) else value

  def called(function, *args):
    cells = [hashable(cell.cell_contents) for cell in function.__closure__ or ()]
    key = (function.__code__, jax.config.jax_enable_x64, *cells)
    try:
      if not args and key not in known:
        known[key] = eval_shape(function)
    except TypeError:  # what cannot be hashed, such as an initializer that holds an array
      return eval_shape(function)
    return eval_shape(function, *args) if args else known[key]

  return called


# At each trace, Flax traces the initializer of each parameter for its shape: half of all tracing.
flax.core.scope.jax = types.SimpleNamespace(**vars(jax))
flax.core.scope.jax.eval_shape = _remembering(jax.eval_shape)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """Switches float64 on for one test."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


@pytest.fixture
def optimized():
  """Lets XLA optimize what one test compiles, as it does for users."""
  held = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", held)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
  """Keeps what is measured and compiled out of the user's cache folder."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  os.environ["XDG_CACHE_HOME"] = str(base / "shared" / "cache")


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch):
  """Leaves out the rest before each turn of a timing, since no test looks at times."""
  monkeypatch.setattr(timing, "REST", 0.0)
