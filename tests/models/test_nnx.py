"""Models in `nnx.bridge.ToNNX` train with NNX, and are converted like their own variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import repjax
from repjax.recognition import is_mark
from tests import helpers
from tests.helpers import F64, quick_jit, random_input, relative_error
from tests.models.families import THOROUGH, small

IMAGES = random_input(4, 32, 32, 3)
LABELS = np.array([0, 1, 2, 0])


def wrapped(model):
  """Returns a model in ToNNX, with shapes in place of arrays."""
  return nnx.eval_shape(
    lambda: nnx.bridge.ToNNX(model).lazy_init(jnp.asarray(IMAGES), rngs=nnx.Rngs(0))
  )


def random_model(model):
  """Returns a model in ToNNX with random variables."""
  bridged = wrapped(model)
  repjax.nnx.load(bridged, **helpers.randomise(helpers.init_shapes(model, IMAGES)))
  return bridged


def loss(model):
  """Returns the cross-entropies of a batch in training mode, and updates the statistics."""
  outputs = model(IMAGES, train=True, mutable=["batch_stats"], rngs=nnx.Rngs(dropout=0))
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  # A network that classifies pixels has the mean over them.
  rows = [logits.reshape(len(LABELS), -1, 3).mean(1) for logits in jax.tree.leaves(outputs)]
  return sum(cross_entropy(logits, LABELS).mean() for logits in rows)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", THOROUGH)
def test_a_bridged_model_takes_a_step_and_is_converted(name):
  linen = small(name, **F64)
  model = random_model(linen)
  optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
  graph, before = nnx.split((model, optimizer))

  @quick_jit
  def step(state):
    model, optimizer = nnx.merge(graph, state)
    grads = nnx.grad(loss)(model)
    optimizer.update(model, grads)
    halves = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    deploy = wrapped(small(name, deploy=True, **F64))
    repjax.nnx.load(deploy, repjax.reparameterize(*halves))
    return deploy(IMAGES), model(IMAGES), *halves

  folded, trained, params, stats = step(before)
  assert relative_error(folded, trained) <= 1e-12

  for collection, after in ((nnx.Param, params), (nnx.BatchStat, stats)):
    old, new = (nnx.to_pure_dict(tree) for tree in (nnx.state(model, collection), after))
    assert jax.tree.structure(old) == jax.tree.structure(new)
    same = helpers.leaves(jax.tree.map(np.array_equal, old, new))
    still = {path.split("/")[-1] for path, unchanged in same.items() if unchanged}
    assert {name for name in still if not is_mark(name)} <= {"bias"}
