"""Costs of models: totals of the papers, and counts by hand for modules of any kind."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import repjax.models
from repjax import analysis, create_model
from repjax.analysis import Cost, StageCost, Summary, depth, format_summary, summary
from repjax.models.repvgg import RepVGG
from tests import helpers
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

A0_SHAPES = [(112, 112, 48), (56, 56, 48), (28, 28, 96), (14, 14, 192), (7, 7, 1280), (1000,)]


@functools.cache
def of(name):
  """Returns the summary of a model for an image of 224 px."""
  return summary(create_model(name), 224)


# One of the models that differ only in width. Names and shapes of all are in tests/weights.
KINDS = ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"]


@pytest.mark.parametrize("name", helpers.spread(KINDS, KINDS[:2]))
def test_totals_are_the_golden_ones(name):
  found, golden = of(name), helpers.counts()[name]
  assert found.train.params == golden["train_params"]
  assert found.train.macs == golden["train_macs"]
  assert found.deploy.params == golden["deploy_params"]
  assert found.deploy.macs == golden["deploy_macs"]
  assert found.deploy.winograd == golden["deploy_winograd_muls"]
  for form in ("train", "deploy"):
    for field in ("params", "macs"):
      parts = [getattr(getattr(stage, form) or Cost(), field) for stage in found.stages]
      assert sum(parts) == getattr(getattr(found, form), field)


def costs(module, image_size=8):
  """Returns (params, macs, winograd) by stage name, in the form that was passed."""
  return {stage.name: tuple(stage.train) for stage in summary(module, image_size).stages}


def test_stages_come_in_order_with_the_shapes_that_they_return():
  found = of("repvgg_a0")
  names = ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
  assert [stage.name for stage in found.stages] == names
  assert [stage.output_shape for stage in found.stages] == A0_SHAPES


def small(**attributes):
  """Builds a small RepVGG."""
  return RepVGG(**tiny.OVERRIDES, num_classes=10, **attributes)


@pytest.mark.parametrize("attributes", [{"deploy": True}, {"remat": True}, {"dtype": jnp.bfloat16}])
def test_what_does_not_change_the_network_changes_no_count(attributes):
  assert summary(small(**attributes), 32) == summary(small(), 32)


def test_images_may_be_oblong():
  tall, square = summary(small(), (64, 32)), summary(small(), (32, 32))
  assert square == summary(small(), 32)
  height, width, features = square.stages[0].output_shape
  assert tall.stages[0].output_shape == (2 * height, width, features)
  for double, single in zip(tall.stages[:-1], square.stages[:-1], strict=True):
    assert double.train.params == single.train.params
    assert double.train.macs == 2 * single.train.macs
  assert tall.stages[-1].train == square.stages[-1].train


def test_nothing_is_computed():
  assert summary(small(), 2**15).train.macs > 2**31


class Plain(nn.Module):
  """A foreign module without `deploy`."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), name="conv")(x)
    x = nn.BatchNorm(use_running_average=True, name="norm")(x)
    x = nn.Conv(4, (1, 1), use_bias=False, name="pointwise")(x)
    return nn.Dense(5, name="dense")(x.mean((1, 2)))


def test_a_plain_module_has_one_form_counted_by_hand():
  found = summary(Plain(), 8)
  assert found.deploy is None
  assert {stage.name: (stage.output_shape, *stage.train) for stage in found.stages} == {
    "conv": ((8, 8, 4), 112, 64 * 108, 64 * 48),
    "norm": ((8, 8, 4), 8, 0, 0),
    "pointwise": ((8, 8, 4), 16, 64 * 16, 64 * 16),
    "dense": ((5,), 25, 20, 20),
  }
  assert found.train == Cost(161, 64 * 124 + 20, 64 * 64 + 20)
  assert all(stage.deploy is None for stage in found.stages)


def test_stages_that_only_hold_parameters_keep_their_place():
  assert list(costs(Plain())) == ["conv", "norm", "pointwise", "dense"]


