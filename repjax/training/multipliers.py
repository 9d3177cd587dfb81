"""RepOptimizer: a plain network learns as a network with scaled branches would.

The branches are those of a ScaledConv, s3 * conv3x3(x) + s1 * conv1x1(x) + s0 * x, where s3 and s1
are constants and s0 learns. The plain network has one 3x3 kernel in their place, K = s3 K3 +
pad(s1 K1) + s0 I. K begins with the value of this sum, and its gradient is multiplied by constants.
Both networks then compute the same after every step:

| optimizer | exact                                                                  |
|-----------|------------------------------------------------------------------------|
| SGD       | yes, with any schedule and momentum, Nesterov's too                    |
| AdamW     | nearly: to the ratio of Adam's constant 1e-8 to the sizes of gradients |

Weight decay keeps this exact if K3, K1 and s0 decay by one factor, and K by the same. Every rule of
`repjax.training.optimizer` does this. A limit on the norm of the whole gradient would
break it, because the gradient of the branches has a different norm.

References:
  Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023.
    https://arxiv.org/abs/2205.15242
  https://github.com/DingXiaoH/RepOptimizers at 1d41318, repoptimizer/
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from repjax.algebra import BranchScales, gradient_multiplier

Tree = Mapping[str, Any]
Scales = Mapping[str, Any]
"""A nested dictionary with a BranchScales at the path of each plain RepConv of a network."""


class MultipliedState(NamedTuple):
  """The state of an optimizer that sees multiplied gradients.

  The scales are a part of the state, so that checkpoints hold them. A run thus continues without
  the folder that the scales came from.

  Attributes:
    scales: the scales of every layer.
    inner: state of the optimizer.
  """

  scales: Scales
  inner: optax.OptState


def multiplied(
  inner: optax.GradientTransformation, scales: Scales, *, adaptive: bool
) -> optax.GradientTransformation:
  """Multiplies the gradients of plain kernels before an optimizer sees them.

  The factors are those of `gradient_multiplier`. All other gradients pass as they are. An adaptive
  optimizer divides by the size of a gradient and would undo the factors, so that its updates are
  multiplied as well.

  Args:
    inner: the optimizer. An adaptive optimizer is given without its weight decay.
    scales: the scales of every layer. Shapes stand for scales that a checkpoint will give.
    adaptive: True for Adam, False for SGD.

  References:
    https://github.com/DingXiaoH/RepOptimizers at 1d41318, repoptimizer_sgd.py and
      repoptimizer_adamw.py. The authors' factors of Adam are sums of scales, not of their absolute
      values. The two differ where a scale has become negative. The law then needs absolute values.
  """
  power = 1 if adaptive else 2

  def first(params: Any) -> MultipliedState:
    return MultipliedState(jax.tree.map(_fresh, dict(scales)), inner.init(params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MultipliedState]:
    updates = _multiply(updates, state.scales, power)
    updates, new = inner.update(updates, state.inner, params)
    if adaptive:
      updates = _multiply(updates, state.scales, power)
    return updates, MultipliedState(state.scales, new)

  return optax.GradientTransformation(first, update)


def _fresh(leaf: Any) -> jax.Array:
  """Returns a copy of an array, because a step donates the state's arrays; zeros for a shape."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jnp.zeros(leaf.shape, leaf.dtype)
  return jnp.copy(leaf)


def _multiply(updates: Tree, scales: Scales, power: int) -> Tree:
  """Returns updates in which the kernel of each layer with scales is multiplied by its factors."""

  def multiply(scales: BranchScales, layer: Tree) -> Tree:
    kernel = layer["conv3x3"]["conv"]["kernel"]
    factors = gradient_multiplier(kernel.shape, scales, power)
    return with_kernel(layer, kernel * factors.astype(kernel.dtype))

  return map_layers(multiply, scales, updates)


def map_layers(
  function: Callable[..., Tree], scales: Scales, tree: Tree, *others: Tree
) -> dict[str, Any]:
  """Returns a tree with function(scales, layer, ...) in place of every layer that has scales.

  Args:
    function: function of a BranchScales, and of the scopes of the layer in `tree` and `others`.
    scales: the scales of every layer.
    tree: parameters, or a tree with the same scopes.
    *others: more trees with these scopes.
  """
  mapped = {}
  for name, below in scales.items():
    call = function if isinstance(below, BranchScales) else _mapping(function)
    mapped[name] = call(below, tree[name], *(other[name] for other in others))
  return {**tree, **mapped}


def _mapping(function: Callable[..., Tree]) -> Callable[..., Tree]:
  return lambda scales, *trees: map_layers(function, scales, *trees)


def with_kernel(layer: Tree, kernel: jax.Array) -> dict[str, Any]:
  """Returns a plain RepConv with a different kernel."""
  branch = layer["conv3x3"]
  return {**layer, "conv3x3": {**branch, "conv": {**branch["conv"], "kernel": kernel}}}
