"""RepMLP's names (2021) in the authors' repository, before the repository turned to RepMLPNet.

Files of both forms have the same names; the deploy form has biases and no norms. In these files the
fully connected layer over tiles is a grouped 1x1 convolution. Its inputs and outputs are flattened
channel by channel.

References:
  https://github.com/DingXiaoH/RepMLP at 2aba6f5, repmlp.py and repmlp_resnet.py
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from repjax.models.repmlp_resnet import VARIANTS
from repjax.weights.naming import Naming, Row
from repjax.weights.resnet import REPMLP_LAYERS

REP_DENSE = (
  Row("RepDense_0/fc/dense", "fc3"),
  Row("RepDense_0/fc/bn", "fc3_bn"),
  Row("RepDense_0/dense", "fc3"),
  Row(r"RepDense_0/local/conv(\d+)x\d+/(conv|bn)", r"repconv\1.\2"),
)
"""The fully connected layer over tiles, which RepMLPNet has too."""

BLOCK = (
  Row("GlobalPerceptron_0/bn", "avg.bn"),
  Row(r"GlobalPerceptron_0/dense/(fc1|fc2)", r"fc1_fc2.\1"),
  *REP_DENSE,
)
"""A block outside a network."""

_OFFICIAL: Naming = (*REPMLP_LAYERS, Row("(light_repmlp|btnk_repmlp)", r"\1"), *BLOCK)

NAMINGS: dict[str, dict[str, Naming]] = {model: {"official": _OFFICIAL} for model in VARIANTS}
"""Model to source to table of names."""

_LAYER = re.compile(r"_repmlp\.fc3\.weight$")
_LOCAL = re.compile(r"(.*_repmlp\.)repconv(\d+)\.conv\.weight$")


def attributes(
  shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], tile: Any
) -> dict[str, Any]:
  """Reads attributes of a RepMLP-ResNet from the names and shapes of a state dict.

  A layer over tiles of h x w pixels, with C channels in and out, has a kernel of shape
  (C h w, C h w / g, 1, 1). An attribute is left out if layers do not agree on its value.

  Args:
    shapes: name to shape of the state dict.
    known: name to shape of a state dict with the same channels and a known tile.
    tile: the known tile, one number or (h, w).

  Returns:
    `tile`, if square; `local_kernels`, if in training form; `fc3_groups`, if stages differ.
  """
  layers = {name: shape for name, shape in shapes.items() if _LAYER.search(name) and name in known}
  if not all(len(shape) == 4 and min(shape) > 0 for shape in layers.values()):
    return {}
  area = tile**2 if isinstance(tile, int) else math.prod(tile)
  areas = {shape[0] * area / known[name][0] for name, shape in layers.items()}
  found: dict[str, Any] = {}
  if len(areas) == 1 and math.sqrt(*areas).is_integer():
    found["tile"] = int(math.sqrt(*areas))
  kernels = {
    tuple(sorted(int(match[2]) for match in map(_LOCAL.match, shapes) if match and match[1] == at))
    for at in (name.removesuffix("fc3.weight") for name in layers)
    if f"{at}fc3_bn.weight" in shapes
  }
  if len(kernels) == 1:
    (found["local_kernels"],) = kernels
  groups = {name.split(".")[0]: shape[0] // shape[1] for name, shape in sorted(layers.items())}
  if len(set(groups.values())) > 1:
    found["fc3_groups"] = tuple(groups.values())
  return found
