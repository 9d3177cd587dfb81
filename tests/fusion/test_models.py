"""The models of this package: fusing the training form gives the kernels of the deploy form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.fusion.report import counts_of
from repjax.program import flat
from tests.fusion.roads import unmatched
from tests.helpers import F64, assert_close, quick_jit, random_variables, spread
from tests.models.families import FAMILIES, small

pytestmark = pytest.mark.usefixtures("x64")

# Kernels that differ from those of the layers' own folds, although the function is the same.
ELSEWHERE = {
  # The sum over a tile is divided by its size in the kernel of the layer after it.
  "repmlp_resnet50_light": ("GlobalPerceptron",),
  "repmlp_cifar": ("GlobalPerceptron",),
  # The head's norm follows a sum with a convolution in it, and merges into the sum.
  "repmlpnet_t224": ("RepHead", "project"),
  # The gate also multiplies the norm's result, so that the norm stays in any case.
  "parnet_s": ("SkipSqueezeExcite",),
}
# Layers wide enough to have more than one channel in each group.
WIDER = {"repmlp_resnet50_light": {"widths": (16, 32, 32, 32)}}
# `scripts/prove_fuse.py` compares all models.
COMPARED = ("repvggplus_l2pse", "repmlp_resnet50_light", "parnet_s")
COMPARED += ("mobileone_s4", "repvit_m0_9", "fastvit_sa12", "pspnet")


def test_the_models_that_are_compared_are_families():
  assert {*COMPARED, *ELSEWHERE} <= {*FAMILIES}


@pytest.mark.parametrize("name", spread(COMPARED, ["parnet_s"]))
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
  both = quick_jit(lambda small, params, x: (fused(small, x), model.apply(params, x)))
  mine, wanted = both(folded, variables, x)
  assert_close(mine, wanted, 1e-12)
