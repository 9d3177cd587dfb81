"""`from_torch` and `to_torch`: a PyTorch state dict as variables, and back."""

import collections
import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.errors import InputError, unknown
from repjax.models import create_model, list_models
from repjax.models.initialize import draw
from repjax.reparam import layer_name, reparameterize
from repjax.spec import ModelSpec
from repjax.weights import repmlp, repmlpnet, repvgg, resnet, vgg
from repjax.weights.naming import Entry, Naming, NoNameError, entries, plain_name

NAMINGS: dict[str, dict[str, Naming]] = {
  **repvgg.NAMINGS,
  **resnet.NAMINGS,
  **vgg.NAMINGS,
  **repmlp.NAMINGS,
  **repmlpnet.NAMINGS,
}
"""Model to source to table; a new family adds its own."""

FOLDED: dict[str, tuple[str, ...]] = {**repmlpnet.FOLDED}
"""Model to the layers that its deploy files hold in deploy form; the others are folded on import.

Models that are not here have deploy files without statistics.
"""

KINDS = ("train", "deploy")
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
  state = _normalised(state_dict)
  if model_name is not None:
    return _recognize_model(state, model_name, overrides)
  closest, _ = _closest_model(state, overrides, hint)
  if closest is None:
    raise InputError(
      f"no model has tensors of the names and shapes of this state dict ({len(state)}: "
      f"{_some(state)})"
    )
  return closest


def from_torch(
  model_name: str,
  state_dict: Mapping[str, Any],
  *,
  num_classes: int = 1000,
  param_dtype: Any = np.float32,
  drop_head: bool = False,
  **overrides: Any,
) -> dict[str, Any]:
  """Variables of a model from a PyTorch state dict, whose naming and kind are found out.

  Args:
    model_name: as in `create_model`.
    state_dict: name to array or CPU tensor, for example from `repjax.weights.read`.
    num_classes: of the model to be made.
    param_dtype: of the variables.
    drop_head: leave the classifiers out of the state dict and draw new ones as `repjax.init` does,
      for another number of classes.
    **overrides: as in `create_model`.

  Returns:
    {"params", "batch_stats"} of a training-form state dict, {"params"} of a deploy-form one. Arrays
    are views of those in `state_dict` where neither dtype nor layout asks for a copy.

  Raises:
    InputError: the state dict does not fit. The one text lists all missing, unexpected, misshapen,
      half-precision and non-finite tensors.
  """
  dtype = np.dtype(param_dtype)
  if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
    raise InputError(f"param_dtype is a floating-point type, got {dtype}")
  state = _normalised(state_dict)
  found = _recognize_model(state, model_name, overrides)
  wanted = _expected(model_name, found.naming, found.kind, num_classes, overrides)
  dropped = {name: entry for name, entry in wanted.items() if drop_head and entry.in_head}
  state = {name: value for name, value in state.items() if name not in dropped}
  wanted = {name: entry for name, entry in wanted.items() if name not in dropped}
  problems = _misfits(state, wanted) + _bad_values(state, wanted, dtype)
  if problems:
    headline = (
      f"these weights do not fit {model_name} (read as {found.naming} names, {found.kind} form) "
      f"with {num_classes} classes; nothing was converted. Problems: {len(problems)}."
    )
    hints = _hints(state, wanted, found, num_classes, overrides)
    text = "\n  ".join([" ".join([headline, *hints]), *problems])
    if len(problems) > 20:  # the first line has scrolled away
      text += "\n" + " ".join([f"That was why they do not fit {model_name}.", *hints])
    raise InputError(text)
  variables: dict[str, Any] = {}
  for name, entry in wanted.items():
    _put(variables, entry.path, entry.layout.from_torch(state[name]))
  if drop_head:
    spec = ModelSpec.usual(model_name, num_classes, overrides)
    shapes = spec.variable_shapes(deploy=found.kind == "deploy")
    heads: dict[str, Any] = {}
    for entry in dropped.values():
      shape = _get(shapes, entry.path).shape
      _put(heads, entry.path, jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype)))
    fresh = draw(heads, jax.random.key(0))
    for entry in dropped.values():
      _put(variables, entry.path, _get(fresh, entry.path))
  if found.kind == "deploy" and "batch_stats" in variables:
    variables = {"params": _fold(variables, dtype)}
  return jax.tree.map(lambda value: value.astype(param_dtype, copy=False), variables)


