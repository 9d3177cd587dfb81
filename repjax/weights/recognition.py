"""`recognize`: finds the model, the naming and the form of a state dict."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError, listed, printable
from repjax.models import create_model, list_models
from repjax.weights.naming import Entry, Naming, NoNameError, heads_among, may_name
from repjax.weights.sources import KINDS, NAMINGS, expected, naming_of
from repjax.weights.wrappers import is_counter, unwrapped, with_plain_names, without_wrappers


class Recognition(NamedTuple):
  """A description of the network that a state dict belongs to.

  Attributes:
    model: name of the model, as in `create_model`.
    naming: source of the names: "official", "timm", "mmpretrain", "repopt" or "repmlp", see
      `NAMINGS`.
    kind: the form, "train" or "deploy".
    num_classes: number of outputs of the classifier; None if the state dict has no classifier.
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
  """Finds the naming, the form and the classes of a state dict, and the model unless it is given.

  Args:
    state_dict: name to array.
    model_name: as in `create_model`. None searches all models for the one whose names and shapes
      fit, or fit best; `from_torch` then lists what does not fit.
    hint: a text that may name the model, such as the file's name. Models in it are tried first.
    **overrides: as in `create_model`.

  Raises:
    InputError: no model has any of the names and shapes, or `model_name` has none of the names in
      any naming.
  """
  state = normalised(state_dict)
  if model_name is not None:
    return recognize_model(state, model_name, overrides)
  closest, _ = closest_model(state, overrides, hint)
  if closest is None:
    raise InputError(
      f"no model has tensors of the names and shapes of this state dict ({len(state)}: "
      f"{listed(state, 4)}). If you know the model, name it (model_name, or --model), with the "
      "attributes in which it differs from the published one (overrides, or --overrides)"
    )
  return closest


def removed_from(
  state_dict: Mapping[str, Any], found: Recognition, overrides: Mapping[str, Any]
) -> list[str]:
  """Lists what is taken off the names of a recognized state dict: prefixes and wrappers."""
  wanted = expected(found.model, found.naming, found.kind, 1000, overrides)
  return list(unwrapped(normalised(state_dict), wanted).removed)


