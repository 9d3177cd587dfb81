"""`reparameterize`: the walk over a parameter tree that folds every layer it has a fold for."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from repjax.layers import (
  fold_aux_head,
  fold_global_perceptron,
  fold_rep_conv,
  fold_rep_dense,
  fold_rep_ffn,
  fold_rep_head,
  fold_rep_norm,
  fold_skip_squeeze_excite,
)

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
  "SkipSqueezeExcite": fold_skip_squeeze_excite,
}
"""A layer's class name to its fold. Extend a copy: `folds={**repjax.FOLDS, "MyLayer": fold}`."""

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

  Walks both trees at any depth. A scope called like a key of `folds`, or like one with `_` and
  anything behind it (Linen's automatic names), is handed to that fold; everything else is passed
  through by reference. A scope that is in deploy form already is left as it is, so a deploy tree
  maps to itself. Pure: works under `jit`, `vmap`, `grad` and `pmap`.

  Args:
    params: the "params" collection of any module that contains repjax layers.
    batch_stats: its "batch_stats" collection.
    epsilon: of the batch norms.
    folds: layer name to `fold(params, stats, epsilon)`, which returns the scope's deploy
      parameters, or None to remove the scope.
    keep: paths, or one path, such as "neck/BatchNorm_0". Statistics below them may stay unused,
      because the caller keeps them for batch norms that are not repjax layers.

  Returns:
    A tree with the structure, shapes and dtypes of the deploy form's `init`.

  Raises:
    ValueError: statistics that no fold used, a layer in training form without statistics, or trees
      that do not belong together. The text names the path.

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
  entries = (keep,) if isinstance(keep, str) else keep
  kept = tuple(tuple(entry.strip("/").split("/")) for entry in entries)
  return _walk(params, batch_stats, (), folds, epsilon, kept)


def layer_name(scope: str, folds: Mapping[str, Fold] = FOLDS) -> str | None:
  """The key of `folds` that a scope's name stands for, None for a scope without a fold."""
  matches = [name for name in folds if scope == name or scope.startswith(f"{name}_")]
  return max(matches, key=len, default=None)


def _walk(params, stats, path, folds, epsilon, kept):
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


def _fold(fold: Fold, params: Tree, stats: Tree, path: tuple[str, ...], epsilon: float):
  if stats:
    try:
      return fold(params, stats, epsilon)
    except ValueError as error:
      raise ValueError(f"{'/'.join(path)}: {error}") from error
  if _DEPLOY_KEYS & params.keys() and "bn" not in params:
    return _walk(params, {}, path, {}, epsilon, ())
  raise ValueError(
    f"{'/'.join(path)} is in training form (it holds {', '.join(sorted(params))}) but has no "
    "batch statistics; pass the batch_stats that belong to these params"
  )


def _refuse_strays(params: Tree, stats: Tree, path: tuple[str, ...], kept) -> None:
  """Raises for statistics at this level that no scope of the parameters will take."""
  strays = {
    name: value
    for name, value in stats.items()
    if not (isinstance(value, Mapping) and isinstance(params.get(name), Mapping))
  }
  for key_path, _ in jax.tree_util.tree_flatten_with_path(strays)[0]:
    leaf = (*path, *(entry.key for entry in key_path))
    if not any(leaf[: len(entry)] == entry for entry in kept):
      raise ValueError(
        f"batch_stats hold {'/'.join(leaf)}, which no fold has used: either params and batch_stats "
        "do not belong together, or this is a batch norm outside repjax's layers; in that case "
        f"keep its statistics yourself and pass keep=({'/'.join(leaf[:-1])!r},)"
      )
