"""Worker processes that make batches: what they need, how they begin and how they end."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator

import cv2

from repjax.errors import InputError

_SHARED_MEMORY = "/dev/shm"
"""The folder of the memory that processes share on Linux. Workers hand on batches through it."""
_WAY_OUT = (
  "Give the container more shared memory (docker run --shm-size=2g, or --ipc=host), use fewer "
  "workers or smaller batches, or read in threads by num_workers=0"
)


def check_shared_memory(num_workers: int, batch_bytes: int) -> None:
  """Raises unless the batches that workers make ahead fit into the shared memory that is free.

  Where they do not fit, the system ends a worker by a bus error in the middle of a run. A container
  of Docker has 64 MB.

  Args:
    num_workers: number of worker processes.
    batch_bytes: bytes of the images in a batch.

  Raises:
    InputError: the batches do not fit.
  """
  if not os.path.isdir(_SHARED_MEMORY):
    return
  # Each worker has four batches: one that is made, one that waits for room in the queue, one in the
  # queue, and one that has been taken out. Two more are on the way to the devices.
  needed = (4 * num_workers + 2) * batch_bytes
  free = shutil.disk_usage(_SHARED_MEMORY).free
  if needed > free:
    raise InputError(
      f"{num_workers} worker processes need {needed / 1e6:,.0f} MB of shared memory for batches of "
      f"{batch_bytes / 1e6:,.1f} MB, and {_SHARED_MEMORY} has {free / 1e6:,.0f} MB free. {_WAY_OUT}"
    )


@contextlib.contextmanager
def explained_death() -> Iterator[None]:
  """Turns Grain's error about a worker that has died into an `InputError` with the reason."""
  try:
    yield
  except RuntimeError as error:
    words = str(error).partition("exit code ")[2].partition(".")[0]
    if not words.lstrip("-").isdigit():
      raise
    raise InputError(f"a worker process that reads images {_cause(int(words))}") from error


def _cause(code: int) -> str:
  """Returns how a process ended and what to do about it, in words."""
  if code == -signal.SIGBUS:
    return f"found no room in shared memory ({_SHARED_MEMORY}). {_WAY_OUT}"
  if code == -signal.SIGKILL:
    return (
      "was killed, most likely because the machine has run out of memory. Use fewer workers or "
      "smaller batches, and run the same command again"
    )
  if code < 0:
    names = {each.value: each.name for each in signal.Signals}
    how = f"was ended by {names.get(-code, f'signal {-code}')}"
  else:
    how = f"ended with the status {code}"
  return (
    f"{how}; what it printed above may say why. To see the error itself, read in this process by "
    "num_workers=0"
  )


def one_thread_each() -> None:
  """Limits OpenCV to one thread per call, because whole images are already handled in parallel."""
  cv2.setNumThreads(1)


def prepare(*worker: int) -> None:
  """Prepares a worker process: limits its threads, and ends it together with its parent."""
  del worker
  one_thread_each()
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Waits for the parent process to end, then ends this process.

  A parent that was killed cannot stop its workers, which would wait for ever.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
