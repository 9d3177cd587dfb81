"""RepMLPNet's names in the authors' repository, the content of their deploy files, preprocessing.

References:
  https://github.com/DingXiaoH/RepMLP at 3eff13f, repmlpnet.py, data/build.py and config.py
"""

from repjax.models.repmlpnet import VARIANTS
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_STAGES = range(1, 10)

_OFFICIAL = (
  Row(r"stem/RepConv_0/conv\d+x\d+", "conv_embedding"),
  *(Row(rf"stage{n}/block(\d+)", rf"stages.{n - 1}.\1") for n in _STAGES),
  *(Row(f"stage{n}/RepConv_embed/conv2x2", f"embeds.{n - 2}") for n in _STAGES[1:]),
  Row("RepNorm_0/bn", "prebn1"),
  Row("RepDense_0/fc/dense", "repmlp_block.fc3"),
  Row("RepDense_0/fc/bn", "repmlp_block.fc3_bn"),
  Row("RepDense_0/dense", "repmlp_block.fc3"),
  Row(r"RepDense_0/local/conv(\d+)x\d+", r"repmlp_block.repconv\1"),
  Row("SqueezeExcite_0/down", "repmlp_block.gp.fc1", DENSE_AS_CONV),
  Row("SqueezeExcite_0/up", "repmlp_block.gp.fc2", DENSE_AS_CONV),
  Row("RepFFN_0/bn", "prebn2"),
  Row("RepFFN_0/expand/conv1x1", "ffn_block.ffn_fc1"),
  Row("RepFFN_0/project/conv1x1", "ffn_block.ffn_fc2"),
  Row("head/RepHead_0/bn", "head_norm"),
  Row("head/RepHead_0/dense", "head"),
  Row("conv", "conv"),
  Row("bn", "bn"),
)

NAMINGS: dict[str, dict[str, Naming]] = {name: {"official": _OFFICIAL} for name in VARIANTS}
"""Model to source to table of names."""

FOLDED: dict[str, tuple[str, ...]] = dict.fromkeys(VARIANTS, ("RepDense",))
"""Model to the layers that its deploy files hold in deploy form.

The authors fold only these layers. Their files hold all other layers as they were trained, with
their statistics.
"""

WITHOUT_MARGIN = frozenset((name, "official") for name in VARIANTS)
"""(model, source) whose published accuracy was measured without a margin around the crop.

The shorter side is resized bilinearly to the model's image size, and the central square of this
size is cut out.
"""
