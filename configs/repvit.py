"""RepViT on ImageNet at 224 px; the size of the network follows a colon.

Recipe: the authors' script, as far as it can be said in fields. 300 epochs, batch 2048, AdamW with
cosine from 4e-3 to 1e-5 after 5 epochs of warm-up, weight decay 0.025, adaptive clipping of
gradients at 0.02. Images: crop and flip, RandAugment of magnitude 9 with noise 0.5, random erasing
0.25, mixup 0.8, CutMix 1.0. An epoch shows a third of the images, three times each. Loss and
weights: label smoothing 0.1, a moving average of parameters (0.99996). One part of the script is
not built, so that its numbers are not to be expected in full. The second classifier learns from a
teacher (RegNetY-16GF) there; here both classifiers learn the labels.
What is confirmed: the numbers are in the authors' command or in the defaults of their script. There
is no drop path and no change of the image size. The script leaves out its scheduler's cool-down of
10 epochs, and the authors' logs end after 300 epochs. Its flag for repeated augmentation is on. The
file of its sampler could not be read; DeiT's sampler of this name takes three copies. The script
evaluates the parameters themselves, and not their average.
Paper: Wang et al., RepViT, CVPR 2024, section 4. https://arxiv.org/abs/2307.09283
Source: https://github.com/THU-MIG/RepViT at 8df4270, main.py, engine.py, logs and README (`m1` to
`m3`); README at 298f420 (the others); https://github.com/facebookresearch/deit at 0c4b8f6,
samplers.py
Expected: the authors' top-1 at 224 px in the table, with a teacher. None is confirmed here. `m1` to
`m3` are the names of the first version of the paper.

| after the colon | top-1 after 300 epochs | after 450 epochs |
|-----------------|------------------------|------------------|
| `m0_9`          | 78.7                   | 79.1             |
| `m1_0`          | 80.0                   | 80.3             |
| `m1_1`          | 80.7                   | 81.2             |
| `m1_5`          | 82.3                   | 82.5             |
| `m2_3`          | 83.3                   | 83.7             |
| `m1`            | 78.5                   |                  |
| `m2`            | 80.6                   |                  |
| `m3`            | 81.4                   |                  |

  repjax train --config repvit
  repjax train --config repvit:m1_1
"""

import ml_collections

from repjax.configs import common


def get_config(size: str = "m0_9") -> ml_collections.ConfigDict:
  """Returns the recipe of the authors for a RepViT, by the end of its name."""
  config = common.get_timm_config(batch_size=2048, rate=4e-3)
  config.model = common.variant("repvit", size)
  config.resize_size = 235  # a crop of 0.95 in evaluation
  config.weight_decay = 0.025
  config.adaptive_clip = 0.02
  config.augment_repeats = 3
  config.mixup = 0.8
  config.ema_decay = 0.99996
  return config
