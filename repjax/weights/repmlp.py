"""RepMLP's names (2021) in the authors' repository, before it went over to RepMLPNet.

Both kinds of a file have the same names; the deploy kind has biases and no norms. The fully
connected layer over tiles is a grouped 1x1 convolution there, whose inputs and outputs lie channel
by channel.

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
"""The layer over tiles, in RepMLPNet too."""

BLOCK = (
  Row("GlobalPerceptron_0/bn", "avg.bn"),
  Row(r"GlobalPerceptron_0/dense/(fc1|fc2)", r"fc1_fc2.\1"),
  *REP_DENSE,
)
"""A lone block."""

_OFFICIAL: Naming = (*REPMLP_LAYERS, Row("((?:light|btnk)_repmlp)", r"\1"), *BLOCK)

NAMINGS: dict[str, dict[str, Naming]] = {model: {"official": _OFFICIAL} for model in VARIANTS}
"""Model to source to table."""

_LAYER = re.compile(r"_repmlp\.fc3\.weight$")
_LOCAL = re.compile(r"(.*_repmlp\.)repconv(\d+)\.conv\.weight$")


def attributes(
  shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], tile: Any
) -> dict[str, Any]:
  """What names and shapes of a RepMLP-ResNet say of its attributes, as far as they agree.

  A layer over tiles of h x w pixels, from C channels to as many, is (C h w, C h w / g, 1, 1).

  Args:
    shapes: of a state dict.
    known: of one with the same channels.
    tile: of that one, one number or (h, w).

  Returns:
    `tile`, a square one; `local_kernels`, of a training form; `fc3_groups`, where stages differ.
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
