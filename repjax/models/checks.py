"""Checks of attributes and of images that networks of several families share."""

import dataclasses
import itertools
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.errors import InputError, printable
from repjax.layers import activation
from repjax.layers.composition import pair
from repjax.schema import shown


def is_list(value: Any) -> bool:
  """Tells if a value is a list or a tuple."""
  return isinstance(value, Sequence) and not isinstance(value, str)


def is_whole(value: Any) -> bool:
  """Tells if a value is a whole number above 0."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


_LONGEST_SIDE = 2**15
"""Pixels along the longest side of an image. XLA ends the process at sizes that overflow."""


def check_image_size(size: Any) -> None:
  """Raises InputError if the size of images is no number of pixels, or two of them."""
  sides: Any = size if isinstance(size, tuple) and len(size) == 2 else (size,)
  if not all(is_whole(side) and side <= _LONGEST_SIDE for side in sides):
    raise InputError(
      "image_size must be a whole number of pixels or a tuple (height, width), at most "
      f"{_LONGEST_SIDE}, got {shown(size)}"
    )


def check_flags(module: nn.Module) -> None:
  """Raises InputError if an attribute of a module that is True or False has a different value."""
  for field in dataclasses.fields(module):
    value = getattr(module, field.name, None)
    if field.type in (bool, "bool") and not isinstance(value, bool | np.bool_):
      raise InputError(f"{field.name} takes True or False, got {value!r}")


def check_pixels(images: jax.Array) -> None:
  """Warns of images that nobody normalized, and raises InputError for images that are none."""
  if jnp.issubdtype(images.dtype, jnp.integer):
    warnings.warn(
      f"the network was given images of {images.dtype}, and takes normalized ones. Pass "
      "spec.preprocessing.normalize(images), with spec from repjax.load, or compile the network "
      "with repjax.deploy.compile(..., preprocessing=spec.preprocessing)",
      stacklevel=2,
    )
  elif not jnp.issubdtype(images.dtype, jnp.floating):
    raise InputError(f"images must be floating-point numbers, got {images.dtype}")


def check_number(field: str, value: Any) -> None:
  """Raises InputError if an attribute is not a whole number above 0."""
  if not is_whole(value):
    raise InputError(f"{field} takes a whole number above 0, got {value!r}")


def check_whole(field: str, value: Any, length: int, note: str = "") -> None:
  """Raises InputError if an attribute is not a list of `length` whole numbers above 0."""
  if not (is_list(value) and len(value) == length and all(map(is_whole, value))):
    raise InputError(f"{field} takes {length} whole numbers above 0{note}, got {value!r}")


def check_last_strides(output_stride: Any) -> None:
  """Raises InputError for an `output_stride` that is not 32, or 16 or 8 with dilation."""
  if output_stride not in (8, 16, 32):
    raise InputError(f"output_stride is 32, 16 or 8, got {output_stride!r}")


def check_stages(stage_sizes: Any, **others: Any) -> None:
  """Raises InputError if attributes do not hold a whole number above 0 for each stage.

  Args:
    stage_sizes: number of blocks in each stage; its length is the number of stages.
    **others: other attributes by name.
  """
  if not (is_list(stage_sizes) and stage_sizes and all(map(is_whole, stage_sizes))):
    raise InputError(
      f"stage_sizes takes a whole number above 0 for each stage, got {stage_sizes!r}"
    )
  for field, value in others.items():
    check_whole(field, value, len(stage_sizes), ", one for each stage in stage_sizes")


def check_multiplied_stages(network: Any) -> None:
  """Raises InputError if sizes, widths or strides make no network of a stem and four stages.

  Args:
    network: a network with `stage_sizes`, `width_multipliers` and `strides`, as RepVGG has them.
  """
  for field, length in (("stage_sizes", 4), ("width_multipliers", 4), ("strides", 5)):
    value = getattr(network, field)
    if isinstance(value, str | int | float) or len(value) != length or not min(value) > 0:
      raise InputError(f"{field} takes {length} numbers above 0, got {value!r}")
  sizes, strides = network.stage_sizes, network.strides
  if not all(isinstance(number, int) for number in (*sizes, *strides)):
    raise InputError(f"stage_sizes and strides are whole numbers, got {sizes} and {strides}")
  if int(64 * min(network.width_multipliers)) < 1:
    raise InputError(f"width_multipliers {network.width_multipliers} leave a stage no channel")


def check_output_stride(network: Any) -> None:
  """Raises InputError if `output_stride` is no product of the first strides.

  Args:
    network: a network with `output_stride` and `strides`, as RepVGG has them.
  """
  totals = sorted(set(itertools.accumulate(network.strides, operator.mul)))
  stride = network.output_stride
  if stride is not None and not (is_whole(stride) and stride in totals):
    raise InputError(
      f"output_stride is one of {', '.join(map(str, totals))}, the products of the first of "
      f"strides={network.strides}, got {stride!r}"
    )


def check_tile(field: str, tile: Any) -> None:
  """Raises InputError if an attribute is not the size of a tile."""
  sides = tile if is_list(tile) else (tile, tile)
  if len(sides) != 2 or not all(map(is_whole, sides)):
    raise InputError(f"{field} takes a whole number above 0, or two (height, width), got {tile!r}")


def check_kernels(local_kernels: Any, *tiles: int | Sequence[int]) -> None:
  """Raises InputError if no layer has these local kernels, or they are larger than all tiles."""
  odd = is_list(local_kernels) and all(is_whole(size) and size % 2 for size in local_kernels)
  if not odd or len(set(local_kernels)) != len(local_kernels):
    raise InputError(
      "local_kernels are different odd numbers, for example (1, 3, 5), or () for none, got "
      f"{local_kernels!r}"
    )
  longest = max(max(pair(tile)) for tile in tiles)
  if max(local_kernels, default=1) > longest:
    raise InputError(
      f"local_kernels are at most as large as the tile, {longest} pixels on its longest side, got "
      f"{local_kernels!r}. Leave large kernels out, or choose a larger tile"
    )


def check_classifier(num_classes: Any, dropout: float, act: str) -> None:
  """Raises InputError if one of these attributes, which every network has, is out of range."""
  if not is_whole(num_classes):
    raise InputError(f"num_classes must be at least 1 and a whole number, got {shown(num_classes)}")
  check_rate("dropout", dropout)
  activation(act)


def check_rate(field: str, value: float) -> None:
  """Raises InputError if an attribute is no probability with which something is left out."""
  if not 0 <= value < 1:
    raise InputError(f"{field} is at least 0 and below 1, got {value}")


def check_key(key: Any) -> None:
  """Raises InputError if a value is no random key of JAX, or several."""
  if not _is_key(key):
    raise InputError(
      f"key must be a JAX random key such as jax.random.key(0), got {printable(repr(key), 60)}"
    )


def _is_key(key: Any) -> bool:
  """Tells if a value is one random key of JAX, of the new or the old kind."""
  dtype = getattr(key, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    # An old key is as many numbers as the random generator that JAX is set to takes.
    return dtype == jnp.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
  return not key.shape


def check_total_stride(network: nn.Module, images: jax.Array, total: int) -> None:
  """Raises InputError if images are no batch, or smaller than the total stride of a network."""
  if images.ndim != 4 or min(images.shape[1:3]) < total:
    raise InputError(
      f"this {type(network).__name__} shrinks images {total} times, so they must be (N, H, W, C) "
      f"with H and W at least {total}; got {images.shape}. "
      + _way_to_batch(images, "Use a larger image size")
    )


def check_tiled(network: nn.Module, images: jax.Array, unit: tuple[int, int], tiles: str) -> None:
  """Raises InputError if images are no batch, or do not divide into the tiles of a network.

  Args:
    network: network that is given the images.
    images: (N, H, W, C).
    unit: height and width in pixels; H and W must be multiples of them.
    tiles: description of the tiles, such as "2x3 at stride 8".
  """
  sides = images.shape[1:3]
  if images.ndim != 4 or not min(sides) or any(side % step for side, step in zip(sides, unit)):
    raise InputError(
      f"this {type(network).__name__} cuts its maps into tiles of {tiles}, so images must be "
      f"(N, H, W, C) with H a multiple of {unit[0]} and W of {unit[1]}; got {images.shape}. "
      + _way_to_batch(images, "Change the image size or the tile")
    )


def _way_to_batch(images: jax.Array, otherwise: str) -> str:
  """Returns what to do about images of a wrong shape.

  Args:
    images: array of any shape.
    otherwise: the way out for a batch (N, H, W, C) of an unsuitable size.
  """
  if images.ndim == 3:
    return "Add the axis of the batch: images[None]"
  if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
    return "If they are (N, C, H, W), as in PyTorch: images.transpose(0, 2, 3, 1)"
  return otherwise
