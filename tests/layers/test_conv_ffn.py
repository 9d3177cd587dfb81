"""ConvFFN is its equation; its norm and its factors fold into its layers."""

import math

import jax
import numpy as np
import pytest

from repjax.layers import ConvFFN, fold_conv_ffn
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error

EPSILON = 1e-5
ACTIVATIONS = {
  "relu": lambda x: np.maximum(x, 0),
  "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def by_definition(variables, x, size, act):
  """The training form in NumPy."""
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  held = params["spatial"][f"conv{size}x{size}"]
  own, pad = stats["spatial"][f"conv{size}x{size}"]["bn"], size // 2
  y = convolve(x, held["conv"]["kernel"], padding=(pad, pad), groups=x.shape[-1])
  y = (y - own["mean"]) / np.sqrt(own["var"] + EPSILON) * held["bn"]["scale"] + held["bn"]["bias"]
  fc1, fc2 = params["dense"]["fc1"], params["dense"]["fc2"]
  y = ACTIVATIONS[act](y @ fc1["kernel"] + fc1["bias"]) @ fc2["kernel"] + fc2["bias"]
  return params["layer_scale"]["gamma"] * y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("expansion", "size", "act", "shape"),
  [(4, 7, "gelu", (2, 5, 4, 3)), (2, 3, "relu", (1, 2, 3, 4))],
  ids=str,
)
def test_both_forms_are_the_equation(expansion, size, act, shape):
  x = random_input(*shape)
  layer, deploy = (ConvFFN(expansion, size, act, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)
  folded = fold_conv_ffn(variables["params"], variables["batch_stats"], EPSILON)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  trained = layer.apply(variables, x)
  assert relative_error(trained, by_definition(variables, x, size, act)) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), trained) <= 1e-12


def test_trees_that_do_not_belong_together_are_refused():
  variables = random_variables(ConvFFN(), random_input(1, 4, 4, 2).astype("float32"))
  with pytest.raises(ValueError, match="a ConvFFN holds dense, layer_scale, spatial, with"):
    fold_conv_ffn(variables["params"], {}, EPSILON)
