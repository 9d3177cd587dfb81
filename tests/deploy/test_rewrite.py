"""Programs whose convolutions are computed otherwise compute the same."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import repjax
from repjax.deploy import rewrite
from repjax.deploy.convolutions import ALGORITHMS, suitable
from repjax.program import trace
from tests.helpers import assert_close, random_variables

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


class Several(nn.Module):
  """Convolutions of many kinds; the scopes of those that cannot be replaced say why."""

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, param_dtype=x.dtype)
    x = conv(8, (3, 3), padding=1, name="first")(x)
    x = nn.Sequential([conv(16, (3, 3), feature_group_count=2, use_bias=False)])(x)
    x = conv(16, (3, 3), name="plain")(x)
    x = conv(16, (3, 3), strides=2, padding="SAME", name="same")(x)
    x = conv(16, (2, 2), padding="VALID", name="valid")(x)
    x = conv(16, (1, 1), name="small")(x)
    x = conv(16, (3, 3), padding=[(0, 1), (2, 1)], kernel_dilation=2, name="dilated")(x)
    x = conv(16, (3, 3), padding="CIRCULAR", name="not_zeros")(x)
    x = conv(16, (3, 3), mask=np.ones((3, 3, 16, 16)), name="masked")(x)
    x = nn.ConvTranspose(16, (3, 3), param_dtype=x.dtype, name="transposed")(x)
    twice = conv(16, (3, 3), name="two_shapes")
    return twice(x).mean((1, 2)) + twice(x[:, 1:]).mean((1, 2)) + conv(16, 3)(x[:, 0])[:, 0]


@pytest.fixture
def several(x64):
  del x64
  x = np.random.default_rng(0).standard_normal((2, 13, 12, 3))
  return Several(), random_variables(Several(), x), x


def test_what_can_be_replaced_is_found(several):
  model, variables, x = several
  found = rewrite.convolutions_in(model.apply, variables, x)
  by_name = {rewrite.scope_of(name): one for name, one in found.items()}
  assert {name: one.kernel for name, one in by_name.items()} == {
    "first": (3, 3, 3, 8),
    "Conv_0": (3, 3, 4, 16),
    "plain": (3, 3, 16, 16),
    "same": (3, 3, 16, 16),
    "valid": (2, 2, 16, 16),
    "small": (1, 1, 16, 16),
    "dilated": (3, 3, 16, 16),
    "not_zeros": (3, 3, 16, 16),  # the border is padded before the convolution
    "transposed": (3, 3, 16, 16),  # at stride 1 a plain convolution
  }
  assert rewrite.convolutions_in(model.apply, variables, x) == found  # however often it is asked
  assert by_name["Conv_0"].groups == 2
  assert by_name["same"].strides == (2, 2)
  assert by_name["same"].padding == ((1, 1), (0, 1))  # rows are odd here and columns even
  assert by_name["dilated"].padding == ((0, 1), (2, 1))
  assert by_name["dilated"].dilation == (2, 2)


@pytest.mark.parametrize("place", range(len(ALGORITHMS)))
def test_all_ways_give_the_same(several, place):
  model, variables, x = several
  found = rewrite.convolutions_in(model.apply, variables, x)
  choices = {}
  for path, one in found.items():
    names = suitable(one._replace(dtype="float32"))
    choices[path] = names[min(place, len(names) - 1)]
  kernels = {
    path: rewrite.prepare_kernel(rewrite.kernel_of(variables, path), name, found[path])
    for path, name in choices.items()
  }
  tree = rewrite.with_kernels(variables, kernels)
  y = jax.jit(rewrite.computed_by(model.apply, variables, choices, found))(tree, x)
  assert_close(y, model.apply(variables, x), 1e-12)
  assert len(set(choices.values())) == min(place + 1, 3)


def test_every_convolution_of_a_deploy_form_is_found():
  model = repjax.create_model("repvgg_b1g4", deploy=True)
  shapes = repjax.spec.shapes_of(model, 64)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  found = rewrite.convolutions_in(model.apply, shapes, images)
  assert len(found) == 28
  assert {one.groups for one in found.values()} == {1, 4}


class Altered(nn.Module):
  """Convolutions whose kernels are not the tree's leaves, or are read elsewhere too."""

  @nn.compact
  def __call__(self, x):
    dtype = {"param_dtype": x.dtype}
    x = nn.WeightNorm(nn.Conv(8, (3, 3), name="normed", **dtype), **dtype)(x)
    scaled = nn.map_variables(
      nn.Conv, "params", lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), init=True
    )
    x = scaled(8, (3, 3), name="scaled", **dtype)(x)
    own = nn.Conv(8, (3, 3), name="promoted", promote_dtype=promoted, **dtype)
    x = own(x)
    x = nn.Conv(8, (3, 3), name="half", dtype=np.float32, **dtype)(x).astype(x.dtype)
    read = nn.Conv(8, (3, 3), name="read", **dtype)
    x = read(x)
    x = nn.Conv(8, (3, 3), name="by_name", **dtype)(inputs=x)
    return x.mean((1, 2)) * read.variables["params"]["kernel"].sum()


