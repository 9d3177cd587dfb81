"""The law that dilated networks obey, for networks whose maps end at strides of 4, 8, 16 and 32."""

from collections.abc import Callable
from typing import Any

from tests import helpers
from tests.helpers import init_shapes, quick_jit, random_input, random_variables

STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}


def dilated_maps(build: Callable[..., Any], output_stride: int) -> dict[str, Any]:
  """Checks that a dilated network has every pixel of the strided one, and returns its maps.

  Args:
    build: builds a network in float64 that returns its maps, given `output_stride` or nothing.
    output_stride: ratio of the size of the image to the size of the last map.
  """
  x, strided, dilated = random_input(1, 75, 64, 3), build(), build(output_stride=output_stride)
  variables = random_variables(strided, x)
  assert helpers.shapes(init_shapes(dilated, x)) == helpers.shapes(variables)

  @quick_jit
  def outputs(variables):
    return strided.apply(variables, x), dilated.apply(variables, x)

  coarse, fine = outputs(variables)
  for name, stride in {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}.items():
    step = max(1, stride // output_stride)
    helpers.assert_close(fine[name][:, ::step, ::step], coarse[name], 1e-12)
  return fine
