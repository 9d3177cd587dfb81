"""Activations by name."""

import math

import numpy as np
import pytest

from repjax.layers import activation

X = np.linspace(-3, 3, 13, dtype=np.float32)


@pytest.mark.parametrize(
  ("name", "law"),
  [
    ("relu", lambda x: max(x, 0)),
    ("silu", lambda x: x / (1 + math.exp(-x))),
    # The exact form: the tanh approximation differs from it by up to 5e-4.
    ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
  ],
)
def test_activation_is_its_equation(name, law):
  np.testing.assert_allclose(activation(name)(X), [law(x) for x in X.tolist()], atol=1e-6)


def test_an_unknown_activation_lists_close_ones():
  with pytest.raises(ValueError, match="unknown activation 'swilu'; did you mean silu"):
    activation("swilu")
