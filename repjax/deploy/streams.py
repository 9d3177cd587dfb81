"""A network in streams on several devices: each stream of the network has its own device.

Terms. A network in streams is a graph of scopes (its top-level modules), and each scope belongs to
a stream. A piece is a run of scopes of one stream that is compiled as one program. A group is a set
of devices with one device for each stream; k groups split a batch into k equal shares.

How streams run at once. A device holds the parameters of its stream's scopes and no other ones.
`StreamsProgram.start` calls the compiled pieces in an order in which each finds its inputs. A call
in JAX returns before the device has done the work: the device queues it until the inputs are there.
So the host runs ahead through all pieces, and pieces on different devices compute at the same time.
A map that a piece reads from a different stream is moved between devices, and these moves are
queued in the same way; nothing here waits or locks. ParNet moves four maps.

With k groups, a stream's k devices form a mesh, and a piece is one program for all of them.

Two designs were left out. One program for all streams, a `shard_map` with a `switch` over devices,
would have to pad the maps and parameters of all streams to one shape. Computing the first layers on
every device would save two moves, but adds a tenth of work to ParNet-S. Devices that share cores,
like those of one CPU, have no time for this work, and images would have to go to all devices.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.deploy.devices import BatchPlan, by_joined_path, checked_devices, pad_images
from repjax.deploy.rewrite import Function
from repjax.deploy.tuning import Tuner, make_tuner
from repjax.deploy.xla import compile_lowered, planned_bytes
from repjax.errors import InputError
from repjax.models.base import StreamScope

_AXIS = "batch"


class Piece(NamedTuple):
  """Scopes of one stream that run one after the other, as one program.

  Attributes:
    stream: number of the stream, from 1.
    scopes: names of the scopes, in the order in which they run.
    reads: inputs of the first scope: names of scopes in other pieces, or "images".
    moves: inputs in `reads` that are elsewhere: on devices of a different stream, or on the host.
    makes: scopes whose maps leave the piece, since a different piece reads them or the network
      returns them.
  """

  stream: int
  scopes: tuple[str, ...]
  reads: tuple[str, ...]
  moves: tuple[str, ...]
  makes: tuple[str, ...]

  @property
  def name(self) -> str:
    """The names of the scopes, joined by "+"."""
    return "+".join(self.scopes)


def cut_into_pieces(parts: Mapping[str, StreamScope], results: Sequence[str]) -> tuple[Piece, ...]:
  """Cuts a network in streams into the fewest pieces that never wait in their middle.

  A scope extends the piece that makes its input if three things hold: this is its only input, no
  other scope reads this input, and both are of one stream. Otherwise the scope begins a new piece.
  If a scope with several readers were in the middle of a piece, its readers on other devices would
  wait for the end of the whole piece.

  Args:
    parts: the network's scopes, in an order in which they can run.
    results: names of the scopes whose maps the network returns.

  Returns:
    Pieces in an order in which they can run.
  """
  readers = {name: [scope for scope in parts if name in parts[scope].reads] for name in parts}
  chains: list[list[str]] = []
  for scope, (stream, reads) in parts.items():
    before = next((chain for chain in chains if (chain[-1],) == reads), None)
    if before and readers[before[-1]] == [scope] and parts[before[-1]].stream == stream:
      before.append(scope)
    else:
      chains.append([scope])
  return tuple(_piece(parts, readers, results, chain) for chain in chains)


def _piece(
  parts: Mapping[str, StreamScope],
  readers: Mapping[str, Sequence[str]],
  results: Sequence[str],
  chain: Sequence[str],
) -> Piece:
  """Describes a chain of scopes as a Piece."""
  stream, reads = parts[chain[0]]
  return Piece(
    stream,
    tuple(chain),
    reads,
    tuple(name for name in reads if name not in parts or parts[name].stream != stream),
    tuple(scope for scope in chain if scope in results or set(readers[scope]) - set(chain)),
  )


class PlacedPiece(NamedTuple):
  """A piece with its parameters on its devices, not yet compiled.

  Attributes:
    piece: the piece.
    sharding: sharding of the piece's maps, split over the devices of its stream.
    tree: variables of the piece's scopes, whole on each of these devices.
    tuner: chooses how convolutions are computed; None leaves every convolution to XLA.
  """

  piece: Piece
  sharding: NamedSharding
  tree: Any
  tuner: Tuner | None


class CompiledPiece(NamedTuple):
  """A piece that is compiled for one batch size.

  Attributes:
    piece: the piece.
    sharding: sharding of the piece's maps, split over the devices of its stream.
    tree: variables that the executable takes, on these devices.
    executable: a compiled function of the tree and of maps by name; returns maps by name.
  """

  piece: Piece
  sharding: NamedSharding
  tree: Any
  executable: Any

  def move_inputs(self, maps: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the piece's inputs on its devices; starts the moves and does not wait for them."""
    return {
      name: jax.device_put(maps[name], self.sharding) if name in self.piece.moves else maps[name]
      for name in self.piece.reads
    }


