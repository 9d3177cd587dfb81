"""Data parallelism by `jax.shard_map`. No other file decides how devices are used.

A batch of B examples is cut into D consecutive parts of B / D, one for each device of the run.
The devices may belong to several processes. Each process reads only the part of its own devices.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.errors import InputError
from repjax.training.prefetch import ReadAhead
from repjax.xla import safe_options

AXIS = "batch"
"""Name of the axis of devices, over which gradients, statistics and metrics are averaged."""

_WHOLE, _SPLIT = PartitionSpec(), PartitionSpec(AXIS)
_OUTPUTS_FIRST = Layout((3, 0, 1, 2))  # of kernels (H, W, I, O)
_REORDERING = ("gpu",)  # platforms on which kernels lie like this


class DataParallel:
  """A function `step(state, batch)` on several devices; `data_parallel` makes it."""

  def __init__(self, step: Callable[..., Any], donate: bool, devices: Sequence[Any], dtype: Any):
    self._step, self._donate = step, donate
    self._mesh = Mesh(np.array(devices), (AXIS,))
    self._options = safe_options(devices[0], dtype)
    self._program: Any = None

  def __call__(self, state: Any, batch: Any) -> Any:
    """Runs the step.

    Args:
      state: a tree from `place`, or a state that the step has returned.
      batch: a batch from `split` or `prefetch`.

    Returns:
      The results of the step, whole on every device.
    """
    if jax.process_count() > 1 and not all(map(_spans_processes, jax.tree.leaves(batch))):
      batch = _put(batch, _SPLIT)
    return self._compiled_for(state)(state, batch)

  def lower(self, state: Any, batch: Any) -> Any:
    """Lowers the step for arrays or for their shapes, as the method `lower` of `jax.jit` does."""
    return self._compiled_for(state).lower(state, batch)

  def _compiled_for(self, state: Any) -> Any:
    """Returns the function of `jax.jit`, which needs to know the tree of a donated state."""
    if self._program is None:
      whole, split = (NamedSharding(self._mesh, spec) for spec in (_WHOLE, _SPLIT))
      # A state that is donated comes back in the same memory, and so in the same layouts.
      held = formats(state, whole) if self._donate else whole
      self._program = jax.jit(
        self._on_each_device(),
        in_shardings=(held, split),
        out_shardings=(held, whole) if self._donate else whole,
        donate_argnums=(0,) if self._donate else (),
        compiler_options=self._options,
      )
    return self._program

  def _on_each_device(self) -> Callable[..., Any]:
    @functools.wraps(self._step)  # The name is that of the compiled program.
    def step(state: Any, batch: Any) -> Any:
      # Each device has one part of the batch, (1, B / D, ...).
      return self._step(state, jax.tree.map(lambda part: part[0], batch))

    # All results of a step are equal on all devices. The check would refuse some that are, such as
    # what is gathered from all devices.
    return jax.shard_map(
      step, mesh=self._mesh, in_specs=(_WHOLE, _SPLIT), out_specs=_WHOLE, check_vma=False
    )


def data_parallel(
  step: Callable[..., Any],
  donate: bool = False,
  devices: Sequence[Any] | None = None,
  dtype: jax.typing.DTypeLike = "float32",
) -> DataParallel:
  """Runs `step(state, batch)` on all devices, each on its part of the batch.

  Args:
    step: function that reduces everything it returns over AXIS, so that all devices return the
      same. With `donate`, it returns a new state of the same structure, and metrics.
    donate: reuse the memory of the state, which the caller must not read again.
    devices: devices to run on; None takes all devices of all processes.
    dtype: dtype of the computation.

  Returns:
    A function of a state from `place` and a batch from `split` or `prefetch`. Its results have no
    device axis.
  """
  return DataParallel(step, donate, _devices() if devices is None else devices, dtype)


def formats(tree: Any, whole: NamedSharding) -> Any:
  """Returns how each array of a tree lies on devices that all hold the whole tree.

  On GPUs, the kernels of convolutions lie in memory output channel by output channel. cuDNN reads
  and writes kernels in this order, and Flax's order would cost a transposition in every step. The
  order is invisible: shapes, indices, values and saved files stay as they are. `Layout.AUTO` would
  leave 1x1 kernels in Flax's order, and the step of RepVGG-A0 would have 6 % more GPU kernels.

  Args:
    tree: arrays, or their shapes.
    whole: sharding of the tree.
  """
  platform = next(iter(whole.device_set)).platform

  def wanted(path: Any, leaf: Any) -> Any:
    is_kernel = getattr(path[-1], "key", None) == "kernel" if path else False
    reordered = is_kernel and len(leaf.shape) == 4 and platform in _REORDERING
    return Format(_OUTPUTS_FIRST, whole) if reordered else whole

  return jax.tree_util.tree_map_with_path(wanted, tree)


def place(tree: Any) -> Any:
  """Copies a whole tree onto every device of this process, in the layouts of `formats`.

  All processes must place the same tree. A `data_parallel` function takes arrays that are placed
  like this without copying them again. So with several processes, too, donation is safe.
  """
  return _put(tree, _WHOLE)


def _put(tree: Any, spec: PartitionSpec) -> Any:
  """Copies this process's part of a tree onto its devices; the result spans all processes."""
  own = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), spec)
  tree = jax.device_put(tree, own)
  if spec == _WHOLE:
    tree = jax.device_put(tree, formats(tree, own))
  count = jax.process_count()
  if count == 1:
    return tree
  together = NamedSharding(Mesh(np.array(_devices()), (AXIS,)), spec)

  def join(leaf: jax.Array) -> jax.Array:
    length = (count * leaf.shape[0], *leaf.shape[1:]) if spec == _SPLIT else leaf.shape
    parts = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(length, together, parts)

  return jax.tree.map(join, tree)


