"""The digits' RepMLP in 8 bits: quantization-aware fine-tuning behind digits_repmlp.py.

python main.py --config configs/digits_repmlp.py
python main.py --config configs/digits_repmlp_qat.py
"""

import ml_collections

from repjax.configs import digits_qat, digits_repmlp


def get_config() -> ml_collections.ConfigDict:
  """That recipe, from there, in 8 bits."""
  return digits_qat.in_8_bits(digits_repmlp.get_config(), "runs/digits_repmlp")
