"""Recognition of layers in a tree: by the content of a scope, or by the name of its class.

The layers of repjax are recognised by what a scope holds. Eight of them hold only scopes with
ordinary names: AuxHead, GlobalPerceptron, RepFFN, RepHead, RepHeads, RepNorm, SkipConv and
SkipSqueezeExcite. Such a layer has its class name at the beginning of the scope's name, or else a
note in its statistics, which the layer writes itself.
Layers of other people are recognised by their class names alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from repjax import layers
from repjax.errors import printable
from repjax.layers.base import RepLayer, is_named
from repjax.layers.grammar import is_skip
from repjax.layers.rep_conv import convolution_branches, other_names

Tree = Mapping[str, Any]
Path = tuple[str, ...]
Fold = Callable[[Tree, Tree, Any], Mapping[str, Any] | None]
Expand = Callable[[Any, Tree, Tree, Any, Any], Mapping[str, Any]]


class Kind(NamedTuple):
  """A kind of layer that repjax folds.

  Attributes:
    layer: class of the layer.
    fold: function of (params, stats, epsilon) that returns the deploy form.
    expand: function of (deploy, shapes, stats, epsilon, key) that returns parameters of the
      training form. The fold maps these to `deploy`.
    recognize: function of params that returns the number of leading axes which `nn.vmap` and
      `nn.scan` have added, or None for a scope that holds anything else.
  """

  layer: type[RepLayer]
  fold: Fold
  expand: Expand
  recognize: Callable[[Tree], int | None]

  def is_in(self, name: str, params: Tree, stats: Tree) -> bool:
    """Tells if a scope of this name holds a layer of this kind in training form."""
    mark = self.layer.mark
    is_said = mark is None or is_named(name, mark) or mark in stats
    return is_said and self.recognize(params) is not None


KINDS: dict[str, Kind] = {
  row.layer.__name__: row
  for row in (
    Kind(layers.AuxHead, layers.fold_aux_head, layers.expand_aux_head, layers.recognize_aux_head),
    Kind(
      layers.GlobalPerceptron,
      layers.fold_global_perceptron,
      layers.expand_global_perceptron,
      layers.recognize_global_perceptron,
    ),
    Kind(layers.RepConv, layers.fold_rep_conv, layers.expand_rep_conv, layers.recognize_rep_conv),
    Kind(
      layers.RepDense, layers.fold_rep_dense, layers.expand_rep_dense, layers.recognize_rep_dense
    ),
    Kind(layers.ConvFFN, layers.fold_conv_ffn, layers.expand_conv_ffn, layers.recognize_conv_ffn),
    Kind(
      layers.RepAttention,
      layers.fold_rep_attention,
      layers.expand_rep_attention,
      layers.recognize_rep_attention,
    ),
    Kind(
      layers.RepMixer, layers.fold_rep_mixer, layers.expand_rep_mixer, layers.recognize_rep_mixer
    ),
    Kind(
      layers.SkipConv, layers.fold_skip_conv, layers.expand_skip_conv, layers.recognize_skip_conv
    ),
    Kind(layers.RepFFN, layers.fold_rep_ffn, layers.expand_rep_ffn, layers.recognize_rep_ffn),
    Kind(layers.RepHead, layers.fold_rep_head, layers.expand_rep_head, layers.recognize_rep_head),
    Kind(
      layers.RepHeads, layers.fold_rep_heads, layers.expand_rep_heads, layers.recognize_rep_heads
    ),
    Kind(layers.RepNorm, layers.fold_rep_norm, layers.expand_rep_norm, layers.recognize_rep_norm),
    Kind(
      layers.ScaledConv,
      layers.fold_scaled_conv,
      layers.expand_scaled_conv,
      layers.recognize_scaled_conv,
    ),
    Kind(
      layers.SkipSqueezeExcite,
      layers.fold_skip_squeeze_excite,
      layers.expand_skip_squeeze_excite,
      layers.recognize_skip_squeeze_excite,
    ),
  )
}

FOLDS: dict[str, Fold] = {name: kind.fold for name, kind in KINDS.items()}
"""Class name of a layer to its fold. Extend a copy: `folds={**repjax.FOLDS, "MyLayer": fold}`."""

LAYERS: tuple[type[RepLayer], ...] = tuple(kind.layer for kind in KINDS.values())
"""The classes of all layers of repjax that have a fold."""


def layer_name(scope: str, folds: Iterable[str] = FOLDS) -> str | None:
  """Returns the class name, among the keys of `folds`, with which the name of a scope begins.

  Returns None if there is no such key.
  """
  # The longest key fits best: beside RepConv, a key RepConv_Wide takes the scope RepConv_Wide_0.
  return max((name for name in folds if is_named(scope, name)), key=len, default=None)


def is_known(name: str, fold: Fold) -> bool:
  """Tells if a fold is the one that repjax has for the layer of a class name."""
  return name in KINDS and KINDS[name].fold is fold


def is_mark(name: str) -> bool:
  """Tells if a leaf of statistics is a note that only names something, with any value.

  Such notes name a skip, or the class of the layer.
  """
  return is_skip(name) or name in KINDS


def kind_of(name: str, params: Tree, stats: Tree) -> Kind | None:
  """Returns the kind of the repjax layer that a scope holds in training form, or None.

  Args:
    name: name of the scope; empty for the whole tree.
    params: parameters of the scope.
    stats: statistics of the scope.
  """
  return next((kind for kind in KINDS.values() if kind.is_in(name, params, stats)), None)


def why_unclear(params: Tree, stats: Tree, path: Path) -> str | None:
  """Explains what is unclear about a scope that no fold takes although it looks like a layer.

  Args:
    params: parameters of the scope.
    stats: statistics of the scope.
    path: place of the scope.

  Returns:
    The two readings of the scope and the way out of each, or None if the scope looks like none of
    the layers.
  """
  where, name = shown(path), printable(path[-1]) if path else "MyLayer"
  if branches := sorted(convolution_branches(params)):
    others = sorted(other_names(params))
    beside = (
      "with one more norm, bn, although all convolutions have norms of their own"
      if others == ["bn"]
      else f"beside {_listed(others)}, which no RepConv holds"
    )
    norms = ", ".join(repr("/".join((*path, branch, "bn"))) for branch in branches)
    return (
      f"{where} holds {_listed(branches)}, as a RepConv does, {beside}. If it is a subclass of "
      "RepConv, give it a fold of its own: "
      f'folds={{**repjax.FOLDS, "{name}": fold}}. If these are convolutions and batch norms of '
      f"another library, keep their statistics: keep=({norms},)"
    )
  for key, kind in KINDS.items():
    held = _unclaimed(params, stats) if kind.layer.mark else []
    if held and kind.recognize(params) is not None:
      fold = f'repjax.FOLDS["{key}"]'
      told = f'folds={{**repjax.FOLDS, "{name}": {fold}}}' if path else f"call {fold}"
      kept = ", ".join(repr("/".join((*path, name))) for name in held)
      return (
        f"{where} holds {_listed(params)} alone, which can be read in two ways. If it is a {key}, "
        f"say so: {told}. If it is not, keep the statistics: keep=({kept},)"
      )
  return None


def _unclaimed(params: Tree, stats: Tree) -> list[str]:
  """Returns paths of statistics that a layer which nobody names may have.

  Such a layer has a norm of its own, or a skip, or a norm in each of its scopes.
  """
  if "bn" in params:
    return ["bn"]
  if skips := [name for name in stats if is_skip(name)]:
    return skips
  inner = {
    f"{name}/bn"
    for name, held in params.items()
    if isinstance(held, Mapping)
    and "bn" in held
    and isinstance(stats.get(name), Mapping)
    and kind_of(str(name), held, stats[name]) is None
  }
  return sorted(inner) if len(inner) == len(params) else []


def shown(path: Path) -> str:
  """Returns a path for a message."""
  return printable("/".join(path)) or "the tree"


def _listed(names: Iterable[str]) -> str:
  """Returns names for a message."""
  return printable(", ".join(map(str, names)), 200)
