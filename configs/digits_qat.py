"""The digits' RepVGG in 8 bits: quantization-aware fine-tuning of what digits.py has trained.

python main.py --config configs/digits.py
python main.py --config configs/digits_qat.py
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  """That recipe, shorter and gentler."""
  config = digits.get_config()
  config.init_from = "runs/digits"
  config.qat = True
  config.num_epochs = 10.0
  config.learning_rate = 0.02
  return config
