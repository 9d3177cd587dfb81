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

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.deploy.devices import Plan, check, padded, readable
from repjax.deploy.rewrite import Function
from repjax.deploy.tuning import tuner
from repjax.deploy.xla import compiled, planned_bytes
from repjax.errors import InputError
from repjax.models.base import StreamScope as Part

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
  compiled: Any

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
    convolutions: as those of a `Program`.
  """

  def __init__(self, run: Callable[..., Any], placed: "PlacedStreams", batch: Any):
    """Compiles; `run` is that of `Inference`."""
    groups = len(placed.groups)
    self.devices, self.images = placed.groups.size, batch.shape[0] + -batch.shape[0] % groups
    self.batch = jax.ShapeDtypeStruct((self.images, *batch.shape[1:]), batch.dtype)
    self._outputs, self._splits = placed.outputs, groups > 1
    self.pieces: list[Running] = []
    maps = {"images": self.batch}
    self.convolutions: dict[tuple[str, ...], str] = {}
    for piece, sharding, tree, chooser in placed.pieces:
      reads = {
        name: jax.ShapeDtypeStruct(maps[name].shape, maps[name].dtype, sharding=sharding)
        for name in piece.reads
      }
      function = _function(run, piece)
      if chooser is not None:
        each = {name: _part(one, groups) for name, one in reads.items()}
        function, tree, choices = chooser(function, each)
        self.convolutions |= choices
      traced = _split(function, sharding).trace(tree, reads)
      maps |= traced.out_info
      executable = compiled(traced.lower(), placed.groups[0, 0])
      self.pieces.append(Running(piece, sharding, tree, executable))

  @property
  def memory(self) -> int | None:
    """Bytes that XLA plans for the device that needs most."""
    streams: dict[int, int] = {}
    for running in self.pieces:
      stream, planned = running.piece.stream, planned_bytes(running.compiled)
      if planned is None:
        return None
      streams[stream] = streams.get(stream, 0) + planned
    return max(streams.values())

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
    pieces: each with the sharding of its maps, its parameters on its devices, and their tuner.
  """

  def __init__(
    self, network: Any, tree: Any, devices: Sequence[Any] | None = None, tune: bool = False
  ):
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
      whole = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
      placed = whole(own)
      chooser = tuner(placed, self.groups[0, 0], whole, tune)
      self.pieces.append((piece, NamedSharding(mesh, PartitionSpec(_AXIS)), placed, chooser))

  def program(
    self, run: Callable[..., Any], batch: jax.ShapeDtypeStruct
  ) -> tuple[StreamsProgram, Plan]:
    """The network for one batch size; `run` is that of `Inference`."""
    start = time.perf_counter()
    program = StreamsProgram(run, self, batch)
    return program, Plan(
      program.devices,
      program.images // len(self.groups),
      program.images,
      {},
      time.perf_counter() - start,
      program.memory,
      readable(program.convolutions),
    )


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
  given = check(devices)
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


def _function(run: Callable[..., Any], piece: Piece) -> Function:
  """A piece as a function of its parameters and of the maps that it reads."""

  def function(tree: Any, maps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    made = run(tree, maps, piece.scopes)
    return {scope: made[scope] for scope in piece.makes}

  return function


def _part(maps: jax.ShapeDtypeStruct, groups: int) -> jax.ShapeDtypeStruct:
  """What one of several groups has of a map."""
  return jax.ShapeDtypeStruct((maps.shape[0] // groups, *maps.shape[1:]), maps.dtype)


def _split(function: Function, sharding: NamedSharding) -> Any:
  """A function of whole parameters and maps that are split over the devices of their stream."""
  split = PartitionSpec(_AXIS)
  each = jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=(PartitionSpec(), split),
    out_specs=split,
    check_vma=False,  # a scan may begin with zeros, which are the same on all devices
  )
  return jax.jit(each, out_shardings=sharding)
