"""Reads each file it is given in a process of its own and prints as JSON what that cost.

Each process may use 3 GB more than it starts with and 10 s of processor time.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

from repjax.errors import InputError
from repjax.weights import read


def main() -> None:
  results = {}
  for path in sys.argv[1:]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
      os.write(writing, json.dumps(_cost(path)).encode())
      os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
      results[path] = json.loads(pipe.read() or f'{{"error": "status {status}"}}')
  print(json.dumps(results))


def _cost(path: str) -> dict[str, object]:
  pages = int(Path("/proc/self/statm").read_text().split()[0])
  room = pages * resource.getpagesize() + 3 * 2**30
  resource.setrlimit(resource.RLIMIT_AS, (room, room))
  resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
  before, begin = _peak(), time.process_time()
  try:
    read(path)
    error, text = "none", ""
  except InputError as caught:
    error, text = "InputError", str(caught)
  except BaseException as caught:
    error, text = type(caught).__name__, ""
  seconds, size = time.process_time() - begin, (_peak() - before) / 1024
  return {"error": error, "text": text[:1000], "seconds": seconds, "megabytes": size}


def _peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
  main()
