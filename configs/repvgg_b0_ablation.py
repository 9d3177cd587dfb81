"""RepVGG-B0 on ImageNet with other branches: the ablations of the RepVGG paper, and two more.

Recipe: the simple recipe of the paper, as in repvgg_b0.
Paper: Ding et al., RepVGG, CVPR 2021, section 4.2. https://arxiv.org/abs/2101.03697
Expected: the paper's top-1 at 224 px in the table. None is confirmed here. Numbers with a question
mark come from copies of the paper's table that could not be checked.

| after the colon         | block                                                      | top-1   |
|-------------------------|------------------------------------------------------------|---------|
| `full`                  | 3x3, 1x1 and identity, each with a norm                    | 75.14   |
| `plain`                 | 3x3                                                        | 72.39   |
| `only_1x1`              | 3x3, 1x1                                                   | 73.15   |
| `only_identity`         | 3x3, identity                                              | 74.79   |
| `identity_without_norm` | 3x3, 1x1, the input itself                                 | 74.18 ? |
| `norm_after_sum`        | no norm in branches, one after their sum                   | 73.52 ? |
| `relu_in_branches`      | a ReLU after each norm; trains, but cannot be converted    | 75.69 ? |
| `diracnet`              | one 3x3 with the kernel of DiracNet, and a norm            | 73.97 ? |
| `trivial`               | one 3x3 with the kernel I + W, and a norm                  | 73.51 ? |
| `acb`                   | 3x3, 1x3, 3x1                                              | 73.58 ? |
| `residual_reorg`        | residual blocks of two 3x3, as in ResNet-18                | 74.56   |
| `dbb`                   | 3x3, 1x1, 1x1 and 3x3, 1x1 and average pool                | none    |
| `qarepvgg`              | 3x3 with a norm, 1x1, the input itself, a norm after all   | none    |

The last two are of later papers, see `common.ABLATIONS`; they give no number for this recipe.

  repjax train --config repvgg_b0_ablation
  repjax train --config repvgg_b0_ablation:plain
"""

import ml_collections

from repjax.configs import common


def get_config(ablation: str = "full") -> ml_collections.ConfigDict:
  """Returns the simple recipe for RepVGG-B0 with the blocks of an ablation."""
  config = common.get_config()
  config.model = "repvgg_b0"
  common.set_ablation(config, ablation)
  return config