def _spans_processes(leaf: Any) -> bool:
  """Returns whether an array has parts in other processes."""
  return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _devices() -> list[Any]:
  """Returns the devices of all processes, those of one process beside each other."""
  processes = range(jax.process_count())
  return [device for index in processes for device in jax.local_devices(process_index=index)]


def split(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Cuts this process's batch for its devices, (B, ...) to (devices, B / devices, ...)."""
  devices = jax.local_device_count()
  return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}


def prefetch(batches: Iterable[dict[str, np.ndarray]], size: int = 2) -> ReadAhead:
  """Reads, cuts and copies batches to this process's devices ahead of time, in a thread.

  Args:
    batches: batches of this process, uncut. Their arrays must not change after they are yielded,
      because on a CPU a JAX array may share memory with the NumPy array that it was made from.
    size: number of batches that are on the devices before the consumer has taken them.

  Returns:
    An iterator of batches for a `data_parallel` function; the caller closes it.
  """

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    # Waits for the copies here, in the thread, so that the consumer never waits for them.
    return jax.block_until_ready(_put(split(batch), _SPLIT))

  return ReadAhead(batches, put, size)


def shard() -> tuple[int, int]:
  """Returns (index, count) of this process among the processes that read data."""
  return jax.process_index(), jax.process_count()


def fitting_batch_size(batch_size: int) -> int:
  """Returns the smallest batch size, at least `batch_size`, that divides over the devices."""
  return batch_size + -batch_size % jax.device_count()


def check_batch_size(batch_size: int, *, parts: int = 1, mixing: bool = False) -> None:
  """Raises InputError where a batch does not divide over the devices.

  Args:
    batch_size: images in a batch, over all devices.
    parts: number of parts into which each device cuts its images.
    mixing: images are mixed, so each part needs two of them.
  """
  devices = jax.device_count()
  unit, cut = devices * parts, f"{devices} devices"
  if parts > 1:
    cut += f" in config.accumulate_steps = {parts} parts each"
  if batch_size < 1 or batch_size % unit:
    below = batch_size - batch_size % unit
    fitting = [size for size in (below, below + unit) if size > 0]
    raise InputError(
      f"batch_size {batch_size} does not divide over {cut}; use {' or '.join(map(str, fitting))}"
    )
  if mixing and batch_size < 2 * unit:
    raise InputError(
      "config.mixup and config.cutmix mix the images that one device has at a time, and "
      f"batch_size {batch_size} over {cut} leaves it one; use at least {2 * unit}, or set both to 0"
    )
