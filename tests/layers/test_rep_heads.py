"""RepHeads is the mean of classifiers with norms, and folds into one fully connected layer."""

import jax
import numpy as np
import pytest

from repjax.errors import InputError
from repjax.layers import RepHeads, expand_rep_heads, fold_rep_heads
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_both_forms_are_the_mean_of_the_classifiers(heads):
  x = random_input(4, 6)
  layer, deploy = (RepHeads(5, heads, deploy=form, **F64) for form in (False, True))
  variables = random_variables(layer, x)
  folded = fold_rep_heads(variables["params"], variables["batch_stats"], EPSILON)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  expected = 0
  for name, held in params.items():
    bn, own = held["bn"], stats[name]["bn"]
    normed = (x - own["mean"]) / np.sqrt(own["var"] + EPSILON) * bn["scale"] + bn["bias"]
    expected = expected + (normed @ held["dense"]["kernel"] + held["dense"]["bias"]) / heads
  assert relative_error(layer.apply(variables, x), expected) <= 1e-12
  assert relative_error(deploy.apply({"params": folded}, x), expected) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_expanded_classifiers_differ():
  # Equal ones would have equal gradients, and stay equal.
  x, layer = random_input(4, 6), RepHeads(5, 2, **F64)
  variables = random_variables(layer, x)
  deploy = fold_rep_heads(variables["params"], variables["batch_stats"], EPSILON)
  shapes = helpers.init_shapes(layer, x)["params"]
  fresh = {name: {"bn": {"mean": np.zeros(6), "var": np.ones(6)}} for name in shapes}
  found = expand_rep_heads(deploy, shapes, fresh, EPSILON, jax.random.key(0))
  kernels = [held["dense"]["kernel"] for held in found.values()]
  assert 0.01 < relative_error(*kernels) < 1
  back = fold_rep_heads(found, fresh, EPSILON)
  assert relative_error(back["dense"]["kernel"], deploy["dense"]["kernel"]) <= 1e-12


def test_no_heads_are_refused():
  with pytest.raises(InputError, match="heads must be at least 1, got 0"):
    helpers.init_shapes(RepHeads(5, 0), np.ones((1, 4), np.float32))


def test_trees_that_do_not_belong_together_are_refused():
  variables = random_variables(RepHeads(5, 2), np.ones((2, 4), np.float32))
  with pytest.raises(ValueError, match="RepHeads hold head0, head1"):
    fold_rep_heads(variables["params"], {"head0": variables["batch_stats"]["head0"]}, EPSILON)
