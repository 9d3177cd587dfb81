"""Gates: layers that multiply. They are not affine, so they survive re-parameterization."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers.linear import linear


class SqueezeExcite(nn.Module):
  """Scales each channel by a number computed from the means of all: y = x * s(mean(x)).

  s = sigmoid(up(relu(down(.)))), two fully connected layers with biases, C -> C // reduction -> C.
  The means run over both spatial axes, so maps need not be square. The same in both forms.
  With a second map z of the same channels y = x * s(mean(z)): RepMLPNet's Global Perceptron looks
  at what goes into its block and scales what comes out.

  Attributes:
    reduction: how many times narrower the hidden layer is.
    dtype: of the computation and the result.
    param_dtype: of the parameters.

  References:
    Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, section 3. https://arxiv.org/abs/1709.01507
    Ding et al., RepMLPNet, CVPR 2022, section 3.1, for z. https://arxiv.org/abs/2112.11081
  """

  reduction: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
    features = x.shape[-1]
    if not 0 < self.reduction <= features:
      raise InputError(
        f"SqueezeExcite {'/'.join(self.path)}: {features} channels reduced {self.reduction} times "
        "leave no hidden channel; change se_reduction or widen the network"
      )
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    gate = (x if z is None else z).mean((1, 2))  # (N, C)
    gate = jax.nn.relu(linear(gate, features // self.reduction, name="down", **dtypes))
    gate = jax.nn.sigmoid(linear(gate, features, name="up", **dtypes))
    return x * gate[:, None, None, :]  # (N, H, W, C)