@pytest.mark.parametrize(
  ("how", "macs", "winograd"),
  [
    ({}, 64 * 9 * 12, 64 * 4 * 12),
    ({"strides": 2}, 16 * 9 * 12, 16 * 9 * 12),
    ({"strides": (1, 2)}, 32 * 9 * 12, 32 * 9 * 12),
    ({"kernel_dilation": 2}, 64 * 9 * 12, 64 * 9 * 12),
    ({"kernel_dilation": (1, 2)}, 64 * 9 * 12, 64 * 9 * 12),
    ({"input_dilation": 2, "padding": 1}, 15 * 15 * 9 * 12, 15 * 15 * 9 * 12),
    ({"feature_group_count": 3, "features": 6}, 64 * 9 * 6, 64 * 4 * 6),
    ({"padding": "VALID"}, 36 * 9 * 12, 36 * 4 * 12),
    ({"kernel_size": (5, 5)}, 64 * 25 * 12, 64 * 25 * 12),
    ({"kernel_size": (1, 3)}, 64 * 3 * 12, 64 * 3 * 12),
    ({"kernel_size": (3, 1)}, 64 * 3 * 12, 64 * 3 * 12),
  ],
  ids=str,
)
def test_a_convolution_is_counted_by_hand(how, macs, winograd):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Conv(**{"features": 4, "kernel_size": (3, 3), "name": "conv"} | how)(x)

  assert costs(Net())["conv"][1:] == (macs, winograd)


def test_a_transposed_convolution_is_no_winograd_one():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(x)

  _, macs, winograd = costs(Net())["up"]
  assert macs == winograd == 16 * 16 * 9 * 12


class Layer(nn.Module):
  """A dense layer and a convolution with a carry, as nn.scan wants it."""

  @nn.compact
  def __call__(self, x, _=None):
    return nn.Conv(3, (1, 1))(nn.Dense(3)(x)), None


class Wrapped(nn.Module):
  """One stage of four layers, each of two 3x3 products for a pixel, made in the way named."""

  how: str

  @nn.compact
  def __call__(self, x):
    if self.how == "scan":
      shared = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      return nn.scan(Layer, length=4, **shared)(name="stage")(x, None)[0]
    if self.how == "scan of remat":
      shared = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      return nn.scan(nn.remat(Layer), length=4, **shared)(name="stage")(x, None)[0]
    if self.how == "vmap":
      shared = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      many = nn.vmap(Layer, in_axes=(None,), axis_size=4, **shared)(name="stage")
      return many(x)[0]
    if self.how == "jit":
      return nn.jit(Stack)(name="stage")(x)
    if self.how == "remat":
      return nn.remat(Stack)(name="stage")(x)
    return Stack(name="stage")(x)


class Stack(nn.Module):
  """Four layers in a row."""

  @nn.compact
  def __call__(self, x):
    for _ in range(4):
      x, _ = Layer()(x)
    return x


@pytest.mark.parametrize("how", ["plain", "jit", "remat", "scan", "scan of remat", "vmap"])
def test_transformed_modules_count_like_plain_ones(how):
  assert costs(Wrapped(how)) == {"stage": (96, 8 * 64 * 9, 8 * 64 * 9)}


@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_a_transformed_model_counts_like_a_plain_one(transform):
  assert costs(transform(Plain)()) == costs(Plain())


def test_attention_is_counted_by_hand():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = x.reshape(x.shape[0], -1, 3)  # (N, T, C)
      return nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=6, name="heads")(x)

  projections, products = 64 * 3 * 8 * 3 + 64 * 8 * 6, 2 * 64 * 64 * 8
  params = 3 * (3 * 8 + 8) + 8 * 6 + 6
  macs = projections + products
  assert costs(Net()) == {"heads": (params, macs, macs)}


