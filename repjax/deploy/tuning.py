"""Chooses the fastest algorithm for each convolution, by measuring once on each kind of machine.

Measurements are kept in `repjax/measured` in the user's cache folder. A different process, or a
different model with layers of the same shapes, finds them there. The chosen algorithms also decide
how results are rounded: results on one machine stay the same for as long as this folder exists.
"""

import contextlib
import functools
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax.cache import recall, remember
from repjax.deploy.convolutions import ALGORITHMS, Convolution, suitable
from repjax.deploy.rewrite import (
  computed_by,
  convolutions_in,
  kernel_of,
  prepare_kernel,
  scope_of,
  with_kernels,
)
from repjax.deploy.xla import compile_lowered
from repjax.functions import Function
from repjax.timing import cpus

CHUNK = 4
"""The largest number of images to measure with. What is fastest for these is so for more images."""

_VERSION = 1  # Raise it when an algorithm or its compilation changes, and all is measured anew.
_FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 15, 0.2
_WORTHWHILE = 0.95  # An algorithm replaces `direct` if it takes less than this share of the time.


class Tuned(NamedTuple):
  """A function whose convolutions are computed by the fastest algorithms.

  Attributes:
    function: a function of `tree` and of inputs.
    tree: parameters, with kernels prepared for the algorithms.
    choices: scope of a convolution to name of its algorithm, where it is not "direct".
  """

  function: Function
  tree: Any
  choices: Mapping[str, str]


class Tuner:
  """Makes functions of one tree `Tuned`.

  Functions for several batch sizes share the tree. A prepared kernel that several of them need is
  made and copied to the devices once.
  """

  def __init__(self, tree: Any, device: Any, place: Callable[[np.ndarray], jax.Array]):
    """Keeps the arguments and measures nothing yet.

    Args:
      tree: arrays on devices.
      device: the device to measure on, of the same kind as the tree's devices.
      place: copies an array to all of the tree's devices.
    """
    self._tree, self._device, self._place = tree, device, place
    self._kernels: dict[tuple[str, str], jax.Array] = {}

  def __call__(self, function: Function, inputs: Any) -> Tuned:
    """Chooses an algorithm for each convolution of a function, for one batch size.

    Args:
      function: a function of the tree and of inputs.
      inputs: shapes and dtypes of the inputs; the first axis is the batch.
    """
    few = jax.tree.map(
      lambda one: jax.ShapeDtypeStruct((min(one.shape[0], CHUNK), *one.shape[1:]), one.dtype),
      inputs,
    )
    found = convolutions_in(function, self._tree, few)
    names = fastest(found.values(), self._device)
    choices = {leaf: names[conv] for leaf, conv in found.items() if names[conv] != "direct"}
    for leaf, name in choices.items():
      if (leaf, name) not in self._kernels:
        kernel = prepare_kernel(kernel_of(self._tree, leaf), name, found[leaf])
        self._kernels[leaf, name] = self._place(kernel)
    kernels = {leaf: self._kernels[leaf, name] for leaf, name in choices.items()}
    tree = with_kernels(self._tree, kernels)
    rewritten = computed_by(function, self._tree, choices, found)
    return Tuned(rewritten, tree, {scope_of(leaf): name for leaf, name in choices.items()})


def make_tuner(
  tree: Any, device: Any, place: Callable[[np.ndarray], jax.Array], tune: bool
) -> Tuner | None:
  """Returns a Tuner, or None if nothing is to be chosen: on GPUs, cuDNN chooses by itself."""
  return Tuner(tree, device, place) if tune and device.platform == "cpu" else None


def fastest(convolutions: Iterable[Convolution], device: Any) -> dict[Convolution, str]:
  """Returns the name of the fastest algorithm for each convolution on this kind of machine.

  What is not known from earlier measurements is measured now and remembered.
  """
  wanted = set(convolutions)
  questions = {conv: _question(conv, device) for conv in wanted}
  names = {conv: recall(questions[conv]) for conv in wanted}
  # The file of a measurement may be damaged and hold anything; then the convolution is new too.
  new = [conv for conv, name in names.items() if name not in suitable(conv)]
  for conv in _with_progress(new):
    names[conv] = _measure_fastest(conv, device)
    remember(questions[conv], names[conv])  # At once, so that an interrupted run loses nothing.
  return names


