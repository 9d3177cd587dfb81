"""Several processes on this machine, joined into one run."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

from tests.training import tiny

SECONDS = 300


class Ended(NamedTuple):
  """The end of a process: its exit status and its output."""

  returncode: int
  stdout: str
  stderr: str


def run(*arguments, folders, cache, devices=2):
  """Runs Python with the same arguments in a process for each folder, until all have ended.

  Args:
    *arguments: of each.
    folders: in which they are, and where they write what they print.
    cache: folder for compiled programs.
    devices: of each process.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = []
  for index, folder in enumerate(folders):
    environment = {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_NUM_PROCESSES": str(len(folders)),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
      "JAX_PLATFORMS": "cpu",
      "JAX_PROCESS_ID": str(index),
      "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
      "PATH": os.defpath,
      "HOME": str(cache),
      "PYTHONPATH": str(tiny.ROOT),
      "XDG_CACHE_HOME": str(cache),
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    command = [sys.executable, *map(str, arguments)]
    outputs = [open(f"{folder}.{name}", "w+") for name in ("stdout", "stderr")]  # noqa: SIM115
    processes.append(
      (
        subprocess.Popen(
          command, cwd=folder, env=environment, text=True, stdout=outputs[0], stderr=outputs[1]
        ),
        outputs,
      )
    )
  try:
    for process, _ in processes:
      process.wait(SECONDS)
  finally:
    for process, _ in processes:
      process.kill()
      process.wait()
    ended = [_ended(*each) for each in processes]
  return ended


def _ended(process, outputs):
  texts = []
  for output in outputs:
    output.seek(0)
    texts.append(output.read())
    output.close()
  return Ended(process.returncode, *texts)
