"""The training recipes, importable as `repjax.configs.NAME`.

The files lie in the folder `configs/` of a checkout. A wheel carries them in this folder.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "configs"
if _CHECKOUT.is_dir():
  __path__.append(str(_CHECKOUT))
