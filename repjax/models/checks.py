"""What networks of several families ask of their attributes and of their images."""

from collections.abc import Sequence
from typing import Any

import jax

from repjax.errors import InputError
from repjax.layers import activation


def check_whole(field: str, value: Sequence[int], length: int) -> None:
  """Raises InputError where an attribute is not as many whole numbers above 0 as it takes."""
  fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
  if not fits or not all(isinstance(number, int) and number > 0 for number in value):
    raise InputError(f"{field} takes {length} whole numbers above 0, got {value!r}")


def check_classifier(num_classes: Any, dropout: float, act: str) -> None:
  """Raises InputError where these attributes, which every network has, are out of range."""
  if not isinstance(num_classes, int) or num_classes < 1:
    raise InputError(f"num_classes must be at least 1, got {num_classes}")
  if not 0 <= dropout < 1:
    raise InputError(f"dropout is at least 0 and below 1, got {dropout}")
  activation(act)


def check_images(network: str, images: jax.Array, total: int) -> None:
  """Raises InputError for images that a network of total stride `total` cannot take."""
  if images.ndim != 4 or min(images.shape[1:3]) < total:
    raise InputError(
      f"this {network} shrinks images {total} times, so they must be (N, H, W, C) with H and W at "
      f"least {total}; got {images.shape}: use a larger image size"
    )
