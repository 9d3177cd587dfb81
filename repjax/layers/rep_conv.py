"""RepConv: a sum of convolution branches that folds into one convolution.

RepConv is the linear layer of which all networks are made. `repjax.layers.grammar` says what the
names of branches mean, `branch_sum` beside it holds the forward pass, and `branches` the fold. This
file is the layer, and tells its scopes from others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers.base import (
  RepLayer,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  refuse_training,
)
from repjax.layers.branch_sum import forward
from repjax.layers.branches import holds_branch, merge_branches, norm_paths, skips
from repjax.layers.grammar import find, is_skip


class RepConv(RepLayer):
  """A sum of branches over one input; its deploy form is one convolution with bias.

  y = sum_b branch_b(x), by default with BN_b(conv_b(x)) as branches. With a norm after the sum,
  y = BN(sum_b branch_b(x)). The deploy form is exact for every stride, dilation, group count,
  padding and padding mode. Smaller kernels sit at the centre of the largest kernel, and the input
  itself is a 1x1 kernel. `avg2x2_conv1x1` is the last 2x2 taps of a 3x3 kernel at stride 2, at
  every size of the map. The sum of the branches is computed in at least float32.

  Attributes:
    features: number of output channels O.
    branches: names of the branches, see the table in `repjax.layers.grammar`.
    strides: stride of every branch, one number or (vertical, horizontal).
    groups: number of groups of every convolution.
    dilation: dilation of every convolution, one number or (vertical, horizontal).
    padding: pixels added on each side for the largest kernel, one number or (vertical, horizontal).
      None keeps the size of the map at stride 1.
    padding_mode: "constant" (zeros), "edge", "reflect" or "wrap", as in `jnp.pad`.
    conv_bias: give convolutions a bias in training form too, as some checkpoints do. True is for
      all, and a list of names for those branches.
    norm: "after_sum" for one norm after the sum of branches without norms. Or a list of names: of
      the branches that end with a norm, with "after_sum" among them for one more after the sum.
      None gives each branch a norm, except a skip. The norm between two steps is always there.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.2. https://arxiv.org/abs/2101.03697
    Chu et al., Make RepVGG Greater Again (QARepVGG), AAAI 2024, for `norm`.
      https://arxiv.org/abs/2212.01593

  Example:
    >>> import jax, repjax
    >>> from repjax.layers import RepConv
    >>> branches = ("conv3x3", "conv1x1", "skip")
    >>> layer = RepConv(8, branches, norm=("conv3x3", "after_sum"), groups=8)
    >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((1, 5, 5, 8)))
    >>> plain = repjax.reparameterize(variables["params"], variables["batch_stats"])
    >>> plain["conv"]["kernel"].shape
    (3, 3, 1, 8)
  """

  features: int
  branches: Sequence[str] = ("conv3x3", "conv1x1", "identity")
  strides: int | Sequence[int] = 1
  groups: int = 1
  dilation: int | Sequence[int] = 1
  padding: int | Sequence[int] | None = None
  padding_mode: str = "constant"
  conv_bias: bool | Sequence[str] = False
  # The method of this name serves layers with one norm.
  norm: str | Sequence[str] | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, I) to (N, H', W', O).

    Raises:
      InputError: the branches do not fit the input, each other or the variables, or are not in the
        grammar. Or an attribute is no such number.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self._check_skips()
    return forward(x, self, train, self._shown()).astype(self.dtype)

  @nn.nowrap
  def check_own(self) -> None:
    """Leaves the checks to the forward pass, which knows the path of the layer and its input."""

  @nn.nowrap
  def notes(self) -> dict[str, float]:
    """Returns the notes of `RepLayer`, and the skips. These hold nothing that a fold could see."""
    return {**super().notes(), **dict.fromkeys(skips(self), 1.0)}

  @nn.nowrap
  def _shown(self) -> str:
    """Returns the layer and its path, for messages. A layer that stands alone has no path."""
    return " ".join(filter(None, ("RepConv", "/".join(self.path))))

  @nn.nowrap
  def _check_skips(self) -> None:
    """Raises InputError if the statistics are of a layer with different skips.

    A skip has no parameters, so that nothing else would tell the two layers apart.
    """
    stats = self.variables.get("batch_stats")
    if stats and (noted := sorted(filter(is_skip, stats))) != (wanted := sorted(skips(self))):
      raise InputError(
        f"{self._shown()} has the skips {wanted}, but its statistics are of a layer "
        f"with the skips {noted}. Build the layer with the branches of its variables, and keep "
        "the notes in batch_stats"
      )


def convolution_branches(params: Mapping[str, Any]) -> list[str]:
  """Returns the names in a scope that look like convolution branches of a RepConv."""
  return [name for name, held in params.items() if _holds_kernel(name, held)]


def other_names(params: Mapping[str, Any]) -> list[str]:
  """Returns the names in a scope that look like no branch of a RepConv."""
  others = [
    name
    for name, held in params.items()
    if (branch := find(name)) is None or not holds_branch(branch, held)
  ]
  # A norm after the sum belongs to a RepConv, unless every convolution has a norm of its own.
  return [name for name in others if name != "bn"] or others


def _holds_kernel(name: object, held: Any) -> bool:
  """Tells if a scope looks like a branch with a convolution."""
  branch = find(name)
  return branch is not None and branch.has_kernel and holds_branch(branch, held)


def _last_step(held: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns what the last step of a branch holds."""
  return held.get("second", {}) if held.keys() & {"first", "second"} else held