def _with_progress(convolutions: Sequence[Convolution]) -> Iterable[Convolution]:
  """Returns the convolutions with a progress bar, which shows on terminals only."""
  if not convolutions:
    return ()
  import tqdm

  title = "measuring which convolutions are fastest"
  return tqdm.tqdm(convolutions, title, leave=False, disable=None)


def time_algorithms(conv: Convolution, names: Iterable[str], device: Any) -> dict[str, list[float]]:
  """Times a layer computed by each algorithm: the convolution, its bias, and a ReLU.

  Every round runs each algorithm once, so that a disturbance of the machine slows all of them. The
  first round is warm-up and does not count. The shorter the layer, the more rounds there are, since
  a short disturbance can hide which algorithm is the fastest.

  Args:
    conv: the convolution.
    names: names of algorithms that suit the convolution.
    device: the device to run on.

  Returns:
    Name to seconds in each round.
  """
  rng = np.random.default_rng(0)
  x = jax.device_put(rng.standard_normal(conv.shape).astype(conv.dtype), device)
  bias = jnp.zeros(conv.kernel[-1:], conv.dtype, device=device)
  kernel = rng.standard_normal(conv.kernel_shape)
  runs = {}
  for name in names:
    algorithm = ALGORITHMS[name]
    held = jax.device_put(algorithm.prepare(kernel, conv).astype(conv.dtype), device)
    lowered = jax.jit(functools.partial(_layer, name, conv)).lower(x, held, bias)
    runs[name] = functools.partial(compile_lowered(lowered, device), x, held, bias)
  times = {name: [] for name in runs}
  begin = time.perf_counter()
  for done in range(1 + _MOST_ROUNDS):
    if done > _FEWEST_ROUNDS and time.perf_counter() - begin > _SECONDS:
      break
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: row[1:] for name, row in times.items()}


def _layer(name: str, conv: Convolution, x: Any, kernel: Any, bias: Any) -> jax.Array:
  """Computes a layer as a network has it: XLA merges bias and ReLU into some algorithms only."""
  shape = [1, 1, 1, 1]
  shape[conv.image_axes[3]] = -1
  return jax.nn.relu(ALGORITHMS[name].compute(x, kernel, conv) + bias.reshape(shape))


def _measure_fastest(conv: Convolution, device: Any) -> str:
  """Measures the suitable algorithms; one that is hardly faster than "direct" is not taken."""
  names = suitable(conv)
  if len(names) == 1:
    return names[0]
  # Other work on the machine only adds to a time, so the least time is the best estimate.
  times = {name: min(row) for name, row in time_algorithms(conv, names, device).items()}
  name = min(times, key=lambda name: times[name])
  return name if times[name] < _WORTHWHILE * times["direct"] else "direct"


def _question(conv: Convolution, device: Any) -> str:
  """Returns a text with everything that decides which algorithm is fastest."""
  # Answers are older than layouts: what has the usual one is asked without it.
  asked = tuple(conv) if conv != conv[:7] + Convolution(*conv[:7])[7:] else conv[:7]
  return f"the fastest of {suitable(conv)} for {asked} on {machine(device)}"


def machine(device: Any) -> str:
  """Describes everything besides the program that decides how fast a program is."""
  devices = len(device.client.devices())
  kind = "" if device.platform == "cpu" else f"{device.device_kind}, "
  return f"{kind}{_processor()}, {devices} devices, jax {jax.__version__}, algorithms {_VERSION}"


@functools.cache
def _processor() -> str:
  """Describes the processor: its model, and the number of CPUs that this process may use."""
  model = platform.processor() or platform.machine()
  # On Linux, `platform` says only "x86_64"; the model's name is in this file.
  with contextlib.suppress(OSError, StopIteration):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
  return f"{model}, {cpus()} CPUs"
