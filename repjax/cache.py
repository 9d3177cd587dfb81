"""The folder in which compiled programs and measurements are kept between runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def cache_folder() -> Path:
  """Where repjax keeps what it can make again, in the user's cache folder."""
  return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "repjax"


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk between runs, unless the user has set a folder already."""
  held: Any = jax.config
  if held.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


@contextlib.contextmanager
def keep_every_program() -> Iterator[None]:
  """Keeps also what compiles in no time: JAX leaves out what takes less than a second."""
  use_compilation_cache()
  name = "jax_persistent_cache_min_compile_time_secs"
  held = jax.config.values[name]
  jax.config.update(name, 0.0)
  try:
    yield
  finally:
    jax.config.update(name, held)
