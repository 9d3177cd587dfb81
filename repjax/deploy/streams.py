"""A network in streams on several devices: one for each stream, or several groups of as many.

A stream's device holds the stream's scopes, and no other device holds them. They are compiled in
pieces, as long as can be, and started in an order in which they can run; JAX's calls return before
the device is done, so that pieces of different streams run at once. What a piece reads of another
stream is moved between devices, which nobody waits for either. For ParNet these are four maps.

With k groups, a stream has a mesh of k devices, over which batches are split, and a piece is one
program for all of them.

One program for all streams, a `shard_map` with a `switch` over devices, would have to pad maps and
parameters of all streams to one shape, and would move at fixed places. Computing the first layers
on every device, instead of moving maps, would spare two moves; it would be a tenth more work in
ParNet-S, for which devices that share cores, as those of one CPU do, have no time, and images would
go to all devices.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.deploy.devices import Plan, check, padded
from repjax.errors import InputError
from repjax.models.common import Part

_AXIS = "batch"


class Piece(NamedTuple):
  """Scopes of one stream that run one behind another, as one program.

  Attributes:
    stream: from 1.
    scopes: in their order.
    reads: what comes from other pieces: scopes, or "images".
    moves: of these, what is elsewhere: on another stream's devices, or on the host.
    makes: scopes whose maps others read, or that are results.
  """

  stream: int
  scopes: tuple[str, ...]
  reads: tuple[str, ...]
  moves: tuple[str, ...]
  makes: tuple[str, ...]

  @property
  def name(self) -> str:
    """The scopes, joined."""
    return "+".join(self.scopes)


def cut(parts: Mapping[str, Part], results: Sequence[str]) -> tuple[Piece, ...]:
  """The longest pieces that wait for nothing but what their first scope reads.

  Args:
    parts: of a network in streams.
    results: scopes whose maps are returned.
  """
  readers = {name: [scope for scope in parts if name in parts[scope].reads] for name in parts}
  chains: list[list[str]] = []
  for scope, (stream, reads) in parts.items():
    ahead = next((chain for chain in chains if (chain[-1],) == reads), None)
    if ahead and readers[ahead[-1]] == [scope] and parts[ahead[-1]].stream == stream:
      ahead.append(scope)
    else:
      chains.append([scope])
  return tuple(_piece(parts, readers, results, chain) for chain in chains)


def _piece(
  parts: Mapping[str, Part],
  readers: Mapping[str, Sequence[str]],
  results: Sequence[str],
  chain: Sequence[str],
) -> Piece:
  stream, reads = parts[chain[0]]
  return Piece(
    stream,
    tuple(chain),
    reads,
    tuple(name for name in reads if name not in parts or parts[name].stream != stream),
    tuple(scope for scope in chain if scope in results or set(readers[scope]) - set(chain)),
  )


class Running(NamedTuple):
  """A piece that is compiled.

  Attributes:
    piece: what it is.
    sharding: of its maps, over the devices of its stream.
    tree: its parameters on these.
    compiled: of the tree and maps by name; returns maps by name.
  """

  piece: Piece
  sharding: NamedSharding
  tree: Any
  compiled: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]

  def moved(self, maps: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What the piece reads, on its devices."""
    return {
      name: jax.device_put(maps[name], self.sharding) if name in self.piece.moves else maps[name]
      for name in self.piece.reads
    }


