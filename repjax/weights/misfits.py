"""Explains why a state dict does not fit: a line for each problem, and guesses about the cause."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.errors import listed
from repjax.weights.attributes import changed_attributes, model_with
from repjax.weights.naming import Entry, heads_among
from repjax.weights.recognition import Recognition, closest_model, model_as_deep
from repjax.weights.sources import KINDS, expected

_MOST_LINES = 10
"""Number of problems up to which each one is told."""
_MOST_GROUPS = 5
"""Number of examples that are told of more problems."""


class Problem(NamedTuple):
  """A tensor that does not fit.

  Attributes:
    kind: what is wrong, for a heading: "missing", "unexpected", ...
    name: name of the tensor.
    text: a line about this tensor.
  """

  kind: str
  name: str
  text: str


def misfits(state: Mapping[str, np.ndarray], wanted: Mapping[str, Entry]) -> list[Problem]:
  """Lists tensors that are missing, that are unexpected, or whose shape is wrong."""
  missing = {name: entry.shape for name, entry in wanted.items() if name not in state}
  unexpected = {name: value.shape for name, value in state.items() if name not in wanted}
  known = {name: entry.shape for name, entry in wanted.items()}
  return [
    *(
      Problem("missing", name, f"missing {name} {shape}{_closest(name, shape, unexpected)}")
      for name, shape in missing.items()
    ),
    *(
      Problem(
        "unexpected",
        name,
        f"unexpected {name} {shape}{_closest(name, shape, missing or known)}",
      )
      for name, shape in unexpected.items()
    ),
    *(
      Problem("of another shape", name, f"{name} is {state[name].shape}, wanted {shape}")
      for name, shape in known.items()
      if name in state and state[name].shape != shape
    ),
  ]


def lines_of(problems: Sequence[Problem]) -> list[str]:
  """Returns a line for each problem, or a few examples with the size of their group.

  A group is a kind of problem in one scope. The largest groups come first.
  """
  if len(problems) <= _MOST_LINES:
    return [problem.text for problem in problems]
  groups: dict[tuple[str, str], list[Problem]] = {}
  for problem in problems:
    groups.setdefault((problem.kind, _scope(problem.name)), []).append(problem)
  lines = [
    f"{kind}: {len(group)} tensors of {scope}, such as {group[0].text.removeprefix(kind).strip()}"
    if len(group) > 1
    else group[0].text
    for (kind, scope), group in sorted(groups.items(), key=lambda each: -len(each[1]))
  ]
  others = sum(sorted(map(len, groups.values()), reverse=True)[_MOST_GROUPS:])
  return [*lines[:_MOST_GROUPS], f"and {others} more"] if others else lines


def _scope(name: str) -> str:
  """Returns the first segment of a name, and the second one if the first says little."""
  first, *others = name.split(".")[:-1] or [name]
  return ".".join((first, *others[:1])) if first in ("backbone", "features") else first


def _closest(name: str, shape: tuple[int, ...], others: Mapping[str, tuple[int, ...]]) -> str:
  """Returns a hint with the most similar names among tensors of the same shape, or ""."""
  same_shape = [other for other, other_shape in others.items() if other_shape == shape]
  close = difflib.get_close_matches(name, same_shape, n=2, cutoff=0.5)
  return f", closest: {' or '.join(close)}" if close else ""


def bad_values(
  state: Mapping[str, np.ndarray], wanted: Mapping[str, Entry], dtype: np.dtype
) -> list[Problem]:
  """Lists tensors of the right shape whose numbers cannot be used."""
  fitting = [name for name, e in wanted.items() if name in state and state[name].shape == e.shape]
  found = []
  for name in fitting:
    problem = _bad_value(state[name], dtype, is_variance=wanted[name].path[-1] == "var")
    if problem:
      kind, text = problem
      found.append(Problem(kind, name, f"{name} {text}"))
  return found


def _bad_value(value: np.ndarray, dtype: np.dtype, *, is_variance: bool) -> tuple[str, str] | None:
  """Returns the kind of a problem with a tensor's numbers and a text about it, or None."""
  if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
    return "not floating-point", f"holds {value.dtype}, not floating-point numbers"
  if is_half(value) and dtype.itemsize > value.dtype.itemsize:
    return "of few bits", f"is {value.dtype}"
  if not np.isfinite(value).all():
    count = np.count_nonzero(~np.isfinite(value))
    return "not finite", f"holds {count} of {value.size} numbers that are not finite"
  if value.dtype.itemsize > dtype.itemsize and _overflows(value, dtype):
    return "too large", f"holds numbers too large for {dtype}"
  if is_variance and (value < 0).any():
    return "negative variances", "holds negative variances"
  return None


