"""Several processes as one run: how they join, and which of them decides, writes and prints.

All processes run the same program, each on its copy of the data. The first process alone reads and
writes the workdir, and sends the others what it read. So the folder need not be shared, and two
processes can never continue from different steps.

An exchange (`first`, `together`, `check_equal`, `anywhere`) ends only when every process has made
the same one. So all processes must make the same exchanges in the same order. An error in one
process would leave the others waiting, which is why exchanges pass errors on.
"""

import contextlib
import io
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from repjax.devices import need_devices
from repjax.errors import InputError
from repjax.training import joining
from repjax.training.interruption import Stopped, status_of

WAIT_SECONDS = 300
"""Seconds that processes wait for the last of them to start."""

LOST_SECONDS = 60
"""Seconds without a sign of life after which a process counts as lost."""

_CHUNK = 1 << 24  # bytes that are sent at once
_ERROR_BYTES = 4096


class SharedError(InputError):
  """An InputError that all processes raise together, so that each can end on its own."""


def initialize(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes of a run. The caller must not have used a device before.

  A value that is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID.
  Without these, jax.distributed asks the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).

  If a process is lost, JAX ends the others with a message. It does so at once for the first
  process, and after LOST_SECONDS for any other.

  Args:
    coordinator: "host:port" of the first process; the port is free there.
    num_processes: number of processes.
    process_id: index of this process, from 0.

  Raises:
    InputError: a value is unknown or impossible, the processes do not fit together or do not come
      in time, or they have different numbers of devices.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  count = _number("JAX_NUM_PROCESSES", num_processes)
  index = _number("JAX_PROCESS_ID", process_id)
  address = joining.Address(coordinator) if coordinator is not None else None
  if count is not None and count < 1:
    raise InputError(
      f"JAX_NUM_PROCESSES counts processes, at least 1; got {count}. {joining.EXAMPLE}"
    )
  if index is not None and (index < 0 or (count is not None and index >= count)):
    raise InputError(
      f"JAX_PROCESS_ID numbers the processes from 0 to one less than their number, "
      f"{'which is not set' if count is None else count}; got {index}. {joining.EXAMPLE}"
    )
  if address is not None and count is not None and index is not None:
    joining.meet(address, count, index, WAIT_SECONDS)
  try:
    jax.distributed.initialize(
      coordinator,
      count,
      index,
      initialization_timeout=WAIT_SECONDS,
      heartbeat_timeout_seconds=LOST_SECONDS,
    )
  except (RuntimeError, TypeError, ValueError) as error:
    raise InputError(_why_not(coordinator, count, index, error)) from error
  need_devices()
  devices, ours = jax.device_count(), jax.local_device_count()
  if len({len(jax.local_devices(process)) for process in range(jax.process_count())}) > 1:
    raise SharedError(
      f"the processes have different numbers of devices: process {jax.process_index()} has {ours} "
      f"of {devices}; start as many on each (CUDA_VISIBLE_DEVICES says which a process may use)"
    )
  # Processes connect at their first exchange. The connection has a short time limit, exchanges have
  # a long one. So they connect now, before anything takes some of them longer than others.
  multihost_utils.sync_global_devices("joined")


def _number(variable: str, value: int | None) -> int | None:
  """Returns a number that was given, or else the value of an environment variable, or None."""
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not (text.isascii() and text.isdigit() and len(text) < 10):
    raise InputError(f"{variable} takes a number, got {text[:60]!r}. {joining.EXAMPLE}")
  return int(text)


def _why_not(
  coordinator: str | None, count: int | None, index: int | None, error: Exception
) -> str:
  """Returns why this process could not join the others, and what to do."""
  given = {
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": count,
    "JAX_PROCESS_ID": index,
  }
  missing = [name for name, value in given.items() if value is None]
  if isinstance(error, ValueError) and missing:
    return (
      f"no cluster was found that says who the other processes are, and {', '.join(missing)} "
      f"{'is' if len(missing) == 1 else 'are'} not set. {joining.EXAMPLE}"
    )
  return f"the processes of this run cannot be joined: {' '.join(str(error).split())}"


def is_first() -> bool:
  """Checks whether this process decides, writes and prints; a single process always does."""
  need_devices()
  return jax.process_index() == 0


def _is_alone() -> bool:
  """Checks whether this process is a whole run."""
  need_devices()
  return jax.process_count() == 1


