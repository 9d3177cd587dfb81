"""Runs a network in streams on several devices: each stream of the network has its own device.

Terms.
- A scope is a top-level module of the network. It reads the maps of other scopes, or the images,
  and makes one map.
- A stream is a set of scopes that share a device. The network numbers its streams from 1 to S.
- A piece is a chain of scopes of one stream that is compiled as one program.
- A group is a set of S devices, one for each stream. With k groups, a batch is split into k equal
  shares, and each group computes its share.

In order: `cut_into_pieces` makes pieces of scopes. `PlacedStreams` copies the parameters of each
piece to the devices of its stream. `StreamsProgram` compiles the pieces for one batch size, and its
methods `start` and `finish` run a batch.

How streams run at once. `start` calls the compiled pieces in an order in which every piece comes
after the pieces that make its inputs. A call in JAX returns at once, with arrays that are computed
later. The device queues the work until the inputs are there. So the host passes through all pieces
without waiting, and pieces on different devices compute at the same time. A map from a different
stream has to be moved between devices, and moves are queued in the same way. ParNet moves four
maps. Nothing locks. The host waits only in `finish`, for the results, and at the beginning of
`start`, if a device still computes the images.

With k groups, the k devices of a stream form a mesh, and a piece is one program for the mesh.

Two designs were left out. One program for all streams, a `shard_map` with a `switch` over devices,
would have to pad the maps and parameters of all streams to one shape. Computing the first layers on
every device would save two moves, but would add a tenth of work to ParNet-S. Devices that share
cores, like those of one CPU, have no time for this work. Images would have to go to all devices.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repjax.deploy.devices import BatchPlan, checked_devices, pad_images
from repjax.deploy.layouts import lay_out, share, trace
from repjax.deploy.tuning import Tuner, make_tuner
from repjax.deploy.xla import compile_lowered, planned_bytes
from repjax.errors import InputError
from repjax.functions import Function
from repjax.models.base import StreamScope

_AXIS = "batch"  # name of the axis over the k devices of one stream


class Piece(NamedTuple):
  """Scopes of one stream that run one after the other, as one program.

  Attributes:
    stream: number of the stream, from 1.
    scopes: names of the scopes, in the order in which they run.
    reads: names of the maps that the first scope reads. A map has the name of the scope that made
      the map, or is "images". Every later scope reads the map of the scope before it.
    moves: names in `reads` of maps that are on devices of a different stream, or on the host.
    makes: names of the maps that leave the piece, because a different piece reads them or the
      network returns them.
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


def cut_into_pieces(scopes: Mapping[str, StreamScope], results: Sequence[str]) -> tuple[Piece, ...]:
  """Cuts the network into the longest chains in which no scope waits for, or delays, another piece.

  A piece begins when all its inputs are there, and hands out its maps at its end. So a scope joins
  the piece that makes its input only if three things hold.

  - The scope has no second input. The scope would have to wait for it in the middle of a piece.
  - No other scope reads the input. Such a reader, in a different piece, would have to wait until
    the whole piece is done.
  - The scope and the piece are of one stream.

  Otherwise the scope begins a new piece.

  Args:
    scopes: name to `StreamScope`, in an order in which the scopes can run.
    results: names of the scopes whose maps the network returns.

  Returns:
    Pieces in an order in which they can run.
  """
  readers = {name: [scope for scope in scopes if name in scopes[scope].reads] for name in scopes}
  chains: list[list[str]] = []
  for scope, (stream, reads) in scopes.items():
    # The chain whose last scope is the only input of this scope.
    before = next((chain for chain in chains if (chain[-1],) == reads), None)
    if before and readers[before[-1]] == [scope] and scopes[before[-1]].stream == stream:
      before.append(scope)
    else:
      chains.append([scope])
  return tuple(_piece(scopes, readers, results, chain) for chain in chains)


