"""How devices are used in inference: one of them, or all by `jax.pmap`; see also `streams`.

A batch that runs on D devices is padded to a multiple of D. Whether that or one device is faster is
measured when a batch size is compiled, also where nothing has to be padded: passing work around can
cost more than it saves. So is whether a CPU computes a large batch at once or PIECE images after
another, whose maps stay in its caches.
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from repjax.cache import recall, remember
from repjax.deploy.rewrite import Function
from repjax.deploy.tuning import PIECE, machine, tuner
from repjax.deploy.xla import compiled, planned_bytes
from repjax.errors import InputError

_AXIS = "batch"
_ROUNDS = 3


class Way(NamedTuple):
  """How a batch may run.

  Attributes:
    devices: how many take part.
    piece: images that a device computes at once; one piece follows another in the same program.
  """

  devices: int
  piece: int


class Plan(NamedTuple):
  """How batches of one size run.

  Attributes:
    devices: as in `Way`, like `piece`.
    images: how many run: the batch size, rounded up to a multiple of `devices` and `piece`.
    seconds: of a batch, from images on the host to results on the host, by what was tried; empty
      where there was nothing to choose, or where what was chosen once was known.
    compile_seconds: for all that was tried; little where the programs were on the disk.
    memory: bytes that XLA plans for a device, with the parameters; None where it does not say.
    convolutions: how each is computed that is not left to XLA, by its scope's path, see
      `repjax.deploy.convolutions`.
  """

  devices: int
  piece: int
  images: int
  seconds: Mapping[Way, float]
  compile_seconds: float
  memory: int | None
  convolutions: Mapping[str, str]


class Program:
  """A function compiled for batches of one size on some devices."""

  def __init__(
    self,
    function: Function,
    placed: "Placed",
    way: Way,
    batch: jax.ShapeDtypeStruct,
  ):
    """Compiles.

    Args:
      function: of the tree that was placed, and of images.
      placed: the tree on devices.
      way: that the batch runs, on 1 device or on all.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    count, piece = self.way = way
    self.images = batch.shape[0] + -batch.shape[0] % (count * piece)
    tree, self.convolutions = placed.tree, {}
    if placed.tuner is not None:
      at_once = jax.ShapeDtypeStruct((piece, *batch.shape[1:]), batch.dtype)
      function, tree, self.convolutions = placed.tuner(function, at_once)
    function = _in_pieces(function, piece)
    if count == 1:
      self._tree, self._sharding = placed.on_one(tree), placed.one
      self._shape = (self.images, *batch.shape[1:])
      mapped = jax.jit(function)
    else:
      self._tree, self._sharding = tree, placed.split
      self._shape = (count, self.images // count, *batch.shape[1:])
      mapped = jax.pmap(function, _AXIS, in_axes=(None, 0), devices=placed.devices)
    shape = jax.ShapeDtypeStruct(self._shape, batch.dtype, sharding=self._sharding)
    self._compiled = compiled(mapped.lower(self._tree, shape), placed.devices[0])
    self.memory = planned_bytes(self._compiled)

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
    return rows if self.way.devices == 1 else rows.reshape(-1, *rows.shape[2:])


class Placed:
  """A tree of arrays, whole on each of some devices.

  Attributes:
    devices: of this process.
    tree: on all of them.
    tuner: chooses how convolutions are computed; None leaves that to XLA.
  """

  def __init__(self, tree: Any, devices: Sequence[Any] | None = None, tune: bool = False):
    """Copies the tree.

    Raises:
      InputError: no devices, one of them twice, of several kinds, or of another process.
    """
    self.devices = check(devices)
    mesh = Mesh(np.array(self.devices), (_AXIS,))
    self.one = SingleDeviceSharding(self.devices[0])
    self.split = NamedSharding(mesh, PartitionSpec(_AXIS))
    whole = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    self.tree = whole(tree)
    self.tuner = tuner(self.tree, self.devices[0], whole, tune)

  def on_one(self, tree: Any) -> Any:
    """What is on all devices, on the first."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

  def program(self, function: Function, batch: jax.ShapeDtypeStruct) -> tuple[Program, Plan]:
    """The function for one batch size in the way that is fastest."""
    start = time.perf_counter()
    ways, question = self._ways(batch.shape[0]), self._question(batch)
    if self.tuner is not None and len(ways) > 1:
      held = recall(question)
      ways = [way for way in ways if [*way] == held] or ways
    programs = [Program(function, self, way, batch) for way in ways]
    compile_seconds = time.perf_counter() - start
    seconds = measure(programs, batch) if len(programs) > 1 else {}
    fastest = min(programs, key=lambda program: seconds.get(program.way, 0))
    if self.tuner is not None and seconds:
      remember(question, [*fastest.way])
    names = readable(fastest.convolutions)
    return fastest, Plan(
      *fastest.way, fastest.images, seconds, compile_seconds, fastest.memory, names
    )

  def _question(self, batch: jax.ShapeDtypeStruct) -> str:
    """What decides how fast each way is, with the program as its parameters tell it."""
    paths = jax.tree_util.tree_leaves_with_path(self.tree)
    leaves = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in paths]
    where = f"{len(self.devices)} of {machine(self.devices[0])}"
    return f"the fastest way for {batch.shape} {batch.dtype} on {where} with {'; '.join(leaves)}"

  def _ways(self, size: int) -> list[Way]:
    # One image on one device of several takes as long as it takes there, and a little more.
    counts = {1, len(self.devices)} if size > 1 else {1}
    ways = [Way(count, -(-size // count)) for count in sorted(counts)]
    if self.tuner is not None:
      ways += [Way(count, PIECE) for count, piece in ways if piece > PIECE]
    return ways


def _in_pieces(function: Function, piece: int) -> Function:
  """The same function of more images, `piece` of them after another."""

  def inference(tree: Any, images: jax.Array) -> Any:
    if len(images) == piece:
      return function(tree, images)
    pieces = images.reshape(-1, piece, *images.shape[1:])
    results = jax.lax.map(lambda images: function(tree, images), pieces)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), results)

  return inference


def measure(programs: Sequence[Program], batch: jax.ShapeDtypeStruct) -> dict[Way, float]:
  """Median seconds of a batch in each way, over rounds in which each runs once."""
  noise = np.random.default_rng(0).integers(0, 256, batch.shape).astype(batch.dtype)
  times = {program.way: [] for program in programs}
  for _ in range(1 + _ROUNDS):
    for program in programs:
      start = time.perf_counter()
      program.finish(program.start(noise), len(noise))
      times[program.way].append(time.perf_counter() - start)
  return {way: statistics.median(row[1:]) for way, row in times.items()}


def readable(choices: Mapping[tuple[str, ...], str]) -> dict[str, str]:
  """The same by paths as strings."""
  return {"/".join(path): name for path, name in choices.items()}


def padded(images: Any, count: int) -> Any:
  """Images followed by as many of zeros as make `count` of them."""
  if len(images) == count:
    return images
  result = np.zeros((count, *images.shape[1:]), images.dtype)
  result[: len(images)] = images
  return result


def check(given: Sequence[Any] | None) -> tuple[Any, ...]:
  """Devices of this process, all if None are given.

  Raises:
    InputError: no devices, one of them twice, of several kinds, or of another process.
  """
  if isinstance(given, jax.Device):
    given = (given,)
  devices = tuple(jax.local_devices() if given is None else given)
  kinds = {getattr(device, "platform", None) for device in devices}
  own = set(jax.local_devices(backend=kinds.pop())) if len(kinds) == 1 and None not in kinds else ()
  if not own or len(set(devices)) != len(devices) or not set(own).issuperset(devices):
    raise InputError(
      f"devices are different ones of this process and of one kind, got {list(devices)}; choose "
      "among jax.local_devices(), or leave them out for all"
    )
  return devices
