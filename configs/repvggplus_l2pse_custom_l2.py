"""RepVGGplus-L2pse on ImageNet, with the custom L2 penalty in place of weight decay on its kernels.

Recipe: that of configs/repvggplus_l2pse.py, with a penalty of the same weight 4e-5. The authors
have since removed the penalty from their script. Their code for the penalty lets biases learn twice
as fast, as here.
Source: https://github.com/DingXiaoH/RepVGG at eae7c52, README and repvggplus_custom_L2.py
Expected: 84.16 % top-1 at 320 px (resize 320, central crop), from that README. Not confirmed here.

  repjax train --config repvggplus_l2pse_custom_l2
"""

import ml_collections

from repjax.configs import repvggplus_l2pse


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `repvggplus_l2pse` with the penalty."""
  config = repvggplus_l2pse.get_config()
  config.weight_decay_rule = "all_but_penalised_kernels"
  config.custom_l2 = config.weight_decay
  return config
