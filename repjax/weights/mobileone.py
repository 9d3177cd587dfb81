"""MobileOne's names in timm, and the preprocessing of the published weights.

Blocks of a stage are numbered in one row in timm too: even numbers are depthwise, odd ones are
pointwise. The branch conv1x1 of a depthwise block is a branch of its own name. That of a pointwise
block is the first of the copies.

References:
  https://github.com/huggingface/pytorch-image-models, timm/models/byobnet.py
"""

from repjax.models.mobileone import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_DEPTHWISE = r"block(\d*[02468])/RepConv_0/conv1x1"

REP_CONV = (
  Row(r"RepConv_0/conv\dx\d_(\d+)", r"conv_kxk.\1"),
  Row(r"RepConv_0/conv\dx\d", "conv_kxk.0"),
  Row("RepConv_0/identity/bn", "identity"),
  Row("RepConv_0/conv", "reparam_conv"),
  Row("conv", "conv"),
  Row("bn", "bn"),
)
"""Branches of one size, an identity, and the deploy form. timm's FastViT has the same names."""

_TIMM: Naming = (
  Row("stem/RepConv_0/conv1x1", "stem.conv_scale"),
  *(Row(f"stage{n}/{_DEPTHWISE}", rf"stages.{n - 1}.\1.conv_scale") for n in (1, 2, 3, 4)),
  Row("stem", "stem"),
  *(Row(rf"stage{n}/block(\d+)", rf"stages.{n - 1}.\1") for n in (1, 2, 3, 4)),
  Row("head", "head.fc"),
  *REP_CONV,
  Row("SqueezeExcite_0/down", "attn.fc1", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "attn.fc2", DENSE_AS_CONV),
)

NAMINGS: dict[str, dict[str, Naming]] = {name: {"timm": _TIMM} for name in VARIANTS}
"""Model to source to table of names."""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, "timm"): Preprocessing(resize_size=248) for name in VARIANTS if name != "mobileone_s0"
}
"""(model, source) to the preprocessing with which its published accuracy was measured.

The smallest network has the default: the shorter side is 256 pixels long.
"""
