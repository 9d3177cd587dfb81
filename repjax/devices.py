"""Refuses work in a process that JAX cannot compute in, or that would wait for ever.

JAX may find none of the devices that it was told to use. Its own error does not say so.

A process that was forked has none of its parent's threads. Where the parent has used JAX's devices,
or is in the middle of reading batches, the child would wait for these threads without a word.

Processes that read images import this module, so it does not import JAX.
"""

import os
import sys

from repjax.errors import InputError, printable

_WAY_OUT = (
  "Start processes by spawn: multiprocessing.get_context('spawn'), or in PyTorch "
  "multiprocessing_context='spawn'"
)

_devices_are_lost = False


def need_devices() -> None:
  """Raises unless this process can compute by JAX. Every public function that computes calls this.

  Raises:
    InputError: the parent of this process had used devices before it forked this process, so that
      programs of JAX would wait for ever; or JAX finds none of the devices that it shall use.
  """
  if _devices_are_lost:
    raise InputError(
      "this process was forked from one that had used JAX already, so that any computation would "
      f"wait for ever. {_WAY_OUT}"
    )
  if missing := missing_devices():
    raise InputError(missing)


def missing_devices() -> str:
  """Returns why JAX finds no device of the platforms that were asked for, or "" if it finds one.

  JAX fails at its first use, with an empty AssertionError if a package for GPUs is not installed.
  Without JAX, no device is missing.
  """
  jax = sys.modules.get("jax")
  if jax is None:
    return ""
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    asked = jax.config.jax_platforms
    reason = printable(error) or "its package for these devices is not installed"
    return (
      f"JAX finds no device of the platform {printable(repr(asked))}, which JAX_PLATFORMS or "
      f"jax.config asks for: {reason}. Set JAX_PLATFORMS=cpu, or leave it out and JAX takes the "
      "devices that are there"
    )
  return ""


def refuse_iterator_of_parent(process: int) -> None:
  """Raises if an iterator was made in a different process.

  Args:
    process: the number of the process that made the iterator.

  Raises:
    InputError: the iterator's threads are in that process, so it would wait for ever in this one.
  """
  if process != os.getpid():
    raise InputError(
      "these batches are read by threads of the process from which this one was forked. Make the "
      f"batches in the process that reads them. {_WAY_OUT}"
    )


def _note_fork() -> None:
  """Notes in a forked process whether its parent had used devices.

  JAX has no public way to ask this that would not start the devices.
  """
  global _devices_are_lost
  bridge = sys.modules.get("jax._src.xla_bridge")
  _devices_are_lost = bool(getattr(bridge, "_backends", None))


if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_note_fork)