def test_a_module_used_twice_is_computed_twice_and_held_once():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(3, name="layer")
      return layer(layer(x))

  assert costs(Net()) == {"layer": (12, 2 * 64 * 9, 2 * 64 * 9)}


def test_setup_style_and_lists_of_modules_have_their_own_stages():
  class Net(nn.Module):
    def setup(self):
      self.layers = [nn.Dense(3), nn.Dense(2)]

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return x

  assert costs(Net()) == {"layers_0": (12, 576, 576), "layers_1": (8, 384, 384)}


class Bare(nn.Module):
  """Parameters and a product in no scope but the model's own."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.ones, (3, 2))
    return jax.lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def test_what_is_outside_of_every_scope_counts_in_the_total():
  assert summary(Bare(), 8).train == Cost(6, 64 * 6, 64 * 6)


class Folded(nn.Module):
  """A foreign model with two forms whose scopes have other names."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x):
    if self.deploy:
      return nn.Dense(3, name="folded")(x)
    return nn.Dense(3, name="first")(x) + nn.Dense(3, name="second")(x)


def test_scopes_of_one_form_only_have_rows_of_their_own():
  found = summary(Folded(), 8)
  one = Cost(12, 576, 576)
  assert found == Summary(
    (
      StageCost("first", (8, 8, 3), one, None),
      StageCost("second", (8, 8, 3), one, None),
      StageCost("folded", (8, 8, 3), None, one),
    ),
    Cost(24, 1152, 1152),
    one,
  )
  assert "folded" in format_summary(found)


def test_a_module_without_products_is_counted_as_nothing():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x.mean((1, 2))

  found = summary(Net(), 8)
  assert found == Summary((), Cost(), None)
  assert format_summary(found).splitlines()[-1].split() == ["total", "0", "0", "0"]


def test_a_stage_that_returns_something_else_has_no_shape():
  class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(x), x

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Pair(name="pair")(x)[0]

  (stage,) = summary(Net(), 8).stages
  assert (stage.name, stage.output_shape) == ("pair", None)


@pytest.mark.parametrize("image_size", [0, -1, (0, 64), (64, 1)], ids=str)
def test_a_size_that_the_model_does_not_take_is_a_value_error(image_size):
  with pytest.raises(ValueError, match=r"H and W at least|image_size must be"):
    summary(small(), image_size)


def test_the_table_lines_up():
  found = of("repvgg_a0")
  forms, header, *rows = format_summary(found).splitlines()
  assert forms.split() == ["training", "form", "deploy", "form"]
  assert header.split() == ["stage", "output", *("parameters", "MACs", "Winograd") * 2]
  assert {len(line) for line in (forms, header, *rows)} == {len(header)}
  ends = [header.index(name) + len(name) for name in ("output", "parameters", "MACs", "Winograd")]
  for row, stage in zip(rows, (*found.stages, None), strict=True):
    cost = stage.train if stage else found.train
    for end, number in zip(ends[1:], cost, strict=True):
      assert row[:end].endswith(f" {number:,}")
      assert row[end : end + 1] == " " or end == len(row) or row[end].isspace()
    if stage:
      assert row.startswith(stage.name)
      assert row[: ends[0]].endswith(" " + "x".join(map(str, stage.output_shape)))
  name, *totals = rows[-1].replace(",", "").split()
  assert name == "total"
  assert list(map(int, totals)) == [*found.train, *found.deploy]


def test_the_table_of_one_form_has_its_columns_once():
  forms, header, *rows = format_summary(summary(Plain(), 8)).splitlines()
  assert forms == ""
  assert header.split() == ["stage", "output", "parameters", "MACs", "Winograd"]
  assert rows[1].split() == ["norm", "8x8x4", "8", "0", "0"]
  assert {len(row) for row in rows} == {len(header)}


