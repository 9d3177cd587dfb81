"""Fair timing: what is compared takes turns, so that all of it meets the same noise."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

Turn = Callable[[int, int], Any]
"""Takes the number of a round and a number of calls; makes the calls and waits for the results."""


def time_in_turns(
  turns: Mapping[str, Turn],
  rounds: int,
  calls: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Returns the seconds of a call in each round, after a warm-up.

  A turn starts with one call without timing. This call brings the subject's data back into the
  caches, and lets the threads of the previous subject fall asleep. The subject that starts a round
  changes from round to round.

  Args:
    turns: name of a subject to its turn.
    rounds: number of rounds; every subject has one turn in each round.
    calls: timed calls in a turn.
    clock: returns seconds since some moment.
  """
  names = list(turns)
  seconds = {name: [] for name in names}
  for turn in turns.values():
    turn(0, 2)
  for number in range(rounds):
    first = number % len(names)
    for name in names[first:] + names[:first]:
      turns[name](number, 1)
      begin = clock()
      turns[name](number, calls)
      seconds[name].append((clock() - begin) / calls)
  return seconds


def cpus() -> int:
  """Returns the number of CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
