"""RepViT's names in the authors' repository and in timm, and preprocessing.

In deploy form a convolution has the name of the conv-BN that it was.

References:
  https://github.com/THU-MIG/RepViT at 960c61b, model/repvit.py
  https://github.com/huggingface/pytorch-image-models, timm/models/repvit.py
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repjax.models.repvit import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row


def _conv_bn(scope: str, name: str) -> Iterator[Row]:
  """Yields the rows of a RepConv of one branch, in both forms."""
  yield Row(rf"{scope}/conv\dx\d/conv", f"{name}.c")
  yield Row(rf"{scope}/conv\dx\d/bn", f"{name}.bn")
  yield Row(f"{scope}/conv", name)


def _downsample(number: int) -> Iterator[Row]:
  """Yields the rows of the beginning of a stage, whose channel mixer has a name of its own."""
  scope, name = f"stage{number}/downsample", f"stages.{number - 1}.downsample"
  yield from _conv_bn(f"{scope}/RepConv_expand", f"{name}.ffn.conv1")
  yield from _conv_bn(f"{scope}/RepConv_project", f"{name}.ffn.conv2")
  yield Row(scope, name)


def _timm(normed_branches: bool) -> Naming:
  """Returns the table of networks whose token mixers have norms in both branches, or a bias."""
  return (
    *_conv_bn("stem/RepConv_conv1", "stem.conv1"),
    *_conv_bn("stem/RepConv_conv2", "stem.conv2"),
    *(Row(rf"stage{n}/block(\d+)", rf"stages.{n - 1}.blocks.\1") for n in (1, 2, 3, 4)),
    *(row for n in (2, 3, 4) for row in _downsample(n)),
    *_conv_bn("RepConv_spatial", "spatial_downsample"),
    *_conv_bn("RepConv_channel", "channel_downsample"),
    Row("before", "pre_block"),
    Row("RepConv_mixer/conv3x3/conv", "token_mixer.conv.c"),
    Row("RepConv_mixer/conv3x3/bn", "token_mixer.conv.bn"),
    Row("RepConv_mixer/conv1x1/conv", f"token_mixer.conv1{'.c' if normed_branches else ''}"),
    Row("RepConv_mixer/conv1x1/bn", "token_mixer.conv1.bn"),
    Row("RepConv_mixer/bn", "token_mixer.bn"),
    Row("RepConv_mixer/conv", "token_mixer"),
    Row("SqueezeExcite_0/down", "se.fc1", DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", "se.fc2", DENSE_AS_CONV),
    *_conv_bn("RepConv_expand", "channel_mixer.conv1"),
    *_conv_bn("RepConv_project", "channel_mixer.conv2"),
    Row("head/RepHeads_0/head0/bn", "head.head.bn"),
    Row("head/RepHeads_0/head0/dense", "head.head.l"),
    Row("head/RepHeads_0/head1/bn", "head.head_dist.bn"),
    Row("head/RepHeads_0/head1/dense", "head.head_dist.l"),
    Row("head/RepHeads_0/dense", "head"),
  )


def _official(stage_sizes: Sequence[int], normed_branches: bool) -> Naming:
  """Returns the authors' table of a network; they number all blocks in one row.

  Args:
    stage_sizes: number of blocks in each stage.
    normed_branches: as in `_timm`.
  """
  return (
    *_conv_bn("stem/RepConv_conv1", "features.0.0"),
    *_conv_bn("stem/RepConv_conv2", "features.0.2"),
    *_official_blocks(stage_sizes),
    *_conv_bn("RepConv_spatial", "token_mixer.0"),
    *_conv_bn("RepConv_channel", "token_mixer.2"),
    Row("RepConv_mixer/conv3x3/conv", "token_mixer.0.conv.c"),
    Row("RepConv_mixer/conv3x3/bn", "token_mixer.0.conv.bn"),
    Row("RepConv_mixer/conv1x1/conv", f"token_mixer.0.conv1{'.c' if normed_branches else ''}"),
    Row("RepConv_mixer/conv1x1/bn", "token_mixer.0.conv1.bn"),
    Row("RepConv_mixer/bn", "token_mixer.0.bn"),
    Row("RepConv_mixer/conv", "token_mixer.0"),
    Row("SqueezeExcite_0/down", "token_mixer.1.fc1", DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", "token_mixer.1.fc2", DENSE_AS_CONV),
    *_conv_bn("RepConv_expand", "channel_mixer.m.0"),
    *_conv_bn("RepConv_project", "channel_mixer.m.2"),
    Row("head/RepHeads_0/head0/bn", "classifier.classifier.bn"),
    Row("head/RepHeads_0/head0/dense", "classifier.classifier.l"),
    Row("head/RepHeads_0/head1/bn", "classifier.classifier_dist.bn"),
    Row("head/RepHeads_0/head1/dense", "classifier.classifier_dist.l"),
    Row("head/RepHeads_0/dense", "classifier"),
  )


def _official_blocks(stage_sizes: Sequence[int]) -> Iterator[Row]:
  """Yields the rows of all blocks. The block before a down-sampling is one of its own there."""
  number = 0  # the stem
  for stage, size in enumerate(stage_sizes, 1):
    if stage > 1:
      yield Row(f"stage{stage}/downsample/before", f"features.{number + 1}")
      yield Row(f"stage{stage}/downsample", f"features.{number + 2}")
      number += 2
    for block in range(size):
      number += 1
      yield Row(f"stage{stage}/block{block}", f"features.{number}")


def _namings(row: Mapping[str, Any]) -> dict[str, Naming]:
  """Returns the tables of a variant by source."""
  normed = row.get("normed_branches", False)
  return {"official": _official(row["stage_sizes"], normed), "timm": _timm(normed)}


NAMINGS: dict[str, dict[str, Naming]] = {name: _namings(row) for name, row in VARIANTS.items()}
"""Model to source to table of names."""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, source): Preprocessing(resize_size=235, interpolation="bicubic")
  for name in VARIANTS
  for source in ("official", "timm")
}
"""(model, source) to the preprocessing with which its published accuracy was measured."""
