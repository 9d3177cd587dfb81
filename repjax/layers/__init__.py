"""Linen modules that train with branches; each stands beside the fold that removes them."""

from repjax.layers.activations import activation
from repjax.layers.aux_head import AuxHead, expand_aux_head, fold_aux_head, recognize_aux_head
from repjax.layers.base import RepLayer
from repjax.layers.conv_ffn import (
  ConvFFN,
  expand_conv_ffn,
  fold_conv_ffn,
  recognize_conv_ffn,
)
from repjax.layers.gates import (
  GlobalGate,
  SkipSqueezeExcite,
  SqueezeExcite,
  expand_skip_squeeze_excite,
  fold_skip_squeeze_excite,
  recognize_skip_squeeze_excite,
)
from repjax.layers.global_perceptron import (
  GlobalPerceptron,
  expand_global_perceptron,
  fold_global_perceptron,
  recognize_global_perceptron,
)
from repjax.layers.linear import linear
from repjax.layers.remainder import expand_rep_conv
from repjax.layers.rep_attention import (
  RepAttention,
  expand_rep_attention,
  fold_rep_attention,
  recognize_rep_attention,
)
from repjax.layers.rep_conv import RepConv, fold_rep_conv, recognize_rep_conv
from repjax.layers.rep_dense import RepDense, expand_rep_dense, fold_rep_dense, recognize_rep_dense
from repjax.layers.rep_ffn import RepFFN, expand_rep_ffn, fold_rep_ffn, recognize_rep_ffn
from repjax.layers.rep_head import RepHead, expand_rep_head, fold_rep_head, recognize_rep_head
from repjax.layers.rep_heads import RepHeads, expand_rep_heads, fold_rep_heads, recognize_rep_heads
from repjax.layers.rep_mixer import (
  RepMixer,
  expand_rep_mixer,
  fold_rep_mixer,
  recognize_rep_mixer,
)
from repjax.layers.rep_norm import RepNorm, expand_rep_norm, fold_rep_norm, recognize_rep_norm
from repjax.layers.scaled_conv import (
  ScaledConv,
  expand_scaled_conv,
  fold_scaled_conv,
  recognize_scaled_conv,
)
from repjax.layers.skip_conv import (
  SkipConv,
  expand_skip_conv,
  fold_skip_conv,
  recognize_skip_conv,
)

__all__ = [
  "AuxHead",
  "ConvFFN",
  "GlobalGate",
  "GlobalPerceptron",
  "RepAttention",
  "RepConv",
  "RepDense",
  "RepFFN",
  "RepHead",
  "RepHeads",
  "RepLayer",
  "RepMixer",
  "RepNorm",
  "ScaledConv",
  "SkipConv",
  "SkipSqueezeExcite",
  "SqueezeExcite",
  "activation",
  "expand_aux_head",
  "expand_conv_ffn",
  "expand_global_perceptron",
  "expand_rep_attention",
  "expand_rep_conv",
  "expand_rep_dense",
  "expand_rep_ffn",
  "expand_rep_head",
  "expand_rep_heads",
  "expand_rep_mixer",
  "expand_rep_norm",
  "expand_scaled_conv",
  "expand_skip_conv",
  "expand_skip_squeeze_excite",
  "fold_aux_head",
  "fold_conv_ffn",
  "fold_global_perceptron",
  "fold_rep_attention",
  "fold_rep_conv",
  "fold_rep_dense",
  "fold_rep_ffn",
  "fold_rep_head",
  "fold_rep_heads",
  "fold_rep_mixer",
  "fold_rep_norm",
  "fold_scaled_conv",
  "fold_skip_conv",
  "fold_skip_squeeze_excite",
  "linear",
  "recognize_aux_head",
  "recognize_conv_ffn",
  "recognize_global_perceptron",
  "recognize_rep_attention",
  "recognize_rep_conv",
  "recognize_rep_dense",
  "recognize_rep_ffn",
  "recognize_rep_head",
  "recognize_rep_heads",
  "recognize_rep_mixer",
  "recognize_rep_norm",
  "recognize_scaled_conv",
  "recognize_skip_conv",
  "recognize_skip_squeeze_excite",
]