class StreamsProgram:
  """A network in streams, compiled for batches of one size.

  Attributes:
    devices: number of devices that take part.
    images: number of images that run; smaller batches are padded.
    batch: shape (N, H, W, 3) and dtype of the padded batch.
    pieces: compiled pieces, in an order in which they can run.
    convolutions: scope's path to name of the algorithm, where it is not XLA's convolution.
  """

  def __init__(self, run: Callable[..., Any], placed: "PlacedStreams", batch: Any):
    """Compiles the pieces.

    Args:
      run: the function `run` of an `Inference`.
      placed: the network's variables on devices.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    groups = len(placed.groups)
    self.devices, self.images = placed.groups.size, batch.shape[0] + -batch.shape[0] % groups
    self.batch = jax.ShapeDtypeStruct((self.images, *batch.shape[1:]), batch.dtype)
    self._outputs, self._splits = placed.outputs, groups > 1
    self.pieces: list[CompiledPiece] = []
    self.convolutions: dict[tuple[str, ...], str] = {}
    # The shapes of all maps by name. They grow piece by piece: tracing a piece gives the shapes of
    # its outputs, which the pieces after it take.
    maps = {"images": self.batch}
    for piece, sharding, tree, tuner in placed.pieces:
      inputs = {
        name: jax.ShapeDtypeStruct(maps[name].shape, maps[name].dtype, sharding=sharding)
        for name in piece.reads
      }
      function = _piece_function(run, piece)
      if tuner is not None:
        # One device computes the share of one group, and algorithms are chosen for this size.
        shares = {name: _share(shape, groups) for name, shape in inputs.items()}
        function, tree, choices = tuner(function, shares)
        self.convolutions |= choices
      traced = _split_over_groups(function, sharding).trace(tree, inputs)
      maps |= traced.out_info
      executable = compile_lowered(traced.lower(), placed.groups[0, 0])
      self.pieces.append(CompiledPiece(piece, sharding, tree, executable))

  @property
  def memory(self) -> int | None:
    """Bytes that XLA plans for the device that needs most; None if XLA does not say."""
    streams: dict[int, int] = {}
    for compiled in self.pieces:
      stream, planned = compiled.piece.stream, planned_bytes(compiled.executable)
      if planned is None:
        return None
      streams[stream] = streams.get(stream, 0) + planned
    return max(streams.values())

  def start(self, images: Any) -> Any:
    """Starts all pieces and returns before they are done; `finish` takes the result.

    Args:
      images: (n, H, W, 3) with n at most the program's number of images.
    """
    if self._splits:
      # Splitting an array of one device over several would make JAX compile a program.
      images = np.asarray(images)
    maps = {"images": pad_images(images, self.images)}
    # Neither the moves nor the calls block, so this loop ends long before the devices do. The maps
    # in the dictionary are promises of arrays; a device waits for them where a piece reads them.
    for compiled in self.pieces:
      maps |= compiled.executable(compiled.tree, compiled.move_inputs(maps))
    return jax.tree.map(lambda scope: maps[scope], self._outputs)

  def finish(self, results: Any, count: int) -> Any:
    """Waits for results and returns the first `count` rows of each, in float32 on the host."""
    return jax.tree.map(lambda rows: np.asarray(rows)[:count].astype(np.float32), results)


class PlacedStreams:
  """The scopes of a network in streams, each on the devices of its stream.

  Attributes:
    groups: array (k, S) of devices: k groups, and in each a device for every one of S streams.
    outputs: outputs of the network: a tree with names of scopes in the place of their maps.
    pieces: pieces with their variables on devices, in an order in which they can run.
  """

  def __init__(
    self, network: Any, tree: Any, devices: Sequence[Any] | None = None, tune: bool = False
  ):
    """Cuts the network into pieces and copies the variables of each to its devices.

    Args:
      network: the network in streams, in deploy form.
      tree: variables of the network.
      devices: devices of this process; None takes all.
      tune: chooses the fastest algorithm for each convolution.

    Raises:
      InputError: as in `check_streams`.
    """
    self.outputs = network.outputs
    self.groups = check_streams(network, devices)
    self.pieces = []
    for piece in cut_into_pieces(network.streams, jax.tree.leaves(self.outputs)):
      # A column of the array: the devices that one stream has in all groups.
      mesh = Mesh(self.groups[:, piece.stream - 1], (_AXIS,))
      variables = {
        collection: {scope: held[scope] for scope in piece.scopes if scope in held}
        for collection, held in tree.items()
      }
      copy_to_all = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
      placed = copy_to_all(variables)
      tuner = make_tuner(placed, self.groups[0, 0], copy_to_all, tune)
      sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
      self.pieces.append(PlacedPiece(piece, sharding, placed, tuner))

  def program(
    self, run: Callable[..., Any], batch: jax.ShapeDtypeStruct
  ) -> tuple[StreamsProgram, BatchPlan]:
    """Compiles the network for one batch size.

    Args:
      run: the function `run` of an `Inference`.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    start = time.perf_counter()
    program = StreamsProgram(run, self, batch)
    return program, BatchPlan(
      devices=program.devices,
      chunk=program.images // len(self.groups),
      images=program.images,
      seconds={},
      compile_seconds=time.perf_counter() - start,
      memory=program.memory,
      convolutions=by_joined_path(program.convolutions),
    )