def normalised(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the arrays of a state dict by plain names, without counters such as batch norms have.

  Raises:
    InputError: the state dict is empty, a value is not an array, or a name cannot be a tensor's.
  """
  if not isinstance(state_dict, Mapping) or not state_dict:
    held = "is empty" if isinstance(state_dict, Mapping) else f"is a {type(state_dict).__name__}"
    raise InputError(f"the state dict {held}; pass a dictionary of arrays by name")
  if strange := [name for name in state_dict if not isinstance(name, str)]:
    raise InputError(f"a state dict has names for keys, got {printable(repr(strange[0]), 100)}")
  arrays = {name: _to_numpy(name, value) for name, value in state_dict.items()}
  flat = [name for name in arrays if name.endswith("flat_param")]
  if flat:
    raise InputError(
      f"{printable(flat[0], 100)} holds the parameters of many layers in one row, as FSDP keeps "
      "them. Save the model with StateDictType.FULL_STATE_DICT, or get_model_state_dict(model, "
      "options=StateDictOptions(full_state_dict=True))"
    )
  found = {n: value for n, value in arrays.items() if not is_counter(n, value)}
  if not found:
    raise InputError(f"the state dict holds no weights, but only numbers: {listed(arrays, 4)}")
  return with_plain_names(found)


def _to_numpy(name: str, value: Any) -> np.ndarray:
  """Returns a value as a NumPy array; raises InputError with its name if NumPy cannot."""
  try:
    return np.asarray(value)
  except (TypeError, ValueError, RuntimeError) as error:
    # NumPy refuses a tensor that is on a GPU, has a gradient or is in bfloat16, and a ragged list.
    whole = ".full_tensor()" if hasattr(value, "full_tensor") else ""  # of a DTensor
    raise InputError(
      f"{printable(name, 100)} is no array: {printable(error, 300)}. Pass {{name: "
      f"t{whole}.detach().cpu().float() ...}}."
    ) from error


def check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises InputError for overrides that are separate arguments of the functions here."""
  for name in ("deploy", "num_classes", "dtype", "param_dtype"):
    if name in overrides:
      raise InputError(f"{name} is not an override of a model's attributes; leave it out of them")


def candidates(
  model_name: str, overrides: Mapping[str, Any], namings: Iterable[str] | None = None
) -> Iterable[tuple[str, str, dict[str, Entry]]]:
  """Yields every naming and kind of a model's state dicts, with the expected tensors.

  The heads are expected for 1000 classes. They are not to be compared.

  Args:
    model_name: as in `create_model`.
    overrides: as in `create_model`.
    namings: the namings to yield; None yields all that the model has.
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
  """Finds the naming and kind of a model that share the most names with a state dict.

  Raises:
    InputError: the model is unknown, an override cannot be used, or no name is shared.
  """
  if model_name not in NAMINGS:
    # The first line raises for an unknown model, which is the likelier mistake. The second raises
    # for a model whose weights nobody has published.
    create_model(model_name)
    naming_of(model_name, "official")
  check_overrides(overrides)
  create_model(model_name, **overrides)  # raises for overrides that the model does not take
  found = _best_naming(state, candidates(model_name, overrides))
  if found is None:
    raise InputError(f"no names are known for a {model_name} with {overrides}")
  naming, kind, wanted = found
  state = unwrapped(state, wanted).state
  if not wanted.keys() & state.keys():
    # Looking for the model here could take half a minute.
    raise InputError(
      f"no name in this state dict is one of {model_name}'s (in {' or '.join(NAMINGS[model_name])} "
      f"naming). It has {listed(state, 4)}, where {naming} naming has {listed(wanted, 4)}. "
      "Leave out --model to find the model of a file, or call recognize(state_dict)."
    )
  return Recognition(model_name, naming, kind, _num_classes(state, wanted))


def _best_naming(
  state: Mapping[str, Any], candidates: Iterable[tuple[str, str, dict[str, Entry]]]
) -> tuple[str, str, dict[str, Entry]] | None:
  """Returns the candidate that shares the most names with a state dict.

  A candidate with exactly the names of the state dict ends the search. Every candidate is traced to
  find its names, which takes half a second.
  """
  best, most = None, -1
  for candidate in candidates:
    shared = len(candidate[2].keys() & unwrapped(state, candidate[2]).state.keys())
    if shared > most:
      best, most = candidate, shared
    if shared == len(state) == len(candidate[2]):
      break
  return best


def _num_classes(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> int | None:
  """Returns the number of outputs of the main classifier, from the size of its bias, or None."""
  for name, entry in wanted.items():
    is_classifier = entry.in_head and entry.path[1] == "head"
    if is_classifier and entry.path[-1] == "bias" and name in state and len(state[name].shape) == 1:
      return state[name].shape[0]
  return None


def closest_model(
  state: Mapping[str, Any], overrides: Mapping[str, Any], hint: str = ""
) -> tuple[Recognition | None, bool]:
  """Finds the model that shares the most tensors with a state dict.

  A tensor is shared if its name and its shape are the same. A head of 1000 classes counts too. For
  an exact match, the heads need not have the same shapes, which depend on the number of classes.

  Args:
    state: the state dict.
    overrides: as in `create_model`; models that do not take them are left out.
    hint: a text that may name the model. Models in it are tried first, the longest name first.

  Returns:
    The model, or None if no model shares a tensor; and True if the match is exact, heads aside.

  Raises:
    InputError: no model takes the overrides.
  """
  check_overrides(overrides)
  original = state
  plain = hint.lower().replace("-", "_")
  models = [name for name in list_models() if name in NAMINGS]
  likeliest_first = sorted(models, key=lambda name: -len(name) * (name in plain))
  refusals, closest, most = [], None, 0
  # Tracing a model takes half a second, and models of one family share their tables. A table that
  # gave none of the names for one model is not tried for the next one, and one whose rows make none
  # of the names is not tried at all. Once a table gave nearly all of the names, only tables of the
  # same family and source are tried.
  names_held = {*state, *map(without_wrappers, state)}
  tables_here = {table for name in models for table in NAMINGS[name].values()}
  unmatched: set[Naming] = {table for table in tables_here if not may_name(table, names_held)}
  decided: tuple[type, str] | None = None
  for model_name in likeliest_first:
    shared: collections.Counter[Naming] = collections.Counter()
    try:
      family = type(create_model(model_name, **overrides))
      tables = {
        naming: table
        for naming, table in NAMINGS[model_name].items()
        if table not in unmatched and decided in (None, (family, naming))
      }
      for naming, kind, wanted in candidates(model_name, overrides, tables):
        state = unwrapped(original, wanted).state
        names = sum(name in state and not entry.in_head for name, entry in wanted.items())
        shared[tables[naming]] += names
        if _has_kernels_of(state, wanted):
          decided = family, naming
        same = sum(name in state and state[name].shape == e.shape for name, e in wanted.items())
        if names and same > most:  # many networks share a classifier's name and shape
          closest = Recognition(model_name, naming, kind, _num_classes(state, wanted))
          most = same
        if fits(state, wanted):
          return Recognition(model_name, naming, kind, _num_classes(state, wanted)), True
    except InputError as error:  # The family does not have these overrides.
      refusals.append(error)
    unmatched |= {table for table, names in shared.items() if not names}
  if len(refusals) == len(likeliest_first):
    raise refusals[0]
  return closest, False


def _has_kernels_of(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> bool:
  """Tells if nearly all convolutions of a state dict have names and kernels like wanted ones.

  Names alone would not do: all names of a RepVGG in deploy form can be names of a MobileOne, whose
  convolutions are depthwise or 1x1.
  """
  ours = {name: _kernel(entry.shape) for name, entry in wanted.items()}
  kernels = {name: _kernel(value.shape) for name, value in state.items() if value.ndim == 4}
  alike = [ours.get(name) == kernel for name, kernel in kernels.items()]
  return sum(alike) > 0.75 * len(alike)


def _kernel(shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
  """Returns the size of a kernel, and whether each of its outputs reads one channel."""
  return shape[2:], shape[1:2] == (1,)


def fits(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> bool:
  """Returns True if a state dict has exactly the wanted names and shapes, heads aside."""
  heads = heads_among(wanted, state)
  body = {name: entry.shape for name, entry in wanted.items() if name not in heads}
  return body == {name: value.shape for name, value in state.items() if name not in heads}


def model_as_deep(
  state: Mapping[str, np.ndarray], found: Recognition, overrides: Mapping[str, Any]
) -> str | None:
  """Finds a model that a state dict fits, among models of the same family and depth.

  Models of one family and depth have the same names and differ in their shapes.
  """
  depth = getattr(create_model(found.model, **overrides), "stage_sizes", None)
  for name in list_models():
    if NAMINGS.get(name) != NAMINGS[found.model]:
      continue
    try:
      if getattr(create_model(name, **overrides), "stage_sizes", None) != depth:
        continue
      if fits(state, expected(name, found.naming, found.kind, 1000, overrides)):
        return name
    except InputError:  # The model does not take these overrides.
      continue
  return None