def test_long_names_and_long_shapes_stay_apart():
  found = Summary(
    (
      StageCost("a_rather_long_name", (1000, 1000, 10000, 100), Cost(10**9, 10**12, 10**12), None),
      StageCost("b", None, Cost(1, 2, 3), None),
    ),
    Cost(10**9 + 1, 10**12 + 2, 10**12 + 3),
    None,
  )
  for line in format_summary(found).splitlines()[2:]:
    assert line.split()[-3:] == [f"{int(n.replace(',', '')):,}" for n in line.split()[-3:]]
  assert format_summary(found).splitlines()[2].split()[:2] == [
    "a_rather_long_name",
    "1000x1000x10000x100",
  ]


class TestDepth:
  @pytest.mark.parametrize("deploy", [False, True])
  @pytest.mark.parametrize(
    ("name", "layers"), [("parnet_s", 12), ("parnet_cifar_s", 12), ("resnet18", 18), ("vgg16", 16)]
  )
  def test_it_is_what_papers_say(self, name, layers, deploy):
    assert depth(create_model(name, deploy=deploy)) == layers

  def test_a_repvgg_is_as_deep_as_it_has_blocks_and_a_classifier(self):
    blocks = 1 + sum(tiny.OVERRIDES["stage_sizes"])
    assert depth(small(), 32) == depth(small(deploy=True), 32) == blocks + 1
    # Two layers more a block, since a gate waits for the convolution that it scales.
    assert depth(small(se="pre", se_reduction=2), 32) == 3 * blocks + 1

  @pytest.mark.parametrize("how", ["plain", "jit", "remat", "scan", "scan of remat"])
  def test_transformed_modules_are_as_deep_as_plain_ones(self, how):
    assert depth(Wrapped(how), 8) == 8

  def test_what_runs_side_by_side_counts_once(self):
    assert depth(Wrapped("vmap"), 8) == 2
    assert depth(Folded(), 8) == depth(Folded(deploy=True), 8) == 1

  def test_only_what_is_made_of_the_images_counts(self):
    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        left, right = (self.param(n, nn.initializers.ones, (3, 3)) for n in ("left", "right"))
        nn.Dense(3)(nn.Dense(3)(x))  # leads to no output
        return nn.Dense(2)(x @ (left @ right @ left))

    class Blind(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(jnp.ones(x.shape))

    assert depth(Net(), 8) == 2
    assert depth(Blind(), 8) == 0

  def test_of_branches_the_longest_counts_and_of_a_loop_one_pass(self):
    def layers(count):
      return lambda x, kernel: functools.reduce(lambda x, _: x @ kernel, range(count), x)

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (3, 3))
        x = jax.lax.cond(x.mean() > 0, layers(1), layers(3), x, kernel)
        _, x = jax.lax.while_loop(
          lambda held: held[0] < 5, lambda held: (held[0] + 1, held[1] @ kernel), (0, x)
        )
        return nn.relu(x)

    assert depth(Net(), 8) == 4

  def test_a_size_that_the_model_does_not_take_is_a_value_error(self):
    with pytest.raises(ValueError, match="H and W at least"):
      depth(small(), 4)


class TestCommand:
  @pytest.fixture(autouse=True)
  def _tiny(self, monkeypatch):
    """Adds a model called tiny, which is traced sooner."""
    monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))

  def test_it_prints_the_table(self, run_command):
    printed = run_command("summary", "--model", "tiny", "--num-classes", 10, "--image-size", 64)
    first, rest = printed.split("\n", 1)
    assert first == "tiny, 10 classes, one image of 64 px"
    model = create_model("tiny", num_classes=10)
    table, end = rest.removesuffix("\n").rsplit("\n", 1)
    assert table == analysis.format_summary(summary(model, 64))
    assert end.startswith(f"depth {depth(model, 64)}: ")

  def test_it_takes_the_size_of_the_model_by_default(self, run_command):
    printed = run_command("summary", "--model", "tiny")
    assert printed.startswith("tiny, 1000 classes, one image of 224 px")
