"""VGG-16's names in torchvision (called official here) and in timm.

The training form is `vgg16_bn` of torchvision. The deploy form is `vgg16`, whose layers are
numbered differently.

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
"""(7, 7, C, O) here, (O, C * 7 * 7) in PyTorch with channels first. Mapping to PyTorch copies."""


def _features(layers: int) -> Iterator[tuple[str, int]]:
  """Yields the scope of each convolution and the convolution's number in torchvision.

  Args:
    layers: number of torchvision's layers for a block: 3 with a batch norm, 2 without.
  """
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
"""Model to source to table of names."""
