"""The digits' RepVGG in 8 bits: quantization-aware fine-tuning behind digits.py.

python main.py --config configs/digits.py
python main.py --config configs/digits_qat.py
"""

import ml_collections

from repjax.configs import digits


def get_config() -> ml_collections.ConfigDict:
  """That recipe, from there, in 8 bits."""
  return in_8_bits(digits.get_config(), "runs/digits")


def in_8_bits(config: ml_collections.ConfigDict, trained: str) -> ml_collections.ConfigDict:
  """A recipe for what was trained by it: half as long, with a twentieth of the learning rate."""
  config.init_from = trained
  config.qat = True
  config.num_epochs = 10.0
  config.learning_rate = 0.02
  return config
