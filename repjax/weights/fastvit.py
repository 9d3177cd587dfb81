"""FastViT's names in the authors' repository and in timm, its deploy files, and preprocessing.

References:
  https://github.com/apple/ml-fastvit at 3a6af9e, models
  https://github.com/huggingface/pytorch-image-models, timm/models/fastvit.py
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from repjax.models.fastvit import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.mobileone import OFFICIAL_CONV, TIMM_CONV
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row


class _Words(NamedTuple):
  """The words that differ between the projects.

  Attributes:
    stem: name of the stem.
    final: name of the last convolution.
    head: name of the classifier.
    convs: name of the largest branches of a convolution.
    scale: name of the 1x1 branch.
    identity: name of the identity branch.
    large: name of the 7x7 branch between stages.
    merged: name of the 7x7 convolution between stages in deploy form.
    positions: name of the convolution that marks positions, in training form.
    ffn: name of the FFN.
    gamma: end of the names of factors.
    layers: the rows of convolutions, norms and gates.
  """

  stem: str
  final: str
  head: str
  convs: str
  scale: str
  identity: str
  large: str
  merged: str
  positions: str
  ffn: str
  gamma: str
  layers: Naming


_OFFICIAL = _Words(
  *("patch_embed", "conv_exp", "head"),
  *("rbr_conv", "rbr_scale", "rbr_skip"),
  *("lkb_origin", "lkb_reparam", "pe"),
  *("convffn", "", OFFICIAL_CONV),
)
_TIMM = _Words(
  *("stem", "final_conv", "head.fc"),
  *("conv_kxk", "conv_scale", "identity"),
  *("large_conv", "reparam_conv", "pos_enc"),
  *("mlp", ".gamma"),
  layers=(
    *TIMM_CONV,
    Row("SqueezeExcite_0/down", "se.fc1", DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", "se.fc2", DENSE_AS_CONV),
  ),
)


class _Places(NamedTuple):
  """The names of the parts of a stage.

  Attributes:
    blocks: name of the blocks.
    between: name of the convolution between this stage and the one before.
    positions: name of the layer that marks positions.
  """

  blocks: str
  between: str
  positions: str


def _timm_places(number: int, plain: int) -> _Places:
  """Returns timm's names of the parts of a stage."""
  del plain
  name = f"stages.{number - 1}"
  return _Places(f"{name}.blocks", f"{name}.downsample.proj", f"{name}.pos_emb")


def _official_places(number: int, plain: int) -> _Places:
  """Returns the authors' names of the parts of a stage.

  The authors number, in one row, the convolutions between stages, those of positions, and stages.
  """
  first = 2 * (number - 1) + max(0, number - 1 - plain)  # after the convolution between stages
  blocks = f"network.{first + (number > plain)}"
  return _Places(blocks, f"network.{first - 1}.proj", f"network.{first}")


def _table(plain: int, words: _Words, places_of: Callable[[int, int], _Places]) -> Naming:
  """Returns a table; the first stages, `plain` of them, have no attention."""
  stages = ((n, n > plain, places_of(n, plain)) for n in range(1, 10))
  return (
    Row("stem/block([01])/RepConv_0/conv1x1", rf"{words.stem}.\1.{words.scale}"),
    Row(r"stem/block(\d)", rf"{words.stem}.\1"),
    *(row for stage in stages for row in _stage(*stage, words)),
    Row("final/RepConv_0/conv1x1", f"{words.final}.{words.scale}"),
    Row("final", words.final),
    Row("head", words.head),
    *_inside(words),
    *words.layers,
  )


def _stage(number: int, attends: bool, places: _Places, words: _Words) -> Iterator[Row]:
  """Yields the rows of a stage. Blocks with attention have two layer scales."""
  scope, (blocks, between, positions) = f"stage{number}", places
  if attends:
    ours = rf"{scope}/block(\d+)/ConvFFN_0/layer_scale/gamma"
    yield Row(ours, rf"{blocks}.\1.layer_scale_2{words.gamma}")
  yield Row(rf"{scope}/block(\d+)", rf"{blocks}.\1")
  yield Row(f"{scope}/downsample/RepConv_large/conv7x7", f"{between}.0.{words.large}")
  yield Row(f"{scope}/downsample/RepConv_large/conv3x3", f"{between}.0.small_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv", f"{between}.0.{words.merged}")
  yield Row(f"{scope}/downsample/pointwise", f"{between}.1")
  yield Row(f"{scope}/SkipConv_positions/inner", f"{positions}.{words.positions}")
  yield Row(f"{scope}/SkipConv_positions/conv", f"{positions}.reparam_conv")


def _inside(words: _Words) -> Iterator[Row]:
  """Yields the rows inside of a block."""
  yield Row("RepMixer_0/mixer/conv3x3", f"token_mixer.mixer.{words.convs}.0")
  yield Row("RepMixer_0/mixer/conv1x1", f"token_mixer.mixer.{words.scale}")
  yield Row("RepMixer_0/mixer/identity/bn", f"token_mixer.mixer.{words.identity}")
  yield Row("RepMixer_0/bn", f"token_mixer.norm.{words.identity}")
  yield Row("RepMixer_0/layer_scale/gamma", f"token_mixer.layer_scale{words.gamma}")
  yield Row("RepMixer_0/conv", "token_mixer.reparam_conv")
  yield Row("RepAttention_0/bn", "norm")
  yield Row("RepAttention_0/dense/(qkv|proj)", r"token_mixer.\1")
  yield Row("RepAttention_0/layer_scale/gamma", f"layer_scale_1{words.gamma}")
  yield Row("ConvFFN_0/spatial/conv7x7", f"{words.ffn}.conv")
  yield Row("ConvFFN_0/dense/(fc1|fc2)", rf"{words.ffn}.\1", DENSE_AS_CONV)
  yield Row("ConvFFN_0/layer_scale/gamma", f"layer_scale{words.gamma}")


def _namings(row: Mapping[str, Any]) -> dict[str, Naming]:
  """Returns the tables of a variant by source."""
  plain = len(row["stage_sizes"]) - row.get("attention_stages", 0)
  return {
    "official": _table(plain, _OFFICIAL, _official_places),
    "timm": _table(plain, _TIMM, _timm_places),
  }


NAMINGS: dict[str, dict[str, Naming]] = {name: _namings(row) for name, row in VARIANTS.items()}
"""Model to source to table of names."""

FOLDED: dict[str, tuple[str, ...]] = dict.fromkeys(VARIANTS, ("RepConv", "RepMixer", "SkipConv"))
"""Model to the layers that its deploy files hold in deploy form.

The authors and timm fold only these layers. Their deploy files hold FFNs and attention as they were
trained, with their norms and factors.
"""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, source): Preprocessing(256, 269 if name == "fastvit_ma36" else 284, "bicubic")
  for name in VARIANTS
  for source in ("official", "timm")
}
"""(model, source) to the preprocessing with which its published accuracy was measured."""
