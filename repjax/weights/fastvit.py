"""FastViT's names in timm, the content of its deploy files, and preprocessing.

References:
  https://github.com/huggingface/pytorch-image-models, timm/models/fastvit.py
"""

from collections.abc import Iterator

from repjax.models.fastvit import VARIANTS
from repjax.spec import Preprocessing
from repjax.weights.mobileone import REP_CONV
from repjax.weights.naming import DENSE_AS_CONV, Naming, Row

_STAGES = range(1, 10)

_BLOCK = (
  Row("RepMixer_0/mixer/conv3x3", "token_mixer.mixer.conv_kxk.0"),
  Row("RepMixer_0/mixer/conv1x1", "token_mixer.mixer.conv_scale"),
  Row("RepMixer_0/mixer/identity/bn", "token_mixer.mixer.identity"),
  Row("RepMixer_0/bn", "token_mixer.norm.identity"),
  Row("RepMixer_0/layer_scale", "token_mixer.layer_scale"),
  Row("RepMixer_0/conv", "token_mixer.reparam_conv"),
  Row("RepAttention_0/bn", "norm"),
  Row("RepAttention_0/dense/(qkv|proj)", r"token_mixer.\1"),
  Row("RepAttention_0/layer_scale", "layer_scale_1"),
  Row("ConvFFN_0/spatial/conv7x7", "mlp.conv"),
  Row("ConvFFN_0/dense/(fc1|fc2)", r"mlp.\1", DENSE_AS_CONV),
  Row("ConvFFN_0/layer_scale", "layer_scale"),
)


def _stage(number: int, attends: bool) -> Iterator[Row]:
  """Yields the rows of a stage, whose blocks may have attention and then two layer scales."""
  scope, name = f"stage{number}", f"stages.{number - 1}"
  if attends:
    ours, theirs = "ConvFFN_0/layer_scale", "layer_scale_2"
    yield Row(rf"{scope}/block(\d+)/{ours}", rf"{name}.blocks.\1.{theirs}")
  yield Row(rf"{scope}/block(\d+)", rf"{name}.blocks.\1")
  yield Row(f"{scope}/downsample/RepConv_large/conv7x7", f"{name}.downsample.proj.0.large_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv3x3", f"{name}.downsample.proj.0.small_conv")
  yield Row(f"{scope}/downsample/RepConv_large/conv", f"{name}.downsample.proj.0.reparam_conv")
  yield Row(f"{scope}/downsample/pointwise", f"{name}.downsample.proj.1")
  yield Row(f"{scope}/SkipConv_positions/inner", f"{name}.pos_emb.pos_enc")
  yield Row(f"{scope}/SkipConv_positions/conv", f"{name}.pos_emb.reparam_conv")


def _timm(stages: int, attention_stages: int) -> Naming:
  """Returns the table of networks with attention in some of the last stages."""
  plain = stages - attention_stages
  return (
    Row("stem/block([01])/RepConv_0/conv1x1", r"stem.\1.conv_scale"),
    Row(r"stem/block(\d)", r"stem.\1"),
    *(row for number in _STAGES for row in _stage(number, number > plain)),
    Row("final/RepConv_0/conv1x1", "final_conv.conv_scale"),
    Row("final", "final_conv"),
    Row("head", "head.fc"),
    *_BLOCK,
    *REP_CONV,
    Row("SqueezeExcite_0/down", "se.fc1", DENSE_AS_CONV),
    Row("SqueezeExcite_0/up", "se.fc2", DENSE_AS_CONV),
  )


NAMINGS: dict[str, dict[str, Naming]] = {
  name: {"timm": _timm(len(row["stage_sizes"]), row.get("attention_stages", 0))}
  for name, row in VARIANTS.items()
}
"""Model to source to table of names."""

FOLDED: dict[str, tuple[str, ...]] = dict.fromkeys(VARIANTS, ("RepConv", "RepMixer", "SkipConv"))
"""Model to the layers that its deploy files hold in deploy form.

timm folds only these layers. Its deploy files hold FFNs and attention as they were trained, with
their norms and factors.
"""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  (name, "timm"): Preprocessing(256, 269 if name == "fastvit_ma36" else 284, "bicubic")
  for name in VARIANTS
}
"""(model, source) to the preprocessing with which its published accuracy was measured."""