def _piece(
  scopes: Mapping[str, StreamScope],
  readers: Mapping[str, Sequence[str]],
  results: Sequence[str],
  chain: Sequence[str],
) -> Piece:
  """Describes a chain of scopes as a Piece.

  Args:
    scopes: as in `cut_into_pieces`.
    readers: name of each scope to the names of the scopes that read its map.
    results: as in `cut_into_pieces`.
    chain: names of the piece's scopes, in order.
  """
  stream, reads = scopes[chain[0]]
  return Piece(
    stream=stream,
    scopes=tuple(chain),
    reads=reads,
    # A name that is no scope is "images", which come from the host.
    moves=tuple(name for name in reads if name not in scopes or scopes[name].stream != stream),
    makes=tuple(scope for scope in chain if scope in results or set(readers[scope]) - set(chain)),
  )


class PlacedPiece(NamedTuple):
  """A piece with its parameters on its devices, not yet compiled.

  Attributes:
    piece: the piece.
    sharding: sharding of the piece's maps: each device of the stream holds its share of the batch.
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
    sharding: sharding of the piece's maps: each device of the stream holds its share of the batch.
    tree: variables that the executable takes, on these devices. A tuner may have changed kernels.
    executable: a compiled function of the tree and of the maps in `piece.reads`, by name. It
      returns the maps in `piece.makes`, by name.
  """

  piece: Piece
  sharding: NamedSharding
  tree: Any
  executable: Any

  def move_inputs(self, maps: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the piece's inputs on its devices; starts the moves and does not wait for them.

    Args:
      maps: all maps that were made so far, by name, and "images".
    """
    # Maps of the same stream are on the right devices already.
    return {
      name: jax.device_put(maps[name], self.sharding) if name in self.piece.moves else maps[name]
      for name in self.piece.reads
    }


class StreamsProgram:
  """A network in streams, compiled for batches of one size.

  Attributes:
    devices: number of devices that take part.
    images: number of images that run, a multiple of the number of groups. Smaller batches are
      padded.
    batch: shape (N, H, W, 3) and dtype of the padded batch.
    pieces: compiled pieces, in an order in which they can run.
    convolutions: scope of a kernel to the name of the algorithm that computes its convolution. XLA
      computes the convolutions that are not listed.
  """

  def __init__(self, run: Callable[..., Any], placed: "PlacedStreams", batch: jax.ShapeDtypeStruct):
    """Compiles the pieces.

    Args:
      run: runs named scopes, given variables and input maps.
      placed: the network's variables on devices.
      batch: shape (N, H, W, 3) and dtype of the images.
    """
    groups = len(placed.groups)
    self.devices = placed.groups.size
    self.images = batch.shape[0] + -batch.shape[0] % groups
    self.batch = jax.ShapeDtypeStruct((self.images, *batch.shape[1:]), batch.dtype)
    self._outputs, self._splits = placed.outputs, groups > 1
    self.pieces: list[CompiledPiece] = []
    self.convolutions: dict[str, str] = {}
    # Shapes of the whole batch's maps, by name. The dictionary grows piece by piece: tracing a
    # piece gives the shapes of its outputs, which later pieces read.
    maps = {"images": self.batch}
    for piece, sharding, tree, tuner in placed.pieces:
      inputs = {
        name: jax.ShapeDtypeStruct(maps[name].shape, maps[name].dtype, sharding=sharding)
        for name in piece.reads
      }
      function = _piece_function(run, piece)
      if tuner is not None:
        # One device computes the share of one group, and algorithms are chosen for this size.
        function, tree, choices = tuner(function, jax.tree.map(share, inputs))
        self.convolutions |= choices
      traced = trace(function, tree, inputs, NamedSharding(sharding.mesh, PartitionSpec()))
      maps |= traced.out_info
      executable = compile_lowered(traced.lower(), placed.groups[0, 0], placed.options)
      tree = lay_out(tree, executable)
      self.pieces.append(CompiledPiece(piece, sharding, tree, executable))

  @property
  def memory(self) -> int | None:
    """The largest sum of XLA's planned bytes over the pieces of one stream.

    The sum can exceed what a device needs at any time. It adds the work space of all pieces, and
    counts a map twice that one piece hands to the next piece. None if XLA does not say.
    """
    streams: dict[int, int] = {}  # number of a stream to bytes
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

    Returns:
      The outputs of the network for the padded batch, as arrays that are still being computed.
    """
    if self._splits:
      # JAX would compile a program to split an array on one device over several devices. An array
      # on the host is split without a program. The copy waits if a device still computes the array.
      images = np.asarray(images)
    maps = {"images": pad_images(images, self.images)}
    # Neither the moves nor the calls wait, so this loop ends long before the devices do. The arrays
    # in `maps` may not be computed yet. A device waits for an array where a piece reads it.
    for compiled in self.pieces:
      maps |= compiled.executable(compiled.tree, compiled.move_inputs(maps))
    return jax.tree.map(lambda scope: maps[scope], self._outputs)

  def finish(self, results: Any, count: int) -> Any:
    """Waits for results and returns the first `count` rows of each, in float32 on the host.

    Args:
      results: arrays from `start`.
      count: number of images before padding.
    """
    return jax.tree.map(lambda rows: np.asarray(rows)[:count].astype(np.float32), results)


class PlacedStreams:
  """The scopes of a network in streams, each on the devices of its stream.

  Attributes:
    groups: array (k, S) of devices: k groups of S devices, one device for each stream.
    outputs: outputs of the network: a tree with names of scopes in the place of their maps.
    pieces: pieces with their variables on devices, in an order in which they can run.
    options: options of XLA besides those that suit the devices.
  """

  def __init__(
    self,
    network: Any,
    tree: Any,
    devices: Sequence[Any] | None = None,
    tune: bool = False,
    options: Mapping[str, Any] | None = None,
  ):
    """Cuts the network into pieces and copies the variables of each to its devices.

    Args:
      network: the network in streams, in deploy form.
      tree: variables of the network.
      devices: devices of this process; None takes all.
      tune: choose the fastest algorithm for each convolution; no effect except on CPUs.
      options: options of XLA besides those that suit the devices.

    Raises:
      InputError: as in `device_groups`.
    """
    self.options = options or {}
    self.outputs = network.outputs
    self.groups = device_groups(network, devices)
    self.pieces = []
    for piece in cut_into_pieces(network.stream_scopes, jax.tree.leaves(self.outputs)):
      # A column of `groups` holds the devices that one stream has in all groups.
      mesh = Mesh(self.groups[:, piece.stream - 1], (_AXIS,))
      # A collection such as "params" lacks the scopes that keep nothing in it.
      variables = {
        collection: {scope: held[scope] for scope in piece.scopes if scope in held}
        for collection, held in tree.items()
      }
      # An empty PartitionSpec splits no axis, so every device of the mesh gets a whole copy.
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
      run: runs named scopes, given variables and input maps.
      batch: shape (N, H, W, 3) and dtype of the images.

    Returns:
      The program, and a record of how batches of this size run.
    """
    start = time.perf_counter()
    program = StreamsProgram(run, self, batch)
    return program, BatchPlan(
      devices=program.devices,
      chunk=program.images // len(self.groups),
      images=program.images,
      # There is one arrangement, so none was timed. On CPUs a tuner may have timed convolutions,
      # and `compile_seconds` includes this time.
      seconds={},
      compile_seconds=time.perf_counter() - start,
      memory=program.memory,
      convolutions=program.convolutions,
      runtime="xla",
      runtimes={},
    )


def device_groups(model: nn.Module, devices: Sequence[Any] | None) -> np.ndarray:
  """Divides devices into groups with one device for each stream of a model.

  Args:
    model: the model, in either form.
    devices: devices of this process; None takes all.

  Returns:
    An array (k, S) of devices: k groups of S devices, one device for each of S streams.

  Raises:
    InputError: the model has no streams, or the number of devices is not a multiple of S, or as in
      `checked_devices`.
  """
  scopes: Mapping[str, StreamScope] | None = getattr(model, "stream_scopes", None)
  if scopes is None:
    raise InputError(
      f'parallel="streams" needs a network in streams like ParNet, got {type(model).__name__}. '
      'The default, parallel="data", uses all devices too.'
    )
  given = checked_devices(devices)
  streams = max(scope.stream for scope in scopes.values())
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
  """Returns a piece as a function of its variables and of its inputs by name.

  Args:
    run: runs named scopes, given variables and input maps, and returns all maps.
    piece: the piece. The function returns only the maps in `piece.makes`.
  """

  def function(tree: Any, maps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    made = run(tree, maps, piece.scopes)
    return {scope: made[scope] for scope in piece.makes}

  return function
