"""Reads `config.augment`: one line of augmentation steps, such as "none | flip"."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from repjax.data.augmentation import crops, distortions, pairs, policies
from repjax.data.augmentation.base import AugmentationStep, Crop, PairCrop, PairStep
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


PAIR_CROPS: dict[str, Callable[..., PairCrop]] = {"scale_and_crop": pairs.scale_and_crop}
"""Names of the first step for segmentation, which makes a square of an image and its mask."""

PAIR_STEPS: dict[str, Callable[..., PairStep]] = {
  "flip": pairs.flip,
  "color_jitter": pairs.on_image(distortions.color_jitter),
}
"""Names of the later steps for segmentation."""


class Augmentation(NamedTuple):
  """A crop and the steps after it; call it as `augmentation(image, size, interpolation, rng)`.

  Attributes:
    crop: makes the square.
    steps: the later steps, in order.
  """

  crop: Callable[..., Any]
  steps: tuple[Callable[..., Any], ...]

  def __call__(self, image: Any, size: int, interpolation: str, rng: np.random.Generator) -> Any:
    """Returns an augmented view.

    Args:
      image: a `Picture`; for segmentation, a `Pair`.
      size: side of the square in pixels.
      interpolation: a key of INTERPOLATIONS.
      rng: source of all random numbers.

    Returns:
      uint8 (size, size, 3); for segmentation, a `Pair` of this size.
    """
    result = self.crop(image, size, interpolation, rng)
    for step in self.steps:
      result = step(result, rng)
    return result


@functools.lru_cache
def parse(line: str, task: str = "classification") -> Augmentation:
  """Reads a line such as "random_resized_crop | flip | rand_augment(2, 9, noise=0.5)".

  Arguments are literals only, so nothing in the line is ever run.

  Args:
    line: steps with `|` between them. A step is a name, or a name with arguments in brackets. The
      first step is a key of CROPS, every later step a key of STEPS. For segmentation these are
      PAIR_CROPS and PAIR_STEPS.
    task: "classification" or "segmentation".

  Raises:
    InputError: a step does not exist, stands in the wrong place, does not take its arguments, or
      cannot be applied to masks.
  """
  first_table, later_table = tables = _tables(task)
  example = " | ".join([next(iter(first_table)), "flip"])
  if not isinstance(line, str):
    raise InputError(f"config.augment is one line of steps, such as {example!r}; got {line!r}")
  first, *later = line.split("|")
  return Augmentation(
    _build(first, first_table, tables, task),
    tuple(_build(text, later_table, tables, task) for text in later),
  )


_Tables = tuple[Mapping[str, Callable[..., Any]], Mapping[str, Callable[..., Any]]]


def _tables(task: str) -> _Tables:
  """Returns the names of the first step and those of the later steps of a task."""
  return (PAIR_CROPS, PAIR_STEPS) if task == "segmentation" else (CROPS, STEPS)


def _build(text: str, table: Mapping[str, Any], tables: _Tables, task: str) -> Any:
  """Makes the step that `text` describes.

  Args:
    text: a step of the line.
    table: the names that may stand in this place.
    tables: the names that may stand first, and those that may stand later.
    task: the task, whose name is for errors.
  """
  name, positional, named = _read(text.strip())
  firsts, laters = tables
  places = f"The line begins with one of {', '.join(firsts)}. Each later step is one of"
  way_out = f"{places} {', '.join(laters)}, after a |"
  if name not in table and (name in firsts or name in laters):
    place = "after the first step" if name in laters else "at the beginning"
    raise InputError(f"config.augment: {name} may stand {place} only. {way_out}")
  if name not in table and any(name in each for each in (*_tables(""), *_tables("segmentation"))):
    raise InputError(f"config.augment: {name} is no step for {task}. {way_out}")
  if name not in table:
    raise unknown("step of config.augment", name, [*firsts, *laters])
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
