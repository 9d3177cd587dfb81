"""ParNet's names in the authors' repository, what their fused files hold, and their activation.

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

_MODELS = [name for name in VARIANTS if "cifar" not in name]  # of which there is no code

NAMINGS: dict[str, dict[str, Naming]] = {name: {"official": _OFFICIAL} for name in _MODELS}
"""Model to source to table."""

FOLDED: dict[str, tuple[str, ...]] = dict.fromkeys(_MODELS, ("RepConv",))
"""Model to the layers that its deploy files, called fused there, hold in deploy form.

The norms of shortcuts and of fusion are in them as they were trained, statistics included.
"""

_WHY = (
  "their configurations ask for silu, the paper's, in a form that the code does not understand, "
  "and so it trained and evaluated them with relu"
)

RELEASED_WITH: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
  (name, "official"): {"act": ("relu", _WHY)} for name in _MODELS
}
"""(model, source) to attributes that no name or shape shows: released weights' value, and why.

The variants have another value.
"""
