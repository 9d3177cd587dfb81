"""Augmentation policies, which draw image operations at random: AutoAugment and RandAugment."""

import functools
from collections.abc import Callable

import numpy as np

from repjax.data.augmentation.base import AugmentationStep, check_number
from repjax.data.augmentation.distortions import cutout
from repjax.data.augmentation.operations import OPERATIONS
from repjax.errors import InputError, unknown

SubPolicy = tuple[str, float, int, str, float, int]
"""Two operations in turn, each with a probability and a magnitude from 0 to 9."""

POLICIES: dict[str, tuple[SubPolicy, ...]] = {
  # AutoAugment, Table 9. Five of the rows occur twice.
  "imagenet": (
    ("posterize", 0.4, 8, "rotate", 0.6, 9),
    ("solarize", 0.6, 5, "autocontrast", 0.6, 5),
    ("equalize", 0.8, 8, "equalize", 0.6, 3),
    ("posterize", 0.6, 7, "posterize", 0.6, 6),
    ("equalize", 0.4, 7, "solarize", 0.2, 4),
    ("equalize", 0.4, 4, "rotate", 0.8, 8),
    ("solarize", 0.6, 3, "equalize", 0.6, 7),
    ("posterize", 0.8, 5, "equalize", 1.0, 2),
    ("rotate", 0.2, 3, "solarize", 0.6, 8),
    ("equalize", 0.6, 8, "posterize", 0.4, 6),
    ("rotate", 0.8, 8, "color", 0.4, 0),
    ("rotate", 0.4, 9, "equalize", 0.6, 2),
    ("equalize", 0.0, 7, "equalize", 0.8, 8),
    ("invert", 0.6, 4, "equalize", 1.0, 8),
    ("color", 0.6, 4, "contrast", 1.0, 8),
    ("rotate", 0.8, 8, "color", 1.0, 2),
    ("color", 0.8, 8, "solarize", 0.8, 7),
    ("sharpness", 0.4, 7, "invert", 0.6, 8),
    ("shear_x", 0.6, 5, "equalize", 1.0, 9),
    ("color", 0.4, 0, "equalize", 0.6, 3),
    ("equalize", 0.4, 7, "solarize", 0.2, 4),
    ("solarize", 0.6, 5, "autocontrast", 0.6, 5),
    ("invert", 0.6, 4, "equalize", 1.0, 8),
    ("color", 0.6, 4, "contrast", 1.0, 8),
    ("equalize", 0.8, 8, "equalize", 0.6, 3),
  ),
  # AutoAugment, Table 7.
  "cifar10": (
    ("invert", 0.1, 7, "contrast", 0.2, 6),
    ("rotate", 0.7, 2, "translate_x", 0.3, 9),
    ("sharpness", 0.8, 1, "sharpness", 0.9, 3),
    ("shear_y", 0.5, 8, "translate_y", 0.7, 9),
    ("autocontrast", 0.5, 8, "equalize", 0.9, 2),
    ("shear_y", 0.2, 7, "posterize", 0.3, 7),
    ("color", 0.4, 3, "brightness", 0.6, 7),
    ("sharpness", 0.3, 9, "brightness", 0.7, 9),
    ("equalize", 0.6, 5, "equalize", 0.5, 1),
    ("contrast", 0.6, 7, "sharpness", 0.6, 5),
    ("color", 0.7, 7, "translate_x", 0.5, 8),
    ("equalize", 0.3, 7, "autocontrast", 0.4, 8),
    ("translate_y", 0.4, 3, "sharpness", 0.2, 6),
    ("brightness", 0.9, 6, "color", 0.2, 8),
    ("solarize", 0.5, 2, "invert", 0.0, 3),
    ("equalize", 0.2, 0, "autocontrast", 0.6, 0),
    ("equalize", 0.2, 8, "equalize", 0.6, 4),
    ("color", 0.9, 9, "equalize", 0.6, 6),
    ("autocontrast", 0.8, 4, "solarize", 0.2, 8),
    ("brightness", 0.1, 3, "color", 0.7, 0),
    ("solarize", 0.4, 5, "autocontrast", 0.9, 3),
    ("translate_y", 0.9, 9, "translate_y", 0.7, 9),
    ("autocontrast", 0.9, 2, "solarize", 0.8, 3),
    ("equalize", 0.8, 8, "invert", 0.1, 3),
    ("translate_y", 0.7, 9, "autocontrast", 0.9, 1),
  ),
}

Scale = Callable[[float, int, int], float]
"""A function (fraction, direction, side) -> the operation's value.

`fraction` is the magnitude as a fraction of the full scale, `direction` is +1 or -1 at random,
`side` is the side of the image in pixels.
"""


