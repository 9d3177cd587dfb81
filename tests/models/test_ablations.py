"""The ablations of RepVGG: each trains and converts, but for a ReLU in the branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.configs import common
from repjax.errors import InputError
from tests import helpers
from tests.helpers import F64, halves, random_input, random_variables, relative_error
from tests.models.families import FAMILIES

SMALL = FAMILIES["repvgg_a0"].overrides | {"num_classes": 3, "strides": (2, 1, 2, 1, 2)}
SMALL |= {"stage_sizes": (2, 3, 1, 1)}
CONVERTED = sorted(common.ABLATIONS.keys() - {"relu_in_branches"})
DIFFERENT = {"dbb", "norm_after_sum", "relu_in_branches", "residual_reorg"}
X = random_input(2, 9, 8, 3)


def small(name, **attributes):
  return repjax.create_model("repvgg_a0", **SMALL | dict(common.ABLATIONS[name]) | attributes)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", helpers.spread(CONVERTED, DIFFERENT & {*CONVERTED}))
def test_both_forms_agree_and_the_deploy_form_is_plain(name):
  assert helpers.forms_differ_by(small(name, **F64), X) <= 1e-12
  deployed = helpers.init_shapes(small(name, deploy=True), X.astype("float32"))["params"]
  plain = helpers.init_shapes(small("plain", deploy=True), X.astype("float32"))["params"]
  assert (helpers.shapes(deployed) == helpers.shapes(plain)) == (name != "residual_reorg")


@pytest.mark.parametrize("name", helpers.spread(common.ABLATIONS, DIFFERENT - {"dbb"}))
def test_a_step_moves_every_parameter_and_every_statistic(name):
  model, x = small(name), X.astype("float32")
  variables = repjax.init(model, jax.random.key(0), X.shape[1:3])
  assert helpers.shapes(variables) == helpers.shapes(helpers.init_shapes(model, x))

  @helpers.quick_jit
  @functools.partial(jax.grad, has_aux=True)
  def step(params, stats):
    variables = {"params": params, "batch_stats": stats}
    logits, updates = model.apply(variables, x, True, mutable=["batch_stats"])
    return jnp.square(logits - jnp.arange(3.0)[None]).sum(), updates["batch_stats"]

  gradients, stats = step(*halves(variables))
  for path, gradient in helpers.leaves(gradients).items():
    assert np.isfinite(gradient).all(), path
    assert np.any(gradient) or path.startswith("stage4"), path  # whose maps may have one pixel
  before = helpers.leaves(variables["batch_stats"])
  for path, after in helpers.leaves(stats).items():
    moves = path.endswith(("mean", "var"))  # and notes stay
    assert np.array_equal(after, before[path]) != moves, path


def test_a_relu_in_the_branches_is_refused_by_name():
  model = small("relu_in_branches")
  variables = random_variables(model, X.astype("float32"))
  with pytest.raises(InputError, match=r"/RepConv_0: conv.*_relu has a ReLU") as told:
    repjax.reparameterize(*halves(variables))
  helpers.assert_one_paragraph(told.value)
  with pytest.raises(InputError, match="no deploy form"):
    helpers.init_shapes(small("relu_in_branches", deploy=True), X.astype("float32"))


def test_blocks_that_change_the_shape_have_no_branch_without_a_convolution():
  model = small("qarepvgg")
  stats = helpers.init_shapes(model, X.astype("float32"))["batch_stats"]
  blocks = {
    f"{stage}/{block}": "skip" in held["RepConv_0"]
    for stage, scope in stats.items()
    for block, held in (scope.items() if stage != "stem" else [("", scope)])
  }
  assert [name for name, has_skip in blocks.items() if has_skip] == [
    *("stage1/block0", "stage1/block1", "stage2/block1", "stage2/block2"),
  ]


def test_residual_blocks_take_two_layers_each():
  shapes = helpers.init_shapes(small("residual_reorg"), X.astype("float32"))["params"]
  layers = {f"{stage}/{block}": sorted(held) for stage, block, held in _blocks(shapes)}
  pair = ["RepConv_conv1", "RepConv_conv2"]
  assert layers == {
    "stage1/block0": [*pair, "RepConv_shortcut"],
    "stage2/block0": [*pair, "RepConv_shortcut"],
    "stage2/block1": ["RepConv_0"],
    "stage3/block0": ["RepConv_0"],
    "stage4/block0": ["RepConv_0"],
  }
  full = {"stage_sizes": (4, 6, 16, 1), "branches": ("conv3x3",), "residual": True}
  network = helpers.init_shapes(
    repjax.create_model("repvgg_b0", **full), jnp.ones((1, 32, 32, 3), jnp.float32)
  )["params"]
  assert [len(network[f"stage{n}"]) for n in (1, 2, 3, 4)] == [2, 3, 8, 1]


def _blocks(params):
  """Yields stage, block and content of every block of a stage."""
  for stage, scope in params.items():
    if stage.startswith("stage"):
      for block, held in scope.items():
        yield stage, block, held


@pytest.mark.usefixtures("x64")
def test_trivial_is_a_convolution_with_an_identity_in_its_kernel():
  model = small("trivial", **F64)
  variables = random_variables(model, X)
  held = variables["params"]["stage1"]["block1"]["RepConv_0"]
  stats = variables["batch_stats"]["stage1"]["block1"]["RepConv_0"]
  folded = repjax.reparameterize(*halves(variables))["stage1"]["block1"]["RepConv_0"]["conv"]
  kernel = np.array(held["conv3x3"]["conv"]["kernel"])
  kernel[1, 1] += np.eye(kernel.shape[-1])
  scale = np.asarray(held["bn"]["scale"]) / np.sqrt(np.asarray(stats["bn"]["var"]) + 1e-5)
  assert relative_error(folded["kernel"], kernel * scale) <= 1e-12


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"norm": ("conv5x5",)}, "norm takes some of"),
    ({"norm": ()}, "norm takes some of"),
    ({"residual": True}, "residual is for plain networks"),
    ({"residual": True, "branches": ("conv3x3",), "se": "pre"}, "residual is for plain networks"),
    ({"branches": ("conv3x3", "conv33x33")}, "3 to 31 taps"),
    ({"branches": ("conv3x3", "conv3x3_d99")}, "3 to 31 taps"),
    ({"branches": ("conv1x1", "identity")}, "3 to 31 taps"),
    ({"branches": ("conv4x4",)}, "3 to 31 taps"),
    ({"branches": ("conv3x3", "conv3x3")}, "different names"),
    ({"branches": "conv3x3"}, "branches"),
    ({"branches": ("conv3x3", "pool")}, "unknown branch 'pool'"),
  ],
  ids=str,
)
def test_overrides_that_make_no_network_are_named(overrides, words):
  with pytest.raises(InputError, match=words) as told:
    repjax.create_model("repvgg_a0", **overrides)
  helpers.assert_one_paragraph(told.value)