def promoted(*values, dtype=None, inexact=True):
  del dtype, inexact
  return values


def test_kernels_that_are_altered_or_read_elsewhere_are_left_alone(x64):
  del x64
  x = np.random.default_rng(0).standard_normal((2, 9, 9, 8))
  variables = Altered().init(jax.random.key(0), x)
  found = rewrite.convolutions_in(Altered().apply, variables, x)
  names = ["params/promoted/kernel", "params/by_name/kernel"]
  assert list(found) == names
  choices = dict.fromkeys(names, "winograd2")
  kernels = {
    name: rewrite.prepare_kernel(rewrite.kernel_of(variables, name), "winograd2", found[name])
    for name in names
  }
  tree = rewrite.with_kernels(variables, kernels)
  y = rewrite.computed_by(Altered().apply, variables, choices, found)(tree, x)
  assert_close(y, Altered().apply(variables, x), 1e-6)  # a part of it is in float32


def channels_first(tree, x):
  """Two layers over (N, C, H, W)."""
  layout = ("NCHW", "OIHW", "NCHW")
  for kernel in (tree["first"], tree["second"]):
    groups = x.shape[1] // kernel.shape[1]
    x = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )
  return x.mean((2, 3))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_channels_may_come_first(x64, name):
  del x64
  rng = np.random.default_rng(0)
  depth, features = (1, 16) if name == "shifts" else (8, 9)
  second = rng.standard_normal((features, depth, 3, 3))
  tree = {"first": rng.standard_normal((8, 3, 3, 3)), "second": second}
  x = rng.standard_normal((2, 3, 7, 6))
  found = rewrite.convolutions_in(channels_first, tree, x)
  assert found["second"].images == (2, 7, 6, 8)
  assert found["second"].shape == (2, 8, 7, 6)
  assert found["second"].kernel == (3, 3, depth, features)
  assert found["second"].kernel_shape == (features, depth, 3, 3)
  kernel = rewrite.prepare_kernel(tree["second"], name, found["second"])
  prepared = rewrite.with_kernels(tree, {"second": kernel})
  y = rewrite.computed_by(channels_first, tree, {"second": name}, found)(prepared, x)
  assert_close(y, channels_first(tree, x), 1e-12)


class Depthwise(nn.Module):
  """Depthwise convolutions, and two that cannot be sums: one of groups and one of NCHW."""

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(nn.Conv, param_dtype=x.dtype, use_bias=False)
    x = conv(8, (3, 3), name="dense")(x)
    x = conv(8, (3, 3), feature_group_count=8, name="plain")(x)
    x = conv(24, (3, 5), strides=(2, 1), feature_group_count=8, padding="SAME", name="wide")(x)
    x = conv(24, (3, 3), kernel_dilation=2, feature_group_count=24, name="dilated")(x)
    x = conv(24, (7, 7), feature_group_count=24, name="large")(x)
    x = conv(24, (3, 3), feature_group_count=12, name="groups")(x)
    kernel = self.param("kernel", nn.initializers.ones, (24, 1, 3, 3), x.dtype)
    x = jax.lax.conv_general_dilated(
      *(x, kernel / 2, (1, 1), "SAME"),
      dimension_numbers=("NHWC", "OIHW", "NHWC"),
      feature_group_count=24,
    )
    return jax.lax.conv_general_dilated(
      *(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME"),
      dimension_numbers=("NCHW", "OIHW", "NCHW"),
      feature_group_count=24,
    ).mean((2, 3))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_depthwise_convolutions_as_sums(x64, dtype):
  del x64
  x = np.random.default_rng(0).standard_normal((2, 13, 12, 3)).astype(dtype)
  variables = jax.tree.map(lambda leaf: leaf.astype(dtype), random_variables(Depthwise(), x))
  apply = Depthwise().apply
  found = rewrite.depthwise_in(apply, variables, x)
  computed = next(iter(found.keys() - {"plain", "wide", "dilated", "large"}))
  assert found == {"plain": 9, "wide": 15, "dilated": 9, "large": 49, computed: 9}
  expected = jax.jit(apply)(variables, x)
  for most_taps, left in ((9, 5), (25, 4), (49, 3)):
    summed = rewrite.with_depthwise_sums(apply, most_taps)
    names = [each.primitive for each in trace(summed, variables, x).equations]
    assert names.count("conv_general_dilated") == left
    assert_close(jax.jit(summed)(variables, x), expected, 1e-12 if dtype == "float64" else 5e-2)


def test_every_depthwise_convolution_counts_where_modules_have_no_scopes():
  def network(kernels, x):
    for kernel in kernels:
      x = jax.lax.conv_general_dilated(
        *(x, kernel.astype(x.dtype), (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
      )
    return x

  kernels = [np.ones((side, side, 1, 3), np.float32) for side in (7, 3, 5)]
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jax.numpy.bfloat16)
  assert sorted(rewrite.depthwise_in(network, kernels, x).values()) == [9, 25, 49]
