"""`reparameterize`: walks over a tree of parameters and folds every layer that has a fold.

A layer is recognised by what its scope holds, not by the name of the scope. The table says where a
fold finds each attribute of a layer.

| attribute                    | where a fold finds it                                     |
|------------------------------|-----------------------------------------------------------|
| branches, kernel sizes       | names of scopes                                           |
| features, groups, tile, sets | shapes of kernels and norms                               |
| `conv_bias`                  | the bias beside the kernel                                |
| `epsilon`                    | a note in "batch_stats"; without a note, the argument     |
| strides, dilation, padding   | not needed: the same for all branches and in deploy form  |
| `padding_mode`               | not needed: the map is padded before all branches         |
| `act`, `dropout`, gates      | not needed: the same in both forms, outside of what folds |
| `axis_name`, momentum        | not needed: they matter in training alone                 |
"""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from repjax.errors import InputError, listed, printable, unknown
from repjax.layers.base import read_notes
from repjax.layers.grammar import find
from repjax.recognition import (
  FOLDS,
  Fold,
  Kind,
  Path,
  Tree,
  is_known,
  kind_of,
  layer_name,
  shown,
  why_unclear,
)
from repjax.trees import (
  check_apart,
  check_arrays,
  check_leaves,
  check_note,
  check_parts,
  check_tree,
  leaves,
  pure,
)


def reparameterize(
  params: Tree,
  batch_stats: Tree,
  *,
  epsilon: float = 1e-5,
  folds: Mapping[str, Fold] = FOLDS,
  keep: str | Iterable[str] = (),
) -> dict[str, Any]:
  """Rewrites the parameters of a training form into those of its deploy form: the same function.

  The function walks both trees at any depth, and folds every layer. It recognises the layers of
  repjax by what a scope holds, whatever the scope is called, and also under `nn.remat`, `nn.jit`,
  `nn.scan` and `nn.vmap` along axis 0. Layers of other people are recognised by name: a fold takes
  every scope whose name is its key of `folds`, or the key followed by `_` and more, as in the
  automatic names of Linen. All other leaves are passed through by reference. A scope in deploy form
  stays unchanged, so that a deploy tree maps to itself. The function is pure: it works under `jit`,
  `vmap`, `grad` and `pmap`.

  Eight layers hold only scopes with ordinary names: AuxHead, GlobalPerceptron, RepFFN, RepHead,
  RepHeads, RepNorm, SkipConv and SkipSqueezeExcite. Such a layer is recognised by its class name at
  the beginning of the scope's name, or else by a note in its statistics, which the layer writes
  itself.

  Args:
    params: the "params" collection of any module that contains repjax layers. Mappings of all
      kinds are taken, such as `nnx.State`.
    batch_stats: the "batch_stats" collection of the same module.
    epsilon: number added to the variance by batch norms, for layers whose trees do not say. A tree
      says the epsilon of every layer for which it is not 1e-5, unless an older version made it.
    folds: layer name to `fold(params, stats, epsilon)`. A fold returns the deploy parameters of the
      scope, or None to remove the scope.
    keep: paths, or one path, such as "neck/BatchNorm_0". Statistics below these paths may stay
      unused, because the caller keeps them for batch norms that are not repjax layers. A scope is
      not folded if its own path, or a path in it, is kept. Every path must lie in one of the trees.

  Returns:
    A tree of dictionaries with the structure, shapes and dtypes of the deploy form's `init`.

  Raises:
    InputError: a tree is no nested dictionary, has an axis of devices, or holds numbers that are
      not floating-point in a layer. Or statistics lie among the parameters, `folds` lacks the fold
      of a layer, an array or scope of a layer lies in the wrong place, no scope has a path of
      `keep`, a fold returns no dictionary, or a different argument is of the wrong kind.
    ValueError: no fold used some statistics, a layer in training form has no statistics, or the two
      trees do not belong together. The text names the path.

  Example:
    >>> import jax, repjax
    >>> model = repjax.create_model("repvgg_a0", num_classes=10)
    >>> variables = repjax.init(model, jax.random.key(0), image_size=32)
    >>> plain = repjax.reparameterize(variables["params"], variables["batch_stats"])
    >>> plain["stem"]["RepConv_0"]["conv"]["kernel"].shape
    (3, 3, 3, 48)

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
  """
  if not (isinstance(params, Mapping) and isinstance(batch_stats, Mapping)):
    raise ValueError(
      f"reparameterize takes two dictionaries, params and batch_stats ({{}} for none), got "
      f"{type(params).__name__} and {type(batch_stats).__name__}"
    )
  if "params" in params and params.keys() <= {"params", "batch_stats"}:
    raise InputError(
      "reparameterize takes params and batch_stats apart, got both in one dictionary. Pass "
      'reparameterize(variables["params"], variables["batch_stats"])'
    )
  params, batch_stats = pure(params), pure(batch_stats)
  check_tree("params", params)
  check_tree("batch_stats", batch_stats)
  check_apart(params, batch_stats)
  rules = _rules(folds, epsilon, keep)
  _check_kept(rules.kept, params, batch_stats)
  rules = rules._replace(unmatched=_unmatched(rules.foreign(), params, batch_stats))
  return dict(_walk(params, batch_stats, (), rules) or {})


