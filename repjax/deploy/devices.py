"""Runs batches on one device, or splits them over all devices; see also `streams`.

A batch that runs on D devices is padded to a multiple of D. Several devices are not always faster:
distributing images and collecting results can cost more than the devices save. Each batch size is
therefore timed on one device and on all. On a CPU a large batch is also timed in chunks of CHUNK
images, one chunk after the other: the maps of a few images stay in the processor's caches. On a GPU
a network is first timed with depthwise convolutions as they are, and as sums over their taps.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from repjax.cache import recall, remember
from repjax.deploy.layouts import lay_out, trace
from repjax.deploy.rewrite import depthwise_in, with_depthwise_sums
from repjax.deploy.tuning import CHUNK, machine, make_tuner
from repjax.deploy.xla import compile_lowered, planned_bytes
from repjax.errors import InputError
from repjax.functions import Function

_AXIS = "batch"
_ROUNDS = 3
_CALLS = 10
_FEW_TAPS = 25  # a 5x5 kernel


class Arrangement(NamedTuple):
  """A way to distribute a batch over devices and time.

  Attributes:
    devices: number of devices that take part.
    chunk: number of images that a device computes at once; chunks follow each other in one program.
  """

  devices: int
  chunk: int


class BatchPlan(NamedTuple):
  """A record of how batches of one size run, and of what was measured to decide it.

  Attributes:
    devices: number of devices that take part.
    chunk: number of images that a device computes at once.
    images: number of images that run: the batch size, rounded up to a multiple of `devices` and
      `chunk`.
    seconds: seconds of a batch, from images on the host to results on the host, by `Arrangement`.
      Empty if there was only one, or if the fastest was known from an earlier measurement.
    compile_seconds: seconds to compile all arrangements; little if the programs were on disk.
    memory: bytes that XLA plans for a device, parameters included; None if XLA does not say.
    convolutions: scope of the kernel to name of the algorithm, for convolutions that XLA does not
      compute; see `repjax.deploy.convolutions`. On GPUs "shifts" means a sum over the taps.
    runtime: name of the runtime that computes the batch.
    runtimes: least seconds of a batch by the name of each runtime. Empty if none were compared.
  """

  devices: int
  chunk: int
  images: int
  seconds: Mapping[Arrangement, float]
  compile_seconds: float
  memory: int | None
  convolutions: Mapping[str, str]
  runtime: str
  runtimes: Mapping[str, float]


class BatchProgram:
  """A function compiled for batches of one size in one arrangement.

  Attributes:
    arrangement: how many devices take part, and how many images each computes at once.
    images: number of images that run; smaller batches are padded.
    convolutions: scope of the kernel to name of the algorithm, where it is not XLA's convolution.
    memory: bytes that XLA plans for a device; None if XLA does not say.
  """

  def __init__(
    self,
    function: Function,
    placed: "PlacedTree",
    arrangement: Arrangement,
    batch: jax.ShapeDtypeStruct,
    most_taps: int = 0,
  ):
    """Compiles the function.

    Args:
      function: a function of the placed tree and of images.
      placed: the tree on devices.
      arrangement: how the batch runs, on 1 device or on all of them.
      batch: shape (N, H, W, 3) and dtype of the images.
      most_taps: depthwise convolutions with at most so many taps are sums over their taps.
    """
    count, chunk = self.arrangement = arrangement
    self.images = batch.shape[0] + -batch.shape[0] % (count * chunk)
    tree, self.convolutions = placed.tree, {}
    at_once = jax.ShapeDtypeStruct((chunk, *batch.shape[1:]), batch.dtype)
    if placed.tuner is not None:
      function, tree, self.convolutions = placed.tuner(function, at_once)
    if most_taps:
      taps = depthwise_in(function, tree, at_once)
      self.convolutions = {scope: "shifts" for scope, count in taps.items() if count <= most_taps}
      function = with_depthwise_sums(function, most_taps)
    function = _in_chunks(function, chunk)
    alone = count == 1
    self._sharding = placed.one if alone else placed.split
    shape = jax.ShapeDtypeStruct(
      (self.images, *batch.shape[1:]), batch.dtype, sharding=self._sharding
    )
    traced = trace(function, tree, shape, placed.one if alone else placed.whole, placed.axes)
    self._executable = compile_lowered(traced.lower(), placed.devices[0], placed.options)
    tree = placed.lay_out(tree, self._executable)
    self._tree = placed.on_first(tree) if alone else tree
    self.memory = planned_bytes(self._executable)

  def start(self, images: Any) -> Any:
    """Starts the computation and returns before it is done; `finish` takes the result.

    Args:
      images: (n, H, W, 3) with n at most the program's number of images.
    """
    if self.arrangement.devices > 1:
      # JAX would compile a program to split an array on one device over several devices.
      images = np.asarray(images)
    return self._executable(self._tree, self.placed(pad_images(images, self.images)))

  def placed(self, images: Any) -> jax.Array:
    """Returns the images of a call on the devices; those that are there stay."""
    return jax.device_put(images, self._sharding)

  def finish(self, results: Any, count: int) -> Any:
    """Waits for results and returns the first `count` rows of each, on the host."""
    return jax.tree.map(lambda rows: np.asarray(rows)[:count], results)


class PlacedTree:
  """A tree of arrays, copied whole to each of some devices.

  Attributes:
    devices: devices of this process.
    one: sharding of arrays on the first device.
    whole: sharding of arrays that all devices hold whole.
    split: sharding of arrays whose first axis is split over all devices.
    tree: the tree on all devices, in the layouts of the program that was compiled last.
    tuner: chooses how convolutions are computed; None leaves every convolution to XLA.
    options: options of XLA besides those that suit the devices.
    axes: as for `trace` of `repjax.deploy.layouts`.
  """

  def __init__(
    self,
    tree: Any,
    devices: Sequence[Any] | None = None,
    tune: bool = False,
    options: Mapping[str, Any] | None = None,
    axes: Mapping[str, int] | None = None,
  ):
    """Copies the tree.

    Args:
      tree: the arrays.
      devices: devices of this process; None takes all.
      tune: choose the fastest algorithm for each convolution; on GPUs, for depthwise ones.
      options: options of XLA besides those that suit the devices.
      axes: as for `trace` of `repjax.deploy.layouts`.

    Raises:
      InputError: there are no devices, or a device is given twice, or the devices are of several
        kinds or of a different process.
    """
    self.devices = checked_devices(devices)
    mesh = Mesh(np.array(self.devices), (_AXIS,))
    self.one = SingleDeviceSharding(self.devices[0])
    self.whole = NamedSharding(mesh, PartitionSpec())
    self.split = NamedSharding(mesh, PartitionSpec(_AXIS))
    self.options, self.axes, self._tune = options or {}, axes, tune
    copy_to_all = functools.partial(jax.device_put, device=self.whole)
    self.tree = copy_to_all(tree)
    self.tuner = make_tuner(self.tree, self.devices[0], copy_to_all, tune)

  def lay_out(self, tree: Any, executable: Any) -> Any:
    """Returns a tree on all devices in the layouts that an executable wants."""
    laid = lay_out(tree, executable)
    if self.tuner is None:
      # Programs for several batch sizes mostly want the same layouts, and then share the arrays.
      self.tree = laid
    return laid

  def on_first(self, tree: Any) -> Any:
    """Returns the first device's copy of a tree that is on all devices, without copying it."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

  def program(
    self, function: Function, batch: jax.ShapeDtypeStruct
  ) -> tuple[BatchProgram, BatchPlan]:
    """Compiles the function for one batch size in every arrangement and returns the fastest.

    Args:
      function: a function of the tree and of images.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    start = time.perf_counter()
    arrangements, question = self._arrangements(batch.shape[0]), self.question(batch)
    if self.tuner is not None and len(arrangements) > 1:
      # An earlier process may have measured the same; then the other arrangements are not compiled.
      known = recall(question)
      arrangements = [each for each in arrangements if [*each] == known] or arrangements
    taps = self._most_taps(function, batch)
    programs = [BatchProgram(function, self, each, batch, taps) for each in arrangements]
    compile_seconds = time.perf_counter() - start
    seconds = time_programs(programs, batch) if len(programs) > 1 else {}
    fastest = min(programs, key=lambda program: seconds.get(program.arrangement, 0))
    if self.tuner is not None and seconds:
      remember(question, [*fastest.arrangement])
    return fastest, BatchPlan(
      *fastest.arrangement,
      fastest.images,
      seconds,
      compile_seconds,
      fastest.memory,
      fastest.convolutions,
      runtime="xla",
      runtimes={},
    )

  def question(self, batch: jax.ShapeDtypeStruct) -> str:
    """Returns a text with everything that decides which arrangement is fastest.

    The names, shapes and dtypes of the parameters stand for the program.
    """
    paths = jax.tree_util.tree_leaves_with_path(self.tree)
    leaves = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in paths]
    where = f"{len(self.devices)} of {machine(self.devices[0])}"
    if self.options:  # CUDA graphs make launches cheap, of which sums need fewer.
      where = f"{where}, options {sorted(self.options.items())}"
    return f"the fastest way for {batch.shape} {batch.dtype} on {where} with {'; '.join(leaves)}"

  def _most_taps(self, function: Function, batch: jax.ShapeDtypeStruct) -> int:
    """Returns the most taps of depthwise convolutions that are faster as sums on this GPU, or 0."""
    if not self._tune or not is_gpu(self.devices[0]):
      return 0
    limits = _limits(depthwise_in(function, self.tree, batch).values())
    if limits == [0]:
      return 0
    question = f"the most taps of a sum in {self.question(batch)}"
    known = recall(question)
    if known not in limits:
      programs = self._programs_of_sums(function, batch, limits)
      seconds = time_on_device(programs, batch)
      known = min(programs, key=lambda limit: seconds[limit])
      remember(question, known)
    return known

  def _programs_of_sums(
    self, function: Function, batch: jax.ShapeDtypeStruct, limits: Sequence[int]
  ) -> dict[int, BatchProgram]:
    """Returns a program for each largest number of taps, but for sums that this GPU cannot run.

    Warns:
      UserWarning: the GPU cannot run the network with sums, for lack of memory for example.
    """
    programs, images = {}, _noise(batch)
    for limit in limits:
      try:
        program = BatchProgram(function, self, Arrangement(1, batch.shape[0]), batch, limit)
        jax.block_until_ready(program.start(images))
      except jax.errors.JaxRuntimeError as error:
        if limit == 0:
          raise
        warnings.warn(
          f"{self.devices[0].device_kind} cannot run depthwise convolutions of up to {limit} taps "
          f"as sums, and keeps them as they are: {str(error).splitlines()[0]}",
          stacklevel=2,
        )
      else:
        programs[limit] = program
    return programs

  def _arrangements(self, size: int) -> list[Arrangement]:
    """Returns the arrangements worth trying for a batch of `size` images."""
    # One image padded to all devices would take as long on each of them as alone on one.
    counts = {1, len(self.devices)} if size > 1 else {1}
    whole = [Arrangement(count, -(-size // count)) for count in sorted(counts)]
    if self.tuner is None:
      return whole
    return whole + [Arrangement(count, CHUNK) for count, chunk in whole if chunk > CHUNK]


def is_gpu(device: Any) -> bool:
  """Tells if a device is a GPU."""
  return device.platform == "gpu"


def _limits(taps: Iterable[int]) -> list[int]:
  """Returns the largest numbers of taps worth trying: none, those of small kernels, and all."""
  counts = [0, *taps]
  return sorted({0, max(count for count in counts if count <= _FEW_TAPS), max(counts)})


def _in_chunks(function: Function, chunk: int) -> Function:
  """Returns the same function for more images, which computes `chunk` images at a time."""

  # The name is that of the compiled program in the cache folder.
  def inference(tree: Any, images: jax.Array) -> Any:
    if len(images) == chunk:
      return function(tree, images)
    chunks = images.reshape(-1, chunk, *images.shape[1:])
    # `lax.map` is a loop on the device: one chunk's maps are dropped before the next one's exist.
    results = jax.lax.map(lambda images: function(tree, images), chunks)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), results)

  return inference


def time_programs(
  programs: Sequence[BatchProgram], batch: jax.ShapeDtypeStruct
) -> dict[Arrangement, float]:
  """Returns the median seconds of a batch in each arrangement.

  Every round runs each program once, so that a disturbance of the machine slows all of them. The
  first round is warm-up and does not count.
  """
  noise = _noise(batch)
  times = {program.arrangement: [] for program in programs}
  for _ in range(1 + _ROUNDS):
    for program in programs:
      start = time.perf_counter()
      program.finish(program.start(noise), len(noise))
      times[program.arrangement].append(time.perf_counter() - start)
  return {arrangement: statistics.median(row[1:]) for arrangement, row in times.items()}


def time_on_device(
  programs: Mapping[int, BatchProgram], batch: jax.ShapeDtypeStruct
) -> dict[int, float]:
  """Returns the least seconds of a batch in each program, for images that are on the device.

  The programs take turns. A turn makes several calls before it waits, so that what the host does is
  hidden unless it takes longer than the device.
  """
  images = next(iter(programs.values())).placed(_noise(batch))
  seconds = dict.fromkeys(programs, float("inf"))
  for _ in range(1 + _ROUNDS):
    for name, program in programs.items():
      jax.block_until_ready(program.start(images))
      start = time.perf_counter()
      jax.block_until_ready([program.start(images) for _ in range(_CALLS)])
      seconds[name] = min(seconds[name], (time.perf_counter() - start) / _CALLS)
  return seconds


def _noise(batch: jax.ShapeDtypeStruct) -> np.ndarray:
  """Returns images of noise."""
  return np.random.default_rng(0).integers(0, 256, batch.shape).astype(batch.dtype)


def pad_images(images: Any, count: int) -> Any:
  """Appends images of zeros until there are `count` images."""
  if len(images) == count:
    return images
  result = np.zeros((count, *images.shape[1:]), images.dtype)
  result[: len(images)] = images
  return result


def checked_devices(given: Sequence[Any] | None) -> tuple[Any, ...]:
  """Returns the given devices, or all devices of this process if None are given.

  Raises:
    InputError: there are no devices, or a device is given twice, or the devices are of several
      kinds or of a different process.
  """
  if isinstance(given, jax.Device):
    given = (given,)
  devices = tuple(jax.local_devices() if given is None else given)
  kinds = {getattr(device, "platform", None) for device in devices}
  local = set()
  if len(kinds) == 1 and None not in kinds:
    local = set(jax.local_devices(backend=kinds.pop()))
  if not local or len(set(devices)) != len(devices) or not local.issuperset(devices):
    raise InputError(
      f"devices must be different devices of one kind, all of this process, got {list(devices)}. "
      "Choose among jax.local_devices(), or leave the argument out for all of them."
    )
  return devices
