"""Both forms agree in float32 in programs that XLA optimizes, as they are for users."""

import jax
import numpy as np
import pytest

import repjax
from tests.helpers import assert_close, halves, quick_jit, random_variables, spread

ONE_EACH = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 8, 8)}
SMALL = {
  "repvgg_d2se": {
    "stage_sizes": (1, 1, 1, 1),
    "width_multipliers": (0.125,) * 4,
    "se_reduction": 2,
  },
  "repmlp_cifar": {"stage_sizes": (1, 1), "widths": (4, 4), "tile": 4, "local_kernels": (1, 3)},
  "repmlpnet_t224": {
    "stage_sizes": (1, 1),
    "widths": (8, 16),
    "tiles": (4, 2),
    "share_sets": (1, 2),
  },
  "parnet_s": {"stage_sizes": (1, 1, 1), "widths": (8, 8, 8, 8)},
  "resnet18": ONE_EACH | {"stem_features": 8},
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", spread(SMALL, ["repvgg_d2se", "repmlp_cifar", "parnet_s"]))
def test_the_deploy_form_computes_the_same_in_float32(name):
  model = repjax.create_model(name, num_classes=5, **SMALL[name])
  images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
  variables = random_variables(model, images)
  params = quick_jit(repjax.reparameterize)(*halves(variables))
  users = jax.jit(
    lambda deploy, *trees: model.clone(deploy=deploy).apply(*trees),
    static_argnums=0,
  )
  assert_close(users(True, {"params": params}, images), users(False, variables, images), 1e-5)
