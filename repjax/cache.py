"""Keeps compiled programs and measurements between runs, in the user's cache folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from repjax import disk, json_files
from repjax.errors import InputError
from repjax.schema import anything, record, text

_ANSWER = record({"question": text(), "answer": anything}, required=("answer",))


def cache_folder() -> Path:
  """Returns the folder of everything that repjax can make again, in the user's cache folder."""
  home = os.environ.get("XDG_CACHE_HOME")
  return (Path(home) if home else Path.home() / ".cache") / "repjax"


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk between runs; a folder that the user has set stays."""
  held: Any = jax.config
  if held.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def recall(question: str) -> Any:
  """Returns the answer that `remember` has kept for a question.

  None if there is no answer, or if its file cannot be read.
  """
  try:
    return json_files.read(_file(question), _ANSWER)["answer"]
  except InputError:
    return None


def remember(question: str, answer: Any) -> None:
  """Keeps the answer to a question, such as a measurement.

  Each answer has its own file, so that several processes can write at once. If the file cannot be
  written, the answer is not kept, and nothing is raised: it can be measured again.
  """
  with contextlib.suppress(InputError, OSError):
    disk.write_json(_file(question), {"question": question, "answer": answer})


def _file(question: str) -> Path:
  """Returns the file of a question, whose name is a hash since questions are long."""
  name = hashlib.sha256(question.encode()).hexdigest()[:32]
  return cache_folder() / "measured" / f"{name}.json"


@contextlib.contextmanager
def keep_every_program() -> Iterator[None]:
  """Keeps every program that is compiled inside, where JAX would skip those of under a second."""
  use_compilation_cache()
  name = "jax_persistent_cache_min_compile_time_secs"
  held = jax.config.values[name]
  jax.config.update(name, 0.0)
  try:
    yield
  finally:
    jax.config.update(name, held)
