"""Which algorithm computes each convolution: measured once on each kind of machine.

What was measured is kept in `repjax/measured` in the user's cache folder, so that another process,
or another model with layers of the same shapes, has it at once. Choices also decide how results are
rounded: on one machine they stay the same as long as that folder does.
"""

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.cache import recall, remember
from repjax.deploy.convolutions import ALGORITHMS, Convolution, suitable
from repjax.deploy.rewrite import (
  Function,
  Path,
  computed_by,
  convolutions_in,
  kernel_of,
  prepared,
  with_kernels,
)
from repjax.deploy.xla import compiled

PIECE = 4
"""Images for which is measured: what is fastest for these is so for more, and seen sooner."""

_VERSION = 1  # of the algorithms and of how they are compiled: with another, all is measured anew
_ROUNDS = 3
_GAIN = 0.95  # of the time of `direct`, below which another algorithm is worth it


class Tuned(NamedTuple):
  """A function whose convolutions are computed in the fastest way.

  Attributes:
    function: of the tree and inputs.
    tree: with the kernels that it takes.
    choices: names of algorithms by path, where it is not "direct".
  """

  function: Function
  tree: Any
  choices: Mapping[Path, str]


class Tuner:
  """Makes functions of one tree `Tuned`; kernels that several take are made and placed once."""

  def __init__(self, tree: Any, device: Any, place: Callable[[np.ndarray], jax.Array]):
    """Measures nothing yet.

    Args:
      tree: of arrays on devices.
      device: one like those, to measure on.
      place: puts an array on all of them.
    """
    self._tree, self._device, self._place = tree, device, place
    self._kernels: dict[tuple[Path, str], jax.Array] = {}

  def __call__(self, function: Function, inputs: Any) -> Tuned:
    """A function for one batch size.

    Args:
      function: of the tree and inputs.
      inputs: their shapes, with the images first, and dtypes.
    """
    few = jax.tree.map(
      lambda one: jax.ShapeDtypeStruct((min(one.shape[0], PIECE), *one.shape[1:]), one.dtype),
      inputs,
    )
    found = convolutions_in(function, self._tree, few)
    names = fastest(found.values(), self._device)
    choices = {path: names[one] for path, one in found.items() if names[one] != "direct"}
    for path, name in choices.items():
      if (path, name) not in self._kernels:
        kernel = prepared(kernel_of(self._tree, path), name, found[path])
        self._kernels[path, name] = self._place(kernel)
    kernels = {path: self._kernels[path, name] for path, name in choices.items()}
    tree = with_kernels(self._tree, kernels)
    return Tuned(computed_by(function, choices, found), tree, choices)


def tuner(
  tree: Any, device: Any, place: Callable[[np.ndarray], jax.Array], tune: bool
) -> Tuner | None:
  """A Tuner if there is something to choose; on a GPU there is not, since cuDNN chooses itself."""
  return Tuner(tree, device, place) if tune and device.platform == "cpu" else None


def fastest(convolutions: Iterable[Convolution], device: Any) -> dict[Convolution, str]:
  """The name of the fastest algorithm for each, as it was measured on this kind of machine."""
  wanted = set(convolutions)
  questions = {one: _question(one, device) for one in wanted}
  names = {one: recall(questions[one]) for one in wanted}
  new = [one for one, name in names.items() if name not in suitable(one)]
  for one in _with_progress(new):
    names[one] = _measured(one, device)
    remember(questions[one], names[one])  # at once: who interrupts need not begin again
  return names


def _with_progress(convolutions: Sequence[Convolution]) -> Iterable[Convolution]:
  """The same with a bar on a terminal."""
  if not convolutions:
    return ()
  import tqdm

  title = "measuring which convolutions are fastest"
  return tqdm.tqdm(convolutions, title, leave=False, disable=None)


def seconds(wanted: Convolution, names: Iterable[str], device: Any) -> dict[str, list[float]]:
  """Seconds of each algorithm with bias and ReLU behind it, in rounds in which each runs once."""
  rng = np.random.default_rng(0)
  x = jax.device_put(rng.standard_normal(wanted.images).astype(wanted.dtype), device)
  bias = jnp.zeros(wanted.kernel[-1:], wanted.dtype, device=device)
  kernel = rng.standard_normal(wanted.kernel)
  runs = {}
  for name in names:
    algorithm = ALGORITHMS[name]
    held = jax.device_put(algorithm.prepare(kernel, wanted).astype(wanted.dtype), device)
    run = compiled(jax.jit(functools.partial(_layer, name, wanted)).lower(x, held, bias), device)
    runs[name] = functools.partial(run, x, held, bias)
  times = {name: [] for name in runs}
  for _ in range(1 + _ROUNDS):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: row[1:] for name, row in times.items()}


def _layer(name: str, wanted: Convolution, x: Any, kernel: Any, bias: Any) -> jax.Array:
  return jax.nn.relu(ALGORITHMS[name].compute(x, kernel, wanted) + bias.reshape(1, 1, 1, -1))


def _measured(wanted: Convolution, device: Any) -> str:
  names = suitable(wanted)
  if len(names) == 1:
    return names[0]
  # Others' work only adds to a time, so the least is the best estimate.
  times = {name: min(row) for name, row in seconds(wanted, names, device).items()}
  name = min(times, key=lambda name: times[name])
  return name if times[name] < _GAIN * times["direct"] else "direct"


def _question(wanted: Convolution, device: Any) -> str:
  return f"the fastest of {suitable(wanted)} for {tuple(wanted)} on {machine(device)}"


def machine(device: Any) -> str:
  """What speed depends on besides the program."""
  devices = len(device.client.devices())
  return f"{_processor()}, {devices} devices, jax {jax.__version__}, algorithms {_VERSION}"


@functools.cache
def _processor() -> str:
  model = platform.processor() or platform.machine()
  with contextlib.suppress(OSError, StopIteration):
    lines = File("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
  cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{model}, {cpus} CPUs"