def _kept(keep: str | Iterable[str]) -> list[Path]:
  """Returns the entries of `keep` as paths."""
  entries = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else list(keep)
  if odd := [entry for entry in entries if not isinstance(entry, str)]:
    raise InputError(
      f"keep takes paths such as 'neck/BatchNorm_0', got {printable(repr(odd[0]), 60)}. Join the "
      "names of scopes with slashes; () keeps nothing"
    )
  return [tuple(entry.strip("/").split("/")) for entry in entries]


def _check_kept(kept: Sequence[Path], params: Tree, stats: Tree) -> None:
  """Raises InputError for an entry of `keep` at which neither of the two trees holds anything."""
  if not kept:
    return
  held, owned = (_paths_in(tree) for tree in (params, stats))
  for entry in kept:
    if entry not in held | owned:
      # Only statistics need keeping. A path is often given without the scopes above it.
      near = {path for path in owned if path[-len(entry) :] == entry} or owned or held
      raise unknown("path in keep", "/".join(entry), map("/".join, near))


def _paths_in(tree: Tree) -> set[Path]:
  """Returns the paths of all scopes and leaves of a tree."""
  paths = [tuple(map(str, path)) for path, _ in leaves(tree)]
  return {path[:end] for path in paths for end in range(1, len(path) + 1)}


def _unmatched(folds: Mapping[str, Fold], params: Tree, stats: Tree) -> tuple[str, ...]:
  """Returns the keys of `folds` by which no scope of the two trees is called."""
  if not folds:
    return ()
  scopes = {name for tree in (params, stats) for path in _paths_in(tree) for name in path}
  return tuple(key for key in folds if not any(layer_name(name, [key]) for name in scopes))


class _Rules(NamedTuple):
  """The arguments of `reparameterize` that hold for the whole walk.

  Attributes:
    folds: a fold for each layer name.
    epsilon: number added to the variance, for layers whose trees do not say.
    kept: paths below which statistics may stay unused.
    unmatched: keys of `folds`, other than those of repjax, by which no scope is called.
  """

  folds: Mapping[str, Fold]
  epsilon: float
  kept: Sequence[Path]
  unmatched: Sequence[str] = ()

  def keeps(self, path: Path) -> bool:
    """Tells if the statistics at a path may stay unused."""
    return any(path[: len(entry)] == entry for entry in self.kept)

  def keeps_in(self, path: Path) -> bool:
    """Tells if the caller keeps a scope itself, or something in the scope."""
    return any(entry[: len(path)] == path for entry in self.kept)

  def foreign(self) -> dict[str, Fold]:
    """Returns the folds of other people's layers, and those that replace a fold of repjax."""
    return {name: fold for name, fold in self.folds.items() if not is_known(name, fold)}