def _each(names: str, scale: Scale) -> dict[str, Scale]:
  """Returns a table that gives every one of the names, separated by blanks, the same scale."""
  return dict.fromkeys(names.split(), scale)


# Shears and rotations are the same in all three tables. Operations without a value, such as
# "invert", are in none of them.
_MOVES: dict[str, Scale] = {
  **_each("shear_x shear_y", lambda fraction, sign, side: 0.3 * fraction * sign),
  **_each("rotate", lambda fraction, sign, side: 30 * fraction * sign),
}
_TRANSLATIONS = "translate_x translate_y"
_ENHANCE = "color contrast brightness sharpness"

AUTO_SCALES: dict[str, Scale] = {
  **_MOVES,
  # The paper's 150 pixels of Inception's 331, in proportion to the side.
  **_each(_TRANSLATIONS, lambda fraction, sign, side: round(150 / 331 * fraction * side) * sign),
  **_each(_ENHANCE, lambda fraction, sign, side: 1 + 0.9 * fraction * sign),
  **_each("posterize", lambda fraction, sign, side: 8 - round(4 * fraction)),
  **_each("solarize", lambda fraction, sign, side: 256 * (1 - fraction)),
}
"""AutoAugment's scales: every operation grows more severe with the magnitude."""

RAND_SCALES: dict[str, Scale] = {
  **_MOVES,
  **_each(_TRANSLATIONS, lambda fraction, sign, side: round(0.45 * fraction * side) * sign),
  **_each(_ENHANCE, lambda fraction, sign, side: 0.1 + 1.8 * fraction),
  **_each("posterize", lambda fraction, sign, side: min(8, int(4 * fraction))),
  **_each("solarize", lambda fraction, sign, side: int(256 * fraction)),
  **_each("solarize_add", lambda fraction, sign, side: int(110 * fraction)),
  **_each("cutout", lambda fraction, sign, side: 2 * int(max(1, 20 * fraction))),
}
"""RandAugment's scales in timm's default: posterize and solarize grow milder with the magnitude."""

INCREASING_SCALES: dict[str, Scale] = {
  **RAND_SCALES,
  **_each(_ENHANCE, lambda fraction, sign, side: max(0.1, 1 + 0.9 * fraction * sign)),
  **_each("posterize", lambda fraction, sign, side: max(0, 4 - int(4 * fraction))),
  **_each("solarize", lambda fraction, sign, side: 256 - int(256 * fraction)),
}
"""RandAugment's scales with `increasing`, "inc1" of timm."""


def auto_augment(policy: str = "imagenet") -> AugmentationStep:
  """Returns a step that applies a sub-policy, drawn for each image from the policy's 25.

  A sub-policy is two operations, each applied with a probability of its own. A magnitude m stands
  for the fraction m / 9 of the operation's range:

    shear          up to 0.3
    translation    up to 150/331 of the side, rounded to whole pixels
    rotation       up to 30 degrees
    posterize      from 8 bits down to 4
    solarize       from 256 down to 0
    color, contrast, brightness, sharpness    factors up to 0.9 away from 1

  Directions are drawn at random where an operation has two. Grey 128 fills in from outside.

  The table "imagenet" is the same in the code of DeepVoltaire, torchvision and timm. The table
  "cifar10" is the same in the first two. The authors' code holds 20 of its rows; Fast AutoAugment's
  copy of them differs in one number, Color 6 for 8.

  The ranges are those of the paper's Table 6, read as DeepVoltaire, torchvision and mmpretrain read
  them: all operations grow more severe with m. The authors' code and timm differ. They divide m by
  10, and their last four factors go from 0.1 to 1.9. On CIFAR the authors translate by up to 10 of
  32 pixels.

  Args:
    policy: "imagenet" or "cifar10".

  Raises:
    InputError: an unknown policy.

  References:
    Cubuk et al., AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019, Tables 6, 7
      and 9. https://arxiv.org/abs/1805.09501
  """
  if not isinstance(policy, str) or policy not in POLICIES:
    raise unknown("AutoAugment policy", policy, POLICIES)
  return functools.partial(_auto_augmented, policy=policy)


