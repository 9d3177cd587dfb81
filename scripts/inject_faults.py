"""Lets commands fail at every call that changes files, and checks what is left on the disk.

A library in C counts the calls that a command makes below a folder: open, write, rename, unlink,
fsync and more, from Python and from C++. Then the command runs again and again, each time with one
fault at a different call. After each fault the folder must hold the old content or the new content,
and other people's files must be as they were. Then the same command runs without a fault. It must
succeed, and leave exactly what it leaves where no fault happened.

Faults:
  kill       SIGKILL before the call
  torn       SIGKILL after half of a write
  signal     SIGTERM before the call
  interrupt  SIGINT before the call, as from Ctrl-C
  enospc     this call alone finds the disk full
  full       the disk is full from this call on
  readonly   the file system is read-only from this call on
  eacces     this call alone is not permitted
  eio        this call alone meets an I/O error

The table counts the runs with a problem of each kind:
  lost       content that was there before, or that a success promised, is gone
  wrong      content is neither the old nor the new, or a mixture
  foreign    other people's files were changed
  ending     a traceback, an unknown signal, no end, or an error that is not one paragraph
  stuck      the same command failed afterwards without a fault
  left over  files of the run with the fault stayed after the command had succeeded

The exit status is 1 unless all counts are zero. Everything at every call takes more than a day on
two cores; every fiftieth call takes about an hour.

Examples:
  python scripts/inject_faults.py --every 50
  python scripts/inject_faults.py --commands convert export --faults kill full
  python scripts/inject_faults.py --commands convert --faults kill --at 230
"""

import argparse
import collections
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tqdm
from faults.cases import CASES, Preparation
from faults.contents import Problem
from faults.server import FAULTS, Server
from faults.trial import Trial

KINDS = ("lost", "wrong", "foreign", "ending", "stuck", "left over")


class Result(NamedTuple):
  """A run with a fault.

  Attributes:
    command, fault: keys of CASES and FAULTS.
    at: number of the call with the fault.
    ended: how the command ended, in words.
    problems: everything that is not as it should be.
    seconds: duration of the run, of the checks and of the run after the fault.
  """

  command: str
  fault: str
  at: int
  ended: str
  problems: list[Problem]
  seconds: float


def main() -> None:
  arguments = _parse()
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
    base = (arguments.folder or Path(temporary)).resolve()
    for name in ("prepared", "case"):  # of an earlier call; its compiled programs stay
      shutil.rmtree(base / name, ignore_errors=True)
    base.mkdir(parents=True, exist_ok=True)
    results = []
    with contextlib.ExitStack() as stack:
      server = stack.enter_context(Server(base, _environment(base)))
      file = stack.enter_context(arguments.json.open("w")) if arguments.json else None
      for result in _results(arguments, server, base):
        results.append(result)
        if file:
          print(_as_json(result), file=file, flush=True)
  print(format_table(results))
  sys.exit(1 if any(result.problems for result in results) else 0)


def _as_json(result: Result) -> str:
  """Returns a run as one line of JSON."""
  problems = [problem._asdict() for problem in result.problems]
  return json.dumps({**result._asdict(), "problems": problems})


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--commands",
    nargs="+",
    choices=CASES,
    default=list(CASES),
    metavar="NAME",
    help=f"commands to run: {', '.join(CASES)} (default: all)",
  )
  parser.add_argument(
    "--faults",
    nargs="+",
    choices=FAULTS,
    default=list(FAULTS),
    metavar="NAME",
    help=f"faults: {', '.join(FAULTS)} (default: all)",
  )
  parser.add_argument(
    "--every", type=int, default=1, metavar="K", help="take every K-th call (default: 1)"
  )
  parser.add_argument(
    "--first", type=int, default=1, metavar="N", help="number of the first call (default: 1)"
  )
  parser.add_argument(
    "--at",
    type=int,
    nargs="+",
    metavar="N",
    help="take these calls only, and show what the command prints",
  )
  parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
  parser.add_argument(
    "--json", type=Path, help="also write each run to this file, as a line of JSON, when it ends"
  )
  return parser.parse_args()


def _environment(base: Path) -> dict[str, str]:
  """Returns variables with which commands are quick and keep their caches apart."""
  return {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    "TFDS_DATA_DIR": str(base / "tfds"),
    "XDG_CACHE_HOME": str(base / "cache"),
  }


def _results(arguments: argparse.Namespace, server: Server, base: Path) -> Iterator[Result]:
  """Yields a result for each run with a fault."""
  preparation, shown = Preparation(server, base), set()
  for command in arguments.commands:
    print(f"preparing {command}", flush=True)
    trial = Trial(server, preparation.case, CASES[command](preparation))
    for name in arguments.faults:
      calls = trial.count(FAULTS[name])
      chosen = arguments.at or range(arguments.first, calls + 1, arguments.every)
      bar = tqdm.tqdm(chosen, desc=f"{command}, {name}", disable=None)
      for at in bar:
        start = time.perf_counter()
        ended, problems = trial.run(FAULTS[name], at)
        result = Result(command, name, at, ended, problems, time.perf_counter() - start)
        if arguments.at:
          print(*trial.outputs, sep="\n")
        for problem in problems:
          if (name, problem) not in shown:
            shown.add((name, problem))
            lines = problem.text.strip().splitlines()
            text = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
            bar.write(f"{command}, {name} at call {at} of {calls}: {problem.kind}: {text}")
        yield result


def format_table(results: Sequence[Result]) -> str:
  """Returns a row for each command and fault, and a row for the sum."""
  groups = collections.defaultdict(list)
  for result in results:
    groups[result.command, result.fault].append(result)
  groups["all", ""] = list(results)
  width = max(len("command"), *(len(command) for command, _ in groups)) + 2
  head = f"{'command':<{width}}{'fault':<11}{'runs':>6}"
  lines = [head + "".join(f"{kind:>11}" for kind in KINDS) + "  ended"]
  for (command, fault), group in groups.items():
    # A run counts once in each column, however many problems it has.
    counts = collections.Counter(
      kind for result in group for kind in {problem.kind for problem in result.problems}
    )
    ends = collections.Counter(result.ended for result in group).most_common()
    ended = ", ".join(f"{count} {end}" for end, count in ends)
    row = f"{command:<{width}}{fault:<11}{len(group):>6}"
    lines.append(row + "".join(f"{counts[kind]:>11}" for kind in KINDS) + f"  {ended}")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
