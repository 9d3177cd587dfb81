"""Fair timing: what is compared takes turns, so that all of it meets the same noise."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

Turn = Callable[[int, int], Any]
"""Takes the number of a round and a number of calls; makes the calls and waits for the results."""


REST = 0.1
"""Seconds before a turn. ONNX Runtime's threads wait for more work on their cores, for 0.05 s after
a call, and whoever comes next lacks these cores."""

_SHORT = 0.05  # After a first call of fewer seconds, two more bring caches and threads to speed.


def time_turn(
  turn: Turn, number: int, calls: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
  """Returns the seconds of a call in one turn, after a rest and calls that are not timed.

  The rest lets the threads of the previous subject fall asleep. The calls bring the subject's data
  back into the caches, and wake its own threads.

  Args:
    turn: the turn of a subject.
    number: number of the round.
    calls: timed calls.
    clock: returns seconds since some moment.
  """
  time.sleep(REST)
  begin = clock()
  turn(number, 1)
  if clock() - begin < _SHORT:
    turn(number, 2)
  begin = clock()
  turn(number, calls)
  return (clock() - begin) / calls


def time_in_turns(
  turns: Mapping[str, Turn],
  rounds: int,
  calls: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Returns the seconds of a call in each round.

  Each subject makes two calls before the first round. The subject that starts a round changes from
  round to round. `time_turn` says how a turn is timed.

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
      seconds[name].append(time_turn(turns[name], number, calls, clock))
  return seconds


def cpus() -> int:
  """Returns the number of CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
