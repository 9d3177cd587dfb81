"""RepViT's names in the authors' repository and in timm, and preprocessing.

In deploy form a convolution has the name of the conv-BN that it was.

References:
  https://github.com/THU-MIG/RepViT at 960c61b, model/repvit.py
  https://github.com/huggingface/pytorch-image-models, timm/models/repvit.py
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


class _Words(NamedTuple):
  """The words that differ between the projects.

  Attributes:
    stem: names of the two convolutions of the stem.
    spatial, channel: names of the convolutions that halve a map and change its channels.
    mixer: name of the token mixer.
    gates: names of the layers of a gate.
    ffn: names of the convolutions of the channel mixer.
    heads: names of the two classifiers.
    head: name of the classifier in deploy form.
  """

  stem: tuple[str, str]
  spatial: str
  channel: str
  mixer: str
  gates: tuple[str, str]
  ffn: tuple[str, str]
  heads: tuple[str, str]
  head: str


_TIMM = _Words(
  stem=("stem.conv1", "stem.conv2"),
  spatial="spatial_downsample",
  channel="channel_downsample",
  mixer="token_mixer",
  gates=("se.fc1", "se.fc2"),
  ffn=("channel_mixer.conv1", "channel_mixer.conv2"),
  heads=("head.head", "head.head_dist"),
  head="head",
)
_OFFICIAL = _Words(
  stem=("features.0.0", "features.0.2"),
  spatial="token_mixer.0",
  channel="token_mixer.2",
  mixer="token_mixer.0",
  gates=("token_mixer.1.fc1", "token_mixer.1.fc2"),
  ffn=("channel_mixer.m.0", "channel_mixer.m.2"),
  heads=("classifier.classifier", "classifier.classifier_dist"),
  head="classifier",
)


def _table(words: _Words, blocks: Iterable[Row], normed_branches: bool) -> Naming:
  """Returns a table.

  Args:
    words: the words of a project.
    blocks: the rows that say where blocks are.
    normed_branches: token mixers have norms in both branches. Otherwise one has a bias.
  """
  return (
    *_conv_bn("stem/RepConv_conv1", words.stem[0]),
    *_conv_bn("stem/RepConv_conv2", words.stem[1]),
    *blocks,
    *_conv_bn("RepConv_spatial", words.spatial),
    *_conv_bn("RepConv_channel", words.channel),
    Row("RepConv_mixer/conv3x3/conv", f"{words.mixer}.conv.c"),
    Row("RepConv_mixer/conv3x3/bn", f"{words.mixer}.conv.bn"),
    Row("RepConv_mixer/conv1x1/conv", f"{words.mixer}.conv1{'.c' if normed_branches else ''}"),
    Row("RepConv_mixer/conv1x1/bn", f"{words.mixer}.conv1.bn"),
    Row("RepConv_mixer/bn", f"{words.mixer}.bn"),
    Row("RepConv_mixer/conv", words.mixer),
    Row("SqueezeExcite_0/down", words.gates[0], DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", words.gates[1], DENSE_AS_CONV),
    *_conv_bn("RepConv_expand", words.ffn[0]),
    *_conv_bn("RepConv_project", words.ffn[1]),
    *(row for number, name in enumerate(words.heads) for row in _head(number, name)),
    Row("head/RepHeads_0/dense", words.head),
  )


def _head(number: int, name: str) -> Iterator[Row]:
  """Yields the rows of a classifier with its norm."""
  yield Row(f"head/RepHeads_0/head{number}/bn", f"{name}.bn")
  yield Row(f"head/RepHeads_0/head{number}/dense", f"{name}.l")


def _timm_blocks() -> Iterator[Row]:
  """Yields the rows of all blocks."""
  for n in (1, 2, 3, 4):
    yield Row(rf"stage{n}/block(\d+)", rf"stages.{n - 1}.blocks.\1")
  for n in (2, 3, 4):
    yield from _downsample(n)
  yield Row("before", "pre_block")


def _official_blocks(stage_sizes: Sequence[int]) -> Iterator[Row]:
  """Yields the rows of all blocks, which the authors number in one row."""
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
  return {
    "official": _table(_OFFICIAL, _official_blocks(row["stage_sizes"]), normed),
    "timm": _table(_TIMM, _timm_blocks(), normed),
  }


NAMINGS: dict[str, dict[str, Naming]] = {name: _namings(row) for name, row in VARIANTS.items()}
"""Model to source to table of names."""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, source): Preprocessing(resize_size=235, interpolation="bicubic")
  for name in VARIANTS
  for source in ("official", "timm")
}
"""(model, source) to the preprocessing with which its published accuracy was measured."""
