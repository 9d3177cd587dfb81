"""`recognize`: which model a state dict is of, in whose names and in which form."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError
from repjax.models import create_model, list_models
from repjax.weights.naming import Entry, Naming, NoNameError, plain_name
from repjax.weights.sources import KINDS, NAMINGS, expected, naming_of

_COUNTER = ".num_batches_tracked"  # of batch norms, which no computation reads


class Recognition(NamedTuple):
  """What a state dict turned out to be.

  Attributes:
    model: its name, as in `create_model`.
    naming: "official", "timm", "mmpretrain" or "repmlp", as `NAMINGS` has them for the model.
    kind: "train" or "deploy".
    num_classes: outputs of its classifier; None where it has none.
  """

  model: str
  naming: str
  kind: str
  num_classes: int | None


def recognize(
  state_dict: Mapping[str, Any],
  model_name: str | None = None,
  *,
  hint: str = "",
  **overrides: Any,
) -> Recognition:
  """Finds the naming, the kind and the classes of a state dict, and the model unless it is given.

  Args:
    state_dict: name to array.
    model_name: as in `create_model`; None searches all models for the one whose names and shapes
      fit, or fit best; what does not fit is then for `from_torch` to say.
    hint: a text that may name the model, such as the file's name; models in it are tried first.
    **overrides: as in `create_model`.

  Raises:
    InputError: no model fits at all, or no name in it is one that `model_name` has in any naming.
  """
  state = normalised(state_dict)
  if model_name is not None:
    return recognize_model(state, model_name, overrides)
  closest, _ = closest_model(state, overrides, hint)
  if closest is None:
    raise InputError(
      f"no model has tensors of the names and shapes of this state dict ({len(state)}: "
      f"{some(state)})"
    )
  return closest


def normalised(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Arrays by their plain names, without the counters of batch norms."""
  if not state_dict:
    raise InputError("the state dict is empty")
  return {
    plain_name(name): _to_numpy(name, value)
    for name, value in state_dict.items()
    if not name.endswith(_COUNTER)
  }


def _to_numpy(name: str, value: Any) -> np.ndarray:
  try:
    return np.asarray(value)
  except (TypeError, ValueError, RuntimeError) as error:
    # A tensor on a GPU, with a gradient, or in bfloat16; a ragged list.
    raise InputError(
      f"{name} is no array: {error}; pass {{name: t.detach().cpu().float() ...}}"
    ) from error


def check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises InputError for what are arguments of their own."""
  for name in ("deploy", "num_classes", "dtype", "param_dtype"):
    if name in overrides:
      raise InputError(f"{name} is no override of a model's attributes; leave it out of them")


def candidates(
  model_name: str, overrides: Mapping[str, Any], namings: Iterable[str] | None = None
) -> Iterable[tuple[str, str, dict[str, Entry]]]:
  """Naming, kind and expected tensors of everything that a model's weights can come as.

  The heads are those of 1000 classes, and not for comparing. `namings` are a choice of them.
  """
  for naming in NAMINGS.get(model_name, {}) if namings is None else namings:
    for kind in KINDS:
      try:
        yield naming, kind, expected(model_name, naming, kind, 1000, overrides)
      except NoNameError:
        continue


def recognize_model(
  state: Mapping[str, Any], model_name: str, overrides: Mapping[str, Any]
) -> Recognition:
  """The naming and kind of a model that share most names with a state dict."""
  if model_name not in NAMINGS:
    create_model(model_name)  # an unknown name is the likelier mistake
    naming_of(model_name, "official")
  check_overrides(overrides)
  create_model(model_name, **overrides)
  found = _best_naming(state, candidates(model_name, overrides))
  if found is None:
    raise InputError(f"no names are known for a {model_name} with {overrides}")
  naming, kind, wanted = found
  if not wanted.keys() & state.keys():
    raise InputError(
      f"no name in this state dict is one of {model_name}'s (in {' or '.join(NAMINGS[model_name])} "
      f"naming): it has {some(state)}, where {naming} naming has {some(wanted)}"
    )
  return Recognition(model_name, naming, kind, _num_classes(state, wanted))


def _best_naming(
  state: Mapping[str, Any], candidates: Iterable[tuple[str, str, dict[str, Entry]]]
) -> tuple[str, str, dict[str, Entry]] | None:
  """The candidate that shares most names; the first with just these, so that no more are traced."""
  best, most = None, -1
  for candidate in candidates:
    shared = len(candidate[2].keys() & state.keys())
    if shared > most:
      best, most = candidate, shared
    if shared == len(state) == len(candidate[2]):
      break
  return best


def _num_classes(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> int | None:
  """Of the main classifier in a state dict."""
  for name, entry in wanted.items():
    is_classifier = entry.in_head and entry.path[1] == "head"
    if is_classifier and entry.path[-1] == "bias" and name in state and len(state[name].shape) == 1:
      return state[name].shape[0]
  return None


def closest_model(
  state: Mapping[str, Any], overrides: Mapping[str, Any], hint: str = ""
) -> tuple[Recognition | None, bool]:
  """The model with most of the names and shapes of a state dict, and whether it has just those.

  Heads are left aside; None where no model has any.

  Raises:
    InputError: no model takes the overrides.
  """
  check_overrides(overrides)
  plain = hint.lower().replace("-", "_")
  models = [name for name in list_models() if name in NAMINGS]
  likeliest_first = sorted(models, key=lambda name: -len(name) * (name in plain))
  refusals, closest, most = [], None, 0
  # To trace a model takes half a second: tables with none of the names are not tried again, nor
  # any others once one has nearly all.
  strange: set[Naming] = set()
  decided: Naming | None = None
  for model_name in likeliest_first:
    tables = {
      naming: table
      for naming, table in NAMINGS[model_name].items()
      if table not in strange and decided in (None, table)
    }
    shared: collections.Counter[Naming] = collections.Counter()
    try:
      for naming, kind, wanted in candidates(model_name, overrides, tables):
        names = sum(name in state and not entry.in_head for name, entry in wanted.items())
        shared[tables[naming]] += names
        if names > 0.75 * len(state):
          decided = tables[naming]
        same = sum(name in state and state[name].shape == e.shape for name, e in wanted.items())
        if same > most:
          closest = Recognition(model_name, naming, kind, _num_classes(state, wanted))
          most = same
        if fits(state, wanted):
          return Recognition(model_name, naming, kind, _num_classes(state, wanted)), True
    except InputError as error:  # overrides that this family does not have
      refusals.append(error)
    strange |= {table for table, names in shared.items() if not names}
  if len(refusals) == len(likeliest_first):
    raise refusals[0]
  return closest, False


def fits(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> bool:
  """Whether names and shapes are the same, heads aside."""
  body = {name: entry.shape for name, entry in wanted.items() if not entry.in_head}
  heads = wanted.keys() - body.keys()
  return body == {name: value.shape for name, value in state.items() if name not in heads}


def model_as_deep(
  state: Mapping[str, np.ndarray], found: Recognition, overrides: Mapping[str, Any]
) -> str | None:
  """The model that a state dict fits among those whose tensors have the names of the one found."""
  depth = getattr(create_model(found.model, **overrides), "stage_sizes", None)
  for name in list_models():
    if NAMINGS.get(name) != NAMINGS[found.model]:
      continue
    try:
      if getattr(create_model(name, **overrides), "stage_sizes", None) != depth:
        continue
      if fits(state, expected(name, found.naming, found.kind, 1000, overrides)):
        return name
    except InputError:  # overrides that this model does not take
      continue
  return None


def some(names: Iterable[str]) -> str:
  """A few of many names, for a message."""
  names = list(names)
  return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
