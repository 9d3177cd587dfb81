"""Compares the two roads to a deploy form: the layers' own folds, and `repjax.fuse`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.helpers import leaves


def unmatched(params: Any, folded: Mapping[str, Any], tolerance: float) -> list[str]:
  """Returns the kernels of a deploy form that no folded array equals.

  Two arrays are equal if one is the other, reshaped or transposed: their sorted numbers agree.
  Biases are left out, since fuse adds the biases of two layers whose results are added.

  Args:
    params: the parameters of the deploy form.
    folded: what the fold of a fused training form returned.
    tolerance: largest difference, relative to the largest number.
  """
  rest = [np.sort(np.ravel(array)) for array in folded.values()]
  lost = []
  for path, leaf in leaves(params).items():
    wanted = np.sort(np.ravel(leaf))
    if path.endswith("bias"):
      continue
    for place, mine in enumerate(rest):
      if (
        mine.shape == wanted.shape
        and np.abs(mine - wanted).max() <= tolerance * np.abs(wanted).max()
      ):
        del rest[place]
        break
    else:
      lost.append(path)
  return lost