def _rules(folds: Any, epsilon: Any, keep: Any) -> _Rules:
  """Returns the rules of a walk; raises InputError for arguments of wrong kinds."""
  if not _is_epsilon(epsilon):
    raise InputError(
      f"epsilon must be one number that is not negative, got {printable(repr(epsilon), 60)}. "
      "Layers with epsilons of their own hold them in batch_stats"
    )
  if not isinstance(folds, Mapping):
    raise InputError(
      f"folds must be a dictionary of functions by class name, got {printable(repr(folds), 60)}. "
      'Pass {**repjax.FOLDS, "MyLayer": fold}'
    )
  for key, fold in folds.items():
    if not isinstance(key, str) or not callable(fold):
      raise InputError(
        "folds must be a dictionary of functions by class name, got "
        f"{printable(repr(fold), 60)} for {printable(repr(key), 60)}. Write "
        '"MyLayer": fold, with fold(params, stats, epsilon)'
      )
  return _Rules(folds, epsilon, _kept(keep))


def _is_epsilon(value: Any) -> bool:
  """Tells if a value is one finite number that is not negative."""
  if isinstance(value, np.ndarray | jax.Array) and value.ndim:
    return False
  if isinstance(value, Tracer):  # its value is not known yet
    return True
  is_number = isinstance(value, float | numbers.Real | np.ndarray | jax.Array)
  return is_number and 0 <= float(value) < np.inf


def _walk(params: Tree, stats: Tree, path: Path, rules: _Rules) -> Mapping[str, Any] | None:
  """Folds all layers in a scope that lies at a path; None if the scope disappears."""
  name, foreign = path[-1] if path else "", rules.foreign()
  if key := layer_name(name, foreign):
    return _fold_foreign(key, foreign[key], params, stats, path, rules)
  kind = None if rules.keeps_in(path) else kind_of(name, params, stats)
  if kind and rules.folds.get(kind.layer.__name__) is kind.fold:
    return _fold_known(kind, params, stats, path, rules)
  if kind and stats:
    raise InputError(
      f"{shown(path)} holds a {kind.layer.__name__}, but folds lacks the fold of repjax for it. "
      "Extend the table of repjax: folds={**repjax.FOLDS, ...}"
    )
  _refuse_strays(params, stats, path, rules)
  result = {}
  for name, value in params.items():
    if not isinstance(value, Mapping):
      result[name] = value
    else:
      below = stats.get(name)
      below = below if isinstance(below, Mapping) else {}  # other statistics here are kept ones
      if (walked := _walk(value, below, (*path, str(name)), rules)) is not None:
        result[name] = walked
  return result


def _fold_foreign(
  key: str, fold: Fold, params: Tree, stats: Tree, path: Path, rules: _Rules
) -> Mapping[str, Any] | None:
  """Folds one layer of other people, or copies the layer if it is in deploy form already."""
  if stats:
    alone, epsilon = read_notes(stats, rules.epsilon)
    if "epsilon" in stats:
      check_arrays((*path, "epsilon"), epsilon)
      check_note((*path, "epsilon"), epsilon)
    folded = _fold(fold, params, alone, epsilon, path)
    if folded is not None and not isinstance(folded, Mapping):
      raise InputError(
        f"{shown(path)}: the fold of {printable(key, 60)} returned "
        f"{printable(type(folded).__name__, 60)}. A fold returns a dictionary with the parameters "
        "of the deploy form, or None to remove the scope"
      )
    return folded
  if {"conv", "dense", "affine"} & params.keys() and "bn" not in params:
    # A walk without folds copies the dictionaries and shares the leaves.
    return _walk(params, {}, path, _Rules({}, rules.epsilon, ()))
  raise _without_statistics(params, path)


def _fold_known(
  kind: Kind, params: Tree, stats: Tree, path: Path, rules: _Rules
) -> Mapping[str, Any] | None:
  """Folds one layer of repjax. A layer with leading axes is folded along all of them."""
  if not stats:
    raise _without_statistics(params, path)
  check_leaves(path, params)
  check_leaves(path, stats)
  axes = kind.recognize(params) or 0
  check_parts(path, params, stats, axes)
  if axes:
    _check_leading(params, stats, axes, path)

  def fold(params: Tree, stats: Tree, epsilon: Any) -> Mapping[str, Any] | None:
    def fold_one(params: Tree, stats: Tree) -> Mapping[str, Any] | None:
      return kind.fold(params, stats, epsilon)

    mapped = fold_one
    for _ in range(axes):
      mapped = jax.vmap(mapped)
    return mapped(params, stats)

  return _fold(fold, params, stats, rules.epsilon, path)


