"""MobileOne's names in the authors' repository and in timm, and preprocessing.

Blocks of a stage are numbered in one row in both: even numbers are depthwise, odd ones are
pointwise. The branch conv1x1 of a depthwise block has a name of its own. That of a pointwise block
is the first of the copies.

References:
  https://github.com/apple/ml-mobileone, mobileone.py
  https://github.com/huggingface/pytorch-image-models, timm/models/byobnet.py
"""

from repjax.models.mobileone import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_DEPTHWISE = r"block(\d*[02468])/RepConv_0/conv1x1"
_STAGES = (1, 2, 3, 4)

OFFICIAL_CONV = (
  Row(r"RepConv_0/conv\dx\d_(\d+)", r"rbr_conv.\1"),
  Row(r"RepConv_0/conv\dx\d", "rbr_conv.0"),
  Row("RepConv_0/identity/bn", "rbr_skip"),
  Row("RepConv_0/conv", "reparam_conv"),
  Row("SqueezeExcite_0/down", "se.reduce", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "se.expand", DENSE_AS_CONV),
  Row("conv", "conv"),
  Row("bn", "bn"),
)
"""A block with the authors' names, which FastViT has too."""

TIMM_CONV = (
  Row(r"RepConv_0/conv\dx\d_(\d+)", r"conv_kxk.\1"),
  Row(r"RepConv_0/conv\dx\d", "conv_kxk.0"),
  Row("RepConv_0/identity/bn", "identity"),
  Row("RepConv_0/conv", "reparam_conv"),
  Row("conv", "conv"),
  Row("bn", "bn"),
)
"""The convolutions of a block with timm's names, which FastViT has too."""

_OFFICIAL: Naming = (
  Row("stem/RepConv_0/conv1x1", "stage0.rbr_scale"),
  Row(rf"(stage\d)/{_DEPTHWISE}", r"\1.\2.rbr_scale"),
  Row("stem", "stage0"),
  Row(r"(stage\d)/block(\d+)", r"\1.\2"),
  Row("head", "linear"),
  *OFFICIAL_CONV,
)

_TIMM: Naming = (
  Row("stem/RepConv_0/conv1x1", "stem.conv_scale"),
  *(Row(f"stage{n}/{_DEPTHWISE}", rf"stages.{n - 1}.\1.conv_scale") for n in _STAGES),
  Row("stem", "stem"),
  *(Row(rf"stage{n}/block(\d+)", rf"stages.{n - 1}.\1") for n in _STAGES),
  Row("head", "head.fc"),
  *TIMM_CONV,
  Row("SqueezeExcite_0/down", "attn.fc1", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "attn.fc2", DENSE_AS_CONV),
)

_NAMINGS: dict[str, Naming] = {"official": _OFFICIAL, "timm": _TIMM}

NAMINGS: dict[str, dict[str, Naming]] = dict.fromkeys(VARIANTS, _NAMINGS)
"""Model to source to table of names."""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, "timm"): Preprocessing(resize_size=248) for name in VARIANTS if name != "mobileone_s0"
}
"""(model, source) to the preprocessing that timm states for the published weights.

The smallest network has the default: the shorter side is 256 pixels long. The authors state none
for their own files, which then have the default too.
"""