def rand_augment(
  num_ops: int = 2,
  magnitude: float = 9,
  *,
  noise: float | str = 0.0,
  probability: float = 0.5,
  increasing: bool = False,
  cutout: bool = False,
) -> AugmentationStep:
  """Returns a step that applies `num_ops` random operations, all of one magnitude.

  The operations are drawn for each image, with replacement, from the 15 of OPERATIONS. A magnitude
  m stands for the fraction m / 10 of the operation's range:

    shear           up to 0.3, in either direction
    translation     up to 0.45 of the side, in either direction, rounded to whole pixels
    rotation        up to 30 degrees, in either direction
    posterize       from 0 up to 4 bits; the image is black where m is below 2.5
    solarize        from 0 up to 256
    solarize_add    up to 110
    color, contrast, brightness, sharpness    factors from 0.1 up to 1.9

  Grey 128 fills in from outside. With noise, each operation draws a magnitude of its own, clipped
  to 0 ... max(10, `magnitude`).

  Published recipes:
    ParNet, "rand-m9-mstd0.5" of timm: rand_augment(2, 9, noise=0.5).
    RepVGG-B3 of mmpretrain: rand_augment(2, 7, noise=0.5, increasing=True).
    RepVGGplus and RepMLPNet, "raug15" of their code:
      rand_augment(2, 15, noise="uniform", probability=1, cutout=True).

  Args:
    num_ops: operations per image.
    magnitude: 0 to 30, where 10 is the end of the ranges. Larger magnitudes extrapolate.
    noise: standard deviation of a normal distribution about `magnitude`. With "uniform", all whole
      numbers from 0 to `magnitude` - 1 are equally likely.
    probability: the probability that a drawn operation is applied: 0.5 in timm and mmpretrain, 1 in
      the paper.
    increasing: makes every operation more severe with the magnitude, as "inc1" of timm does:
      posterize from 4 bits down to 0, solarize from 256 down, and the four factors up to 0.9 away
      from 1 in either direction.
    cutout: adds a 16th operation, a square with sides of 4 m pixels in one colour.

  Raises:
    InputError: a number is outside its range, or an option has the wrong type.

  References:
    Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space,
      CVPR Workshops 2020, section 3. https://arxiv.org/abs/1909.13719
    Operations, ranges, noise and probability are timm's. mmpretrain's code agrees with
      `increasing`, the code of RepVGG and RepMLP agrees without it. The paper has neither
      solarize_add nor invert.
  """
  uniform = isinstance(noise, str) and noise == "uniform"
  check_number("rand_augment's num_ops", num_ops, 1, 100, whole=True)
  check_number("rand_augment's magnitude", magnitude, int(uniform), 30, whole=uniform)
  if not uniform:
    check_number('rand_augment\'s noise, if not "uniform",', noise, 0, 30)
  check_number("rand_augment's probability", probability, 0, 1)
  for argument, value in {"increasing": increasing, "cutout": cutout}.items():
    if not isinstance(value, bool):
      raise InputError(f"rand_augment's {argument} is {value!r}; it must be True or False")
  return functools.partial(
    _rand_augmented,
    num_ops=int(num_ops),
    magnitude=magnitude,
    noise=None if isinstance(noise, str) else noise,
    probability=probability,
    increasing=increasing,
    names=(*OPERATIONS, "cutout") if cutout else tuple(OPERATIONS),
  )


def _auto_augmented(pixels: np.ndarray, rng: np.random.Generator, *, policy: str) -> np.ndarray:
  """Applies one sub-policy of a policy's table."""
  row = POLICIES[policy][rng.integers(len(POLICIES[policy]))]
  for name, probability, magnitude in (row[:3], row[3:]):
    if rng.random() < probability:
      pixels = _apply(name, AUTO_SCALES, magnitude / 9, pixels, rng)
  return pixels


def _rand_augmented(
  pixels: np.ndarray,
  rng: np.random.Generator,
  *,
  num_ops: int,
  magnitude: float,
  noise: float | None,
  probability: float,
  increasing: bool,
  names: tuple[str, ...],
) -> np.ndarray:
  """Applies `num_ops` of the named operations; a `noise` of None draws uniform magnitudes."""
  scales = INCREASING_SCALES if increasing else RAND_SCALES
  for index in rng.integers(len(names), size=num_ops):
    if rng.random() < probability:
      if noise is None:
        drawn = rng.integers(int(magnitude))
      else:
        drawn = min(max(rng.normal(magnitude, noise), 0), max(10, magnitude))
      pixels = _apply(names[index], scales, drawn / 10, pixels, rng)
  return pixels


def _apply(
  name: str, scales: dict[str, Scale], fraction: float, pixels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Applies an operation whose magnitude is a fraction of the full scale."""
  if name not in scales:
    return OPERATIONS[name](pixels)
  # A direction is drawn for every scale, also where the scale ignores it.
  value = scales[name](fraction, 1 if rng.random() < 0.5 else -1, pixels.shape[0])
  if name == "cutout":
    return cutout(pixels, int(value), rng)
  return OPERATIONS[name](pixels, value)
