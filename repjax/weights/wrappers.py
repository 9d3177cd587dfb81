"""Takes off what wrappers of modules add to the names of tensors.

A module inside a wrapper has the wrapper's attribute in the names of its tensors. PyTorch,
Lightning, averages of weights and people's own classes add such segments in front of the names, and
at any place inside them if they wrap a part of the network:

  layer1.0.conv1.weight                               the name
  module.layer1.0.conv1.weight                        data-parallel training
  layer1._orig_mod.0.conv1.weight                     torch.compile of one stage
  lightning.student.layer1.0.conv1.weight             somebody's own classes

`plain_name` takes off what only a wrapper can have added. `unwrapped` knows the wanted names. So it
takes off anything that stands in front of all of them.
"""

import collections
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError, printable

_PRIVATE = frozenset(
  (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP before PyTorch 2
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
  )
)
"""Attributes that no network has for a layer of its own."""

_WRAPPERS = _PRIVATE | {
  *("module", "_module", "model", "_model", "net", "network", "backbone", "wrapped", "inner"),
  *("ema", "ema_model", "model_ema", "averaged_model", "online_model", "student", "encoder"),
}
"""Segments that wrappers add. They are ignored inside names, wanted ones included.

So are all that begin with an underscore, since published networks have no such names.
"""

_COUNTERS = {
  *("num_batches_tracked", "n_averaged", "initted", "step", "num_updates", "decay"),
  *("total_ops", "total_params"),
}
"""Last segments of numbers that no computation reads: of norms, averages and the profiler thop."""

_LONGEST = 1000


def plain_name(name: str) -> str:
  """Takes off what only a wrapper can have added to the name of a tensor."""
  *scopes, last = name.split(".")
  scopes = [segment for segment in scopes if segment not in _PRIVATE]
  while scopes[:1] == ["module"]:
    scopes = scopes[1:]
  return ".".join((*scopes, last))


def with_plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a state dict by plain names.

  Raises:
    InputError: two names are the same without what wrappers add, or a name cannot be the name of a
      tensor in a network.
  """
  plain: dict[str, Any] = {}
  for name, value in state.items():
    if not name.isprintable() or len(name) > _LONGEST:
      raise InputError(
        f"a tensor is called {printable(name, 100)}, which no network does: names are printable "
        f"and have at most {_LONGEST} characters. Look at where the file comes from"
      )
    short = plain_name(name)
    if short in plain:
      raise InputError(
        f"it holds {short} twice, with and without a prefix such as module. or _orig_mod. Keep one"
      )
    plain[short] = value
  return plain


def is_counter(name: str, value: np.ndarray) -> bool:
  """Returns True for one number that counts something: steps, batches or averaged models."""
  whole = value.ndim == 0 and value.dtype.kind in "iub"
  return whole or (value.size == 1 and name.rpartition(".")[2] in _COUNTERS)


class Unwrapped(NamedTuple):
  """A state dict by the wanted names.

  Attributes:
    state: name to array. Names that are not wanted are as they were.
    removed: what was taken off, for messages: prefixes as "model.", segments inside as "module".
    rivals: prefixes below which there are different tensors of the same wanted names.
  """

  state: dict[str, Any]
  removed: tuple[str, ...]
  rivals: tuple[str, ...]


def unwrapped(state: Mapping[str, Any], wanted: Collection[str]) -> Unwrapped:
  """Returns a state dict by the wanted names, without prefixes and wrappers.

  A prefix counts if the names without it are at least half of the wanted names, or of the state
  dict. The prefix with the most wanted names is taken. Names that have only the first part of it,
  such as a classifier beside a wrapped backbone, lose that part.
  """
  if wanted and all(name in state for name in wanted):
    return Unwrapped(dict(state), (), ())
  by_key = {without_wrappers(name): name for name in wanted}
  starts = {name.partition(".")[0] for name in wanted}
  found: dict[str, dict[str, str]] = collections.defaultdict(dict)
  for name in state:
    for prefix, start, key in _tails(name):
      # A wrapper belongs to the prefix, unless wanted names begin with it.
      if key in by_key and (not _is_wrapper(start) or start in starts):
        found[prefix].setdefault(by_key[key], name)
  enough = min(len(wanted), len(state)) / 2
  likely = [prefix for prefix, names in found.items() if not prefix or len(names) >= enough]
  best = max(likely, key=lambda prefix: (len(found[prefix]), -len(prefix)), default="")
  names: dict[str, str] = {}
  for prefix in _parts(best):
    taken = set(names.values())
    names = {
      **{new: old for new, old in found.get(prefix, {}).items() if old not in taken},
      **names,
    }
  return Unwrapped(
    _renamed(state, names), _removed(best, names), _rivals(best, likely, found, enough)
  )


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """Returns a state dict with new names for some tensors, in the order that it had."""
  new_names = {old: new for new, old in names.items()}
  # A tensor whose name went to a different one is not dropped: it must show as unexpected.
  given = {name: f"(the other) {name}" for name in names if name not in new_names}
  return {new_names.get(name, given.get(name, name)): value for name, value in state.items()}


def _removed(best: str, names: Mapping[str, str]) -> tuple[str, ...]:
  """Lists what was taken off: the prefix, and wrappers inside names."""
  inside = {
    segment
    for new, old in names.items()
    for segment in (collections.Counter(old.removeprefix(best).split(".")) - _segments(new))
  }
  front = (best,) if best and any(old.startswith(best) for old in names.values()) else ()
  return (*front, *sorted(inside - set(best.split("."))))


def _segments(name: str) -> collections.Counter[str]:
  return collections.Counter(name.split("."))


def _rivals(
  best: str, likely: Iterable[str], found: Mapping[str, Mapping[str, str]], enough: float
) -> tuple[str, ...]:
  """Lists the prefixes of different networks of the same names, the taken one first."""
  own = set(found.get(best, {}).values())
  others = [
    prefix
    for prefix in likely
    if prefix != best
    and len(found[prefix]) >= enough
    and not own & set(found[prefix].values())
    and set(found[prefix]) & set(found[best])
  ]
  return (best, *others) if others else ()


def _parts(prefix: str) -> list[str]:
  """Returns a prefix, and what is left of it without its last segments: "a.b.", "a.", ""."""
  segments = prefix.split(".")[:-1]
  return ["".join(f"{part}." for part in segments[:end]) for end in range(len(segments), -1, -1)]


def without_wrappers(name: str) -> str:
  """Returns a name without the segments that wrappers add."""
  *scopes, last = name.split(".")
  return ".".join([*(segment for segment in scopes if not _is_wrapper(segment)), last])


def _is_wrapper(segment: str) -> bool:
  return segment in _WRAPPERS or segment.startswith("_")


@functools.lru_cache(maxsize=2**14)
def _tails(name: str) -> tuple[tuple[str, str, str], ...]:
  """Splits a name at each of its first segments into a prefix and the rest.

  Returns:
    The prefix with its dot, the first segment of the rest, and the key of the rest.
  """
  segments = name.split(".")
  return tuple(
    (
      "".join(f"{segment}." for segment in segments[:at]),
      segments[at],
      without_wrappers(".".join(segments[at:])),
    )
    for at in range(min(len(segments), 12))
  )
