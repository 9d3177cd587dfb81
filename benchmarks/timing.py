"""Timing of several subjects in turns, and the file of results, for all benchmarks.

`repjax.timing.time_in_turns` says how a turn is timed, and why the subjects take turns.
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
from repjax.timing import Turn, cpus, time_in_turns
from repjax.xla import safe_options


class Plan(NamedTuple):
  """The bytes that XLA plans for a call of a program, on each device.

  Attributes:
    temporary: intermediate values.
    arguments: inputs, weights and, for a training step, the rest of the state.
    accessed: bytes that the operations read and write, where each value counts at each use. XLA
      estimates them after it has merged operations.
  """

  temporary: int
  arguments: int
  accessed: int


class Running(NamedTuple):
  """A subject that has started.

  Attributes:
    run: takes an input and returns an output, which may not be ready yet.
    memory: returns the bytes that a call needs, inputs and weights included; None if unknown.
    plan: returns what XLA plans; None if unknown.
  """

  run: Callable[[Any], Any]
  memory: Callable[[], int | None] = lambda: None
  plan: Callable[[], Plan | None] = lambda: None


class Subject(NamedTuple):
  """A program to time.

  Attributes:
    start: takes a prepared input and returns the running subject. Compilation happens here, or in
      the first call.
    prepare: returns an input in the subject's layout, on the subject's device; not timed.
    wait: waits until an output is ready.
    read: returns an output as a NumPy array, for comparison.
  """

  start: Callable[[Any], Running]
  prepare: Callable[[Any], Any] = jnp.asarray
  wait: Callable[[Any], Any] = jax.block_until_ready
  read: Callable[[Any], np.ndarray] = np.asarray


class Result(NamedTuple):
  """The measurements of a subject.

  Attributes:
    seconds: seconds of a call, as [repeat][round].
    compile_s: seconds from the start to the first output, for each repeat.
    memory: bytes that a call needs, as in `Running`.
    plan: what XLA plans, as in `Running`.
  """

  seconds: list[list[float]]
  compile_s: list[float]
  memory: int | None
  plan: Plan | None = None

  @property
  def all_seconds(self) -> list[float]:
    """The seconds of a call in all rounds of all repeats."""
    return [value for repeat in self.seconds for value in repeat]

  @property
  def median(self) -> float:
    """The median seconds of a call."""
    return statistics.median(self.all_seconds)


def plan_of(executable: Any) -> Plan | None:
  """Returns what XLA plans for a compiled program, or None if XLA does not say."""
  memory, costs = executable.memory_analysis(), executable.cost_analysis()
  if memory is None or not costs:
    return None
  accessed = int(costs["bytes accessed"])
  return Plan(memory.temp_size_in_bytes, memory.argument_size_in_bytes, accessed)


def program(
  function: Callable[[Any, Any], Any], held: Any, dtype: jax.typing.DTypeLike = "float32"
) -> Subject:
  """Returns the subject that computes `function(held, input)`, compiled by JAX.

  Each start copies `held`, since speed depends on the place of arrays in memory.

  Args:
    function: takes `held` and an input, and returns an output.
    held: tree of arrays, usually the variables of a model.
    dtype: dtype of the computation.
  """
  options = safe_options(jax.devices()[0], dtype)

  def start(x: Any) -> Running:
    copied = jax.tree.map(jnp.copy, held)
    executable = jax.jit(function, compiler_options=options).lower(copied, x).compile()
    return Running(functools.partial(executable, copied), lambda: planned_bytes(executable))

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
  """Times subjects in turns, and returns the measurements by name.

  Args:
    subjects: name to subject.
    inputs: inputs of the rounds, in cyclic order.
    rounds: number of rounds in each repeat.
    repeats: number of times that all subjects start again.
    calls: calls in a turn before the wait. One call measures latency; more calls keep a device
      busy and measure throughput.
    clock: returns seconds since some moment.
    check: takes the outputs of all subjects for the first input, before anything is timed, and
      raises where they differ.
  """
  seconds, compile_s = ({name: [] for name in subjects} for _ in range(2))
  started = {}
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
      started[name] = running
    check(outputs)
    for name, row in time_in_turns(turns, rounds, calls, clock).items():
      seconds[name].append(row)
  return {
    name: Result(seconds[name], compile_s[name], running.memory(), running.plan())
    for name, running in started.items()
  }


def _turn(run: Callable[[Any], Any], wait: Callable[[Any], Any], inputs: Sequence[Any]) -> Turn:
  """Returns the turn of a subject, whose input depends on the number of the round."""

  def turn(number: int, calls: int) -> None:
    x = inputs[number % len(inputs)]
    output = None
    for _ in range(calls):
      output = run(x)
    wait(output)

  return turn


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """Returns the median over the rounds of numerator / denominator."""
  return statistics.median(a / b for a, b in zip(numerators, denominators))


def spread_of_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
  """Returns the median and the quartiles over the rounds of numerator / denominator, for a row."""
  ratios = [a / b for a, b in zip(numerators, denominators)]
  low, median, high = statistics.quantiles(ratios, n=4)
  return {"ratio": median, "quartiles": [low, high]}


def relative_errors(
  outputs: Mapping[str, np.ndarray], expected: np.ndarray, tolerance: float
) -> dict[str, float]:
  """Returns max|a - b| / max|b| of each output a against the expected b.

  Raises:
    InputError: an error is larger than the tolerance, or is not a number.
  """
  scale = np.abs(expected).max()
  errors = {name: float(np.abs(y - expected).max() / scale) for name, y in outputs.items()}
  for name, error in errors.items():
    if not error <= tolerance:
      raise InputError(
        f"{name} differs from repjax by a relative error of {error:.1e}, where at most "
        f"{tolerance:.0e} is expected. Its speed would mean nothing, so nothing was timed. "
        f"Leave out {name} to time the other subjects"
      )
  return errors


def random_images(batch_size: int, image_size: int, count: int = 1) -> list[np.ndarray]:
  """Returns `count` batches of noise (N, H, W, 3)."""
  shape = (batch_size, image_size, image_size, 3)
  rng = np.random.default_rng(0)
  return [rng.standard_normal(shape, np.float32) for _ in range(count)]


def cpu_time() -> float:
  """Returns the CPU seconds of this process and of its finished child processes."""
  times = os.times()
  return time.process_time() + times.children_user + times.children_system


def machine() -> dict[str, Any]:
  """Returns the facts about the machine that results depend on, and its load in the last minute."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": platform.processor() or platform.machine(),
    "cpus": cpus(),
    "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
    "jax": jax.__version__,
  }


def write_json(path: Path, facts: dict[str, Any], **results: Any) -> None:
  """Writes results as JSON, after the facts about the machine and the run."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({**machine(), **facts, **results}, indent=2) + "\n")
