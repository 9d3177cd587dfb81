"""How devices are used: data parallelism by `jax.pmap`. What else knows, knows how many there are.

Device d of D has examples d * B / D ... (d + 1) * B / D - 1 of a batch of B, however many processes
the devices belong to: each process reads the part that its devices need, and cuts it for them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.errors import InputError
from repjax.training.prefetch import ReadAhead

AXIS = "batch"
"""The pmapped axis: gradients, statistics and metrics are averaged over it."""


def data_parallel(step: Callable[..., Any], donate: bool = False) -> Callable[..., Any]:
  """Runs `step(state, batch)` on all devices, each on its part of the batch.

  Args:
    step: reduces everything it returns over AXIS, so that all devices return the same.
    donate: reuse the memory of the state, which the caller must not read again.

  Returns:
    A function of a state from `place` and a batch from `split` or `prefetch`; its results carry no
    device axis.
  """
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=None,
    donate_argnums=(0,) if donate else (),
  )


def place(tree: Any) -> Any:
  """Copies a tree onto every device of this process, whole; the same tree in all processes.

  A pmapped function takes arrays that lie so without another copy, which is what makes it safe to
  donate them where there are several processes.
  """
  return jax.device_put(tree, NamedSharding(_own_mesh(), PartitionSpec()))


def split(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Cuts this process's batch for its devices: (B, ...) to (devices, B / devices, ...)."""
  devices = jax.local_device_count()
  return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}


def prefetch(batches: Iterable[dict[str, np.ndarray]], size: int = 2) -> ReadAhead:
  """Reads, cuts and copies batches to this process's devices ahead of time, in a thread.

  Args:
    batches: this process's, uncut. They must not be written to once they are yielded: on a CPU,
      arrays may share memory with what they were made from.
    size: batches that are on the devices before anyone has taken them.

  Returns:
    An iterator of batches for a `data_parallel` function, to be closed; see `ReadAhead`.
  """
  sharding = NamedSharding(_own_mesh(), PartitionSpec(AXIS))

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    # Waits for the copies, so that a batch which can be taken is there.
    return jax.block_until_ready(jax.device_put(split(batch), sharding))

  return ReadAhead(batches, put, size)


def _own_mesh() -> Mesh:
  """This process's devices, in the order in which a pmapped function uses them."""
  return Mesh(np.array(jax.local_devices()), (AXIS,))


def shard() -> tuple[int, int]:
  """(index, count) of this process among those that read data."""
  return jax.process_index(), jax.process_count()


def fitting_batch_size(batch_size: int) -> int:
  """The smallest batch size from `batch_size` on that divides over the devices."""
  return batch_size + -batch_size % jax.device_count()


def check_batch_size(batch_size: int, *, parts: int = 1, mixing: bool = False) -> None:
  """Raises InputError where a batch does not divide over the devices.

  Args:
    batch_size: images over all devices.
    parts: into which each device cuts what it has of them.
    mixing: each part must have two images to mix.
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
      "config.mixup and config.cutmix mix the images that one device has at a time, and batch_size "
      f"{batch_size} over {cut} leaves it one; use at least {2 * unit}, or set both to 0"
    )
