"""Runs commands of repjax in forked processes, each with one fault at a chosen call.

A process that has imported everything forks for each run, so that a run does not wait for imports.
The library of inject.c counts the calls and makes the fault happen; the process is therefore
started by `Server`, with LD_PRELOAD.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Kinds of calls, as in inject.c.
MAKE, WRITE, FLUSH, RENAME, REMOVE, CHANGE = (1 << bit for bit in range(6))
ALL = 63
# A flush changes nothing that the next process could see, so a process need not be killed at one.
BUT_FLUSH = ALL & ~FLUSH
NEED_ROOM = MAKE | WRITE | FLUSH | RENAME
NEED_PERMISSION = MAKE | RENAME | REMOVE | CHANGE


class Fault(NamedTuple):
  """A fault at one call.

  Attributes:
    kinds: kinds of calls that are counted; the fault can happen at each of these.
    signal: signal that the process gets before the call; 0: none.
    error: error that the call returns; 0: none.
    lasting: all later calls of these kinds return the error too.
    half: a write at which the fault happens writes half of its bytes first.
  """

  kinds: int = ALL
  signal: int = 0
  error: int = 0
  lasting: bool = False
  half: bool = False


FAULTS = {
  "kill": Fault(BUT_FLUSH, signal=signal.SIGKILL),
  "torn": Fault(WRITE, signal=signal.SIGKILL, half=True),
  "signal": Fault(signal=signal.SIGTERM),
  "interrupt": Fault(signal=signal.SIGINT),
  "enospc": Fault(NEED_ROOM, error=errno.ENOSPC),
  "full": Fault(NEED_ROOM, error=errno.ENOSPC, lasting=True, half=True),
  "readonly": Fault(error=errno.EROFS, lasting=True),
  "eacces": Fault(NEED_PERMISSION, error=errno.EACCES),
  "eio": Fault(error=errno.EIO),
}


# A process with threads must not fork, and linear algebra starts threads when it is imported.
_NO_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Run(NamedTuple):
  """The end of a command.

  Attributes:
    status: exit status; -n: signal n ended the process; None: the process was killed after
      `Server.timeout` seconds.
    calls: number of calls that were counted.
    output: everything that the command printed.
  """

  status: int | None
  calls: int
  output: str


class Server:
  """A process that runs commands; use it as a context.

  Attributes:
    timeout: seconds after which a command is killed.
  """

  timeout = 120.0

  def __init__(self, folder: Path, environment: Mapping[str, str]):
    """Compiles the library and starts the process.

    Args:
      folder: folder for the library and the output of commands.
      environment: more variables of the environment.
    """
    self._output = folder / "output.txt"
    library = _compile(folder)
    self._process = subprocess.Popen(
      [sys.executable, str(Path(__file__).resolve()), str(library)],
      env={**os.environ, **environment, **_NO_THREADS, "LD_PRELOAD": str(library)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> "Server":
    """Returns the server."""
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the process."""
    self._process.communicate()

  def run(self, arguments: Sequence[str], folder: Path, fault: Fault, at: int = 0) -> Run:
    """Runs `repjax ARGUMENTS`.

    Args:
      arguments: name of a command, and its arguments.
      folder: folder below which calls are counted.
      fault: the fault. Its kinds of calls are counted.
      at: number of the call at which the fault happens; 0: no fault happens.
    """
    return self._ask(arguments=arguments, folder=str(folder), fault=fault, at=at)

  def load(self, arguments: Sequence[str]) -> Run:
    """Runs a command without a fault, and then imports everything that the command has imported.

    Later runs of such commands start without these imports.
    """
    return self._ask(arguments=arguments, load=True)

  def _ask(self, **request: Any) -> Run:
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    request |= {"timeout": self.timeout, "output": str(self._output)}
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise SystemExit("error: the process that starts the commands has ended by itself")
    status, calls = json.loads(answer)
    return Run(status, calls, self._output.read_text(errors="replace"))


def _compile(folder: Path) -> Path:
  """Compiles inject.c, and returns the library."""
  if not shutil.which("cc"):
    raise SystemExit("error: there is no C compiler `cc`, which compiles inject.c; install gcc")
  library = folder / "inject.so"
  flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
  subprocess.run(["cc", *flags, str(HERE / "inject.c"), "-o", str(library), "-ldl"], check=True)
  return library


def main() -> None:
  """Serves requests until stdin ends. In each forked process, runs one command to its end."""
  os.environ.pop("LD_PRELOAD")  # programs that a command starts are not armed
  sys.path.insert(0, str(ROOT))
  request = _serve(ctypes.CDLL(sys.argv[1]))
  if request is None:
    return
  from repjax import cli

  try:
    # The end of this process is that of the command, with all that Python does at the end.
    cli.main(request["arguments"])
  finally:
    if "modules" in request:
      Path(request["modules"]).write_text("\n".join(list(sys.modules)))


def _serve(library: ctypes.CDLL) -> dict[str, Any] | None:
  """Answers requests; returns None in this process, and the request in a forked one."""
  for line in sys.stdin:
    request = json.loads(line)
    if request.get("load"):
      request["modules"] = request["output"] + ".modules"
    gc.freeze()  # so that a forked process does not touch, and so copy, all objects
    process = os.fork()
    if not process:
      _redirect(request["output"])
      if "folder" in request:
        fault = Fault(*request["fault"])
        library.inject_arm(os.fsencode(request["folder"]), ctypes.c_long(request["at"]), *fault)
      return request
    status = _wait(process, request["timeout"])
    if "modules" in request:
      _import(Path(request["modules"]).read_text().split("\n"))
    print(json.dumps([status, library.inject_count()]), flush=True)
  return None


def _redirect(output: str) -> None:
  """Sends what this process prints into a file, and gives it nothing to read."""
  with open(os.devnull) as nothing, open(output, "wb") as file:
    os.dup2(nothing.fileno(), 0)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)


def _wait(process: int, seconds: float) -> int | None:
  """Waits for a process; returns its status as `Run` has it."""
  handle = os.pidfd_open(process)
  ended, _, _ = select.select([handle], [], [], seconds)
  os.close(handle)
  if not ended:
    os.kill(process, signal.SIGKILL)
  status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
  return status if ended else None


def _import(names: Sequence[str]) -> None:
  """Imports modules, so that forked processes have them."""
  for name in names:
    # ONNX Runtime starts a thread when it is imported.
    if not name.startswith(("__main__", "onnxruntime")):
      with contextlib.suppress(Exception):  # some modules are made by others and have no file
        importlib.import_module(name)
  threads = len(os.listdir("/proc/self/task"))
  if threads > 1:
    raise SystemExit(f"error: imports have started {threads - 1} threads, so forks are not safe")


if __name__ == "__main__":
  main()
