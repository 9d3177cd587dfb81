"""Attributes of layers are checked by their annotations, when a layer is built."""

import jax.numpy as jnp
import pytest

from repjax import layers
from repjax.errors import InputError
from tests import helpers


@pytest.mark.parametrize(
  ("build", "said"),
  [
    (lambda: layers.RepDense(4, tile="a"), "tile of a RepDense must be .*got 'a'"),
    (lambda: layers.RepDense(4, tile=2, local_kernels=3), "local_kernels of a RepDense .*got 3"),
    (lambda: layers.RepDense(4, tile=2, groups=None), "groups of a RepDense .*got None"),
    (lambda: layers.RepHead("4"), "num_classes of a RepHead must be a whole number"),
    (lambda: layers.RepHead(4, dropout="a"), "dropout of a RepHead must be a finite number"),
    (lambda: layers.ScaledConv(4, strides=(1, 1)), "strides of a ScaledConv .*whole number"),
    (lambda: layers.ScaledConv(4, identity=3), "identity of a ScaledConv must be true or false"),
    (lambda: layers.GlobalPerceptron(2, reduction=None), "reduction of a GlobalPerceptron"),
    (lambda: layers.RepNorm(dtype=3), "^dtype takes a floating-point type"),
    (lambda: layers.RepConv(4, param_dtype=jnp.int32), "^param_dtype takes a floating-point type"),
  ],
)
def test_a_wrong_type_is_named(build, said):
  with pytest.raises(InputError, match=said) as told:
    build()
  helpers.assert_one_paragraph(told.value)
