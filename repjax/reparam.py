"""`reparameterize`: walks over a tree of parameters and folds every layer that has a fold."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from repjax.errors import InputError
from repjax.layers import (
  fold_aux_head,
  fold_global_perceptron,
  fold_rep_conv,
  fold_rep_dense,
  fold_rep_ffn,
  fold_rep_head,
  fold_rep_norm,
  fold_scaled_conv,
  fold_skip_squeeze_excite,
)
from repjax.trees import check_leaves, check_tree

Tree = Mapping[str, Any]
Fold = Callable[[Tree, Tree, float], Mapping[str, Any] | None]

FOLDS: dict[str, Fold] = {
  "AuxHead": fold_aux_head,
  "GlobalPerceptron": fold_global_perceptron,
  "RepConv": fold_rep_conv,
  "RepDense": fold_rep_dense,
  "RepFFN": fold_rep_ffn,
  "RepHead": fold_rep_head,
  "RepNorm": fold_rep_norm,
  "ScaledConv": fold_scaled_conv,
  "SkipSqueezeExcite": fold_skip_squeeze_excite,
}
"""Class name of a layer to its fold. Extend a copy: `folds={**repjax.FOLDS, "MyLayer": fold}`."""

_DEPLOY_KEYS = {"conv", "dense", "affine"}


def reparameterize(
  params: Tree,
  batch_stats: Tree,
  *,
  epsilon: float = 1e-5,
  folds: Mapping[str, Fold] = FOLDS,
  keep: str | Iterable[str] = (),
) -> dict[str, Any]:
  """Rewrites the parameters of a training form into those of its deploy form: the same function.

  The function walks both trees at any depth. A fold takes every scope whose name is a key of
  `folds`, or a key followed by `_` and more, as in the automatic names of Linen. All other leaves
  are passed through by reference. A scope in deploy form stays unchanged, so that a deploy tree
  maps to itself. The function is pure: it works under `jit`, `vmap`, `grad` and `pmap`.

  Args:
    params: the "params" collection of any module that contains repjax layers.
    batch_stats: the "batch_stats" collection of the same module.
    epsilon: number added to the variance by batch norms.
    folds: layer name to `fold(params, stats, epsilon)`. A fold returns the deploy parameters of the
      scope, or None to remove the scope.
    keep: paths, or one path, such as "neck/BatchNorm_0". Statistics below these paths may stay
      unused, because the caller keeps them for batch norms that are not repjax layers.

  Returns:
    A tree with the structure, shapes and dtypes of the deploy form's `init`.

  Raises:
    InputError: a tree is no nested dictionary, has an axis of devices, or holds numbers that are
      not floating-point in a layer.
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
  check_tree("params", params)
  check_tree("batch_stats", batch_stats)
  entries = (keep,) if isinstance(keep, str) else keep
  kept = tuple(tuple(entry.strip("/").split("/")) for entry in entries)
  return _walk(params, batch_stats, (), folds, epsilon, kept)


def layer_name(scope: str, folds: Mapping[str, Fold] = FOLDS) -> str | None:
  """Returns the key of `folds` that fits the name of a scope, or None if the scope has no fold."""
  # The longest key fits best: beside RepConv, a key RepConv_Wide takes the scope RepConv_Wide_0.
  matches = [name for name in folds if scope == name or scope.startswith(f"{name}_")]
  return max(matches, key=len, default=None)


def _is_plain(params: Tree) -> bool:
  """Returns True if the parameters of a layer are in deploy form."""
  return bool(_DEPLOY_KEYS & params.keys()) and "bn" not in params


def _walk(
  params: Tree,
  stats: Tree,
  path: tuple[str, ...],
  folds: Mapping[str, Fold],
  epsilon: float,
  kept: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
  """Folds all layers of a tree that lies at a path, as `reparameterize` describes."""
  _refuse_strays(params, stats, path, kept)
  result = {}
  for name, value in params.items():
    here, below = (*path, name), stats.get(name, {})
    layer = layer_name(name, folds)
    if not isinstance(value, Mapping):
      result[name] = value
    elif layer is None:
      result[name] = _walk(value, below, here, folds, epsilon, kept)
    else:
      folded = _fold(folds[layer], value, below, here, epsilon)
      if folded is not None:
        result[name] = folded
  return result


def _fold(
  fold: Fold, params: Tree, stats: Tree, path: tuple[str, ...], epsilon: float
) -> Mapping[str, Any] | None:
  """Folds one layer, or returns a copy of the layer if the layer is in deploy form already."""
  if stats:
    if fold in FOLDS.values():  # A layer of somebody else may hold anything.
      check_leaves(path, params)
      check_leaves(path, stats)
    try:
      return fold(params, stats, epsilon)
    except ValueError as error:
      raise ValueError(f"{'/'.join(path)}: {error}") from error
  if _is_plain(params):
    # A walk without folds copies the dictionaries and shares the leaves.
    return _walk(params, {}, path, {}, epsilon, ())
  raise ValueError(
    f"{'/'.join(path)} is in training form (it holds {', '.join(sorted(params))}) but has no "
    "batch statistics. Pass the batch_stats that belong to these params"
  )


def _refuse_strays(
  params: Tree, stats: Tree, path: tuple[str, ...], kept: Sequence[tuple[str, ...]]
) -> None:
  """Raises ValueError if no scope of the parameters takes some statistics of this level."""
  strays = {
    name: value
    for name, value in stats.items()
    if not (isinstance(value, Mapping) and isinstance(params.get(name), Mapping))
  }
  for key_path, _ in jax.tree_util.tree_flatten_with_path(strays)[0]:
    leaf = (*path, *(entry.key for entry in key_path))
    if not any(leaf[: len(entry)] == entry for entry in kept):
      raise ValueError(
        f"batch_stats hold {'/'.join(leaf)}, which no fold has used. Either params and batch_stats "
        "do not belong together, or this is a batch norm outside the layers of repjax. If so, "
        f"keep the statistics yourself and pass keep=({'/'.join(leaf[:-1])!r},)"
      )