def _fold(
  fold: Fold, params: Tree, stats: Tree, epsilon: Any, path: Path
) -> Mapping[str, Any] | None:
  """Calls a fold, and names the path in its errors."""
  try:
    return fold(params, stats, epsilon)
  except ValueError as error:
    kind = InputError if isinstance(error, InputError) else ValueError
    raise kind(f"{shown(path)}: {error}") from error


def _without_statistics(params: Tree, path: Path) -> ValueError:
  """Returns the error for a layer in training form that has no statistics."""
  return ValueError(
    f"{shown(path)} is in training form (it holds {listed(sorted(map(str, params)))}) but has no "
    "batch statistics. Pass the batch_stats that belong to these params"
  )


def _check_leading(params: Tree, stats: Tree, axes: int, path: Path) -> None:
  """Raises ValueError if the leaves of a layer do not all have the same leading axes."""
  shapes = {leaf.shape[:axes] for leaf in jax.tree.leaves((params, stats))}
  if len(shapes) != 1:
    raise ValueError(
      f"{shown(path)}: its kernels have {axes} axes more than the layer gives them. nn.vmap and "
      "nn.scan add such axes to all parameters and statistics alike, but here the arrays begin "
      f"with {sorted(shapes)}. Map both collections over axis 0: "
      'variable_axes={"params": 0, "batch_stats": 0}'
    )


def _refuse_strays(params: Tree, stats: Tree, path: Path, rules: _Rules) -> None:
  """Raises ValueError if no fold takes some statistics at this level."""
  strays = {
    name: value
    for name, value in stats.items()
    if not (isinstance(value, Mapping) and isinstance(params.get(name), Mapping))
  }
  unused = [name for name in stats if not rules.keeps((*path, str(name)))]
  if unused and not rules.keeps_in(path) and (reason := why_unclear(params, stats, path)):
    raise ValueError(reason)
  for below, value in leaves(strays):
    leaf = (*path, *map(str, below))
    if value is not None and not rules.keeps(leaf):
      raise ValueError(_describe_stray(leaf, params, strays, path, rules.unmatched))


def _describe_stray(
  leaf: Path, params: Tree, strays: Tree, path: Path, unmatched: Sequence[str]
) -> str:
  """Returns the message about a statistic that no fold has used.

  Args:
    leaf: place of the statistic.
    params: parameters of the scope in which it lies.
    strays: everything in the scope that no fold takes.
    path: place of the scope.
    unmatched: the caller's keys of `folds` by which no scope is called.
  """
  called = layer_name(path[-1]) if path else None
  owner = (
    f"The scope is called like a {called}"
    if called
    else "These are statistics of a layer of repjax"
    if any(find(name) or name in FOLDS for name in strays)
    else None
  )
  if owner:
    return (
      f"{shown(path)}: no fold takes the statistics {shown(leaf)}. {owner}, but the scope holds "
      f"the parameters {listed(sorted(map(str, params))) or 'of nothing'}. Either the "
      "parameters are in deploy form already, which has no statistics, or params and batch_stats "
      "do not belong together"
    )
  return (
    f"batch_stats hold {shown(leaf)}, which no fold has used{_without_params(leaf, params, path)}. "
    "Either params and batch_stats do not belong together, or this is a batch norm outside the "
    "layers of repjax. If so, "
    f"keep the statistics yourself and pass keep=({'/'.join(leaf[:-1])!r},). Or the layer is your "
    "own: folds finds a layer by its class name at the beginning of the scope's name, as in "
    f"MyLayer_0{_named_by_no_scope(unmatched)}"
  )


def _without_params(leaf: Path, params: Tree, path: Path) -> str:
  """Returns a clause on the outermost scope of a statistic that the parameters lack, if one is."""
  here: Any = params
  for end in range(len(path), len(leaf) - 1):
    here = here.get(leaf[end]) if isinstance(here, Mapping) else None
    if here is None:
      return f", and params have no {shown(leaf[: end + 1])}"
  return ""


def _named_by_no_scope(keys: Sequence[str]) -> str:
  """Returns the end of a message that lists the keys of `folds` by which no scope is called."""
  if not keys:
    return ""
  return f". No scope here is called by these keys of folds: {listed(map(repr, sorted(keys)))}"
