"""Networks of other people's styles: the fused function is the same at two sizes.

`python scripts/prove_fuse.py --networks` compares them at more.
"""

import jax
import numpy as np
import pytest

import repjax
from tests.fusion.nets import nets, randomised
from tests.helpers import quick_jit

pytestmark = pytest.mark.usefixtures("x64", "lenient")


@pytest.fixture
def lenient():
  """Allows what other people's networks do: promotion of ranks and dtypes."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def relative_error(results, wanted):
  """Returns the largest relative error among all results."""
  pairs = list(zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True))
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", nets())
def test_the_fused_network_computes_the_same(name):
  net = nets()[name]()
  params = randomised(net.params)
  fused = repjax.fuse(net.function, net.params, net.images(net.sizes[0]), check=False)
  small = fused.fold(params)
  # Compiled together, which takes less time than twice.
  both = quick_jit(lambda small, params, x: (fused(small, x), net.function(params, x)))
  for size in net.sizes[::2] if len(net.sizes) > 2 else net.sizes:
    assert relative_error(*both(small, params, net.images(size))) <= 1e-12
  products = fused.report.before.products, fused.report.after.products
  assert products == net.products
  assert len(fused.report.norms) == net.norms
  assert fused.report.after.multiplications <= fused.report.before.multiplications