def recognize_rep_conv(params: Mapping[str, Any]) -> int | None:
  """Tells if a scope holds a RepConv in training form.

  Such a scope holds branches, at least one with a convolution, and perhaps a norm after the sum.
  With such a norm, at least one convolution has no norm of its own. There is at least one norm:
  several layers in deploy form, called `conv3x3` and `conv1x1`, hold convolutions alone.

  Args:
    params: parameters of the scope.

  Returns:
    The number of leading axes of the kernels, from `nn.vmap` or `nn.scan`; None for other scopes.
  """
  branches = {name: held for name, held in params.items() if name != "bn"}
  convs = convolution_branches(branches)
  if not convs or not all(
    (branch := find(name)) and holds_branch(branch, held) for name, held in branches.items()
  ):
    return None
  if "bn" in params and (
    not holds_arrays(params["bn"]) or all("bn" in _last_step(params[name]) for name in convs)
  ):
    return None
  if not norm_paths(params):
    return None
  paths = [(*(["first"] if "first" in params[name] else []), "conv", "kernel") for name in convs]
  counts = [leading_axes(params[name], path, 4) for name, path in zip(convs, paths)]
  # A branch without a kernel is for the fold to refuse.
  return max((count for count in counts if count is not None), default=0)


def fold_rep_conv(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepConv: its branches with their statistics become one convolution.

  `repjax.layers.branches.merge_branches` has the equation.

  Args:
    params: {branch: {conv: {kernel[, bias]}, bn: {scale, bias}}}; an identity has no conv.
    stats: {branch: {bn: {mean, var}}}, and notes.
    epsilon: number added to the variance by batch norms.

  Returns:
    {conv: {kernel (H, W, I/g, O), bias (O,)}} in the dtype of the branches' kernels.

  Raises:
    InputError: a branch is no affine map.
    ValueError: the two trees do not hold the same branches, or shapes do not fit.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
  """
  merged = merge_branches(params, stats, epsilon)
  return {"conv": kernel_and_bias(merged, kernel_dtype(params))}


def kernel_dtype(params: Mapping[str, Any]) -> Any:
  """Returns the dtype of the first kernel of a RepConv in training form."""
  held = params[convolution_branches(params)[0]]
  return held.get("first", held)["conv"]["kernel"].dtype
