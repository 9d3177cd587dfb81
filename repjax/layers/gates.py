"""Gates: layers that multiply. A product is not affine, so gates survive re-parameterization."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from repjax.algebra import AffineParams, absorb_affine, affine_bn, bn_affine, wide_dtype
from repjax.errors import InputError
from repjax.layers.base import (
  RepLayer,
  dtypes_of,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.linear import kernel_init, linear
from repjax.layers.rep_norm import Affine


class SqueezeExcite(nn.Module):
  """A gate for each channel, computed from the means of all channels: y = x * s(mean(x)).

  s = sigmoid(up(relu(down(.)))), two fully connected layers with biases, C -> hidden -> C.
  The means run over both spatial axes, so maps need not be square. Both forms are the same.

  A second map z of as many channels may drive the gate: y = x * s(mean(z)). The Global Perceptron
  of RepMLPNet does so: it reads the input of its block and scales the block's output.

  Attributes:
    reduction: ratio of the number of channels to the hidden layer's width, which is rounded down.
    hidden: width of the hidden layer. None takes the reduction.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.

  References:
    Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, section 3. https://arxiv.org/abs/1709.01507
    Ding et al., RepMLPNet, CVPR 2022, section 3.1, for z. https://arxiv.org/abs/2112.11081
  """

  reduction: int = 16
  hidden: int | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
    """Maps (N, H, W, C), and z (N, H', W', C) if given, to (N, H, W, C).

    Raises:
      InputError: the reduction or `hidden` leaves no hidden channel.
    """
    features, hidden = x.shape[-1], self.hidden
    if hidden is None and 0 < self.reduction <= features:
      hidden = features // self.reduction
    if hidden is None or hidden < 1:
      raise InputError(
        f"SqueezeExcite {'/'.join(self.path)}: {features} channels reduced {self.reduction} times "
        f"leave no hidden channel (hidden={self.hidden}). Widen the network, or lower the "
        "reduction: se_reduction, where a network has it"
      )
    dtypes = dtypes_of(self)
    gate = (x if z is None else z).mean((1, 2))  # (N, C)
    gate = jax.nn.relu(linear(gate, hidden, name="down", **dtypes))
    gate = jax.nn.sigmoid(linear(gate, features, name="up", **dtypes))
    return x * gate[:, None, None, :]  # (N, H, W, C)


class GlobalGate(nn.Module):
  """A factor for each channel, computed from the means of all channels: 2 sigmoid(W mean(x)).

  W has no bias. Both forms are the same. With groups, a channel's factor depends on the means of
  its group alone. Factors lie between 0 and 2, so a gate with W = 0 changes nothing.

  Attributes:
    features: number of factors O.
    groups: number of groups g of channels and of factors.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.

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
      InputError: C or O does not divide into groups.
    """
    n, channels, groups = x.shape[0], x.shape[-1], self.groups
    if channels % groups or self.features % groups:
      raise InputError(
        f"GlobalGate {'/'.join(self.path)}: {channels} input and {self.features} output channels "
        f"do not both divide into {groups} groups. Change the widths or the groups"
      )
    shape = (channels // groups, self.features)
    kernel = self.param("kernel", kernel_init, shape, self.param_dtype).astype(self.dtype)
    means = x.mean((1, 2)).astype(self.dtype).reshape(n, groups, -1)  # (N, g, C/g)
    kernel = kernel.reshape(shape[0], groups, -1)  # (C/g, g, O/g): group by group along O
    products = jnp.einsum("ngi,igo->ngo", means, kernel)
    return 2 * jax.nn.sigmoid(products).reshape(n, 1, 1, -1)


class SkipSqueezeExcite(RepLayer):
  """ParNet's gated shortcut: z = BN(x), y = z * sigmoid(W mean(z)).

  The gate reads the output of the norm and scales it. With the norm's scale s and shift t:

    y = (s x + t) * sigmoid(W' mean(x) + b'),  W' = W diag(s),  b' = W t.

  This is exact: a per-channel affine map and the mean over pixels may change places. The right side
  is the deploy form. It has no norm. Its gate stays because a gate multiplies. Its affine map stays
  because the gate comes between the map and the next convolution.

  Scopes of the training form: `bn`, and `dense` without bias. Deploy form: `affine`, and `dense`
  with bias. In the deploy form the matrix product, too, is in at least float32. Attributes are
  those of `RepLayer`.

  References:
    Goyal et al., Non-deep Networks, NeurIPS 2022, section 3.1. https://arxiv.org/abs/2110.07641
  """

  mark = "SkipSqueezeExcite"

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
      z = self.norm(x, train)
      gate = z.mean((1, 2))  # (N, C)
    # W' mean(x) and b' may be large and nearly cancel. In bfloat16 their sum would then be noise.
    dtypes = self.dtypes() | ({"dtype": x.dtype} if self.deploy else {})
    gate = linear(gate, x.shape[-1], name="dense", use_bias=self.deploy, **dtypes)
    gate = jax.nn.sigmoid(gate.astype(self.dtype))[:, None, None, :]
    return z.astype(self.dtype) * gate  # (N, H, W, C)


def recognize_skip_squeeze_excite(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a SkipSqueezeExcite, else None.

  Any scope with nothing but `bn` and a fully connected layer `dense` without a bias could be one
  in training form.
  """
  if params.keys() != {"bn", "dense"} or not holds_arrays(params["bn"]):
    return None
  if leading_axes(params, ("dense", "bias"), 1) is not None:
    return None
  return leading_axes(params, ("dense", "kernel"), 2)


