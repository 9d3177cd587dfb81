"""RepDense: both forms compute the same, and they compute what the equations say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.algebra import ConvParams, conv_to_dense
from repjax.layers import RepDense, fold_rep_dense
from repjax.layers.rep_dense import partition, unpartition
from repjax.program import trace
from tests import helpers
from tests.helpers import F64, convolve, random_input, random_variables, relative_error

EPSILON = 1e-5
EXACT = 1e-12
LAYERS = {  # H, W, C, and attributes
  "plain": (8, 6, 4, {"features": 4, "tile": (4, 3)}),
  "groups": (4, 8, 8, {"features": 8, "tile": 4, "groups": 4}),
  "widening": (6, 6, 4, {"features": 8, "tile": (2, 3), "groups": 2}),
  "narrowing": (6, 4, 8, {"features": 4, "tile": (6, 2), "groups": 4}),
  "one tile": (5, 7, 2, {"features": 6, "tile": (5, 7), "local_kernels": (1, 3, 5, 7)}),
  "beyond the tile": (4, 6, 2, {"features": 2, "tile": (2, 3), "local_kernels": (5, 9)}),
  "no convolution": (4, 6, 4, {"features": 6, "tile": (4, 3), "groups": 2, "local_kernels": ()}),
  "share-sets": (
    8,
    6,
    6,
    {"features": 6, "tile": (4, 3), "share_sets": 3, "local_kernels": (1, 3)},
  ),
  "one set": (4, 4, 3, {"features": 3, "tile": (2, 4), "share_sets": 1, "local_kernels": (3,)}),
  "a set a channel": (4, 2, 3, {"features": 3, "tile": 2, "share_sets": 3}),
  "tiles of a pixel": (2, 3, 4, {"features": 4, "tile": 1, "share_sets": 2, "local_kernels": (1,)}),
}


def fold(variables):
  return fold_rep_dense(variables["params"], variables["batch_stats"], EPSILON)


def normalise(y, params, stats):
  """A batch norm with running statistics, over the last axes of y."""
  bn, held = (jax.tree.map(np.asarray, tree["bn"]) for tree in (params, stats))
  return (y - held["mean"]) / np.sqrt(held["var"] + EPSILON) * bn["scale"] + bn["bias"]


def by_definition(layer, variables, x):
  """The training form in NumPy, tile by tile and channel group by channel group."""
  params, stats = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))
  height, width = (layer.tile, layer.tile) if isinstance(layer.tile, int) else layer.tile
  y = np.zeros((*x.shape[:3], layer.features))
  sets = layer.share_sets
  # What passes through the layer together: all channels, or a run of one channel of every set.
  runs = [slice(None)] if sets is None else [slice(i, i + sets) for i in range(0, x.shape[3], sets)]
  for n, top, left in np.ndindex(x.shape[0], x.shape[1] // height, x.shape[2] // width):
    for run in runs:
      window = (n, slice(top * height, (top + 1) * height), slice(left * width, (left + 1) * width))
      y[(*window, run)] = tile_by_definition(params, stats, x[(*window, run)], sets)
  return y


def tile_by_definition(params, stats, x, sets):
  kernel = params["fc"]["dense"]["kernel"]
  groups = len(kernel)
  outputs = []
  for group, channels in enumerate(np.split(x, groups, axis=2)):
    y = np.einsum("hwc,hwcvuo->vuo", channels, kernel[group])
    own = {
      key: {"bn": {k: v[group] for k, v in tree["fc"]["bn"].items()}}
      for key, tree in (("params", params), ("stats", stats))
    }
    outputs.append(normalise(y, own["params"], own["stats"]))
  y = np.concatenate(outputs, axis=2)
  for name, held in params.get("local", {}).items():
    size = held["conv"]["kernel"].shape[0]
    padding = (size // 2, size // 2)
    branch = convolve(x[None], held["conv"]["kernel"], padding=padding, groups=groups)[0]
    y = y + normalise(branch, held, stats["local"][name])
  return y


@pytest.mark.usefixtures("x64")
class TestBothForms:
  @pytest.mark.parametrize("name", LAYERS)
  def test_compute_what_the_equations_say(self, name):
    height, width, channels, attributes = LAYERS[name]
    x = random_input(2, height, width, channels)
    train, deploy = (RepDense(**attributes, deploy=form, **F64) for form in (False, True))
    variables = random_variables(train, x)

    @helpers.quick_jit
    def outputs(variables):
      folded = fold(variables)
      return train.apply(variables, x), deploy.apply({"params": folded}, x), folded

    trained, deployed, folded = outputs(variables)
    assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
    assert relative_error(trained, by_definition(train, variables, x)) <= EXACT
    assert relative_error(deployed, trained) <= EXACT

  def test_every_part_counts(self):
    # Otherwise an error in one output could be hidden by a different one.
    height, width, channels, attributes = LAYERS["widening"]
    x, layer = random_input(1, height, width, channels), RepDense(**attributes, **F64)
    variables = random_variables(layer, x)
    apply = helpers.quick_jit(layer.apply)
    whole, (flat, tree) = apply(variables, x), jax.tree.flatten(variables)
    for index, path in enumerate(helpers.leaves(variables)):
      changed = jax.tree.unflatten(tree, [*flat[:index], 1.5 * flat[index], *flat[index + 1 :]])
      assert relative_error(apply(changed, x), whole) > 1e-3, path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 8), (8, 4)])
def test_convolutions_become_matrices_for_unequal_channels_too(inputs, outputs):
  # The authors read the responses to an identity, (C*h*w/g, O*h*w), with C and O the wrong way
  # round; with as many outputs as inputs that is the same.
  (height, width), groups = (3, 2), 2
  rng = np.random.default_rng(0)
  conv = ConvParams(rng.standard_normal((3, 3, inputs // groups, outputs)), np.zeros(outputs))
  kernel, _ = conv_to_dense(conv, (height, width), groups)
  # (g, h*w*C/g, h*w*O/g) in PyTorch's order: channels before pixels, on both sides.
  kernel = np.asarray(kernel).transpose(0, 3, 1, 2, 6, 4, 5)
  pixels = height * width
  matrices = kernel.reshape(groups, inputs // groups * pixels, outputs // groups * pixels)
  responses = np.concatenate(matrices, axis=1)  # (C*h*w/g, O*h*w)
  right = responses.T
  theirs = responses.reshape(outputs * pixels // groups, inputs * pixels).T.reshape(right.shape)
  assert np.array_equal(theirs, right) == (inputs == outputs)

  x = random_input(1, height, width, inputs)
  rows = np.stack(np.split(x.transpose(0, 3, 1, 2).ravel(), groups))  # (g, C*h*w/g)
  expected = convolve(x, conv.kernel, padding=(1, 1), groups=groups).transpose(0, 3, 1, 2).ravel()
  ours, wrong = (
    np.einsum("gi,goi->go", rows, matrix.reshape(groups, -1, rows.shape[1])).ravel()
    for matrix in (right, theirs)
  )
  assert relative_error(ours, expected) <= EXACT
  assert (relative_error(wrong, expected) > 0.5) == (inputs != outputs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["widening", "share-sets"])
def test_gradients_through_the_fold_are_those_of_the_branches(name):
  height, width, channels, attributes = LAYERS[name]
  x = random_input(2, height, width, channels)
  train, deploy = (RepDense(**attributes, deploy=form, **F64) for form in (False, True))
  variables = random_variables(train, x)
  target = random_input(2, height, width, attributes["features"], seed=2)

  def loss_of_branches(variables):
    return ((train.apply(variables, x) - target) ** 2).sum()

  def loss_through_the_fold(variables):
    return ((deploy.apply({"params": fold(variables)}, x) - target) ** 2).sum()

  both = helpers.quick_jit(
    lambda v: (jax.grad(loss_through_the_fold)(v), jax.grad(loss_of_branches)(v))
  )
  through, expected = map(helpers.leaves, both(variables))
  assert through.keys() == expected.keys()
  for path, gradient in expected.items():
    assert np.abs(gradient).max() > 0, path
    assert relative_error(through[path], gradient) <= 1e-10, path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "shape"), [("groups", (4, 4, 4, 2)), ("share-sets", (3,))])
def test_training_moves_the_statistics_of_each_pixel_or_of_each_set(name, shape):
  height, width, channels, attributes = LAYERS[name]
  x, layer = random_input(3, height, width, channels), RepDense(**attributes, **F64)
  variables = random_variables(layer, x)
  step = helpers.quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"]))
  y, updates = step(variables)
  assert y.shape == (3, height, width, attributes["features"])
  kernel = np.asarray(variables["params"]["fc"]["dense"]["kernel"])
  tiles = np.asarray(partition(x, kernel.shape[1:3], channels // (len(kernel) * kernel.shape[3])))
  rows = tiles.reshape(*tiles.shape[:3], len(kernel), -1)  # (M, h, w, g, C/g)
  products = np.einsum("mhwgc,ghwcvuo->mgvuo", rows, kernel)
  over = (0,) if len(shape) > 1 else (0, 2, 3, 4)
  batch = {"mean": products.mean(over), "var": products.var(over, ddof=1)}  # as PyTorch keeps it
  for statistic, value in batch.items():
    old, new = (tree["batch_stats"]["fc"]["bn"][statistic] for tree in (variables, updates))
    assert new.shape == shape
    assert relative_error(new, 0.9 * np.asarray(old) + 0.1 * value) <= EXACT


def test_a_gradient_over_wide_tiles_runs():
  # XLA's program for CPUs crashed on this where the layer had all eight axes at once.
  x, layer = random_input(64, 4, 4, 64).astype("float32"), RepDense(64, 4, 2, local_kernels=())
  variables = random_variables(layer, x)
  gradient = jax.jit(jax.grad(lambda v: (layer.apply(v, x) ** 2).sum()))(variables)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_trees_describe_themselves():
  x = jnp.ones((1, 8, 12, 4))
  layer = RepDense(6, (4, 3), groups=2, local_kernels=(1, 3))
  assert helpers.shapes(helpers.leaves(helpers.init_shapes(layer, x)["params"])) == {
    "fc/dense/kernel": ((2, 4, 3, 2, 4, 3, 3), jnp.float32),
    "fc/bn/scale": ((2, 4, 3, 3), jnp.float32),
    "fc/bn/bias": ((2, 4, 3, 3), jnp.float32),
    **{
      f"local/conv{size}x{size}/{leaf}": (shape, jnp.float32)
      for size in (1, 3)
      for leaf, shape in {
        "conv/kernel": (size, size, 2, 6),
        "bn/scale": (6,),
        "bn/bias": (6,),
      }.items()
    },
  }
  assert helpers.shapes(helpers.init_shapes(layer.clone(deploy=True), x)) == {
    "params": {
      "dense": {"kernel": ((2, 4, 3, 2, 4, 3, 3), jnp.float32), "bias": ((2, 4, 3, 3), jnp.float32)}
    }
  }


@pytest.mark.parametrize("name", ["groups", "share-sets"])
def test_the_layer_is_one_product_batched_over_groups(name):
  height, width, channels, attributes = LAYERS[name]
  layer = RepDense(**attributes, deploy=True)
  x = jnp.ones((2, height, width, channels))
  program = trace(layer.apply, helpers.init_shapes(layer, x), x)
  products = [equation for equation in program.equations if is_product(equation)]
  assert [equation.primitive for equation in products] == ["dot_general"]
  kernel = products[0].inputs[1].aval
  assert kernel.size == sum(leaf.size for leaf in kernels(helpers.init_shapes(layer, x)))
  assert products[0].params["dimension_numbers"][1][1] == (0,)


def is_product(equation):
  return equation.primitive in ("dot_general", "conv_general_dilated")


def kernels(variables):
  return [leaf for path, leaf in helpers.leaves(variables).items() if path.endswith("kernel")]


class TestTiles:
  @pytest.mark.parametrize("rows", [1, 2])
  def test_each_holds_its_own_pixels_in_their_order(self, rows):
    x = np.arange(2 * 6 * 4 * 6).reshape(2, 6, 4, 6)
    tiles = np.asarray(partition(jnp.asarray(x), (3, 2), rows))
    assert tiles.shape == (2 * 2 * 2 * rows, 3, 2, 6 // rows)
    last = x[1, 3:, 2:, 6 - 6 // rows :]
    np.testing.assert_array_equal(tiles[-1], last)
    np.testing.assert_array_equal(tiles[rows], x[0, :3, 2:, : 6 // rows])
    np.testing.assert_array_equal(unpartition(jnp.asarray(tiles), (6, 4), rows), x)


class TestInitialValues:
  @staticmethod
  def draw(layer, *shape):
    params = helpers.quick_jit(layer.init)(jax.random.key(0), jnp.ones((1, *shape)))["params"]
    return jax.tree.map(np.asarray, params)

  def test_groups_of_channels_start_orthogonal_as_one_matrix(self):
    layer = RepDense(4, (2, 3), groups=2, local_kernels=())
    kernel = self.draw(layer, 2, 3, 4)["fc"]["dense"]["kernel"]
    # In PyTorch's order the groups' outputs follow one another: more rows than columns.
    columns = kernel.reshape(2, 12, 12).transpose(1, 0, 2).reshape(12, 24)
    np.testing.assert_allclose(columns @ columns.T, np.eye(12), atol=1e-5)

  def test_share_sets_start_uniform(self):
    layer = RepDense(40, (3, 4), share_sets=20, local_kernels=())
    kernel = self.draw(layer, 3, 4, 40)["fc"]["dense"]["kernel"]
    bound = 1 / np.sqrt(12)
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(np.std(kernel) / bound - 1 / np.sqrt(3)) < 0.02

  def test_biases_of_the_deploy_form_are_bounded_by_the_inputs_of_a_group(self):
    bias = self.draw(RepDense(64, 2, groups=2, deploy=True), 2, 2, 8)["dense"]["bias"]
    assert 0.95 / 4 < np.abs(bias).max() <= 1 / 4


class TestDtypes:
  @pytest.mark.parametrize("deploy", [False, True])
  def test_bfloat16_computation_keeps_float32_variables(self, deploy):
    x, layer = jnp.ones((2, 4, 4, 4)), RepDense(4, 2, dtype=jnp.bfloat16, deploy=deploy)
    variables = helpers.init_shapes(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(layer.apply, variables, x).dtype == jnp.bfloat16

  def test_bfloat16_parameters_fold_to_bfloat16(self):
    layer = RepDense(4, 2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = helpers.init_shapes(layer, jnp.ones((1, 4, 4, 4)))
    folded = jax.eval_shape(fold, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}

  def test_forms_agree_to_float32_precision_when_computed_in_it(self):
    x, layer = random_input(2, 8, 8, 8).astype("float32"), RepDense(8, 4, groups=2)
    variables = random_variables(layer, x)
    deploy = layer.clone(deploy=True)
    outputs = helpers.quick_jit(lambda v: (deploy.apply({"params": fold(v)}, x), layer.apply(v, x)))
    assert relative_error(*outputs(variables)) <= 1e-5

  def test_narrow_parameters_are_added_up_before_they_are_rounded(self):
    x, layer = jnp.ones((1, 4, 4, 4)), RepDense(4, 2, local_kernels=(1, 3))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_variables(layer, x))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    fold_jitted = helpers.quick_jit(fold)
    for ours, expected in zip(*map(jax.tree.leaves, (fold_jitted(variables), fold_jitted(wide)))):
      assert ours.dtype == jnp.bfloat16
      np.testing.assert_array_equal(ours, expected.astype(jnp.bfloat16))


class TestRefusals:
  @staticmethod
  def init(shape=(1, 8, 6, 4), **attributes):
    return helpers.init_shapes(RepDense(**{"features": 4, "tile": 2} | attributes), jnp.ones(shape))

  @pytest.mark.parametrize("shape", [(1, 7, 6, 4), (1, 8, 5, 4), (8, 6, 4), (1, 0, 6, 4)], ids=str)
  def test_maps_that_do_not_divide_into_tiles(self, shape):
    with pytest.raises(ValueError, match=r"do not divide into tiles of 2x2 pixels; H and W .*size"):
      self.init(shape)

  def test_the_error_names_the_layer(self):
    class Network(helpers.nn.Module):
      @helpers.nn.compact
      def __call__(self, x):
        return RepDense(4, (4, 4), name="RepDense_here")(x)

    with pytest.raises(ValueError, match="RepDense RepDense_here: maps of shape"):
      helpers.init_shapes(Network(), jnp.ones((1, 6, 6, 4)))

  @pytest.mark.parametrize("attributes", [{"groups": 3}, {"features": 6, "groups": 4}], ids=str)
  def test_channels_must_divide_into_groups(self, attributes):
    with pytest.raises(ValueError, match=r"do not both divide into \d groups"):
      self.init(**attributes)

  @pytest.mark.parametrize(
    "attributes", [{"features": 8}, {"share_sets": 3}, {"groups": 2}], ids=str
  )
  def test_share_sets_keep_the_channels_and_have_no_groups(self, attributes):
    with pytest.raises(ValueError, match="with share-sets there are as many output as input"):
      self.init(**{"share_sets": 2} | attributes)

  @pytest.mark.parametrize("sizes", [(1, 2), (3, 3), (-1,)], ids=str)
  def test_local_kernels_are_odd_and_differ(self, sizes):
    with pytest.raises(ValueError, match="local_kernels are different odd numbers"):
      self.init(local_kernels=sizes)

  def test_the_deploy_form_cannot_train(self):
    layer, x = RepDense(4, 2, deploy=True), jnp.ones((1, 4, 4, 4))
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(functools.partial(layer.apply, train=True), helpers.init_shapes(layer, x), x)

  def test_trees_that_do_not_belong_together(self):
    variables = self.init()
    with pytest.raises(ValueError, match=r"statistics of \['fc'\]"):
      fold_rep_dense(variables["params"], {"fc": variables["batch_stats"]["fc"]}, EPSILON)
    other = self.init(tile=(4, 2))
    mixed = {**variables["params"], "fc": other["params"]["fc"]}
    with pytest.raises(ValueError, match="one common shape"):
      jax.eval_shape(lambda: fold_rep_dense(ones(mixed), ones(variables["batch_stats"]), EPSILON))

  def test_convolutions_of_another_layer(self):
    variables, other = self.init(), self.init(features=8)
    mixed = {
      key: {**variables[key], "local": other[key]["local"]} for key in ("params", "batch_stats")
    }
    with pytest.raises(ValueError, match="do not lie beside a fully connected layer"):
      fold(ones(mixed))


def ones(tree):
  return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)


def test_the_walk_finds_the_layer():
  x = jnp.ones((1, 4, 4, 4))
  variables = random_variables(RepDense(4, 2, groups=2), x)
  trees = ({"RepDense_0": variables[key]} for key in ("params", "batch_stats"))
  params, expected = helpers.quick_jit(lambda: (repjax.reparameterize(*trees), fold(variables)))()
  jax.tree.map(np.testing.assert_array_equal, params["RepDense_0"], expected)
  assert repjax.reparameterize(params, {})["RepDense_0"]["dense"] == params["RepDense_0"]["dense"]
  with pytest.raises(ValueError, match=r"RepDense_0 is in training form .* no batch statistics"):
    repjax.reparameterize({"RepDense_0": variables["params"]}, {})