def to_torch(
  model_name: str, variables: Mapping[str, Any], naming: str = "official"
) -> dict[str, np.ndarray]:
  """A PyTorch state dict of a model's variables: the inverse of `from_torch`.

  Args:
    model_name: as in `create_model`.
    variables: {"params", "batch_stats"} of the training form, or {"params"} of the deploy form.
    naming: "official", "timm", "mmpretrain" or "repmlp", as `NAMINGS` has them for the model.

  Returns:
    Name to contiguous array in PyTorch's layout and the variables' dtype. `num_batches_tracked`,
    which PyTorch does not need, is not among them.

  Raises:
    InputError: the naming does not know this model, or has no name for one of its leaves.
  """
  table = _naming(model_name, naming)
  if model_name in FOLDED and "batch_stats" not in variables:
    raise InputError(
      f"the deploy form of {model_name} has no names in other projects: their deploy files hold "
      "batch norms, which are folded here; pass the training form's params and batch_stats (from "
      "the command line: --form train)"
    )
  if "params" not in variables or not variables.keys() <= {"params", "batch_stats"}:
    raise InputError(
      f"to_torch takes {{'params', 'batch_stats'}}, or {{'params'}} of a deploy form; got "
      f"{_some(variables)}"
    )
  try:
    wanted = entries(table, variables)
  except NoNameError as error:
    raise InputError(f"{naming} names of {model_name} do not cover {error}") from error
  norms = {entry.path[1:-1] for entry in wanted.values() if entry.path[-1] == "scale"}
  lacking = norms - {entry.path[1:-1] for entry in wanted.values() if entry.path[-1] == "var"}
  if lacking:
    raise InputError(
      f"{len(lacking)} batch norms have no statistics, {'/'.join(min(lacking))} for one; pass the "
      "batch_stats that belong to these params"
    )

  return {
    name: np.ascontiguousarray(entry.layout.to_torch(np.asarray(_get(variables, entry.path))))
    for name, entry in wanted.items()
  }


def _naming(model_name: str, naming: str) -> Naming:
  if model_name not in NAMINGS:
    raise unknown("model with importable weights", model_name, NAMINGS)
  if naming not in NAMINGS[model_name]:
    raise InputError(
      f"{naming!r} has no names for {model_name}; there are: {', '.join(NAMINGS[model_name])}"
    )
  return NAMINGS[model_name][naming]


