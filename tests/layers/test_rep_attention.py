"""RepAttention is its equation; its norm and its factors fold into its two layers."""

import jax
import numpy as np
import pytest

from repjax.errors import InputError
from repjax.layers import RepAttention, expand_rep_attention, fold_rep_attention
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5


def by_definition(variables, x, size):
  """The training form in NumPy, head by head."""
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  bn, own, (qkv, proj) = params["bn"], stats["bn"], (params["dense"][n] for n in ("qkv", "proj"))
  normed = (x - own["mean"]) / np.sqrt(own["var"] + EPSILON) * bn["scale"] + bn["bias"]
  channels = x.shape[-1]
  rows = normed.reshape(len(x), -1, channels) @ qkv["kernel"]
  queries, keys, values = np.split(rows, 3, axis=-1)
  mixed = np.empty_like(queries)
  for start in range(0, channels, size):
    head = slice(start, start + size)
    scores = queries[..., head] @ keys[..., head].transpose(0, 2, 1) / np.sqrt(size)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed[..., head] = shares / shares.sum(-1, keepdims=True) @ values[..., head]
  y = mixed @ proj["kernel"] + proj["bias"]
  return params["layer_scale"]["gamma"] * y.reshape(x.shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "shape"), [(2, (2, 3, 4, 6)), (4, (1, 1, 1, 4))], ids=str)
def test_both_forms_are_the_equation(size, shape):
  x = random_input(*shape)
  layer, deploy = (RepAttention(size, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)
  folded = fold_rep_attention(variables["params"], variables["batch_stats"], EPSILON)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  trained = layer.apply(variables, x)
  assert relative_error(trained, by_definition(variables, x, size)) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), trained) <= 1e-12


def test_channels_that_do_not_divide_into_heads_are_refused():
  with pytest.raises(InputError, match="6 channels do not divide into heads of 4"):
    helpers.init_shapes(RepAttention(4), np.ones((1, 2, 2, 6), np.float32))


def test_trees_that_do_not_belong_together_are_refused():
  variables = random_variables(RepAttention(2), random_input(1, 2, 2, 4).astype("float32"))
  with pytest.raises(ValueError, match="a RepAttention holds bn, dense, layer_scale, with"):
    fold_rep_attention(variables["params"], {}, EPSILON)


@pytest.mark.usefixtures("x64")
def test_expanded_channels_that_qkv_does_not_read_stay_finite():
  x, layer = random_input(1, 2, 2, 4), RepAttention(2, **F64)
  variables = random_variables(layer, x)
  folded = fold_rep_attention(variables["params"], variables["batch_stats"], EPSILON)
  qkv = folded["dense"]["qkv"]
  qkv["bias"] = qkv["bias"] - qkv["kernel"][1] * 2
  qkv["kernel"] = qkv["kernel"].at[1].set(0)
  fresh = {"bn": {"mean": np.zeros(4), "var": np.ones(4)}}
  shapes = helpers.init_shapes(layer, x)["params"]
  found = expand_rep_attention(folded, shapes, fresh, EPSILON, jax.random.key(0))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
