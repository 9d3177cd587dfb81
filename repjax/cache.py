"""The folder in which compiled programs and measurements are kept between runs."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from repjax import disk
from repjax.errors import InputError


def cache_folder() -> Path:
  """Where repjax keeps what it can make again, in the user's cache folder."""
  home = os.environ.get("XDG_CACHE_HOME")
  return (Path(home) if home else Path.home() / ".cache") / "repjax"


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk between runs, unless the user has set a folder already."""
  held: Any = jax.config
  if held.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def recall(question: str) -> Any:
  """What `remember` has kept of a question; None if nothing, or if it cannot be read."""
  try:
    held = json.loads(_file(question).read_text())
  except (OSError, ValueError):
    return None
  return held.get("answer") if isinstance(held, dict) else None


def remember(question: str, answer: Any) -> None:
  """Keeps a measurement in a file of its own, whoever else writes; not where that cannot be."""
  with contextlib.suppress(InputError, OSError):
    disk.write_json(_file(question), {"question": question, "answer": answer})


def _file(question: str) -> Path:
  name = hashlib.sha256(question.encode()).hexdigest()[:32]
  return cache_folder() / "measured" / f"{name}.json"


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
