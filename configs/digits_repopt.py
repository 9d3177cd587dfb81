"""A small plain network on handwritten digits, trained with RepOptimizer in under two minutes.

Model: the network of configs/digits.py with 3x3 convolutions alone, in training too.
Data and recipe: those of configs/digits.py. The optimizer takes the scales of the hyper-search in
configs/digits_repopt_search.py.
Expected: at least 98 % on the 360 test images, equal in both forms. Confirmed here. The digits are
too easy to show what RepOptimizer is worth: plain SGD gets as far.

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
