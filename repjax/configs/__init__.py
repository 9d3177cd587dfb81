"""The training recipes, importable as `repjax.configs.NAME`.

A wheel carries the recipes in this folder. In a checkout they lie in the folder `configs/` beside
the package.
"""

from pathlib import Path

_HERE = Path(__file__).parent
# Beside an installed package, a folder `configs` belongs to a different project, whose code must
# not run in place of a recipe.
if not (_HERE / "common.py").exists():
  __path__.append(str(_HERE.parents[1] / "configs"))
