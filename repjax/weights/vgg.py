"""VGG-16's names in torchvision, which are its official ones here, and in timm.

Training form: `vgg16_bn` there. Deploy form: `vgg16`, whose layers have other numbers.

References:
  https://github.com/pytorch/vision, torchvision/models/vgg.py
  https://github.com/huggingface/pytorch-image-models, timm/models/vgg.py
"""

from collections.abc import Iterator

from repjax.models.vgg import POOLED, STAGE_SIZES
from repjax.weights.naming import DENSE_AS_CONV, Layout, Naming, Row

MAP_AS_DENSE = Layout(
  lambda x: x.transpose(3, 2, 0, 1).reshape(x.shape[-1], -1),
  lambda x: x.reshape(len(x), -1, POOLED, POOLED).transpose(2, 3, 1, 0),
)
"""(7, 7, C, O) and (O, C * 7 * 7), channels first. The way to PyTorch copies where it must."""


def _features(layers: int) -> Iterator[tuple[str, int]]:
  """The scope of each convolution and its number, if a block has that many layers there."""
  number = 0
  for stage, size in enumerate(STAGE_SIZES, 1):
    for block in range(size):
      yield f"stage{stage}/block{block}/RepConv_0", number
      number += layers
    number += 1  # the max-pool


_FEATURES = (
  *(Row(f"{scope}/conv3x3/conv", f"features.{number}") for scope, number in _features(3)),
  *(Row(f"{scope}/conv3x3/bn", f"features.{number + 1}") for scope, number in _features(3)),
  *(Row(f"{scope}/conv", f"features.{number}") for scope, number in _features(2)),
)

_TORCHVISION = (
  *_FEATURES,
  Row("fc1", "classifier.0", MAP_AS_DENSE),
  Row("fc2", "classifier.3"),
  Row("head", "classifier.6"),
)

_TIMM = (
  *_FEATURES,
  Row("fc1", "pre_logits.fc1"),
  Row("fc2", "pre_logits.fc2", DENSE_AS_CONV),
  Row("head", "head.fc"),
)

NAMINGS: dict[str, dict[str, Naming]] = {"vgg16": {"official": _TORCHVISION, "timm": _TIMM}}
"""Model to source to table."""
