"""RepVGG's names in four repositories: the authors', timm, mmpretrain and RepOptimizer's.

References:
  https://github.com/DingXiaoH/RepVGG
  https://github.com/huggingface/pytorch-image-models, timm/models/byobnet.py
  https://github.com/open-mmlab/mmpretrain, mmpretrain/models/backbones/repvgg.py
  https://github.com/DingXiaoH/RepOptimizers, repoptimizer/repoptvgg_model.py
"""

import re
from collections.abc import Iterable
from typing import Any

from repjax.models.repvgg import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_INSIDE = (Row("conv", "conv"), Row("bn", "bn"))  # a branch's convolution and norm

_OFFICIAL_LAYERS = (
  Row(r"AuxHead_(\w+)/RepConv_0/conv3x3", r"\1_aux.0"),
  Row(r"AuxHead_(\w+)/head", r"\1_aux.3"),
  Row("stem", "stage0"),
  Row("head", "linear"),
  Row("RepConv_0/conv3x3", "rbr_dense"),
  Row("RepConv_0/conv1x1", "rbr_1x1"),
  Row("RepConv_0/identity/bn", "rbr_identity"),
  Row("RepConv_0/conv", "rbr_reparam"),
  *_INSIDE,
)

_OFFICIAL = (
  *_OFFICIAL_LAYERS,
  Row(r"(stage\w+)/block(\d+)", r"\1.\2"),
  Row("SqueezeExcite_0/(down|up)", r"se.\1", DENSE_AS_CONV),
)

_OFFICIAL_PLUS = (
  *_OFFICIAL_LAYERS,
  Row(r"(stage\w+)/block(\d+)", r"\1.blocks.\2"),
  Row("SqueezeExcite_0/(down|up)", r"post_se.\1", DENSE_AS_CONV),
)

_TIMM = (
  Row("stem", "stem"),
  *(Row(rf"stage{stage}/block(\d+)", rf"stages.{stage - 1}.\1") for stage in (1, 2, 3, 4)),
  Row("head", "head.fc"),
  Row("RepConv_0/conv3x3", "conv_kxk"),
  Row("RepConv_0/conv1x1", "conv_1x1"),
  Row("RepConv_0/identity/bn", "identity"),
  Row("RepConv_0/conv", "reparam_conv"),
  *_INSIDE,
  Row("SqueezeExcite_0/down", "attn.fc1", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "attn.fc2", DENSE_AS_CONV),
)

_MMPRETRAIN = (
  Row("stem", "backbone.stem"),
  Row(r"stage([1-4])/block(\d+)", r"backbone.stage_\1.\2"),
  Row("head", "head.fc"),
  Row("RepConv_0/conv3x3", "branch_3x3"),
  Row("RepConv_0/conv1x1", "branch_1x1"),
  Row("RepConv_0/identity/bn", "branch_norm"),
  Row("RepConv_0/conv", "branch_reparam"),
  Row("conv", "conv"),
  Row("bn", "norm"),
  Row("SqueezeExcite_0/down", "se_layer.conv1.conv", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "se_layer.conv2.conv", DENSE_AS_CONV),
)

# The authors of RepOptimizer train plain networks, and networks with scales for the hyper-search.
_REPOPT = (
  Row("stem", "stage0"),
  Row(r"(stage[1-4])/block(\d+)", r"\1.\2"),
  Row("head", "linear"),
  Row("RepConv_0/conv3x3/conv", "conv"),
  Row("RepConv_0/conv3x3/bn", "bn"),
  Row("ScaledConv_0/conv3x3/conv", "conv"),
  Row("ScaledConv_0/conv3x3", "scale_conv"),
  Row("ScaledConv_0/conv1x1/conv", "conv_1x1"),
  Row("ScaledConv_0/conv1x1", "scale_1x1"),
  Row("ScaledConv_0/identity", "scale_identity"),
  Row("ScaledConv_0/bn", "bn"),
  Row("SqueezeExcite_0/(down|up)", r"post_se.\1", DENSE_AS_CONV),
)

_REPOPT_BLOCK = re.compile(r"(?:.*\.)?stage([1-4])\.(\d+)\.conv\.weight")


def repopt_overrides(names: Iterable[str]) -> dict[str, Any]:
  """Returns the attributes that names of RepOptimizer's authors show, such as `branches`.

  Their networks have no models of their own here. B1 and B2 are plain networks of the same name,
  and L1 and L2 have the widths of B1 and B2 with more blocks.

  Args:
    names: names of a state dict. Names of other sources give {}.
  """
  names = list(names)
  stem = {name.rpartition("stage0.")[2] for name in names if "stage0." in name}
  if not {"conv.weight", "bn.weight"} <= stem:
    return {}
  found: dict[str, Any] = (
    {"scaled": True} if "scale_conv.weight" in stem else {"branches": ["conv3x3"]}
  )
  blocks = {match.groups() for name in names if (match := _REPOPT_BLOCK.fullmatch(name))}
  sizes = [sum(stage == str(number) for stage, _ in blocks) for number in (1, 2, 3, 4)]
  if all(sizes) and tuple(sizes) != VARIANTS["repvgg_b1"]["stage_sizes"]:
    found["stage_sizes"] = sizes
  return found


_NAMINGS: dict[str, Naming] = {
  "official": _OFFICIAL,
  "timm": _TIMM,
  "mmpretrain": _MMPRETRAIN,
  "repopt": _REPOPT,
}

NAMINGS: dict[str, dict[str, Naming]] = {
  **dict.fromkeys(VARIANTS, _NAMINGS),
  "repvggplus_l2pse": {"official": _OFFICIAL_PLUS},
}
"""Model to source to table of names."""

_AT_320 = Preprocessing(image_size=320, resize_size=320)

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  ("repvgg_d2se", "official"): _AT_320,
  ("repvgg_d2se", "timm"): _AT_320,
  ("repvggplus_l2pse", "official"): _AT_320,
  # RepOptimizer's script resizes the shorter side to the size of the crop.
  **{(name, "repopt"): Preprocessing(resize_size=224) for name in VARIANTS},
}
"""(model, source) to the preprocessing with which its published accuracy was measured.

Models that are not in this table use the defaults of `Preprocessing`: the shorter side is resized
bilinearly to 256, the central 224 x 224 pixels are cut out, and ImageNet's mean and standard
deviation normalize them.
"""
