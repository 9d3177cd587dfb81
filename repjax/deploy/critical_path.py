"""`critical_path`: times the pieces of a network in streams and finds the longest chain of them."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.deploy.compile import CompiledModel
from repjax.deploy.streams import Piece, StreamsProgram
from repjax.errors import InputError

_TRANSFERS = ("moves", "host")  # Shares of the time in which nothing is computed.


class PieceCost(NamedTuple):
  """The time of one piece, measured while nothing else ran.

  Attributes:
    piece: the piece: its scopes, its stream, and what it reads.
    seconds: seconds of computing, once all maps are on the piece's devices.
    moves: name to seconds in which a map, or the images, comes to the piece's devices.
  """

  piece: Piece
  seconds: float
  moves: Mapping[str, float]


class CriticalPath(NamedTuple):
  """The chain of pieces that takes longest, each piece measured alone; `print` shows a table.

  Attributes:
    batch_size: the batch size that was measured.
    devices: number of devices that took part.
    costs: costs of all pieces, in an order in which the pieces can run.
    path: names of the pieces on the longest chain.
    seconds: seconds of the longest chain, from images on the host to results on the host. No run is
      faster, as long as every piece takes as long as it does alone.
    shares: parts of `seconds`, which add up to it. "serial" are the pieces beside which nothing can
      run; "stream 1", "stream 2", ... are the other pieces on the path, by stream; "moves" are maps
      between the devices of two streams; "host" are images to devices and results to the host.
  """

  batch_size: int
  devices: int
  costs: tuple[PieceCost, ...]
  path: tuple[str, ...]
  seconds: float
  shares: dict[str, float]

  @property
  def streams(self) -> dict[int, float]:
    """Seconds of computing by stream, all pieces of a stream together."""
    return _sums((cost.piece.stream, cost.seconds) for cost in self.costs)

  @property
  def one_by_one(self) -> float:
    """Seconds of all pieces one after the other on one device, images and results included."""
    return self.shares["host"] + sum(cost.seconds for cost in self.costs)

  @property
  def bound(self) -> str:
    """The name of the largest share."""
    return max(self.shares, key=self.shares.__getitem__)

  def __str__(self) -> str:
    width = max(len(cost.piece.name) for cost in self.costs) + 2
    lines = [f"{'piece':<{width}}stream{'ms':>10}  waits for moves, ms"]
    for cost in self.costs:
      moves = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in cost.moves.items())
      mark = "*" if cost.piece.name in self.path else " "
      numbers = f"{cost.piece.stream:>6}{1e3 * cost.seconds:>10.3f}"
      lines.append(f"{cost.piece.name:<{width}}{numbers}{mark} {moves}".rstrip())
    streams = ", ".join(f"stream {n} {1e3 * s:.3f} ms" for n, s in sorted(self.streams.items()))
    shares = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in self.shares.items())
    lines += [
      f"by stream: {streams}",
      f"critical path (*): {' > '.join(self.path)}",
      f"  {1e3 * self.seconds:.3f} ms = {shares}; most of it: {self.bound}",
      f"  all pieces one after another {1e3 * self.one_by_one:.3f} ms: "
      f"at most {self.one_by_one / self.seconds:.2f} times as fast in streams",
    ]
    return "\n".join(lines)


def critical_path(
  compiled: CompiledModel, batch_size: int | None = None, *, rounds: int = 10
) -> CriticalPath:
  """Measures every piece of a network in streams alone, and finds the longest chain of pieces.

  Args:
    compiled: a model compiled by `compile` with `parallel="streams"`.
    batch_size: a batch size that the model is compiled for; None takes the smallest.
    rounds: number of measurements; medians are taken.

  Returns:
    The longest chain, and the cost of every piece.

  Raises:
    InputError: the model is not compiled in streams, or not for this batch size, or `rounds` is
      below 1.

  Example:
    in_streams = repjax.deploy.compile(model, variables, image_size=224, parallel="streams")
    print(repjax.deploy.critical_path(in_streams))
  """
  if not isinstance(compiled, CompiledModel):
    raise InputError(
      f"critical_path takes what repjax.deploy.compile returns, got {type(compiled).__name__}"
    )
  size = compiled.batch_sizes[0] if batch_size is None else batch_size
  if size not in compiled.batch_sizes:
    raise InputError(
      f"this model is compiled for batch sizes {compiled.batch_sizes}, got {size!r}. Choose one of "
      "these, or compile the model with this batch size."
    )
  if rounds < 1:
    raise InputError(f"rounds must be 1 or more, got {rounds}")
  program = compiled.programs[size]
  if not isinstance(program, StreamsProgram):
    raise InputError(
      'this model is not compiled in streams and has no pieces; compile it with parallel="streams"'
    )
  costs, to_host = measure_pieces(program, rounds)
  return longest_chain(costs, to_host, size, program.devices)


def measure_pieces(program: StreamsProgram, rounds: int) -> tuple[list[PieceCost], float]:
  """Returns the cost of each piece, and the seconds in which the results come to the host."""
  noise = np.random.default_rng(0).integers(0, 256, program.batch.shape)
  images = noise.astype(program.batch.dtype)
  maps, costs = {"images": images}, []
  for compiled in program.pieces:
    piece, moves = compiled.piece, {}
    for name in piece.moves:
      move = functools.partial(jax.device_put, maps[name], compiled.sharding)
      moves[name] = _median(move, rounds)
    # Moves are over before the piece is timed, and the piece is over before the next one starts.
    inputs = jax.block_until_ready(compiled.move_inputs(maps))
    compute = functools.partial(compiled.executable, compiled.tree, inputs)
    costs.append(PieceCost(piece, _median(compute, rounds), moves))
    maps |= jax.block_until_ready(compute())
  # JAX caches the host's copy of an array. A second copy of the same results would take no time,
  # so every round computes new results.
  seconds = []
  for _ in range(1 + rounds):
    results = jax.block_until_ready(program.start(images))
    start = time.perf_counter()
    program.finish(results, len(images))
    seconds.append(time.perf_counter() - start)
  return costs, statistics.median(seconds[1:])


def longest_chain(
  costs: Sequence[PieceCost], to_host: float, batch_size: int, devices: int
) -> CriticalPath:
  """Returns the chain of pieces that ends last.

  A piece can start once all its inputs are there: the end of the piece that makes an input, plus
  the time of the move. The input that comes last decides, so following the last inputs from the
  piece that ends last back to the images gives the longest chain.

  Args:
    costs: costs of the pieces, in an order in which the pieces can run.
    to_host: seconds in which the results come to the host.
    batch_size: the batch size that was measured.
    devices: number of devices that took part.
  """
  maker = {scope: cost.piece.name for cost in costs for scope in cost.piece.makes}
  ends: dict[str, float] = {}  # when each piece ends, in seconds
  last_input: dict[str, str] = {}  # the map that each piece waits for longest
  for cost in costs:
    # Images have no maker and are there at 0 seconds; maps of the same stream need no move.
    arrivals = {
      name: ends.get(maker.get(name, ""), 0.0) + cost.moves.get(name, 0.0)
      for name in cost.piece.reads
    }
    last_input[cost.piece.name] = latest = max(arrivals, key=arrivals.__getitem__)
    ends[cost.piece.name] = arrivals[latest] + cost.seconds
  by_name = {cost.piece.name: cost for cost in costs}
  path = [max(ends, key=ends.__getitem__)]
  while (name := last_input[path[0]]) in maker:
    path.insert(0, maker[name])
  serial = _serial(costs, maker)
  shares = _sums(
    ("serial" if name in serial else f"stream {by_name[name].piece.stream}", by_name[name].seconds)
    for name in path
  )
  shares |= dict.fromkeys(_TRANSFERS, 0.0)
  for name in path:
    moved = by_name[name].moves.get(last_input[name], 0.0)
    shares["host" if last_input[name] == "images" else "moves"] += moved
  shares["host"] += to_host
  return CriticalPath(batch_size, devices, tuple(costs), tuple(path), sum(shares.values()), shares)


def _serial(costs: Sequence[PieceCost], maker: Mapping[str, str]) -> set[str]:
  """Returns the pieces that are before or after every other piece, so that nothing runs beside."""
  before: dict[str, set[str]] = {}  # all pieces that must end before a piece can start
  for cost in costs:
    inputs = {maker[name] for name in cost.piece.reads if name in maker}
    before[cost.piece.name] = inputs.union(*(before[name] for name in inputs))
  return {
    name
    for name, earlier in before.items()
    if all(name in before[later] for later in before.keys() - earlier - {name})
  }


def _sums(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
  """Adds up the values of each key."""
  sums: dict[Any, float] = {}
  for key, value in pairs:
    sums[key] = sums.get(key, 0.0) + value
  return sums


def _median(run: Callable[[], Any], rounds: int) -> float:
  """Returns the median seconds of a call until its arrays are ready, after one call of warm-up."""
  seconds = []
  for _ in range(1 + rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:])
