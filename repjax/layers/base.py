"""The base of every layer that has two forms, and the batch norm that such layers train with."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import wide_dtype
from repjax.errors import InputError, unknown
from repjax.layers.attributes import check_attributes, check_dtypes
from repjax.layers.batch_norm import MOMENTUM, RUNNING_VARIANCES, STATISTICS, BatchNorm, Moments

EPSILON = 1e-5
_TRAINING = ("axis_name", "running_variance", "statistics")
_SHARED = ("epsilon", "deploy", "dtype", "param_dtype", *_TRAINING)
Tree = Mapping[str, Any]


class RepLayer(nn.Module, kw_only=True):
  """A layer with a training form, and with a deploy form that computes the same.

  The seven attributes are given by keyword. A layer writes notes beside its statistics if a fold
  could not read the layer from shapes and names alone, see `notes`.

  Attributes:
    epsilon: number added to the variance by batch norms.
    axis_name: name of the pmapped axis over which batch norms share their statistics. None keeps
      the statistics of each device apart.
    running_variance: variance of a batch of n values that running variances average. "unbiased"
      divides the sum of squares by n - 1, as PyTorch does, and "biased" by n, as Flax does.
    statistics: how training finds the statistics of 1x1 branches. "covariance" merges them, see
      `repjax.layers.covariance`; the results are the same to rounding. "outputs" computes each
      branch. "auto" merges where that is expected to be faster.
    deploy: build the deploy form.
    dtype: dtype of the computation and of the result. Norms compute in at least float32.
    param_dtype: dtype of the parameters.
  """

  epsilon: float = EPSILON
  axis_name: str | None = None
  running_variance: str = "unbiased"
  statistics: str = "auto"
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  mark: ClassVar[str | None] = None
  """Class name of a layer that holds only scopes with ordinary names, such as `bn` and `dense`."""

  def __post_init__(self):
    if not (isinstance(self.epsilon, numbers.Real) and 0 <= self.epsilon < math.inf):
      raise InputError(f"epsilon must be a number of at least 0, got {self.epsilon!r}")
    check_training(self)
    check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
    self.check_own()
    super().__post_init__()

  # `nowrap` marks plain helpers: Linen neither traces them as calls nor names them in programs.
  @nn.nowrap
  def check_own(self) -> None:
    """Raises InputError if an attribute of the subclass is not of its annotated type."""
    check_attributes(self, but={"parent", "name", *_SHARED})

  @nn.nowrap
  def norm(self, x: jax.Array, train: bool, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Applies a batch norm in the scope `bn`; for use in a compact method.

    Args:
      x: (N, H, W, C), or an array of any rank.
      train: normalise with the statistics of the batch and update the running ones. Otherwise the
        running statistics are used.
      axis: axes that keep statistics of their own; by default the last one. The norm averages over
        all other axes.

    Returns:
      The normalised array, in the shape of `x` and its dtype widened to at least float32.
    """
    wide, rank = wide_dtype(x.dtype), x.ndim
    axes = sorted(index % rank for index in (axis if isinstance(axis, tuple) else (axis,)))
    norm = self.build_norm(tuple(x.shape[index] for index in axes), wide, train, tuple(axes))
    # Linen mixes float32 statistics with parameters of other dtypes, which strict rules forbid.
    with jax.numpy_dtype_promotion("standard"):
      return norm(x.astype(wide))

  @nn.nowrap
  def norm_of(self, moments: Moments) -> tuple[jax.Array, jax.Array]:
    """Returns factor and bias of a batch norm in training, in the scope `bn`, and updates it.

    The norm computes (x - mean) * factor + bias.

    Args:
      moments: statistics of x, of all devices where the norm shares them.
    """
    mean = moments.mean
    with jax.numpy_dtype_promotion("standard"):  # as in `norm`
      return self.build_norm(mean.shape, mean.dtype, train=True).of_moments(moments)

  @nn.nowrap
  def build_norm(
    self,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    train: bool,
    axes: tuple[int, ...] = (-1,),
  ) -> BatchNorm:
    """Builds a batch norm in the scope `bn`, with the attributes of this layer.

    Args:
      shape: number of features, one for each axis in `axes`.
      dtype: dtype of the result.
      train: as in `norm`.
      axes: axes that keep statistics of their own.
    """
    self.write_notes()
    return BatchNorm(
      use_running_average=not train,
      axis=cast(int, axes),  # annotated as one number, but read as one or several
      momentum=MOMENTUM,
      # The fold reads the number from the tree. Reading the same one here keeps the two equal.
      epsilon=self.get_variable("batch_stats", "epsilon", self.epsilon),
      axis_name=self.axis_name,
      dtype=dtype,
      param_dtype=self.param_dtype,
      # True would keep the statistics of a float64 model in float32.
      force_float32_reductions=jnp.dtype(self.param_dtype) != jnp.float64,
      shape=shape,
      running_variance=self.running_variance,
      name="bn",
    )

  @nn.nowrap
  def notes(self) -> dict[str, float]:
    """Returns the scalars that a fold of this layer needs beside the statistics, by name.

    `epsilon` is one of them if it is not 1e-5. `mark` is one, with any value, in a scope whose name
    does not begin with the class name. Other people's scopes may hold the same as such a layer.
    """
    notes = {"epsilon": self.epsilon} if self.epsilon != EPSILON else {}
    if self.mark and self.name and not is_named(self.name, self.mark):
      notes[self.mark] = 1.0
    return notes

  @nn.nowrap
  def write_notes(self) -> None:
    """Writes the notes into new statistics, each as a leaf of its name.

    Statistics are new under `init`, and where a call makes them because it got none. Statistics
    without notes, which older versions wrote, stay as they are: training must not change the
    structure of a tree.
    """
    is_new = self.is_mutable_collection("batch_stats") and not self.variables.get("batch_stats")
    if not (self.is_initializing() or is_new):
      return
    for name, value in self.notes().items():
      self.put_variable("batch_stats", name, jnp.asarray(value, wide_dtype(self.param_dtype)))

  @nn.nowrap
  def shared(self) -> dict[str, Any]:
    """Returns the seven attributes by name, for layers inside this one."""
    return {
      "epsilon": self.epsilon,
      "deploy": self.deploy,
      **training_of(self),
      **self.dtypes(),
    }

  @nn.nowrap
  def dtypes(self) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` by name, for layers that are the same in both forms."""
    return dtypes_of(self)


def holds_arrays(scope: Any) -> bool:
  """Tells if a scope holds no further scopes, as that of one convolution or norm does."""
  return isinstance(scope, Mapping) and not any(isinstance(v, Mapping) for v in scope.values())


def kernel_and_bias(layer: tuple[jax.Array, jax.Array], dtype: Any) -> dict[str, jax.Array]:
  """Returns the kernel and the bias of a layer by name, in a dtype."""
  kernel, bias = layer
  return {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}


def is_named(scope: str, layer: str) -> bool:
  """Tells if the name of a scope is a class name, or begins with a class name and `_`."""
  return scope == layer or scope.startswith(f"{layer}_")


def read_notes(
  stats: Tree, epsilon: float | jax.Array, mark: str | None = None
) -> tuple[dict[str, Any], Any]:
  """Takes the notes of a layer out of its statistics.

  Args:
    stats: statistics of one layer.
    epsilon: number to return for a layer that has no note of its epsilon.
    mark: class name of the layer, if the layer may have a note of it.

  Returns:
    The statistics alone, and the epsilon of the layer.
  """
  alone = {name: value for name, value in stats.items() if name not in ("epsilon", mark)}
  return alone, stats.get("epsilon", epsilon)


def leading_axes(tree: Any, path: Sequence[str], rank: int) -> int | None:
  """Counts the axes of an array in front of the axes that a layer gives it.

  `nn.vmap` and `nn.scan` add such axes.

  Args:
    tree: parameters of a scope.
    path: names that lead to the array.
    rank: number of axes that the layer gives the array.

  Returns:
    The number, or None if there is no array at this path or the array has too few axes.
  """
  for name in path:
    if not isinstance(tree, Mapping) or name not in tree:
      return None
    tree = tree[name]
  extra = getattr(tree, "ndim", -1) - rank
  return extra if extra >= 0 else None


def dtypes_of(module: Any) -> dict[str, Any]:
  """Returns `dtype` and `param_dtype` of a module by name, for layers inside the module."""
  return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def training_of(module: Any) -> dict[str, Any]:
  """Returns what concerns the norms of a module in training alone, by name, for layers inside."""
  return {name: getattr(module, name) for name in _TRAINING}


def check_training(module: Any) -> None:
  """Raises InputError if an attribute that concerns training alone has an unknown value."""
  for name, known in (("running_variance", RUNNING_VARIANCES), ("statistics", STATISTICS)):
    if getattr(module, name) not in known:
      raise unknown(name, getattr(module, name), known)


def refuse_training(deploy: bool, train: bool) -> None:
  """Raises ValueError if a deploy form is asked to train, or if it is unclear which form it is."""
  if not isinstance(deploy, bool):
    raise InputError(f"deploy takes True or False, got {deploy!r}")
  if deploy and train:
    raise ValueError(
      "the deploy form cannot train: its batch norms and branches are gone, and such a network "
      "does not converge. Train or fine-tune the training form, then re-parameterize again"
    )
