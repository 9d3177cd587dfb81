"""The augmentation of a config: steps in a row, written as one line."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.data import policies, transforms
from repjax.data.decode import Picture
from repjax.data.jitter import Step
from repjax.errors import InputError, unknown

CROPS: dict[str, Callable[..., transforms.Crop]] = {
  "none": transforms.central_square,
  "pad_and_crop": transforms.pad_and_crop,
  "random_resized_crop": transforms.random_resized_crop,
}
"""What a line may begin with: from an image of any size to a square."""

STEPS: dict[str, Callable[..., Step]] = {"flip": transforms.flip, **policies.STEPS}
"""What may follow: from a square to a square of the same size."""


class Augmentation(NamedTuple):
  """A crop and what follows it; call it as `augmentation(picture, size, interpolation, rng)`."""

  crop: transforms.Crop
  steps: tuple[Step, ...]

  def __call__(
    self, picture: Picture, size: int, interpolation: str, rng: np.random.Generator
  ) -> np.ndarray:
    """Makes a uint8 (size, size, 3) of a picture."""
    pixels = self.crop(picture, size, interpolation, rng)
    for step in self.steps:
      pixels = step(pixels, rng)
    return pixels


@functools.lru_cache
def parse(line: str) -> Augmentation:
  """Reads a line such as "random_resized_crop | flip | rand_augment(2, 9, noise=0.5)".

  Args:
    line: steps with `|` between them; a step is a name, or a name with arguments in brackets. The
      first is a key of CROPS, the others are keys of STEPS.

  Raises:
    InputError: a step that does not exist, in a wrong place or with arguments that it does not
      take; the text says which.
  """
  if not isinstance(line, str):
    raise InputError(f"config.augment is one line of steps, such as 'none | flip'; got {line!r}")
  first, *others = line.split("|")
  return Augmentation(
    _build(first, CROPS, STEPS), tuple(_build(text, STEPS, CROPS) for text in others)
  )


def _build(text: str, table: Mapping[str, Any], other: Mapping[str, Any]) -> Any:
  name, positional, named = _read(text.strip())
  if name in other:
    where = "after the first step" if other is STEPS else "as the first step only"
    raise InputError(
      f"config.augment: {name} can stand {where}; first comes one of {', '.join(CROPS)}, then any "
      f"of {', '.join(STEPS)}, with | between them, as in 'none | flip'"
    )
  if name not in table:
    raise unknown("step of config.augment", name, [*CROPS, *STEPS])
  try:
    inspect.signature(table[name]).bind(*positional, **named)
  except TypeError as error:
    raise InputError(
      f"config.augment: {text.strip()}: {error}; it is {name}({_parameters(table[name])})"
    ) from None
  return table[name](*positional, **named)


def _parameters(make: Callable[..., Any]) -> str:
  """What a step takes, as a person would write it."""
  return ", ".join(
    name if parameter.default is parameter.empty else f"{name}={parameter.default!r}"
    for name, parameter in inspect.signature(make).parameters.items()
  )


def _read(text: str) -> tuple[str, list[Any], dict[str, Any]]:
  """The name and the arguments of a step."""
  try:
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Name):
      return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
      raise ValueError
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    if None in named:
      raise ValueError
    return node.func.id, [ast.literal_eval(value) for value in node.args], named  # pyright: ignore[reportReturnType]
  except (SyntaxError, ValueError):
    raise InputError(
      f"config.augment: {text!r} is no step; a step is a name, such as flip, or a name with "
      "arguments, such as rand_augment(2, 9, noise=0.5), and | stands between two steps"
    ) from None