def fold_skip_squeeze_excite(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a SkipSqueezeExcite: its norm becomes an affine map, and folds into the gate's weights.

  Args:
    params: {bn: {scale, bias}, dense: {kernel (C, C)}}.
    stats: {bn: {mean, var}}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {affine: {scale, bias}, dense: {kernel (C, C), bias (C,)}}; `affine` in the dtype of the norm's
    scale, `dense` in the dtype of the kernel.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, epsilon = read_notes(stats, epsilon, SkipSqueezeExcite.mark)
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
    "dense": kernel_and_bias(folded, kernel.dtype),
  }


def expand_skip_squeeze_excite(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a SkipSqueezeExcite: its affine map becomes a norm, and leaves the gate's weights.

  W = diag(1 / s) W'. With a shift t, the training form has b' = W t and nothing else, so `deploy`
  must be the fold of a training form. Rows of W whose scale is zero are chosen to make up b'.

  Args:
    deploy: {affine: {scale, bias}, dense: {kernel (C, C), bias (C,)}}.
    shapes: not used.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: not used.

  Returns:
    {bn: {scale, bias}, dense: {kernel (C, C)}}, which folds into `deploy` with these statistics.
  """
  del shapes, key
  stats, epsilon = read_notes(stats, epsilon, SkipSqueezeExcite.mark)
  affine = AffineParams(deploy["affine"]["scale"], deploy["affine"]["bias"])
  dtype = wide_dtype(*(leaf.dtype for leaf in (*affine, deploy["dense"]["kernel"])))
  scale, shift = (leaf.astype(dtype) for leaf in affine)
  kernel, bias = (deploy["dense"][name].astype(dtype) for name in ("kernel", "bias"))
  lost = scale == 0
  kernel = jnp.where(lost[:, None], 0, kernel / jnp.where(lost, 1, scale)[:, None])
  # Many rows make up the rest of b'. These rows have the smallest norm.
  rest = bias - jnp.einsum("i,io->o", shift, kernel, precision=lax.Precision.HIGHEST)
  free = jnp.where(lost, shift, 0)
  power = jnp.square(free).sum()
  kernel = (
    kernel + jnp.where(power > 0, free / jnp.where(power > 0, power, 1), 0)[:, None] * rest[None]
  )
  return {"bn": affine_bn(affine, stats["bn"], epsilon), "dense": {"kernel": kernel}}
