"""Networks of other people's styles: the fused function is the same at two sizes.

`python scripts/prove_fuse.py --networks` compares them at four.
"""

import pytest

from tests.fusion.nets import fused_error, lenient, nets

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", nets())
def test_the_fused_network_computes_the_same(name):
  with lenient():
    net = nets()[name]()
    error, fused = fused_error(net, net.sizes[::2])
  assert error <= net.tolerance
  assert (fused.report.before.products, fused.report.after.products) == net.products
  assert len(fused.report.norms) == net.norms
  assert fused.report.after.multiplications <= fused.report.before.multiplications
