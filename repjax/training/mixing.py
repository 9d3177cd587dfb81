"""Mixup and CutMix: images of a batch and their targets, blended in pairs on the device."""

import jax
import jax.numpy as jnp


def mix(
  images: jax.Array, targets: jax.Array, key: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Blends each image and its target with the previous image of the batch and its target.

  Mixup:  x' = l x_i + (1 - l) x_{i-1},  t' = l t_i + (1 - l) t_{i-1},  l ~ Beta(alpha, alpha).
  CutMix: x' is x_i with a box of x_{i-1} in it, l = 1 - area of the box / area of the image. The
  box has the aspect ratio of the image, and covers a share 1 - Beta(alpha, alpha) of the image. Its
  centre is uniform in the image. The box is clipped to the image before l is computed.

  All images of a batch share one l and one box. With Mixup and CutMix both on, each call takes one
  of them with probability 1/2. The partners are the batch rolled by one. A reversed batch would
  blend the middle image of an odd batch with itself, and would repeat every pair. Label smoothing
  and normalization of images may come before or after, since l + (1 - l) = 1.

  Args:
    images: float (N, H, W, C), N at least 2.
    targets: probabilities, float (N, K).
    key: random key.
    mixup: alpha of the Beta distribution of Mixup; 0: no Mixup.
    cutmix: alpha of the Beta distribution of CutMix; 0: no CutMix. At least one must be on.

  Returns:
    Images and targets of the same shapes and dtypes.

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
  """Draws the share that each image keeps of itself, see `mix`.

  Args:
    key: random key.
    size: (H, W) of the images.
    mixup: alpha of Mixup, or 0.
    cutmix: alpha of CutMix, or 0.

  Returns:
    The share in each pixel, float32 (1, H, W, 1), and its mean l, float32 ().
  """
  choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
  if not cutmix:
    return _draw_mixup(mixup_key, size, mixup)
  if not mixup:
    return _draw_cutmix(cutmix_key, size, cutmix)
  chosen = jax.random.bernoulli(choice_key)
  return jax.tree.map(
    lambda first, second: jnp.where(chosen, first, second),
    _draw_mixup(mixup_key, size, mixup),
    _draw_cutmix(cutmix_key, size, cutmix),
  )


def blend(values: jax.Array, own: jax.Array) -> jax.Array:
  """Returns own * value + (1 - own) * previous value along the first axis.

  The value before the first is the last.

  Raises:
    ValueError: there is a single value, which has no partner.
  """
  if len(values) < 2:
    raise ValueError("mixup and cutmix need at least 2 images on each device, got 1")
  own = own.astype(values.dtype)
  return own * values + (1 - own) * jnp.roll(values, 1, axis=0)


def dominant(labels: jax.Array, share: jax.Array) -> jax.Array:
  """Returns the label with the larger share in each blended target.

  With equal shares this is the label of the image, not of its partner.
  """
  return jnp.where(share >= 0.5, labels, jnp.roll(labels, 1, axis=0))


def _draw_mixup(key: jax.Array, size: tuple[int, ...], alpha: float) -> tuple[jax.Array, jax.Array]:
  """Draws one share for all pixels."""
  share = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
  return jnp.full((1, *size, 1), share), share


def _draw_cutmix(
  key: jax.Array, size: tuple[int, ...], alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Draws a box in which the share is 0, and 1 elsewhere."""
  share_key, centre_key = jax.random.split(key)
  # The side is the root of the area, so that the box keeps the aspect ratio of the image.
  side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32))
  extent = (side * jnp.asarray(size, jnp.float32)).astype(jnp.int32)
  centre = jax.random.randint(centre_key, (2,), 0, jnp.asarray(size), jnp.int32)
  # The box may reach over the border. Comparing its ends with each row and column clips the box.
  start = centre - extent // 2
  rows, columns = (
    (jnp.arange(length) >= start[axis]) & (jnp.arange(length) < start[axis] + extent[axis])
    for axis, length in enumerate(size)
  )
  own = 1 - (rows[:, None] & columns[None, :]).astype(jnp.float32)
  return own.reshape(1, *size, 1), own.mean()