class StreamsProgram:
  """A network in streams, compiled for batches of one size.

  Attributes:
    devices: how many take part.
    images: how many run.
    batch: shape (N, H, W, 3) with as many, and dtype of the images.
    pieces: in an order in which they can run.
  """

  def __init__(self, run: Callable[..., Any], placed: "PlacedStreams", batch: Any):
    """Compiles; `run` is that of `Inference`."""
    groups = len(placed.groups)
    self.devices, self.images = placed.groups.size, batch.shape[0] + -batch.shape[0] % groups
    self.batch = jax.ShapeDtypeStruct((self.images, *batch.shape[1:]), batch.dtype)
    self._outputs, self._splits = placed.outputs, groups > 1
    self.pieces: list[Running] = []
    maps = {"images": self.batch}
    for piece, sharding, tree in placed.pieces:
      reads = {
        name: jax.ShapeDtypeStruct(maps[name].shape, maps[name].dtype, sharding=sharding)
        for name in piece.reads
      }
      traced = _split(run, piece, sharding).trace(tree, reads)
      maps |= traced.out_info
      self.pieces.append(Running(piece, sharding, tree, traced.lower().compile()))

  def start(self, images: Any) -> Any:
    """Starts to compute what `finish` takes, of at most as many images as this is made for."""
    if self._splits:
      images = np.asarray(images)  # splitting on a device would compile
    maps = {"images": padded(images, self.images)}
    for running in self.pieces:
      maps |= running.compiled(running.tree, running.moved(maps))
    return jax.tree.map(lambda scope: maps[scope], self._outputs)

  def finish(self, results: Any, count: int) -> Any:
    """Waits for results; the first `count` rows of each, float32 on the host."""
    return jax.tree.map(lambda rows: np.asarray(rows)[:count].astype(np.float32), results)


class PlacedStreams:
  """The scopes of a network in streams, each on the devices of its stream.

  Attributes:
    groups: array (k, S) of devices, k groups with one for each of S streams.
    outputs: those of the network.
    pieces: each with the sharding of its maps and its parameters on its devices.
  """

  def __init__(self, network: Any, tree: Any, devices: Sequence[Any] | None = None):
    """Copies each piece's part of the tree; errors as in `check_streams`."""
    parts, self.outputs = network.streams, network.outputs
    self.groups = check_streams(network, devices)
    self.pieces = []
    for piece in cut(parts, jax.tree.leaves(self.outputs)):
      mesh = Mesh(self.groups[:, piece.stream - 1], (_AXIS,))
      own = {
        collection: {scope: held[scope] for scope in piece.scopes if scope in held}
        for collection, held in tree.items()
      }
      placed = jax.device_put(own, NamedSharding(mesh, PartitionSpec()))
      self.pieces.append((piece, NamedSharding(mesh, PartitionSpec(_AXIS)), placed))

  def program(
    self, run: Callable[..., Any], batch: jax.ShapeDtypeStruct
  ) -> tuple[StreamsProgram, Plan]:
    """The network for one batch size; `run` is that of `Inference`."""
    start = time.perf_counter()
    program = StreamsProgram(run, self, batch)
    return program, Plan(program.devices, program.images, {}, time.perf_counter() - start)


def check_streams(model: nn.Module, devices: Sequence[Any] | None) -> np.ndarray:
  """Devices in groups (k, S) with one for each of a model's S streams.

  Raises:
    InputError: a model without streams, or devices that do not make groups.
  """
  parts: Mapping[str, Part] | None = getattr(model, "streams", None)
  if parts is None:
    raise InputError(
      f'parallel="streams" is for networks in streams, as ParNet is, and {type(model).__name__} is '
      'none; parallel="data", which is the default, uses all devices too'
    )
  given = tuple(jax.local_devices() if devices is None else devices)
  check(given)
  streams = max(part.stream for part in parts.values())
  if len(given) % streams:
    on_cpu = (
      f", or start with XLA_FLAGS=--xla_force_host_platform_device_count={streams} for as many"
    )
    raise InputError(
      f"{streams} streams run on {streams} devices or a multiple, got {len(given)}; choose as many "
      "by devices=jax.local_devices()[:N]"
      + (f"{on_cpu} that share the CPU's cores" if given[0].platform == "cpu" else "")
    )
  return np.array(given).reshape(-1, streams)


def _split(run: Callable[..., Any], piece: Piece, sharding: NamedSharding) -> Any:
  """A piece as a function whose maps are split over the devices of its stream."""

  def function(tree: Any, maps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    made = run(tree, maps, piece.scopes)
    return {scope: made[scope] for scope in piece.makes}

  split = PartitionSpec(_AXIS)
  each = jax.shard_map(
    function, mesh=sharding.mesh, in_specs=(PartitionSpec(), split), out_specs=split
  )
  return jax.jit(each, out_shardings=sharding)
