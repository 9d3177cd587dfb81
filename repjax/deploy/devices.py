"""How devices are used in inference: one of them, or all by `jax.pmap`; see also `streams`.

A batch that runs on D devices is padded to a multiple of D. Whether that or one device is faster is
measured when a batch size is compiled, also where nothing has to be padded: passing work around can
cost more than it saves.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from repjax.errors import InputError

_AXIS = "batch"
_ROUNDS = 3


class Plan(NamedTuple):
  """How batches of one size run.

  Attributes:
    devices: how many take part.
    images: how many run: the batch size, rounded up to a multiple of `devices`.
    seconds: of a batch, from images on the host to results on the host, by number of devices;
      empty where there was nothing to choose.
    compile_seconds: for all that was tried; little where the programs were on the disk.
  """

  devices: int
  images: int
  seconds: Mapping[int, float]
  compile_seconds: float


class Program:
  """A function compiled for batches of one size on some devices."""

  def __init__(
    self,
    function: Callable[[Any, jax.Array], Any],
    placed: "Placed",
    count: int,
    batch: jax.ShapeDtypeStruct,
  ):
    """Compiles.

    Args:
      function: of the tree that was placed, and of images.
      placed: the tree on devices.
      count: devices to run on: 1 or all.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    self.devices, self.images = count, batch.shape[0] + -batch.shape[0] % count
    if count == 1:
      self._tree, self._sharding = placed.on_one, placed.one
      self._shape = (self.images, *batch.shape[1:])
      mapped = jax.jit(function)
    else:
      self._tree, self._sharding = placed.on_all, placed.split
      self._shape = (count, self.images // count, *batch.shape[1:])
      mapped = jax.pmap(function, _AXIS, in_axes=(None, 0), devices=placed.devices)
    shape = jax.ShapeDtypeStruct(self._shape, batch.dtype, sharding=self._sharding)
    self._compiled = mapped.lower(self._tree, shape).compile()

  def start(self, images: Any) -> Any:
    """Starts to compute what `finish` takes, of at most as many images as this is made for."""
    images = padded(images, self.images)
    if images.shape != self._shape:
      images = np.asarray(images).reshape(self._shape)  # (D, N / D, H, W, 3)
    return self._compiled(self._tree, jax.device_put(images, self._sharding))

  def finish(self, results: Any, count: int) -> Any:
    """Waits for results; the first `count` rows of each, on the host."""
    return jax.tree.map(lambda rows: self._joined(np.asarray(rows))[:count], results)

  def _joined(self, rows: np.ndarray) -> np.ndarray:
    return rows if self.devices == 1 else rows.reshape(-1, *rows.shape[2:])


class Placed:
  """A tree of arrays, whole on each of some devices.

  Attributes:
    devices: of this process.
    on_one: the tree on the first device.
    on_all: the tree on all of them.
  """

  def __init__(self, tree: Any, devices: Sequence[Any] | None = None):
    """Copies the tree.

    Raises:
      InputError: no devices, one of them twice, of several kinds, or of another process.
    """
    self.devices = tuple(jax.local_devices() if devices is None else devices)
    check(self.devices)
    mesh = Mesh(np.array(self.devices), (_AXIS,))
    self.one = SingleDeviceSharding(self.devices[0])
    self.split = NamedSharding(mesh, PartitionSpec(_AXIS))
    self.on_all = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    self.on_one = jax.tree.map(lambda leaf: leaf.addressable_data(0), self.on_all)

  def program(
    self, function: Callable[[Any, jax.Array], Any], batch: jax.ShapeDtypeStruct
  ) -> tuple[Program, Plan]:
    """The function for one batch size on one device or on all, whichever is faster."""
    start = time.perf_counter()
    # One image on one device of several takes as long as it takes there, and a little more.
    counts = (1, len(self.devices)) if len(self.devices) > 1 and batch.shape[0] > 1 else (1,)
    programs = [Program(function, self, count, batch) for count in counts]
    compile_seconds = time.perf_counter() - start
    seconds = measure(programs, batch) if len(programs) > 1 else {}
    fastest = min(programs, key=lambda program: seconds.get(program.devices, 0))
    return fastest, Plan(fastest.devices, fastest.images, seconds, compile_seconds)


def measure(programs: Sequence[Program], batch: jax.ShapeDtypeStruct) -> dict[int, float]:
  """Median seconds of a batch by number of devices, over rounds in which each runs once."""
  noise = np.random.default_rng(0).integers(0, 256, batch.shape).astype(batch.dtype)
  times = {program.devices: [] for program in programs}
  for _ in range(1 + _ROUNDS):
    for program in programs:
      start = time.perf_counter()
      program.finish(program.start(noise), len(noise))
      times[program.devices].append(time.perf_counter() - start)
  return {count: statistics.median(row[1:]) for count, row in times.items()}


def padded(images: Any, count: int) -> Any:
  """Images followed by as many of zeros as make `count` of them."""
  if len(images) == count:
    return images
  result = np.zeros((count, *images.shape[1:]), images.dtype)
  result[: len(images)] = images
  return result


def check(devices: Sequence[Any]) -> None:
  """Raises InputError: no devices, one of them twice, of several kinds, or of another process."""
  kinds = {device.platform for device in devices}
  own = set(jax.local_devices(backend=devices[0].platform)) if devices else set()
  if len(kinds) != 1 or len(set(devices)) != len(devices) or not own.issuperset(devices):
    raise InputError(
      f"devices are different ones of this process and of one kind, got {list(devices)}; choose "
      "among jax.local_devices(), or leave them out for all"
    )
