"""The models of this package: fusing the training form gives the kernels of the deploy form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.fusion.report import counts_of
from repjax.program import flat
from tests.fusion.roads import unmatched
from tests.helpers import F64, assert_close, quick_jit, random_variables
from tests.models.families import FAMILIES, small

pytestmark = pytest.mark.usefixtures("x64")

# Where fuse puts a norm elsewhere than the layers' own folds: before a mean over pixels, a fold
# merges the norm into the fully connected layer after the mean. Fuse keeps it before the mean.
ELSEWHERE = {
  "repmlp_resnet50_light": ("GlobalPerceptron",),
  "repmlp_cifar": ("GlobalPerceptron",),
  "repmlpnet_t224": ("RepHead", "project"),
  "parnet_s": ("SkipSqueezeExcite",),
}
# Layers wide enough to have more than one channel in each group.
WIDER = {"repmlp_resnet50_light": {"widths": (16, 32, 32, 32)}}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_roads_give_the_same_kernels(name):
  settings = WIDER.get(name, {}) | F64
  model, deploy = small(name, **settings), small(name, deploy=True, **settings)
  # ParNet's last average pools must not cover a whole map: their divisor could depend on the size.
  size = 128 if name == "parnet_s" else 64
  images = jnp.zeros((1, size, size, 3))
  variables = random_variables(model, images)
  fused = repjax.fuse(lambda held, x: model.apply(held, x), variables, images, check=False)
  folded = fused.fold(variables)
  params = repjax.reparameterize(variables["params"], variables.get("batch_stats", {}))
  lost = unmatched(params, folded, 1e-12)
  assert all(any(part in path for part in ELSEWHERE.get(name, ())) for path in lost), lost
  plain = jax.make_jaxpr(lambda held, x: deploy.apply({"params": held}, x))(params, images)
  products = sum(counts_of(equation).products for equation in flat(plain).equations)
  assert fused.report.after.products == products
  x = jnp.asarray(np.random.default_rng(0).normal(size=images.shape))
  assert_close(quick_jit(fused)(folded, x), quick_jit(model.apply)(variables, x), 1e-12)