def check_streams(model: nn.Module, devices: Sequence[Any] | None) -> np.ndarray:
  """Returns an array (k, S) of devices: k groups, and in each a device for every stream.

  Raises:
    InputError: the model has no streams, or the number of devices is not a multiple of S.
  """
  parts: Mapping[str, StreamScope] | None = getattr(model, "streams", None)
  if parts is None:
    raise InputError(
      f'parallel="streams" needs a network in streams like ParNet, got {type(model).__name__}. '
      'The default, parallel="data", uses all devices too.'
    )
  given = checked_devices(devices)
  streams = max(part.stream for part in parts.values())
  if len(given) % streams:
    on_cpu = (
      f" Or start with XLA_FLAGS=--xla_force_host_platform_device_count={streams}, which divides "
      "the CPU's cores."
    )
    raise InputError(
      f"{streams} streams run on {streams} devices or a multiple, got {len(given)}. Choose devices "
      "by devices=jax.local_devices()[:N]." + (on_cpu if given[0].platform == "cpu" else "")
    )
  return np.array(given).reshape(-1, streams)


def _piece_function(run: Callable[..., Any], piece: Piece) -> Function:
  """Returns a piece as a function of its variables and of its inputs by name."""

  def function(tree: Any, maps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    made = run(tree, maps, piece.scopes)
    return {scope: made[scope] for scope in piece.makes}

  return function


def _share(maps: jax.ShapeDtypeStruct, groups: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of the part of a batch of maps that one of several groups has."""
  return jax.ShapeDtypeStruct((maps.shape[0] // groups, *maps.shape[1:]), maps.dtype)


def _split_over_groups(function: Function, sharding: NamedSharding) -> Any:
  """Returns a jitted function that runs on every device of a stream, each with its group's share.

  Variables are whole on each device. Maps are split along the batch, on the way in and out.
  """
  split = PartitionSpec(_AXIS)
  each = jax.shard_map(
    function,
    mesh=sharding.mesh,
    in_specs=(PartitionSpec(), split),
    out_specs=split,
    # The check would refuse a scan that begins with zeros, which are the same on all devices.
    check_vma=False,
  )
  return jax.jit(each, out_shardings=sharding)
