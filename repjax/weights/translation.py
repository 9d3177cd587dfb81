"""`from_torch` and `to_torch`: map a PyTorch state dict to variables, and back."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repjax.errors import InputError, listed, printable
from repjax.models.initialize import draw
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec
from repjax.trees import check_tree
from repjax.weights.misfits import Problem, bad_values, explain, lines_of, misfits
from repjax.weights.naming import NoNameError, entries, heads_among
from repjax.weights.recognition import Recognition, normalised, recognize_model
from repjax.weights.sources import (
  FOLDED,
  RELEASED_WITH,
  expected,
  expected_marks,
  naming_of,
)
from repjax.weights.wrappers import unwrapped


def from_torch(
  model_name: str,
  state_dict: Mapping[str, Any],
  *,
  num_classes: int = 1000,
  param_dtype: Any = np.float32,
  drop_head: bool = False,
  **overrides: Any,
) -> dict[str, Any]:
  """Makes a model's variables from a PyTorch state dict, whose naming and form are recognized.

  A prefix of all names and the segments that wrappers of modules add to names are taken off.
  Counters, such as the number of batches that a norm has seen, are left out.

  Args:
    model_name: as in `create_model`.
    state_dict: name to array or CPU tensor, for example from `repjax.weights.read`.
    num_classes: number of classes of the model.
    param_dtype: dtype of the variables.
    drop_head: ignores the classifiers in the state dict and draws new ones as `repjax.init` does,
      for a different number of classes.
    **overrides: as in `create_model`.

  Returns:
    {"params", "batch_stats"} of a training-form state dict, {"params"} of a deploy-form one. Arrays
    are views of the arrays in `state_dict` if neither dtype nor layout needs a copy.

  Raises:
    InputError: the state dict does not fit. One text lists all missing, unexpected, misshapen,
      half-precision and non-finite tensors, in groups if there are many. Also raised if the state
      dict holds several networks, or if it fits but an override must be given, since no tensor
      shows its value: `act` for the authors' files of ParNet.
  """
  dtype = np.dtype(param_dtype)
  if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
    raise InputError(f"param_dtype must be a floating-point type, got {dtype}")
  state = normalised(state_dict)
  found = recognize_model(state, model_name, overrides)
  wanted = expected(model_name, found.naming, found.kind, num_classes, overrides)
  state, removed, rivals = unwrapped(state, wanted)
  if rivals:
    raise InputError(_of_several(rivals))
  dropped = {name: wanted[name] for name in heads_among(wanted, state)} if drop_head else {}
  state = {name: value for name, value in state.items() if name not in dropped}
  wanted = {name: entry for name, entry in wanted.items() if name not in dropped}
  problems = misfits(state, wanted) + bad_values(state, wanted, dtype)
  if problems:
    beside = _beside(removed, problems)
    hints = beside or explain(state, wanted, found, num_classes, overrides)
    raise InputError(_refusal(found, num_classes, removed, problems, hints))
  _refuse_unsaid(found, overrides)
  variables: dict[str, Any] = {}
  for name, entry in wanted.items():
    _put(variables, entry.path, entry.layout.from_torch(state[name]))
  for path, shape in expected_marks(model_name, found.kind, num_classes, overrides).items():
    _put(variables, path, np.ones(shape, dtype))
  if drop_head:
    spec = ModelSpec.usual(model_name, num_classes, overrides)
    shapes = spec.variable_shapes(deploy=found.kind == "deploy")
    paths = [entry.path for entry in dropped.values()]
    fresh = _draw(shapes, paths, dtype)
    for path in paths:
      _put(variables, path, _get(fresh, path))
  # Deploy files of some families still hold batch norms; see `FOLDED`.
  if found.kind == "deploy" and "batch_stats" in variables:
    variables = {"params": _fold(variables, dtype)}
  return jax.tree.map(lambda value: value.astype(param_dtype, copy=False), variables)


def to_torch(
  model_name: str, variables: Mapping[str, Any], naming: str = "official"
) -> dict[str, np.ndarray]:
  """Makes a PyTorch state dict from a model's variables; the inverse of `from_torch`.

  Args:
    model_name: as in `create_model`.
    variables: {"params", "batch_stats"} of the training form, or {"params"} of the deploy form.
    naming: source of the names: "official", "timm", "mmpretrain", "repopt" or "repmlp", see
      `NAMINGS`.

  Returns:
    Name to contiguous array, in PyTorch's layout and the dtype of the variables. The counters
    `num_batches_tracked`, which PyTorch does not need, are left out.

  Raises:
    InputError: the naming does not know the model or has no name for a leaf, the variables are not
      those of one form, or statistics are missing.
  """
  table = naming_of(model_name, naming)
  if model_name in FOLDED and "batch_stats" not in variables:
    raise InputError(
      f"the deploy form of {model_name} has no names in other projects: their deploy files hold "
      "batch norms, which repjax folds. Pass params and batch_stats of the training form, or "
      "--form train."
    )
  check_tree("variables", variables)
  for name, collection in variables.items():
    check_tree(f"variables[{name!r}]", collection)
  if "params" not in variables or not variables.keys() <= {"params", "batch_stats"}:
    raise InputError(
      f"to_torch takes {{'params', 'batch_stats'}}, or {{'params'}} of a deploy form, got "
      f"{listed(variables, 4)}"
    )
  try:
    wanted = entries(table, variables)
  except NoNameError as error:
    raise InputError(f"{naming} names of {model_name} do not cover {error}") from error
  # Parameters of a training form that come without statistics are not a deploy form, which has no
  # batch norms.
  norms = {entry.path[1:-1] for entry in wanted.values() if entry.path[-2:] == ("bn", "scale")}
  lacking = norms - {entry.path[1:-1] for entry in wanted.values() if entry.path[-1] == "var"}
  if lacking:
    raise InputError(
      f"{len(lacking)} batch norms have no statistics, for example {'/'.join(min(lacking))}. Pass "
      "the batch_stats that belong to these params."
    )

  return {
    name: np.ascontiguousarray(entry.layout.to_torch(np.asarray(_get(variables, entry.path))))
    for name, entry in wanted.items()
  }


def _of_several(rivals: Sequence[str]) -> str:
  """Returns the error text for a state dict in which several networks have the same names."""
  places = printable(" and ".join(f"below {p}" if p else "without a prefix" for p in rivals))
  chosen = printable(next(filter(None, rivals))[:-1])
  return (
    f"the state dict holds several networks with the same names: {places}. Choose one: "
    f"read(path, entry={chosen!r}), --entry {chosen}, or pass only the tensors of one"
  )


def _beside(removed: Sequence[str], problems: Sequence[Problem]) -> list[str]:
  """Returns the way out if a whole network lies below a prefix, and other tensors beside it."""
  prefix = next((part for part in removed if part.endswith(".")), "")
  if not prefix or any(problem.kind != "unexpected" for problem in problems):
    return []
  if any(problem.name.startswith(prefix) for problem in problems):
    return []
  entry = printable(prefix[:-1], 100)
  return [
    f"The whole network is below {entry}. To leave out the tensors beside it, take "
    f"read(path, entry={entry!r}), or --entry {entry}."
  ]


def _refusal(
  found: Recognition,
  num_classes: int,
  removed: Sequence[str],
  problems: Sequence[Problem],
  hints: Sequence[str],
) -> str:
  """Returns the error text for weights that do not fit: a summary, then lines about problems."""
  headline = (
    f"these weights do not fit {found.model} (read as {found.naming} names, {found.kind} form) "
    f"with {num_classes} classes; nothing was converted. Problems: {len(problems)}."
  )
  if removed:
    headline += f" Names were read without {listed(map(repr, removed))}."
  return "\n  ".join([" ".join([headline, *hints]), *lines_of(problems)])


def _refuse_unsaid(found: Recognition, overrides: Mapping[str, Any]) -> None:
  """Raises InputError if a state dict does not show an attribute and no override gives it."""
  for name, (value, why) in RELEASED_WITH.get((found.model, found.naming), {}).items():
    if name not in overrides:
      raise InputError(
        f"{found.naming} weights of {found.model} do not show their {name}. The authors' released "
        f"weights need {name}={value!r}, which is not the model's default: {why}. Pass "
        f"{name}={value!r} for them, or the value that your weights were trained with; pass the "
        "same to create_model."
      )


def _draw(
  shapes: Mapping[str, Any], paths: Sequence[tuple[str, ...]], dtype: np.dtype
) -> dict[str, Any]:
  """Draws variables at some paths, with the distributions of `repjax.init`."""
  wanted: dict[str, Any] = {}
  for path in paths:
    shape = _get(shapes, path).shape
    _put(wanted, path, jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype)))
  return draw(wanted, jax.random.key(0))


def _fold(variables: Mapping[str, Any], dtype: np.dtype) -> Any:
  """Folds variables, of which some layers are already in deploy form, in float32 or wider."""
  wide = np.promote_types(dtype, np.float32)
  with jax.enable_x64(wide == np.float64):
    widened = jax.tree.map(lambda value: value.astype(wide, copy=False), dict(variables))
    folded = jax.jit(reparameterize)(widened["params"], widened["batch_stats"])
    return jax.tree.map(np.asarray, folded)


def _get(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
  return functools.reduce(lambda below, key: below[key], path, tree)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value