def first(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """Calls `function` in the first process, and returns its result in all processes.

  Args:
    function: function whose result can be pickled.
    *args: arguments of the function.
    **kwargs: arguments of the function.

  Raises:
    InputError: the function raised an InputError; all processes raise it. Any other error is
      raised in the first process only, which then ends, see `leave_at_once`.
  """
  if _is_alone():
    return function(*args, **kwargs)
  result, problem = None, None
  # Only InputErrors are passed on. They are expected, and end a run in good order.
  if is_first():
    try:
      result = function(*args, **kwargs)
    except InputError as error:
      problem = str(error)
  result, problem = pickle.loads(_broadcast(pickle.dumps((result, problem)) if is_first() else b""))
  if problem is not None:
    raise SharedError(problem)
  return result


def together(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """Calls `function` in every process, and returns its result in this process.

  Args:
    function: function that may fail in some processes only.
    *args: arguments of the function.
    **kwargs: arguments of the function.

  Raises:
    InputError: the function raised an InputError in some process; all processes raise it.
  """
  if _is_alone():
    return function(*args, **kwargs)
  result, problem = None, b""
  try:
    result = function(*args, **kwargs)
  except InputError as error:
    problem = str(error).encode()[:_ERROR_BYTES]
  texts = _gather(problem)
  failed = [index for index, text in enumerate(texts) if text]
  if not failed:
    return result
  where = ""
  # An error that all processes share needs no list of processes.
  if len(set(texts)) > 1:
    where = f"process {', '.join(map(str, failed))} of {len(texts)}: "
  raise SharedError(where + texts[failed[0]])


def check_equal(what: str, value: Any) -> None:
  """Raises InputError in every process if a value is not the same in all of them.

  Args:
    what: name of the value in the error's text.
    value: value whose `repr` is equal only for equal values.
  """
  if _is_alone():
    return
  own = repr(value)
  theirs = first(lambda: own)

  def check() -> None:
    if own != theirs:
      raise InputError(
        f"{what} differs from that of the first process: {own[:1000]} here, {theirs[:1000]} there; "
        "start all processes by the same command, on the same version and the same data"
      )

  together(check)


def anywhere(flag: bool) -> bool:
  """Checks whether a flag is set in any process. All processes must ask at the same point."""
  return flag if _is_alone() else any(_gather(b"1" if flag else b""))


def _broadcast(message: bytes) -> bytes:
  """Returns the message of the first process in all processes; the others pass any message."""
  # JAX has no 64-bit integers by default, and a message can exceed 4 GiB: two numbers of 31 bits.
  length = np.asarray(divmod(len(message), 1 << 31), np.uint32)
  high, low = map(int, multihost_utils.broadcast_one_to_all(length))
  size = (high << 31) + low
  # JAX compiles a program for each chunk size, so sizes are powers of two and programs are few.
  # Chunks are small, because they take device memory beside the model.
  chunk = min(_CHUNK, max(1024, 1 << (size - 1).bit_length()))
  padded = np.zeros(-(-size // chunk) * chunk, np.uint8)
  padded[: len(message)] = np.frombuffer(message, np.uint8)
  for start in range(0, len(padded), chunk):
    part = slice(start, start + chunk)
    # JAX broadcasts by adding zeros. With floats, that would turn -0.0 into 0.0; bytes are exact.
    padded[part] = multihost_utils.broadcast_one_to_all(padded[part])
  return padded[:size].tobytes()


def _gather(message: bytes) -> list[str]:
  """Returns the messages of all processes, of at most _ERROR_BYTES bytes each."""
  padded = np.frombuffer(message.ljust(_ERROR_BYTES, b"\0"), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))  # (processes, _ERROR_BYTES)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


class _Nothing:
  """An object whose methods all do nothing and return None."""

  def __getattr__(self, name: str) -> Callable[..., None]:
    return lambda *args, **kwargs: None


def writer(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """Makes a writer of files in the first process, and in the others an object that does nothing.

  Args:
    make: function that makes the writer, whose methods' results may be None.
    *args: arguments of `make`.
    **kwargs: arguments of `make`.
  """
  return make(*args, **kwargs) if is_first() else _Nothing()


@contextlib.contextmanager
def first_prints() -> Iterator[None]:
  """Suppresses what is printed in all processes but the first."""
  with contextlib.ExitStack() as stack:
    if not is_first():
      stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    yield


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[None]:
  """Joins the other processes if `distributed` is set, and leaves them as `leave_at_once` does."""
  if distributed:
    initialize()
  with leave_at_once():
    yield


@contextlib.contextmanager
def leave_at_once() -> Iterator[None]:
  """Ends a process that fails alone at once, so that the others learn that it is gone.

  Without this there would be a deadlock. The failed process would wait for the others when Python
  exits, and the others would wait for it in the middle of a step. Errors that all processes raise
  together pass unchanged, and so do all errors of a single process.
  """
  try:
    yield
  except BaseException as error:
    done = isinstance(error, SystemExit) and error.code in (None, 0)
    together = isinstance(error, SharedError) or (isinstance(error, Stopped) and error.agreed)
    if together or done or _is_alone():
      raise
    where = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, KeyboardInterrupt):
      print(f"{where} was stopped; the same command continues", file=sys.stderr, flush=True)
      os._exit(status_of(error))
    if isinstance(error, InputError):
      print(f"error: {where}: {error}", file=sys.stderr)
    else:
      print(f"{where} ends:", file=sys.stderr)
      traceback.print_exc()
    # os._exit skips everything that Python does at exit, so the output is flushed here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
