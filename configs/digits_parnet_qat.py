"""The digits' ParNet in 8 bits: quantization-aware fine-tuning behind digits_parnet.py.

python main.py --config configs/digits_parnet.py
python main.py --config configs/digits_parnet_qat.py
"""

import ml_collections

from repjax.configs import digits_parnet, digits_qat


def get_config() -> ml_collections.ConfigDict:
  """That recipe, from there, in 8 bits."""
  return digits_qat.in_8_bits(digits_parnet.get_config(), "runs/digits_parnet")
