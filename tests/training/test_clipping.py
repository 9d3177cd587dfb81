"""Adaptive clipping against timm's rule, computed in PyTorch's layouts by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repjax.training import clipping, optimizer
from tests.helpers import leaves, relative_error

FACTOR = 0.3
SHAPES = {
  "conv": {"kernel": (3, 3, 4, 6), "bias": (6,)},
  "grouped": {"kernel": (3, 3, 2, 6)},
  "depthwise": {"kernel": (3, 3, 1, 6)},
  "depthwise1x1": {"kernel": (1, 1, 1, 6)},
  "bn": {"scale": (6,), "bias": (6,)},
  "tiles": {"kernel": (2, 2, 3, 4, 2, 3, 5), "bias": (2, 2, 3, 5)},
  "tile_norm": {"scale": (2, 2, 3, 5)},
  "head": {"kernel": (6, 5), "bias": (5,)},
  "temperature": {"scale": ()},
}


def drawn(seed):
  """A value for each shape; the outputs of each kernel differ in size, and one is zero."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    value = rng.standard_normal(shape) * 10.0 ** rng.uniform(-1.5, 1.5, shape[-1:])
    if path[-1].key == "kernel" and shape[:3] != (1, 1, 1):
      value[..., 0] = 0
    return jnp.asarray(value)

  return jax.tree_util.tree_map_with_path(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def as_in_pytorch(path, value):
  """A parameter as PyTorch holds it: outputs first, and norms and biases as vectors."""
  value = np.asarray(value)
  if not path.endswith("kernel"):
    return value.reshape(-1) if value.ndim else value
  if value.ndim == 7:  # (g, h, w, I, h, w, O): one row for each output of each group
    value = value.transpose(0, 4, 5, 6, 1, 2, 3)
    return value.reshape(np.prod(value.shape[:4]), -1)
  return np.moveaxis(value, -1, 0)


def clipped_as_in_timm(value, gradient):
  """timm's `adaptive_clip_grad` of one parameter, by its text: one row after the other."""

  def clip(value, gradient):
    limit = max(np.linalg.norm(value), 1e-3) * FACTOR
    norm = np.linalg.norm(gradient)
    return gradient if norm < limit else gradient * (limit / max(norm, 1e-6))

  if value.ndim <= 1:
    return clip(value, gradient)
  return np.stack([clip(v.reshape(-1), g.reshape(-1)) for v, g in zip(value, gradient)]).reshape(
    value.shape
  )


@pytest.mark.usefixtures("x64")
def test_units_are_the_rows_that_timm_clips():
  params, gradients = drawn(0), drawn(1)
  clip = clipping.adaptive_clip(FACTOR)
  ours, _ = jax.jit(clip.update)(gradients, clip.init(params), params)
  touched = []
  for path, value in leaves(params).items():
    given, limited = (as_in_pytorch(path, leaves(tree)[path]) for tree in (gradients, ours))
    expected = clipped_as_in_timm(as_in_pytorch(path, value), given)
    assert relative_error(limited, expected) <= 1e-14, path
    touched += list((given != expected).reshape(-1))
  assert 0.1 < np.mean(touched) < 0.9  # some are within the limit, and others are not


def test_optax_clips_a_depthwise_1x1_kernel_as_a_whole():
  # The reason for a clipping of our own. The shape is that of RepViT's small branches.
  params = {"kernel": jnp.asarray([1.0, 10.0]).reshape(1, 1, 1, 2)}
  gradients = {"kernel": jnp.ones((1, 1, 1, 2))}
  for clip, expected in (
    (optax.adaptive_grad_clip(0.5), [1.0, 1.0]),
    (clipping.adaptive_clip(0.5), [0.5, 1.0]),
  ):
    limited, _ = clip.update(gradients, clip.init(params), params)
    np.testing.assert_allclose(limited["kernel"].ravel(), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("backbone_rate", [1.0, 0.0])
def test_an_optimizer_clips_before_it_decays(backbone_rate):
  params, gradients = drawn(0), drawn(1)
  if backbone_rate == 0:
    gradients = {"head": gradients["head"]}
  sgd = optimizer.sgd(
    lambda step: 1.0,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.1,
    weight_decay_rule="more_than_one_axis",
    adaptive_clip=FACTOR,
    backbone_rate=backbone_rate,
  )
  updates, _ = sgd.update(gradients, sgd.init(params), params)
  for path, update in leaves(updates).items():
    value, given = (as_in_pytorch(path, leaves(tree)[path]) for tree in (params, gradients))
    expected = -clipped_as_in_timm(value, given) - 0.1 * path.endswith("kernel") * value
    assert relative_error(as_in_pytorch(path, update), expected) <= 1e-14, path
