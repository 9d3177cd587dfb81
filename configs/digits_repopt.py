"""A small plain network on handwritten digits, trained with RepOptimizer, in a minute on two cores.

Model: the network of configs/digits.py with 3x3 convolutions alone, also in training.
Data and recipe: those of configs/digits.py; the optimizer takes the scales of a hyper-search.
Expected: TODO

  repjax train --config digits_repopt_search
  repjax train --config digits_repopt
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for a plain network and RepOptimizer."""
  config = digits.get_config()
  config.model_overrides.branches = ("conv3x3",)
  config.optimizer = "repoptimizer"
  config.scales = "runs/digits_repopt_search"
  return config
