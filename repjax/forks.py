"""Refuses work in a forked process that would wait for ever.

A process that was forked has none of its parent's threads. Where the parent has used JAX's devices,
or is in the middle of reading batches, the child would wait for these threads without a word.
"""

import os
import sys

from repjax.errors import InputError

_WAY_OUT = (
  "Start processes by spawn: multiprocessing.get_context('spawn'), or in PyTorch "
  "multiprocessing_context='spawn'"
)

_devices_are_lost = False


def refuse_lost_devices() -> None:
  """Raises if the parent of this process had used devices before it forked this process.

  Raises:
    InputError: it had, and programs of JAX would wait for ever in this process.
  """
  if _devices_are_lost:
    raise InputError(
      "this process was forked from one that had used JAX already, so that any computation would "
      f"wait for ever. {_WAY_OUT}"
    )


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
