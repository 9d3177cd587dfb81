"""Reads `config.augment`: one line of augmentation steps, such as "none | flip"."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.data.augmentation import crops, distortions, policies
from repjax.data.augmentation.base import AugmentationStep, Crop
from repjax.data.decode import Picture
from repjax.errors import InputError, unknown

CROPS: dict[str, Callable[..., Crop]] = {
  "none": crops.central_square,
  "pad_and_crop": crops.pad_and_crop,
  "random_resized_crop": crops.random_resized_crop,
}
"""Names of the first step, which makes a square of an image of any size."""

STEPS: dict[str, Callable[..., AugmentationStep]] = {
  "flip": distortions.flip,
  "auto_augment": policies.auto_augment,
  "rand_augment": policies.rand_augment,
  "color_jitter": distortions.color_jitter,
  "random_erasing": distortions.random_erasing,
}
"""Names of the later steps, which change a square and keep its size."""


class Augmentation(NamedTuple):
  """A crop and the steps after it; call it as `augmentation(picture, size, interpolation, rng)`.

  Attributes:
    crop: makes the square.
    steps: the later steps, in order.
  """

  crop: Crop
  steps: tuple[AugmentationStep, ...]

  def __call__(
    self, picture: Picture, size: int, interpolation: str, rng: np.random.Generator
  ) -> np.ndarray:
    """Returns an augmented view of a picture, uint8 (size, size, 3)."""
    pixels = self.crop(picture, size, interpolation, rng)
    for step in self.steps:
      pixels = step(pixels, rng)
    return pixels


@functools.lru_cache
def parse(line: str) -> Augmentation:
  """Reads a line such as "random_resized_crop | flip | rand_augment(2, 9, noise=0.5)".

  Arguments are literals only, so nothing in the line is ever run.

  Args:
    line: steps with `|` between them. A step is a name, or a name with arguments in brackets. The
      first step is a key of CROPS, every later step a key of STEPS.

  Raises:
    InputError: a step does not exist, stands in the wrong place, or does not take its arguments.
  """
  if not isinstance(line, str):
    raise InputError(f"config.augment is one line of steps, such as 'none | flip'; got {line!r}")
  first, *later = line.split("|")
  return Augmentation(
    _build(first, CROPS, STEPS), tuple(_build(text, STEPS, CROPS) for text in later)
  )


def _build(text: str, table: Mapping[str, Any], wrong_table: Mapping[str, Any]) -> Any:
  """Makes the step that `text` describes.

  Args:
    text: a step of the line.
    table: the names that may stand in this place.
    wrong_table: the names that may stand in other places only.
  """
  name, positional, named = _read(text.strip())
  if name in wrong_table:
    place = "after the first step" if wrong_table is STEPS else "at the beginning"
    raise InputError(
      f"config.augment: {name} may stand {place} only. The line begins with one of "
      f"{', '.join(CROPS)}. Each later step is one of {', '.join(STEPS)}, after a |"
    )
  if name not in table:
    raise unknown("step of config.augment", name, [*CROPS, *STEPS])
  try:
    inspect.signature(table[name]).bind(*positional, **named)
  except TypeError as error:
    raise InputError(
      f"config.augment: {text.strip()}: {error}; write {name}({_parameters(table[name])})"
    ) from None
  return table[name](*positional, **named)


def _parameters(make: Callable[..., Any]) -> str:
  """Returns the parameters of a step with their defaults, as one writes them in the line."""
  return ", ".join(
    name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
    for name, parameter in inspect.signature(make).parameters.items()
  )


def _read(text: str) -> tuple[str, list[Any], dict[str, Any]]:
  """Returns the name, the positional arguments and the named arguments of a step."""
  try:
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Name):
      return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
      raise ValueError
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    if None in named:  # the name of `**mapping`, which a line has no use for
      raise ValueError
    return node.func.id, [ast.literal_eval(value) for value in node.args], named  # pyright: ignore[reportReturnType]
  except (SyntaxError, ValueError):
    raise InputError(
      f"config.augment: {text!r} is no step. A step is a name, such as flip, or a name with "
      "arguments, such as rand_augment(2, 9, noise=0.5). Write | between two steps"
    ) from None
