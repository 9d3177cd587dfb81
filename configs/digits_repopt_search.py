"""The hyper-search of RepOptimizer on handwritten digits, done in two minutes on two cores.

Model: the network of configs/digits.py, whose branches have scales in place of batch norms.
Data and recipe: those of configs/digits.py.
Expected: TODO

  repjax train --config digits_repopt_search
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a network of branches with scales."""
  config = digits.get_config()
  config.model_overrides.scaled = True
  return config
