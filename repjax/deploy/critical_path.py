"""`critical_path`: what each piece of a network in streams costs, and which of them bound it."""

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

_OFF = ("moves", "host")  # of shares: what is no computing


class Cost(NamedTuple):
  """What was measured of a piece while nothing else ran.

  Attributes:
    piece: its scopes, its stream, and what it reads.
    seconds: of computing, from maps that are there.
    moves: seconds in which each map comes to its devices, for those of other streams, and images.
  """

  piece: Piece
  seconds: float
  moves: Mapping[str, float]


class CriticalPath(NamedTuple):
  """The chain of pieces that takes longest, each measured alone; `print` it.

  Attributes:
    batch_size: that was measured.
    devices: how many took part.
    costs: of all pieces, in an order in which they can run.
    path: names of the pieces on the longest chain.
    seconds: of that chain, with its moves, from images on the host to results on the host: no run
      takes less while a piece takes as long as it does alone.
    shares: what these seconds are made of, which add up: "serial", pieces beside which nothing can
      run; "stream 1", ...: others on the path, by their stream; "moves", of maps from one stream's
      devices to another's; "host", of images to devices and of results from there.
  """

  batch_size: int
  devices: int
  costs: tuple[Cost, ...]
  path: tuple[str, ...]
  seconds: float
  shares: dict[str, float]

  @property
  def streams(self) -> dict[int, float]:
    """Seconds of computing by stream, all its pieces together."""
    return _sums((cost.piece.stream, cost.seconds) for cost in self.costs)

  @property
  def one_by_one(self) -> float:
    """Seconds of all pieces one after another, with images and results, but no moves."""
    return self.shares["host"] + sum(cost.seconds for cost in self.costs)

  @property
  def bound(self) -> str:
    """The largest of the shares."""
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
  """Measures each piece of a network in streams alone, and finds the longest chain of them.

  Args:
    compiled: by `compile` with `parallel="streams"`.
    batch_size: that it is compiled for; None: the smallest.
    rounds: of which medians are taken.

  Raises:
    InputError: a model that is not compiled in streams or not for this batch size, or no rounds.

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
      f"this model is compiled for batch sizes {compiled.batch_sizes}, got {size!r}; choose one of "
      "these, or compile it with others"
    )
  if rounds < 1:
    raise InputError(f"rounds are 1 or more, got {rounds}")
  program = compiled._programs[size]
  if not isinstance(program, StreamsProgram):
    raise InputError(
      "only a model in streams is made of pieces with a critical path; compile it with "
      'parallel="streams"'
    )
  costs, to_host = measure(program, rounds)
  return longest(costs, to_host, size, program.devices)


def measure(program: StreamsProgram, rounds: int) -> tuple[list[Cost], float]:
  """The cost of each piece, and the seconds in which results come to the host."""
  noise = np.random.default_rng(0).integers(0, 256, program.batch.shape)
  images = noise.astype(program.batch.dtype)
  maps, costs = {"images": images}, []
  for running in program.pieces:
    piece, moves = running.piece, {}
    for name in piece.moves:
      move = functools.partial(jax.device_put, maps[name], running.sharding)
      moves[name] = _median(move, rounds)
    reads = jax.block_until_ready(running.moved(maps))
    compute = functools.partial(running.compiled, running.tree, reads)
    costs.append(Cost(piece, _median(compute, rounds), moves))
    maps |= jax.block_until_ready(compute())
  # An array keeps what it has brought to the host once, so that each round makes results anew.
  seconds = []
  for _ in range(1 + rounds):
    results = jax.block_until_ready(program.start(images))
    start = time.perf_counter()
    program.finish(results, len(images))
    seconds.append(time.perf_counter() - start)
  return costs, statistics.median(seconds[1:])


def longest(costs: Sequence[Cost], to_host: float, batch_size: int, devices: int) -> CriticalPath:
  """The chain of pieces that is done last.

  Args:
    costs: in an order in which the pieces can run.
    to_host: seconds in which results come to the host.
    batch_size: that was measured.
    devices: how many took part.
  """
  maker = {scope: cost.piece.name for cost in costs for scope in cost.piece.makes}
  done: dict[str, float] = {}
  ahead: dict[str, str] = {}  # the map that a piece waits for longest
  for cost in costs:
    there = {
      name: done.get(maker.get(name, ""), 0.0) + cost.moves.get(name, 0.0)
      for name in cost.piece.reads
    }
    ahead[cost.piece.name] = last = max(there, key=there.__getitem__)
    done[cost.piece.name] = there[last] + cost.seconds
  by_name = {cost.piece.name: cost for cost in costs}
  path = [max(done, key=done.__getitem__)]
  while (name := ahead[path[0]]) in maker:
    path.insert(0, maker[name])
  alone = _alone(costs, maker)
  shares = _sums(
    ("serial" if name in alone else f"stream {by_name[name].piece.stream}", by_name[name].seconds)
    for name in path
  )
  shares |= dict.fromkeys(_OFF, 0.0)
  for name in path:
    moved = by_name[name].moves.get(ahead[name], 0.0)
    shares["host" if ahead[name] == "images" else "moves"] += moved
  shares["host"] += to_host
  return CriticalPath(batch_size, devices, tuple(costs), tuple(path), sum(shares.values()), shares)


def _alone(costs: Sequence[Cost], maker: Mapping[str, str]) -> set[str]:
  """Pieces that come before or behind every other, so that nothing can run beside them."""
  before: dict[str, set[str]] = {}
  for cost in costs:
    near = {maker[name] for name in cost.piece.reads if name in maker}
    before[cost.piece.name] = near.union(*(before[name] for name in near))
  return {
    name
    for name, earlier in before.items()
    if all(name in before[other] for other in before.keys() - earlier - {name})
  }


def _sums(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
  sums: dict[Any, float] = {}
  for key, value in pairs:
    sums[key] = sums.get(key, 0.0) + value
  return sums


def _median(run: Callable[[], Any], rounds: int) -> float:
  """Seconds of a call until its arrays are there, behind one that is not timed."""
  seconds = []
  for _ in range(1 + rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:])
