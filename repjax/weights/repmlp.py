"""RepMLP's names (2021) in the authors' repository, before it went over to RepMLPNet.

Both kinds of a file have the same names; the deploy kind has biases and no norms. The fully
connected layer over tiles is a grouped 1x1 convolution there, whose inputs and outputs lie channel
by channel.

References:
  https://github.com/DingXiaoH/RepMLP at 2aba6f5, repmlp.py and repmlp_resnet.py
"""

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
