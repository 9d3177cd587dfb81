"""Several processes as one run: how they find one another, who decides, writes and prints.

All run the same program on data that each has for itself. The first alone reads and writes the
workdir and sends the others what it read, so that the folder need not be shared, and so that no
two processes can continue from different steps.
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

from repjax.errors import InputError
from repjax.training.interruption import Stopped, status_of

WAIT_SECONDS = 300
"""How long processes wait for the last of them to start."""

LOST_SECONDS = 60
"""How long nothing is heard of a process before it counts as lost."""

_CHUNK = 1 << 24  # bytes that are sent at once
_ERROR_BYTES = 4096
_EXAMPLE = (
  "On two machines, put JAX_COORDINATOR_ADDRESS=HOST_OF_THE_FIRST:1234 JAX_NUM_PROCESSES=2 "
  "JAX_PROCESS_ID=0 before the command on the first, the same with JAX_PROCESS_ID=1 on the second"
)


class SharedError(InputError):
  """An InputError that every process raises, so that all of them can end in good order."""


def initialize(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins the other processes of a run; to be called before anything touches a device.

  What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
  otherwise from the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU), as jax.distributed reads it.

  A process that is lost takes the others with it: JAX ends them, saying so, at once where it was
  the first process, and otherwise when nothing was heard of it for LOST_SECONDS.

  Args:
    coordinator: "host:port", of the first process, at a port that is free there.
    num_processes: how many.
    process_id: which this is, from 0.

  Raises:
    InputError: neither the arguments nor a cluster say all three, they cannot be, or the processes
      have different numbers of devices. JAX ends the program where others do not come in time.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  count = _number("JAX_NUM_PROCESSES", num_processes)
  index = _number("JAX_PROCESS_ID", process_id)
  if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
    raise InputError(f"JAX_COORDINATOR_ADDRESS is HOST:PORT, got {coordinator}. {_EXAMPLE}")
  if count is not None and index is not None and not 0 <= index < count:
    raise InputError(f"JAX_PROCESS_ID is in 0 ... {count - 1} of {count} processes, got {index}")
  if None not in (coordinator, count, index):
    print(
      f"process {index} of {count}: waiting for the others at {coordinator}, at most "
      f"{WAIT_SECONDS} s; see that they run and reach that port if this ends in DEADLINE_EXCEEDED",
      file=sys.stderr,
      flush=True,
    )
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
  devices, ours = jax.device_count(), jax.local_device_count()
  if len({len(jax.local_devices(process)) for process in range(jax.process_count())}) > 1:
    raise SharedError(
      f"the processes have different numbers of devices: process {jax.process_index()} has {ours} "
      f"of {devices}; start as many on each (CUDA_VISIBLE_DEVICES says which a process may use)"
    )
  # They connect at the first exchange and then wait for one another for long; until then they do
  # not, and what follows may take some of them longer.
  multihost_utils.sync_global_devices("joined")


def _number(variable: str, value: int | None) -> int | None:
  """A number that was given, or else that of the environment."""
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not text.isdigit():
    raise InputError(f"{variable} takes a number, got {text!r}. {_EXAMPLE}")
  return int(text)


def _why_not(
  coordinator: str | None, count: int | None, index: int | None, error: Exception
) -> str:
  """What keeps this process from the others, and the way out."""
  given = {
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": count,
    "JAX_PROCESS_ID": index,
  }
  missing = [name for name, value in given.items() if value is None]
  if isinstance(error, ValueError) and missing:
    return (
      f"no cluster was found that says who the other processes are, and {', '.join(missing)} "
      f"{'is' if len(missing) == 1 else 'are'} not set. {_EXAMPLE}"
    )
  reason = " ".join(str(error).split())
  hint = " Is the port in use? Another will do, the same for all processes." if index == 0 else ""
  return f"the processes of this run cannot be joined: {reason}.{hint}"


def is_first() -> bool:
  """Whether this process is the one that decides, writes and prints; where there is one, it is."""
  return jax.process_index() == 0


def first(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """What `function` returns, or the InputError it raises, in the first process, for all processes.

  Args:
    function: called in the first process only; what it returns can be pickled.
    *args: of the function.
    **kwargs: of the function.
  """
  if jax.process_count() == 1:
    return function(*args, **kwargs)
  result, problem = None, None
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
  """Calls `function` in every process; an InputError of one of them is raised by all.

  Args:
    function: which may fail in some processes only.
    *args: of the function.
    **kwargs: of the function.

  Returns:
    What it has returned in this process.
  """
  if jax.process_count() == 1:
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
  if len(set(texts)) > 1:
    where = f"process {', '.join(map(str, failed))} of {len(texts)}: "
  raise SharedError(where + texts[failed[0]])


def check_equal(what: str, value: Any) -> None:
  """Raises InputError in every process where they hold different values.

  Args:
    what: the value's name in the error's text.
    value: with a `repr` that tells different values apart.
  """
  if jax.process_count() == 1:
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
  """Whether a flag is set in any process, such as that a signal came; all have to ask at once."""
  return flag if jax.process_count() == 1 else any(_gather(b"1" if flag else b""))


def _broadcast(message: bytes) -> bytes:
  """The first process's message, in all processes."""
  length = np.asarray(divmod(len(message), 1 << 31), np.uint32)  # which may be more than 4 GiB
  high, low = map(int, multihost_utils.broadcast_one_to_all(length))
  size = (high << 31) + low
  # Powers of two, so that few programs are compiled; never much at once beside a model.
  chunk = min(_CHUNK, max(1024, 1 << (size - 1).bit_length()))
  padded = np.zeros(-(-size // chunk) * chunk, np.uint8)
  padded[: len(message)] = np.frombuffer(message, np.uint8)
  for start in range(0, len(padded), chunk):
    part = slice(start, start + chunk)
    # As bytes: floats are summed with zeros, which makes a negative zero positive.
    padded[part] = multihost_utils.broadcast_one_to_all(padded[part])
  return padded[:size].tobytes()


def _gather(message: bytes) -> list[str]:
  """Every process's message of at most _ERROR_BYTES bytes."""
  padded = np.frombuffer(message.ljust(_ERROR_BYTES, b"\0"), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))  # (processes, _ERROR_BYTES)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


class _Nothing:
  """Takes every call, does nothing and returns None."""

  def __getattr__(self, name: str) -> Callable[..., None]:
    return lambda *args, **kwargs: None


def writer(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """`make(...)` in the first process; in the others something whose methods do nothing.

  Args:
    make: makes what writes files, and whose methods' results may be None.
    *args: of `make`.
    **kwargs: of `make`.
  """
  return make(*args, **kwargs) if is_first() else _Nothing()


@contextlib.contextmanager
def first_prints() -> Iterator[None]:
  """Drops what is printed in all processes but the first."""
  with contextlib.ExitStack() as stack:
    if not is_first():
      stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    yield


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[None]:
  """Is one of several processes where that is asked for, see `initialize` and `leave_at_once`."""
  if distributed:
    initialize()
  with leave_at_once():
    yield


@contextlib.contextmanager
def leave_at_once() -> Iterator[None]:
  """Ends a process that fails alone without waiting for the others, who then learn that it is gone.

  Otherwise it would wait for them at its end, and they for it in the middle of a step. What all
  raise together is raised here too, and so is everything where there is one process.
  """
  try:
    yield
  except BaseException as error:
    done = isinstance(error, SystemExit) and error.code in (None, 0)
    together = isinstance(error, SharedError) or (isinstance(error, Stopped) and error.agreed)
    if jax.process_count() == 1 or together or done:
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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
