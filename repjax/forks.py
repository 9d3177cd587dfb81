"""Refuses work in a forked process that would wait for ever.

A process that was forked has no thread of its parent. Where the parent had started the threads of
JAX or of a reader of files, the child waits for them without end and without a word.
"""

import os

from repjax.errors import InputError

DATA = "data sets"
DEVICES = "models"

_first_users: dict[str, int] = {}


def refuse_after_fork(what: str) -> None:
  """Notes that this process uses something that starts threads.

  Args:
    what: DATA or DEVICES.

  Raises:
    InputError: this process was forked from one that had used the same thing.
  """
  if _first_users.setdefault(what, os.getpid()) != os.getpid():
    raise InputError(
      f"this process was forked from one that had used {what} already, and would wait for ever, "
      "since threads are not forked. Start processes by spawn: "
      "multiprocessing.get_context('spawn'), or multiprocessing_context='spawn' in PyTorch"
    )
