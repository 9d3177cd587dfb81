"""The base of every layer that has two forms, and the batch norm that such layers train with."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import wide_dtype
from repjax.errors import InputError

EPSILON = 1e-5
MOMENTUM = 0.9  # the weight of the old running value; PyTorch calls the same rule 0.1


class RepLayer(nn.Module, kw_only=True):
  """A layer with a training form, and with a deploy form that computes the same.

  The five attributes are given by keyword.

  Attributes:
    epsilon: number added to the variance by batch norms.
    axis_name: name of the pmapped axis over which batch norms share their statistics. None keeps
      the statistics of each device apart.
    deploy: build the deploy form.
    dtype: dtype of the computation and of the result. Norms compute in at least float32.
    param_dtype: dtype of the parameters.
  """

  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  # `nowrap` marks plain helpers: Linen neither traces them as calls nor names them in programs.
  @nn.nowrap
  def norm(self, x: jax.Array, train: bool, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Applies a batch norm in the scope `bn`; arguments and result as in `batch_norm`."""
    return batch_norm(
      x,
      train,
      epsilon=self.epsilon,
      axis_name=self.axis_name,
      param_dtype=self.param_dtype,
      axis=axis,
    )

  @nn.nowrap
  def shared(self) -> dict[str, Any]:
    """Returns the five attributes by name, for layers inside this one."""
    return {
      "epsilon": self.epsilon,
      "axis_name": self.axis_name,
      "deploy": self.deploy,
      **self.dtypes(),
    }

  @nn.nowrap
  def dtypes(self) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` by name, for layers that are the same in both forms."""
    return dtypes_of(self)


def dtypes_of(module: Any) -> dict[str, Any]:
  """Returns `dtype` and `param_dtype` of a module by name, for layers inside the module."""
  return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def batch_norm(
  x: jax.Array,
  train: bool,
  *,
  epsilon: float,
  axis_name: str | None,
  param_dtype: jax.typing.DTypeLike,
  axis: int | tuple[int, ...] = -1,
) -> jax.Array:
  """Applies a batch norm in a scope called `bn`; for use in a compact method.

  Args:
    x: (N, H, W, C), or an array of any rank.
    train: normalise with the statistics of the batch and update the running ones. Otherwise the
      running statistics are used.
    epsilon: number added to the variance.
    axis_name: name of the pmapped axis over which statistics are shared. None shares nothing.
    param_dtype: dtype of scale and bias.
    axis: axes that keep statistics of their own, ascending; by default the last one. The norm
      averages over all other axes.

  Returns:
    The normalised array, in the shape of `x` and its dtype widened to at least float32.
  """
  wide = wide_dtype(x.dtype)
  feature_axes: Any = axis  # annotated as one number, but read as one or several
  norm = nn.BatchNorm(
    use_running_average=not train,
    axis=feature_axes,
    momentum=MOMENTUM,
    epsilon=epsilon,
    axis_name=axis_name,
    dtype=wide,
    param_dtype=param_dtype,
    # True would keep the statistics of a float64 model in float32.
    force_float32_reductions=jnp.dtype(param_dtype) != jnp.float64,
    name="bn",
  )
  # Linen mixes float32 statistics with parameters of other dtypes, which strict rules forbid.
  with jax.numpy_dtype_promotion("standard"):
    return norm(x.astype(wide))


def refuse_training(deploy: bool, train: bool) -> None:
  """Raises ValueError if a deploy form is asked to train, or if it is unclear which form it is."""
  if not isinstance(deploy, bool):
    raise InputError(f"deploy takes True or False, got {deploy!r}")
  if deploy and train:
    raise ValueError(
      "the deploy form cannot train: its batch norms and branches are gone, and such a network "
      "does not converge. Train or fine-tune the training form, then re-parameterize again"
    )
