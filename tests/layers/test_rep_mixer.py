"""RepMixer is its equation, and folds into one depthwise convolution."""

import jax
import numpy as np
import pytest

from repjax.layers import RepMixer, fold_rep_mixer
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error

EPSILON = 1e-5


def normalise(x, bn, stats):
  scale = bn["scale"] / np.sqrt(stats["var"] + EPSILON)
  return (x - stats["mean"]) * scale + bn["bias"]


def by_definition(variables, x, size):
  """The training form in NumPy."""
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  mixed, channels = -normalise(x, params["bn"], stats["bn"]), x.shape[-1]
  for name, taps in ((f"conv{size}x{size}", size), ("conv1x1", 1)):
    held, pad = params["mixer"][name], taps // 2
    y = convolve(x, held["conv"]["kernel"], padding=(pad, pad), groups=channels)
    mixed = mixed + normalise(y, held["bn"], stats["mixer"][name]["bn"])
  bn = params["mixer"]["identity"]["bn"]
  mixed = mixed + normalise(x, bn, stats["mixer"]["identity"]["bn"])
  return x + params["layer_scale"]["gamma"] * mixed


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "shape"), [(3, (2, 5, 4, 6)), (5, (1, 3, 3, 2))], ids=str)
def test_both_forms_are_the_equation(size, shape):
  x = random_input(*shape)
  layer, deploy = (RepMixer(size, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)
  folded = fold_rep_mixer(variables["params"], variables["batch_stats"], EPSILON)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  trained = layer.apply(variables, x)
  assert relative_error(trained, by_definition(variables, x, size)) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), trained) <= 1e-12


def test_a_new_mixer_is_nearly_the_identity():
  x, layer = random_input(2, 4, 4, 3).astype("float32"), RepMixer()
  variables = layer.init(jax.random.key(0), x)
  assert 0 < relative_error(layer.apply(variables, x), x) < 1e-3


def test_trees_that_do_not_belong_together_are_refused():
  variables = random_variables(RepMixer(), random_input(1, 4, 4, 2).astype("float32"))
  stats = {name: held for name, held in variables["batch_stats"].items() if name != "bn"}
  with pytest.raises(ValueError, match="a RepMixer holds bn, layer_scale, mixer; got"):
    fold_rep_mixer(variables["params"], stats, EPSILON)