def _normalised(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
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


def _expected(
  model_name: str, naming: str, kind: str, num_classes: int, overrides: Mapping[str, Any]
) -> dict[str, Entry]:
  """What a state dict of that model, naming and kind holds."""
  return _expected_cached(model_name, naming, kind, num_classes, json.dumps(dict(overrides)))


@functools.lru_cache(maxsize=256)
def _expected_cached(
  model_name: str, naming: str, kind: str, num_classes: int, overrides: str
) -> dict[str, Entry]:
  spec = ModelSpec.usual(model_name, num_classes, json.loads(overrides))
  shapes = spec.variable_shapes(deploy=kind == "deploy")
  if kind == "deploy" and model_name in FOLDED:
    layers = dict.fromkeys(FOLDED[model_name])
    shapes = _partly_folded(spec.variable_shapes(), shapes["params"], layers)
  return entries(_naming(model_name, naming), shapes)


def _partly_folded(
  trained: Mapping[str, Any], plain: Mapping[str, Any], layers: Mapping[str, Any]
) -> dict[str, Any]:
  """Training-form variables where scopes called like `layers` are as in the plain parameters."""

  def walk(params: Any, stats: Any, plain: Any) -> tuple[Any, Any]:
    own, held = {}, {name: value for name, value in stats.items() if name not in params}
    for name, value in params.items():
      if layer_name(name, layers):
        own[name] = plain[name]
      elif isinstance(value, Mapping):
        own[name], below = walk(value, stats.get(name, {}), plain.get(name, {}))
        held |= {name: below} if below else {}
      else:
        own[name] = value
    return own, held

  params, stats = walk(trained["params"], trained["batch_stats"], plain)
  return {"params": params, "batch_stats": stats}


def _fold(variables: Mapping[str, Any], dtype: np.dtype) -> Any:
  """Deploy-form parameters from variables that are in part in that form already."""
  wide = np.promote_types(dtype, np.float32)
  with jax.enable_x64(wide == np.float64):
    widened = jax.tree.map(lambda value: value.astype(wide, copy=False), dict(variables))
    folded = jax.jit(reparameterize)(widened["params"], widened["batch_stats"])
    return jax.tree.map(np.asarray, folded)


def check_overrides(overrides: Mapping[str, Any]) -> None:
  """Raises InputError for what are arguments of their own."""
  for name in ("deploy", "num_classes", "dtype", "param_dtype"):
    if name in overrides:
      raise InputError(f"{name} is no override of a model's attributes; leave it out of them")


def _candidates(
  model_name: str, overrides: Mapping[str, Any], namings: Iterable[str] | None = None
) -> Iterable[tuple[str, str, dict[str, Entry]]]:
  """Naming, kind and expected tensors of everything that a model's weights can come as.

  The heads are those of 1000 classes, and not for comparing. `namings` are a choice of them.
  """
  for naming in NAMINGS.get(model_name, {}) if namings is None else namings:
    for kind in KINDS:
      try:
        yield naming, kind, _expected(model_name, naming, kind, 1000, overrides)
      except NoNameError:
        continue


def _recognize_model(
  state: Mapping[str, Any], model_name: str, overrides: Mapping[str, Any]
) -> Recognition:
  """The naming and kind of a model that share most names with a state dict."""
  if model_name not in NAMINGS:
    create_model(model_name)  # an unknown name is the likelier mistake
    _naming(model_name, "official")
  check_overrides(overrides)
  create_model(model_name, **overrides)
  naming, kind, wanted = _best_naming(state, _candidates(model_name, overrides))
  if not wanted.keys() & state.keys():
    raise InputError(
      f"no name in this state dict is one of {model_name}'s (in {' or '.join(NAMINGS[model_name])} "
      f"naming): it has {_some(state)}, where {naming} naming has {_some(wanted)}"
    )
  return Recognition(model_name, naming, kind, _num_classes(state, wanted))


def _best_naming(
  state: Mapping[str, Any], candidates: Iterable[tuple[str, str, dict[str, Entry]]]
) -> tuple[str, str, dict[str, Entry]]:
  """The candidate that shares most names; the first with just these, so that no more are traced."""
  best, most = None, -1
  for candidate in candidates:
    shared = len(candidate[2].keys() & state.keys())
    if shared > most:
      best, most = candidate, shared
    if shared == len(state) == len(candidate[2]):
      break
  assert best is not None  # every model with importable weights has a naming
  return best


def _num_classes(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> int | None:
  """Of the main classifier in a state dict."""
  for name, entry in wanted.items():
    is_classifier = entry.in_head and entry.path[1] == "head"
    if is_classifier and entry.path[-1] == "bias" and name in state and len(state[name].shape) == 1:
      return state[name].shape[0]
  return None


def _closest_model(
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
      for naming, kind, wanted in _candidates(model_name, overrides, tables):
        names = sum(name in state and not entry.in_head for name, entry in wanted.items())
        shared[tables[naming]] += names
        if names > 0.75 * len(state):
          decided = tables[naming]
        same = sum(name in state and state[name].shape == e.shape for name, e in wanted.items())
        if same > most:
          closest = Recognition(model_name, naming, kind, _num_classes(state, wanted))
          most = same
        if _fits(state, wanted):
          return Recognition(model_name, naming, kind, _num_classes(state, wanted)), True
    except InputError as error:  # overrides that this family does not have
      refusals.append(error)
    strange |= {table for table, names in shared.items() if not names}
  if len(refusals) == len(likeliest_first):
    raise refusals[0]
  return closest, False


def _fits(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> bool:
  """Whether names and shapes are the same, heads aside."""
  body = {name: entry.shape for name, entry in wanted.items() if not entry.in_head}
  heads = wanted.keys() - body.keys()
  return body == {name: value.shape for name, value in state.items() if name not in heads}


def _misfits(state: Mapping[str, np.ndarray], wanted: Mapping[str, Entry]) -> list[str]:
  """What is missing, not wanted, or of another shape: a line each."""
  missing = {name: entry.shape for name, entry in wanted.items() if name not in state}
  unexpected = {name: value.shape for name, value in state.items() if name not in wanted}
  known = {name: entry.shape for name, entry in wanted.items()}
  return [
    *(
      f"missing {name} {shape}{_closest(name, shape, unexpected)}"
      for name, shape in missing.items()
    ),
    *(
      f"unexpected {name} {shape}{_closest(name, shape, missing or known)}"
      for name, shape in unexpected.items()
    ),
    *(
      f"{name} is {state[name].shape}, wanted {shape}"
      for name, shape in known.items()
      if name in state and state[name].shape != shape
    ),
  ]


def _closest(name: str, shape: tuple[int, ...], others: Mapping[str, tuple[int, ...]]) -> str:
  """The most similar names among those of the same shape."""
  same_shape = [other for other, its in others.items() if its == shape]
  close = difflib.get_close_matches(name, same_shape, n=2, cutoff=0.5)
  return f", closest: {' or '.join(close)}" if close else ""


def _bad_values(
  state: Mapping[str, np.ndarray], wanted: Mapping[str, Entry], dtype: np.dtype
) -> list[str]:
  """Tensors whose numbers cannot be used: a line each."""
  lines = []
  fitting = [name for name, e in wanted.items() if name in state and state[name].shape == e.shape]
  for name in fitting:
    value = state[name]
    if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
      lines.append(f"{name} holds {value.dtype}, not floating-point numbers")
    elif is_half(value) and dtype.itemsize > value.dtype.itemsize:
      lines.append(f"{name} is {value.dtype}")
    elif not np.isfinite(value).all():
      count = np.count_nonzero(~np.isfinite(value))
      lines.append(f"{name} holds {count} of {value.size} numbers that are not finite")
    elif value.dtype.itemsize > dtype.itemsize and _overflows(value, dtype):
      lines.append(f"{name} holds numbers too large for {dtype}")
    elif wanted[name].path[-1] == "var" and (value < 0).any():
      lines.append(f"{name} holds negative variances")
  return lines


def _overflows(value: np.ndarray, dtype: np.dtype) -> bool:
  return float(np.abs(value).max(initial=0)) > float(jax.numpy.finfo(dtype).max)


def is_half(value: np.ndarray) -> bool:
  """Whether an array holds floating-point numbers of fewer than 32 bits."""
  return value.dtype.itemsize < 4 and jax.numpy.issubdtype(value.dtype, jax.numpy.floating)


def _hints(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, Entry],
  found: Recognition,
  num_classes: int,
  overrides: Mapping[str, Any],
) -> list[str]:
  """What may have gone wrong as a whole."""
  hints = []
  if any(map(is_half, state.values())):
    hints.append(
      "Half-precision weights are rounded already: if that is wanted, widen them first, with "
      "value.astype('float32') or --allow-half."
    )
  other_kind = KINDS[1 - KINDS.index(found.kind)]
  other = _expected(found.model, found.naming, other_kind, num_classes, overrides)
  strangers = [name for name in state if name in other and name not in wanted]
  if strangers:
    return [*hints, f"It mixes both kinds: of the {other_kind} form are {_some(strangers)}."]
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
  """Whose names and shapes a state dict has, where that can be told."""
  heads = {name for name, entry in wanted.items() if entry.in_head}
  ours = {(name, entry.shape) for name, entry in wanted.items() if name not in heads}
  theirs = {(name, value.shape) for name, value in state.items() if name not in heads}
  odd = {name for name, _ in ours ^ theirs}
  if len(odd) < 4:  # some mishap rather than another model
    return []
  changed = _changed_attributes(state, wanted, found, overrides)
  if changed:
    return [
      f"Its RepMLPs have {', '.join(f'{name}={value}' for name, value in changed.items())}: pass "
      f"this (from the command line: --overrides '{json.dumps({**overrides, **changed})}')."
    ]
  model = None
  if wanted.keys() == state.keys():
    model = _model_as_deep(state, found, overrides)
  elif not overrides and len(odd) > len(wanted) / 10:  # no two models differ by a few names
    closest, fits = _closest_model(state, {})
    model = closest.model if closest and fits and closest.model != found.model else None
  return [f"Its names and shapes are those of {model}."] if model else []


def _changed_attributes(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, Entry],
  found: Recognition,
  overrides: Mapping[str, Any],
) -> dict[str, Any]:
  """Attributes that can be read off a state dict, where they are not those of the model."""
  if found.model not in repmlp.NAMINGS:
    return {}
  model = create_model(found.model, **overrides)
  shapes = {name: entry.shape for name, entry in wanted.items()}
  held = repmlp.attributes(shapes, shapes, model.tile)
  read = repmlp.attributes({name: value.shape for name, value in state.items()}, shapes, model.tile)
  return {name: value for name, value in read.items() if value != held.get(name)}


def _model_as_deep(
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
      if _fits(state, _expected(name, found.naming, found.kind, 1000, overrides)):
        return name
    except InputError:  # overrides that this model does not take
      continue
  return None


def _some(names: Iterable[str]) -> str:
  names = list(names)
  return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _get(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
  return functools.reduce(lambda below, key: below[key], path, tree)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value
