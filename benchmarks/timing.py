"""What the benchmarks share: subjects that are timed in turns, and the file of their results.

Subjects take turns in rounds, so that all meet the same noise; who begins moves on from round to
round. A turn is one call that is not timed, which brings back the subject's own data into the
caches and lets the threads of the one before fall asleep, then the timed ones, then waiting.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.deploy.xla import planned_bytes
from repjax.errors import InputError


class Running(NamedTuple):
  """A subject that is ready.

  Attributes:
    run: takes an input and returns an output, which may be on its way yet.
    memory: bytes that a call needs with all that it reads, where it can be told.
  """

  run: Callable[[Any], Any]
  memory: Callable[[], int | None] = lambda: None


class Subject(NamedTuple):
  """Something to be timed.

  Attributes:
    start: takes a prepared input and makes ready for such; what compiles compiles here, or in the
      first call.
    prepare: an input in the subject's own layout and on its device, which is not timed.
    wait: until an output is there.
    read: an output as numbers to compare.
  """

  start: Callable[[Any], Running]
  prepare: Callable[[Any], Any] = jnp.asarray
  wait: Callable[[Any], Any] = jax.block_until_ready
  read: Callable[[Any], np.ndarray] = np.asarray


class Result(NamedTuple):
  """What was measured of a subject.

  Attributes:
    seconds: of a call, as [repeat][round].
    compile_s: from the start to the first output, of each repeat.
    memory: see `Running`.
  """

  seconds: list[list[float]]
  compile_s: list[float]
  memory: int | None

  @property
  def all_seconds(self) -> list[float]:
    """Of all repeats."""
    return [value for repeat in self.seconds for value in repeat]

  @property
  def median(self) -> float:
    """Seconds of a call."""
    return statistics.median(self.all_seconds)


Turn = Callable[[int, int], Any]
"""Takes the round's number and a number of calls, makes these and waits until they are done."""


def program(function: Callable[[Any, Any], Any], held: Any) -> Subject:
  """`function(held, input)`, compiled by JAX.

  Each start copies what is held, since speed depends on where it lies in memory.
  """

  def start(x: Any) -> Running:
    own = jax.tree.map(jnp.copy, held)
    executable = jax.jit(function).lower(own, x).compile()
    return Running(functools.partial(executable, own), lambda: planned_bytes(executable))

  return Subject(start)


def race(
  subjects: Mapping[str, Subject],
  inputs: Sequence[Any],
  *,
  rounds: int,
  repeats: int = 1,
  calls: int = 1,
  clock: Callable[[], float] = time.perf_counter,
  check: Callable[[dict[str, np.ndarray]], Any] = lambda outputs: None,
) -> dict[str, Result]:
  """Times subjects in turns.

  Args:
    subjects: by name.
    inputs: rounds take one after another, from the first again behind the last.
    rounds: of each repeat.
    repeats: how often all subjects are started anew.
    calls: in a turn before waiting. With 1 times are latencies; more keep a device busy.
    clock: seconds since some moment.
    check: sees what every subject makes of the first input before anything is timed.
  """
  seconds, compile_s = ({name: [] for name in subjects} for _ in range(2))
  memory = {}
  for _ in range(repeats):
    turns, outputs = {}, {}
    for name, subject in subjects.items():
      prepared = [subject.prepare(x) for x in inputs]
      begin = clock()
      running = subject.start(prepared[0])
      output = running.run(prepared[0])
      subject.wait(output)
      compile_s[name].append(clock() - begin)
      outputs[name] = subject.read(output)
      turns[name] = _turn(running.run, subject.wait, prepared)
      memory[name] = running.memory
    check(outputs)
    for name, row in time_in_turns(turns, rounds, calls, clock).items():
      seconds[name].append(row)
  return {name: Result(seconds[name], compile_s[name], memory[name]()) for name in subjects}


def _turn(run: Callable[[Any], Any], wait: Callable[[Any], Any], inputs: Sequence[Any]) -> Turn:
  def turn(number: int, calls: int) -> None:
    x = inputs[number % len(inputs)]
    output = None
    for _ in range(calls):
      output = run(x)
    wait(output)

  return turn


def time_in_turns(
  turns: Mapping[str, Turn],
  rounds: int,
  calls: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Seconds of a call of each in each round, after a warm-up."""
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


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """The median of the rounds' ratios."""
  return statistics.median(a / b for a, b in zip(numerators, denominators))


def relative_errors(
  outputs: Mapping[str, np.ndarray], expected: np.ndarray, tolerance: float
) -> dict[str, float]:
  """max|a - b| / max|b| of each output a against b.

  Raises:
    InputError: one is larger than the tolerance, or no number.
  """
  scale = np.abs(expected).max()
  errors = {name: float(np.abs(y - expected).max() / scale) for name, y in outputs.items()}
  for name, error in errors.items():
    if not error <= tolerance:
      raise InputError(
        f"{name} computes something else than repjax: the relative error is {error:.1e}, where at "
        f"most {tolerance:.0e} is expected; its speed would mean nothing, so nothing was timed. "
        "Leave it out to time the others"
      )
  return errors


def random_images(batch_size: int, image_size: int, count: int = 1) -> list[np.ndarray]:
  """Noise (N, H, W, 3), several times."""
  shape = (batch_size, image_size, image_size, 3)
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape, np.float32) for _ in range(count)]


def cpu_time() -> float:
  """Seconds of this process on CPUs, and of those that it has started, as compilers are."""
  times = os.times()
  return time.process_time() + times.children_user + times.children_system


def cpus() -> int:
  """Those that this process may use, and how many threads every subject gets on a CPU."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
  """What results depend on besides the code; the load is that of the minute before."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": platform.processor() or platform.machine(),
    "cpus": cpus(),
    "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
    "jax": jax.__version__,
  }


def write_json(path: Path, facts: dict[str, Any], **results: Any) -> None:
  """Writes results, with the machine that gave them first."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({**machine(), **facts, **results}, indent=2) + "\n")
