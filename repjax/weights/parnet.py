"""ParNet's names in the authors' repository, the content of their fused files, their activation.

References:
  https://github.com/imankgoyal/NonDeepNetworks at 777b286, folder imagenet
"""

from repjax.models.parnet import VARIANTS
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_OFFICIAL = (
  Row("downsample([01])", r"inits.0.\1.block"),
  Row("downsample2", "inits.1.block"),
  Row("downsample3", "inits.2.block"),
  *(Row(rf"stream{n}/block(\d+)", rf"streams.{n - 1}.\1.block") for n in (1, 2, 3)),
  Row("fusion1", "downsamples_2.0.block"),
  Row("fusion2/RepNorm_stream/bn", "downsamples_2.1.0.b1"),
  Row("fusion2/RepNorm_previous/bn", "downsamples_2.1.0.b2"),
  Row("fusion2", "downsamples_2.1.2.block"),
  Row("fusion3/RepNorm_stream/bn", "combine.0.b1"),
  Row("fusion3/RepNorm_previous/bn", "combine.0.b2"),
  Row("fusion3", "combine.2.block"),
  Row("downsample4", "combine.3.block"),
  Row("head", "head.fc"),
  Row("RepConv_0/conv3x3/(conv|bn)", r"rbr_dense.\1"),
  Row("RepConv_0/conv1x1/(conv|bn)", r"rbr_1x1.\1"),
  Row("RepConv_0/avg2x2_conv1x1/(conv|bn)", r"rbr_1x1.1.\1"),  # rbr_1x1.0 is the pool
  Row("RepConv_0/conv", "rbr_dense"),
  Row("SkipSqueezeExcite_0/bn", "rbr_identity"),
  Row("SkipSqueezeExcite_0/dense", "se.cvsig.conv", DENSE_AS_CONV),
  Row("gate", "se.cvsig.conv", DENSE_AS_CONV),
)

_MODELS = [name for name in VARIANTS if "cifar" not in name]  # Code for CIFAR was not released.

NAMINGS: dict[str, dict[str, Naming]] = {name: {"official": _OFFICIAL} for name in _MODELS}
"""Model to source to table of names."""

FOLDED: dict[str, tuple[str, ...]] = dict.fromkeys(_MODELS, ("RepConv",))
"""Model to the layers that the authors' deploy files, called fused there, hold in deploy form.

These files hold the norms of shortcuts and of fusion as they were trained, with their statistics.
"""

_WHY = (
  "the authors' configurations ask for the paper's silu in a form that their code does not "
  "understand, so it trained and evaluated the weights with relu"
)

RELEASED_WITH: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
  (name, "official"): {"act": ("relu", _WHY)} for name in _MODELS
}
"""(model, source) to attributes that no name or shape of a tensor shows.

Each has the value that the released weights need, and the reason. The variants have a different
value.
"""
