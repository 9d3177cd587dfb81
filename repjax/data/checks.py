"""Checks of the numbers that a config gives to augmentation steps."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from repjax.errors import InputError


def check_number(what: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
  """Refuses what is not a finite number from `low` to `high`; `what` names it in the error."""
  number: Any = (
    value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
  )
  if not low <= number <= high or math.isinf(number) or (whole and number != int(number)):
    wanted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
    raise InputError(f"{what} is {value!r}; it must be a {'whole ' * whole}number {wanted}")


def check_range(what: str, value: Any, low: float, high: float) -> tuple[float, float]:
  """Refuses what is not (least, largest), both above 0 and from `low` to `high`."""
  if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
    raise InputError(f"{what} is {value!r}; it must be two numbers, (least, largest)")
  for number in value:
    check_number(f"a bound of {what}", number, low, high)
  if not 0 < value[0] <= value[1]:
    raise InputError(f"{what} is {value!r}; it must be (least, largest), both above 0")
  return float(value[0]), float(value[1])
