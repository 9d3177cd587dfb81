"""The types of augmentation steps, and the checks of the numbers that a config gives them."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repjax.data.decode import Picture
from repjax.data.pairs import Pair
from repjax.errors import InputError

Crop = Callable[[Picture, int, str, np.random.Generator], np.ndarray]
"""The first step: crop(picture, size, interpolation, rng) -> uint8 (size, size, 3)."""

AugmentationStep = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A later step: step(pixels, rng), uint8 (S, S, 3) to uint8 (S, S, 3).

A step never writes into `pixels`. It may return `pixels` itself where nothing changes.
"""

PairCrop = Callable[[Pair, int, str, np.random.Generator], Pair]
"""The first step for an image and its mask: crop(pair, size, interpolation, rng)."""

PairStep = Callable[[Pair, np.random.Generator], Pair]
"""A later step for an image and its mask: step(pair, rng)."""


def check_number(what: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
  """Raises unless `value` is a finite number from `low` to `high`.

  Args:
    what: the argument's name in the error.
    value: what the config gave.
    low: the least allowed number.
    high: the largest allowed number; may be infinite.
    whole: allows whole numbers only.

  Raises:
    InputError: `value` is no such number.
  """
  # A bool is a number to Python, but never meant as one. NaN fails both comparisons below.
  number: Any = (
    value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
  )
  if not low <= number <= high or math.isinf(number) or (whole and number != int(number)):
    wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
    raise InputError(f"{what} is {value!r}; it must be a {'whole ' * whole}number {wanted}")


def check_range(what: str, value: Any, low: float, high: float) -> tuple[float, float]:
  """Returns `value` as two floats (least, largest), or raises.

  Args:
    what: the argument's name in the error.
    value: what the config gave.
    low: the least allowed bound.
    high: the largest allowed bound; may be infinite.

  Raises:
    InputError: `value` is not two numbers, 0 < least <= largest, from `low` to `high`.
  """
  if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
    raise InputError(f"{what} is {value!r}; it must be two numbers, (least, largest)")
  for number in value:
    check_number(f"a bound of {what}", number, low, high)
  if not 0 < value[0] <= value[1]:
    raise InputError(f"{what} is {value!r}; it must be (least, largest), both above 0")
  return float(value[0]), float(value[1])
