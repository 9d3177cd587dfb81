"""The auxiliary head: its equation, and its disappearance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers import AuxHead, fold_aux_head
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(6, 4), (5, 3)], ids=str)
def test_logits_are_conv_norm_relu_mean_linear(size):
  x, head = random_input(2, *size, 4), AuxHead(3, **F64)
  variables = jax.tree.map(np.asarray, random_variables(head, x))
  params, conv = variables["params"], variables["params"]["RepConv_0"]["conv3x3"]
  stats = variables["batch_stats"]["RepConv_0"]["conv3x3"]["bn"]
  y = convolve(x, conv["conv"]["kernel"], strides=(2, 2), padding=(1, 1))
  y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * conv["bn"]["scale"] + conv["bn"]["bias"]
  expected = np.maximum(y, 0).mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
  assert relative_error(helpers.quick_jit(head.apply)(variables, x), expected) <= 1e-12


def test_training_updates_the_statistics():
  x, head = random_input(2, 4, 4, 4).astype("float32"), AuxHead(3)
  variables = random_variables(head, x)
  step = helpers.quick_jit(lambda v: head.apply(v, x, train=True, mutable=["batch_stats"]))
  _, updates = step(variables)
  old, new = helpers.leaves(variables["batch_stats"]), helpers.leaves(updates["batch_stats"])
  assert old.keys() == new.keys()
  assert all(np.abs(new[path] - old[path]).max() > 0 for path in old)


def test_the_fold_is_nothing():
  variables = random_variables(AuxHead(3), jnp.ones((1, 4, 4, 4)))
  assert fold_aux_head(variables["params"], variables["batch_stats"], 1e-5) is None
