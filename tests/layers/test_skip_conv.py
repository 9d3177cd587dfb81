"""SkipConv is a convolution and its input, and folds into the convolution."""

import jax
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.layers import ConvFFN, RepMixer, SkipConv, fold_skip_conv
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "shape"), [(7, (2, 5, 4, 3)), (3, (1, 1, 2, 4))], ids=str)
def test_both_forms_are_the_equation(size, shape):
  x = random_input(*shape)
  layer, deploy = (SkipConv(size, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)
  folded = fold_skip_conv(variables["params"], variables["batch_stats"], 1e-5)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  held = variables["params"]["inner"]
  pad = (size // 2, size // 2)
  expected = x + convolve(x, held["kernel"], held["bias"], padding=pad, groups=x.shape[-1])
  assert relative_error(layer.apply(variables, x), expected) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), expected) <= 1e-12


def test_the_note_tells_the_training_form():
  x, layer = random_input(1, 4, 4, 2).astype("float32"), SkipConv(3, name="SkipConv_0")
  variables = layer.init(jax.random.key(0), x)
  assert variables["batch_stats"] == {"skip": 1.0}
  params, stats = ({"SkipConv_0": variables[key]} for key in ("params", "batch_stats"))
  assert repjax.reparameterize(params, stats)["SkipConv_0"].keys() == {"conv"}
  with pytest.raises(ValueError, match=r"SkipConv_0 is in training form .* no batch statistics"):
    repjax.reparameterize(params, {})
  other = {"block": {"inner": variables["params"]["inner"]}}
  assert repjax.reparameterize(other, {})["block"].keys() == {"inner"}


@pytest.mark.parametrize("layer", [ConvFFN, RepMixer, SkipConv])
@pytest.mark.parametrize("deploy", [False, True])
def test_an_even_kernel_would_change_the_size_of_maps(layer, deploy):
  with pytest.raises(InputError, match=r"odd number of taps.* got 4"):
    helpers.init_shapes(layer(size=4, deploy=deploy), np.ones((1, 4, 4, 2), np.float32))


def test_trees_that_do_not_belong_together_are_refused():
  variables = random_variables(SkipConv(3), np.ones((1, 4, 4, 2), np.float32))
  with pytest.raises(ValueError, match="a SkipConv holds inner, and the note skip"):
    fold_skip_conv(variables["params"], {}, 1e-5)
