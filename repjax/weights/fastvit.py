"""FastViT's names in the authors' repository and in timm, its deploy files, and preprocessing.

References:
  https://github.com/apple/ml-fastvit at 3a6af9e, models
  https://github.com/huggingface/pytorch-image-models, timm/models/fastvit.py
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from repjax.models.fastvit import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.mobileone import OFFICIAL_CONV, TIMM_CONV
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_STAGES = range(1, 10)


class _Words(NamedTuple):
  """The words that differ between the projects.

  Attributes:
    convs: name of the largest branches of a convolution.
    scale: name of the 1x1 branch.
    identity: name of the identity branch.
    ffn: name of the FFN.
    gamma: end of the names of factors.
  """

  convs: str
  scale: str
  identity: str
  ffn: str
  gamma: str


_OFFICIAL = _Words("rbr_conv", "rbr_scale", "rbr_skip", "convffn", "")
_TIMM = _Words("conv_kxk", "conv_scale", "identity", "mlp", ".gamma")


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


def _blocks(scope: str, name: str, attends: bool, words: _Words) -> Iterator[Row]:
  """Yields the rows of the blocks of a stage. Blocks with attention have two layer scales."""
  if attends:
    ours = rf"{scope}/block(\d+)/ConvFFN_0/layer_scale/gamma"
    yield Row(ours, rf"{name}.\1.layer_scale_2{words.gamma}")
  yield Row(rf"{scope}/block(\d+)", rf"{name}.\1")


def _timm(plain: int) -> Naming:
  """Returns timm's table; the first stages, `plain` of them, have no attention."""
  return (
    Row("stem/block([01])/RepConv_0/conv1x1", r"stem.\1.conv_scale"),
    Row(r"stem/block(\d)", r"stem.\1"),
    *(row for n in _STAGES for row in _timm_stage(n, n > plain)),
    Row("final/RepConv_0/conv1x1", "final_conv.conv_scale"),
    Row("final", "final_conv"),
    Row("head", "head.fc"),
    *_inside(_TIMM),
    *TIMM_CONV,
    Row("SqueezeExcite_0/down", "se.fc1", DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", "se.fc2", DENSE_AS_CONV),
  )


def _timm_stage(number: int, attends: bool) -> Iterator[Row]:
  """Yields the rows of a stage with timm's names."""
  scope, name = f"stage{number}", f"stages.{number - 1}"
  yield from _blocks(scope, f"{name}.blocks", attends, _TIMM)
  yield Row(f"{scope}/downsample/RepConv_large/conv7x7", f"{name}.downsample.proj.0.large_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv3x3", f"{name}.downsample.proj.0.small_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv", f"{name}.downsample.proj.0.reparam_conv")
  yield Row(f"{scope}/downsample/pointwise", f"{name}.downsample.proj.1")
  yield Row(f"{scope}/SkipConv_positions/inner", f"{name}.pos_emb.pos_enc")
  yield Row(f"{scope}/SkipConv_positions/conv", f"{name}.pos_emb.reparam_conv")


def _official(plain: int) -> Naming:
  """Returns the authors' table; the first stages, `plain` of them, have no attention."""
  return (
    Row("stem/block([01])/RepConv_0/conv1x1", r"patch_embed.\1.rbr_scale"),
    Row(r"stem/block(\d)", r"patch_embed.\1"),
    *(row for n in _STAGES for row in _official_stage(n, plain)),
    Row("final/RepConv_0/conv1x1", "conv_exp.rbr_scale"),
    Row("final", "conv_exp"),
    Row("head", "head"),
    *_inside(_OFFICIAL),
    *OFFICIAL_CONV,
  )


def _official_stage(number: int, plain: int) -> Iterator[Row]:
  """Yields the rows of a stage with the authors' names.

  The authors number, in one row, the convolutions between stages, those of positions, and stages.
  """
  scope, attends = f"stage{number}", number > plain
  first = 2 * (number - 1) + max(0, number - 1 - plain)  # after the convolution between stages
  yield from _blocks(scope, f"network.{first + attends}", attends, _OFFICIAL)
  down = f"network.{first - 1}.proj"
  yield Row(f"{scope}/downsample/RepConv_large/conv7x7", f"{down}.0.lkb_origin")
  yield Row(f"{scope}/downsample/RepConv_large/conv3x3", f"{down}.0.small_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv", f"{down}.0.lkb_reparam")
  yield Row(f"{scope}/downsample/pointwise", f"{down}.1")
  yield Row(f"{scope}/SkipConv_positions/inner", f"network.{first}.pe")
  yield Row(f"{scope}/SkipConv_positions/conv", f"network.{first}.reparam_conv")


def _plain(row: Mapping[str, Any]) -> int:
  """Returns the number of stages without attention of a variant."""
  return len(row["stage_sizes"]) - row.get("attention_stages", 0)


NAMINGS: dict[str, dict[str, Naming]] = {
  name: {"official": _official(_plain(row)), "timm": _timm(_plain(row))}
  for name, row in VARIANTS.items()
}
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
