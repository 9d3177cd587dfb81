"""Augmentation of training images: `config.augment` is one line of steps that run left to right.

    parser.py        reads the line and holds the tables of names
    crops.py         the first step: a square from an image of any size
    distortions.py   later steps: flip, colour jitter, random erasing
    policies.py      later steps: AutoAugment and RandAugment
    operations.py    the single image operations that policies apply
    pairs.py         crops and steps for an image and its mask
    base.py          the types of steps, and checks of their arguments

To add a step, write a function that takes the step's arguments and returns the step. Then add the
function to `CROPS` or `STEPS` in parser.py; or to `PAIR_CROPS` or `PAIR_STEPS`, for segmentation.
"""

from repjax.data.augmentation.parser import (
  CROPS,
  PAIR_CROPS,
  PAIR_STEPS,
  STEPS,
  Augmentation,
  parse,
)

__all__ = ["CROPS", "PAIR_CROPS", "PAIR_STEPS", "STEPS", "Augmentation", "parse"]