def _overflows(value: np.ndarray, dtype: np.dtype) -> bool:
  """Returns True if an array holds a number that is infinite in `dtype`."""
  return float(np.abs(value).max(initial=0)) > float(jax.numpy.finfo(dtype).max)


def is_half(value: np.ndarray) -> bool:
  """Returns True if an array holds floating-point numbers of fewer than 32 bits."""
  return value.dtype.itemsize < 4 and jax.numpy.issubdtype(value.dtype, jax.numpy.floating)


def explain(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, Entry],
  found: Recognition,
  num_classes: int,
  overrides: Mapping[str, Any],
) -> list[str]:
  """Guesses the cause for which a state dict does not fit; a sentence for each guess.

  Args:
    state: the state dict.
    wanted: the tensors that a fitting state dict holds.
    found: what the state dict was recognized as.
    num_classes: number of classes that the caller has asked for.
    overrides: overrides of the model that the caller has given.
  """
  hints = []
  if any(map(is_half, state.values())):
    hints.append(
      "Half-precision weights are already rounded. To accept the rounding, widen them first, with "
      "value.astype('float32') or --allow-half."
    )
  other_kind = KINDS[1 - KINDS.index(found.kind)]
  other = expected(found.model, found.naming, other_kind, num_classes, overrides)
  strangers = [name for name in state if name in other and name not in wanted]
  if strangers:
    return [*hints, f"It mixes both kinds: of the {other_kind} form are {listed(strangers, 4)}."]
  if overrides.get("features_only"):
    hints.append(
      "With features_only a model has no classifier: leave that override out. The variables then "
      "fit the model with features_only too, which does not read the classifier."
    )
  heads = heads_among(wanted, state)
  if heads and heads.isdisjoint(state):
    hints.append(
      "The file has no classifier: draw a new one (drop_head=True and num_classes, or --drop-head "
      "and --num-classes)."
    )
  if found.num_classes not in (None, num_classes) and any(e.in_head for e in wanted.values()):
    hints.append(
      f"The file has {found.num_classes} classes: pass num_classes={found.num_classes}, or drop "
      "its classifier and draw a new one (drop_head=True, or --drop-head)."
    )
  return [*hints, *_other_attributes_or_model(state, wanted, found, overrides)]


def _other_attributes_or_model(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, Entry],
  found: Recognition,
  overrides: Mapping[str, Any],
) -> list[str]:
  """Names the attributes or the model that a state dict fits, if one can be found."""
  heads = heads_among(wanted, state)
  ours = {(name, entry.shape) for name, entry in wanted.items() if name not in heads}
  theirs = {(name, value.shape) for name, value in state.items() if name not in heads}
  odd = {name for name, _ in ours ^ theirs}
  if len(odd) < 4:  # Few tensors are damaged; a different model would differ in more.
    return []
  if changed := changed_attributes(state, wanted, found, overrides):
    given = {**overrides, **changed}
    if model := model_with(found, given):
      return [f"Its names and shapes are those of {model}."]
    return [
      f"Its layers have {', '.join(f'{name}={value}' for name, value in changed.items())}: pass "
      f"this (from the command line: --overrides '{json.dumps(given)}'). "
      "Attributes that no shape shows, such as strides, are to be given as well."
    ]
  model = None
  # Searching all models takes many seconds. Two models never differ in a few names only, so the
  # search is worth its time only if many names differ.
  if wanted.keys() == state.keys():
    model = model_as_deep(state, found, overrides)
  elif not overrides and len(odd) > len(wanted) / 10:
    closest, fits = closest_model(state, {})
    model = closest.model if closest and fits and closest.model != found.model else None
  if model:
    return [f"Its names and shapes are those of {model}."]
  return [
    "No model was found that has all of these names and shapes. Name a different model "
    "(model_name, or --model), or the attributes in which yours differs from the published one "
    "(overrides, or --overrides)."
  ]
