"""Data parallelism by `jax.pmap`. No other file decides how devices are used.

A batch of B examples is cut into D consecutive parts of B / D, one for each device of the run.
The devices may belong to several processes. Each process reads only the part of its own devices.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.errors import InputError
from repjax.training.prefetch import ReadAhead

AXIS = "batch"
"""Name of the axis of devices, over which gradients, statistics and metrics are averaged."""


def data_parallel(
  step: Callable[..., Any], donate: bool = False, devices: Sequence[Any] | None = None
) -> Any:
  """Runs `step(state, batch)` on all devices, each on its part of the batch.

  Args:
    step: function that reduces everything it returns over AXIS, so that all devices return the
      same.
    donate: reuse the memory of the state, which the caller must not read again.
    devices: devices to run on; None takes all.

  Returns:
    A function of a state from `place` and a batch from `split` or `prefetch`. Its results have no
    device axis.
  """
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=None,
    donate_argnums=(0,) if donate else (),
    devices=devices,
  )


def place(tree: Any) -> Any:
  """Copies a whole tree onto every device of this process.

  All processes must place the same tree. A pmapped function takes arrays that are placed like this
  without copying them again. So with several processes, too, donation is safe.
  """
  return jax.device_put(tree, NamedSharding(_own_mesh(), PartitionSpec()))


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
  sharding = NamedSharding(_own_mesh(), PartitionSpec(AXIS))

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    # Waits for the copies here, in the thread, so that the consumer never waits for them.
    return jax.block_until_ready(jax.device_put(split(batch), sharding))

  return ReadAhead(batches, put, size)


def _own_mesh() -> Mesh:
  """Returns a mesh of this process's devices, in the order in which `jax.pmap` uses them."""
  return Mesh(np.array(jax.local_devices()), (AXIS,))


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
