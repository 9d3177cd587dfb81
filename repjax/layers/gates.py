"""Gates: layers that multiply. They are not affine, so they survive re-parameterization."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine, wide_dtype
from repjax.errors import InputError
from repjax.layers.linear import kernel_init, linear
from repjax.layers.rep_norm import EPSILON, Affine, batch_norm, refuse_training


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


class GlobalGate(nn.Module):
  """A factor for each channel, computed from the means of all: 2 sigmoid(W mean(x)).

  W has no bias. The same in both forms. With groups a channel's factor depends on the means of its
  group alone. Factors lie between 0 and 2, so a gate that knows nothing changes nothing.

  Attributes:
    features: factors O.
    groups: of channels and factors.
    dtype: of the computation and the result.
    param_dtype: of the parameters.

  References:
    Goyal et al., Non-deep Networks, NeurIPS 2022, appendix, for the blocks that have it.
      https://arxiv.org/abs/2110.07641
  """

  features: int
  groups: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to factors (N, 1, 1, O).

    Raises:
      ValueError: C or O does not divide into groups.
    """
    n, channels, groups = x.shape[0], x.shape[-1], self.groups
    if channels % groups or self.features % groups:
      raise InputError(
        f"GlobalGate {'/'.join(self.path)}: {channels} input and {self.features} output channels "
        f"do not both divide into {groups} groups"
      )
    shape = (channels // groups, self.features)
    kernel = self.param("kernel", kernel_init, shape, self.param_dtype).astype(self.dtype)
    means = x.mean((1, 2)).astype(self.dtype).reshape(n, groups, -1)  # (N, g, C/g)
    kernel = kernel.reshape(shape[0], groups, -1)  # (C/g, g, O/g)
    products = jnp.einsum("ngi,igo->ngo", means, kernel)
    return 2 * jax.nn.sigmoid(products).reshape(n, 1, 1, -1)


class SkipSqueezeExcite(nn.Module):
  """ParNet's gated shortcut: z = BN(x), y = z * sigmoid(W mean(z)).

  The gate reads and scales what comes out of the norm. With s and t the norm's scale and shift

    y = (s x + t) * sigmoid(W' mean(x) + b'),  W' = W diag(s),  b' = W t,

  which is exact, since the mean over pixels of a per-channel affine map is that map of the mean.
  The deploy form is this: no norm, but a gate, which multiplies and therefore stays, and an affine
  map that no convolution absorbs, because the gate comes after it.

  Scopes of the training form: `bn` and `dense`, without bias. Deploy form: `affine` and `dense`,
  with bias.

  Attributes:
    epsilon: of the batch norm.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the training form's matrix product and of the result; all else is in at least float32.
    param_dtype: of the parameters.

  References:
    Goyal et al., Non-deep Networks, NeurIPS 2022, section 3.1. https://arxiv.org/abs/2110.07641
  """

  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if self.deploy:
      x = x.astype(wide_dtype(x.dtype))
      z = Affine(self.param_dtype, name="affine")(x)
      gate = x.mean((1, 2))  # (N, C)
    else:
      z = batch_norm(
        x,
        train,
        epsilon=self.epsilon,
        axis_name=self.axis_name,
        param_dtype=self.param_dtype,
      )
      gate = z.mean((1, 2))  # (N, C)
    # In deploy form the norm's shift is in the bias, and narrow numbers would not cancel.
    dtypes = {"dtype": x.dtype if self.deploy else self.dtype, "param_dtype": self.param_dtype}
    gate = linear(gate, x.shape[-1], name="dense", use_bias=self.deploy, **dtypes)
    gate = jax.nn.sigmoid(gate.astype(self.dtype))[:, None, None, :]
    return z.astype(self.dtype) * gate  # (N, H, W, C)


def fold_skip_squeeze_excite(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a SkipSqueezeExcite: its norm becomes an affine map and goes into the gate's weights.

  Args:
    params: {bn: {scale, bias}, dense: {kernel (C, C)}}.
    stats: {bn: {mean, var}}.
    epsilon: of the batch norm.

  Returns:
    {affine: {scale, bias}, dense: {kernel (C, C), bias (C,)}} in the dtypes of the norm's scale and
    of the kernel.

  Raises:
    ValueError: the two trees do not belong together.
  """
  if params.keys() != {"bn", "dense"} or stats.keys() != {"bn"}:
    raise ValueError(
      f"a SkipSqueezeExcite holds bn and dense, with statistics of bn; got parameters of "
      f"{sorted(params)} and statistics of {sorted(stats)}"
    )
  kernel = params["dense"]["kernel"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  folded = absorb_affine(affine, kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype))
  dtype = params["bn"]["scale"].dtype
  return {
    "affine": {"scale": affine.scale.astype(dtype), "bias": affine.bias.astype(dtype)},
    "dense": dict(zip(("kernel", "bias"), (leaf.astype(kernel.dtype) for leaf in folded))),
  }
