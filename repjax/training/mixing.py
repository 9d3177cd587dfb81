"""Mixup and CutMix: the images of a batch and their targets, blended in pairs on the device."""

import jax
import jax.numpy as jnp


def mix(
  images: jax.Array, targets: jax.Array, key: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Blends each image and its target with those of the image before it in the batch.

  Mixup:  x' = l x_i + (1 - l) x_{i-1},  t' = l t_i + (1 - l) t_{i-1},  l ~ Beta(alpha, alpha).
  CutMix: x' is x_i with a box of x_{i-1} in it, l = 1 - area of the box / area of the image. The
  box has the image's aspect ratio and before clipping an area of 1 - Beta(alpha, alpha); its centre
  is uniform, and what lies outside the image is cut off before l is computed.

  One l, and one box, for the batch. With both on, each call takes one of them with probability
  1/2. The partner is the batch rolled by one rather than reversed: no image is its own partner in a
  batch of any size from two on, and no pair occurs twice. Smoothing targets before or after gives
  the same, and so does normalising images, since l + (1 - l) = 1.

  Args:
    images: float (N, H, W, C), N at least 2.
    targets: probabilities, float (N, K).
    key: of the random numbers.
    mixup: alpha of Mixup's Beta distribution; 0: no Mixup.
    cutmix: alpha of CutMix's Beta distribution; 0: no CutMix. One of both must be on.

  Returns:
    images and targets of the same shapes and dtypes.

  References:
    Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.
      https://arxiv.org/abs/1710.09412
    Yun et al., CutMix, ICCV 2019, section 3. https://arxiv.org/abs/1905.04899
    The choice with probability 1/2: MIXUP_SWITCH_PROB in config.py of RepMLPNet's training
      script, https://github.com/DingXiaoH/RepMLP, and `switch_prob` in timm's data/mixup.py.
  """
  own, share = draw(key, images.shape[1:3], mixup=mixup, cutmix=cutmix)
  return blend(images, own), blend(targets, share)


def draw(
  key: jax.Array, size: tuple[int, ...], *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
  """Draws how much of itself an image keeps; see `mix`.

  Args:
    key: of the random numbers.
    size: (H, W) of the images.
    mixup: alpha, or 0.
    cutmix: alpha, or 0.

  Returns:
    The share of itself in each pixel, float32 (1, H, W, 1), and its mean, float32 ().
  """
  choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
  if not cutmix:
    return _draw_mixup(mixup_key, size, mixup)
  if not mixup:
    return _draw_cutmix(cutmix_key, size, cutmix)
  chosen = jax.random.bernoulli(choice_key)
  return jax.tree.map(
    lambda one, other: jnp.where(chosen, one, other),
    _draw_mixup(mixup_key, size, mixup),
    _draw_cutmix(cutmix_key, size, cutmix),
  )


def blend(values: jax.Array, own: jax.Array) -> jax.Array:
  """Keeps `own` of each value and takes the rest from the one before it, the first from the last.

  Raises:
    ValueError: a single value, which has no partner.
  """
  if len(values) < 2:
    raise ValueError("mixup and cutmix need at least 2 images on each device, got 1")
  own = own.astype(values.dtype)
  return own * values + (1 - own) * jnp.roll(values, 1, axis=0)


def dominant(labels: jax.Array, share: jax.Array) -> jax.Array:
  """The label with the larger share in each blended target, the own one where they are equal."""
  return jnp.where(share >= 0.5, labels, jnp.roll(labels, 1, axis=0))


def _draw_mixup(key: jax.Array, size: tuple[int, ...], alpha: float) -> tuple[jax.Array, jax.Array]:
  share = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
  return jnp.full((1, *size, 1), share), share


def _draw_cutmix(
  key: jax.Array, size: tuple[int, ...], alpha: float
) -> tuple[jax.Array, jax.Array]:
  share_key, centre_key = jax.random.split(key)
  side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32))
  extent = (side * jnp.asarray(size, jnp.float32)).astype(jnp.int32)
  centre = jax.random.randint(centre_key, (2,), 0, jnp.asarray(size), jnp.int32)
  start = centre - extent // 2  # may lie outside the image, as may the end
  rows, columns = (
    (jnp.arange(length) >= start[axis]) & (jnp.arange(length) < start[axis] + extent[axis])
    for axis, length in enumerate(size)
  )
  own = 1 - (rows[:, None] & columns[None, :]).astype(jnp.float32)
  return own.reshape(1, *size, 1), own.mean()
