"""Models of published libraries: the fused function is the same at two even and two odd sizes.

`pip install -e '.[libraries]'` installs the libraries. A test is skipped if its library is not
there, so that `make test` needs none of them.
"""

import pytest

from tests.fusion.nets import fused_error, lenient
from tests.fusion.published import published

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", published())
def test_the_fused_model_computes_the_same(name):
  with lenient():
    net = published()[name]()
    error, fused = fused_error(net, net.sizes)
  assert error <= net.tolerance
  assert (fused.report.before.products, fused.report.after.products) == net.products
  assert len(fused.report.norms) == net.norms
  assert fused.report.after.multiplications <= fused.report.before.multiplications
