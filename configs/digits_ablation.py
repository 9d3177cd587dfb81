"""A small RepVGG on handwritten digits with other branches: every ablation in seconds.

Data: the digits of the config `digits`, at 16 px.
Recipe: that of `digits` in 8 epochs, for a network of 16 layers with 16 channels. The config
repvgg_b0_ablation lists the names after the colon.
Expected: 58 to 98 % after 8 epochs; docs/benchmarks.md has the table of `benchmarks/ablation.py`.

  repjax train --config digits_ablation
  repjax train --config digits_ablation:plain
"""

import ml_collections

from repjax.configs import common, digits


def get_config(ablation: str = "full") -> ml_collections.ConfigDict:
  """Returns a short recipe for a narrow RepVGG with the blocks of an ablation."""
  config = digits.get_config()
  config.model_overrides.stage_sizes = (2, 4, 8, 1)
  config.model_overrides.width_multipliers = (0.25, 0.125, 0.0625, 0.03125)
  config.model_overrides.strides = (1, 2, 1, 2, 1)
  common.set_ablation(config, ablation)
  config.num_epochs = 8.0
  config.eval_every_epochs = 8.0
  return config
