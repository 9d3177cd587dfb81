"""Gates compute what their equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers import SqueezeExcite
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(3, 5), (1, 6), (4, 4)], ids=str)
def test_squeeze_excite_is_its_equation_on_oblong_maps_too(size):
  x, layer = random_input(2, *size, 16), SqueezeExcite(4, **F64)
  variables = random_variables(layer, x)
  down, up = (jax.tree.map(np.asarray, variables["params"][name]) for name in ("down", "up"))
  assert down["kernel"].shape == (16, 4)
  hidden = np.maximum(x.mean((1, 2)) @ down["kernel"] + down["bias"], 0)
  gate = 1 / (1 + np.exp(-(hidden @ up["kernel"] + up["bias"])))
  assert relative_error(layer.apply(variables, x), x * gate[:, None, None, :]) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_squeeze_excite_may_look_at_another_map_than_it_scales():
  # The Global Perceptron of RepMLPNet.
  x, z, layer = random_input(2, 3, 5, 8), random_input(2, 4, 6, 8, seed=2), SqueezeExcite(4, **F64)
  variables = random_variables(layer, x)
  scaled, gated = layer.apply(variables, x, z), layer.apply(variables, z)
  gate = np.asarray(gated / z)[:, 0, 0]  # (N, C)
  assert relative_error(scaled, x * gate[:, None, None, :]) <= 1e-12


@pytest.mark.parametrize(
  ("features", "reduction", "hidden"), [(16, 16, 1), (20, 16, 1), (40, 16, 2)]
)
def test_hidden_channels_are_rounded_down(features, reduction, hidden):
  variables = helpers.init_shapes(SqueezeExcite(reduction), jnp.ones((1, 2, 2, features)))
  assert variables["params"]["down"]["kernel"].shape == (features, hidden)


def test_no_hidden_channel_is_refused():
  with pytest.raises(ValueError, match="8 channels reduced 16 times"):
    helpers.init_shapes(SqueezeExcite(16), jnp.ones((1, 2, 2, 8)))


def test_bfloat16_computation_keeps_float32_parameters():
  x, layer = jnp.ones((1, 2, 2, 8), jnp.bfloat16), SqueezeExcite(4, dtype=jnp.bfloat16)
  variables = helpers.init_shapes(layer, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
  assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16
