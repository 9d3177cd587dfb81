"""The training and evaluation steps against the same thing written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.spec import Preprocessing
from repjax.training import mixing, optimizer, parallel
from repjax.training.state import TrainState, create_state
from repjax.training.step import make_eval_step, make_train_step
from repjax.training.tasks import Classification, Segmentation
from tests.helpers import F64, leaves, random_variables, relative_error, shapes, spread
from tests.models.families import FAMILIES
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

DEVICES, EACH, CLASSES = 4, 2, 10
PREPROCESSING = Preprocessing(16, 16, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
RATE, DECAY, SMOOTHING = 0.5, 0.01, 0.2


def make_batch(seed=0, classes=CLASSES):
  """Different images and labels for every device."""
  rng = np.random.default_rng(seed)
  count = DEVICES * EACH
  return {
    "image": rng.integers(0, 256, (count, 16, 16, 3), np.uint8),
    "label": rng.integers(0, classes, (count,), np.int32),
  }


def cross_entropy(logits, labels, smoothing=0.0):
  """Mean over images of -sum_k t_k log p_k with t = (1 - e) onehot + e / K."""
  onehot = jnp.eye(logits.shape[-1])[labels]
  targets = (1 - smoothing) * onehot + smoothing / logits.shape[-1]
  log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
  return -jnp.mean(jnp.sum(targets * log_p, -1))


def assert_trees_close(tree, other, tolerance):
  ours, theirs = leaves(tree), leaves(other)
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    assert relative_error(value, theirs[path]) <= tolerance, path


class Toy(nn.Module):
  """Batch norm, dropout and a linear layer on the mean colour; auxiliary logits on request."""

  dropout: float = 0.0
  aux: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.BatchNorm(use_running_average=not train)(images.mean((1, 2)))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    auxiliary = {name: nn.Dense(3, name=name)(x) for name in self.aux}
    logits = nn.Dense(3)(x)
    return (logits, auxiliary) if train and auxiliary else logits


class DropoutMask(nn.Module):
  """Keeps the mask that dropout has drawn as a running statistic."""

  @nn.compact
  def __call__(self, images, train=False):
    mask = self.variable("batch_stats", "mask", jnp.zeros, (64,))
    drawn = nn.Dropout(0.5, deterministic=not train)(jnp.ones(64))
    if train:
      mask.value = drawn
    return nn.Dense(3)(images.mean((1, 2)))


def toy_state(model, rate=0.1):
  sgd = optimizer.sgd(lambda step: rate, momentum=0.9, nesterov=False, weight_decay=0.0)
  return create_state(random_variables(model, jnp.ones((1, 16, 16, 3))), sgd), sgd


def training_outputs(model, variables, batch):
  @jax.jit
  def apply(images):
    images = PREPROCESSING.normalize(images)
    return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

  return apply(batch["image"])


@pytest.fixture
def double(x64):
  """A float64 RepVGG, its first state, the optimizer and a function that builds its step."""
  sgd = optimizer.sgd(lambda step: RATE, momentum=0.9, nesterov=False, weight_decay=DECAY)
  model = repjax.create_model("repvgg_a0", num_classes=CLASSES, **tiny.OVERRIDES, **F64)
  state = create_state(random_variables(model, jnp.ones((1, 16, 16, 3))), sgd)

  def build(axis_name, batch_norm_axis=None):
    return make_train_step(
      model.clone(axis_name=batch_norm_axis),
      sgd,
      PREPROCESSING,
      task=Classification(label_smoothing=SMOOTHING),
      axis_name=axis_name,
    )

  with jax.numpy_dtype_promotion("standard"):  # images are normalised in float32
    yield model, state, build


def test_a_step_on_four_devices_is_the_mean_over_each_devices_images(double):
  model, state, build = double
  batch = make_batch()
  step = parallel.data_parallel(build(parallel.AXIS))
  new, metrics = step(parallel.place(state), parallel.split(batch))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def alone(params, images, labels):
    logits, updates = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    return cross_entropy(logits, labels, SMOOTHING), (logits, updates["batch_stats"])

  images = PREPROCESSING.normalize(batch["image"])
  rows = []
  for part in range(DEVICES):
    own = slice(part * EACH, (part + 1) * EACH)
    rows.append(alone(state.params, images[own], batch["label"][own]))
  (loss, (_, stats)), gradients = jax.tree.map(lambda *row: sum(row) / DEVICES, *rows)
  correct = [
    row[0][1][0].argmax(-1) == label for row, label in zip(rows, batch["label"].reshape(4, -1))
  ]

  def stepped(path, value):
    name = "/".join(entry.key for entry in path)
    decays = name.endswith(("kernel", "identity/bn/scale"))
    factor = 2 if name.endswith("bias") else 1
    return value - factor * RATE * (leaves(gradients)[name] + DECAY * decays * value)

  norm = np.sqrt(sum((value**2).sum() for value in jax.tree.leaves(gradients)))
  params = jax.tree_util.tree_map_with_path(stepped, state.params)
  assert relative_error(metrics["loss"], loss) <= 1e-6
  assert metrics["accuracy"] == np.mean(correct)
  assert relative_error(metrics["grad_norm"], norm) <= 1e-11
  assert_trees_close(new.params, params, 1e-11)
  assert_trees_close(new.batch_stats, stats, 1e-11)
  assert new.step == 1


def test_results_are_the_same_on_every_device_and_carry_no_device_axis(double):
  _, state, build = double
  step = parallel.data_parallel(build(parallel.AXIS))
  new, metrics = step(parallel.place(state), parallel.split(make_batch()))
  assert shapes(new) == shapes(state)
  assert {value.shape for value in metrics.values()} == {()}
  for value in jax.tree.leaves((new, metrics)):
    copies = [np.asarray(shard.data) for shard in value.addressable_shards]
    assert len(copies) == DEVICES
    assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)
    assert copies[0].shape == value.shape


def test_a_step_is_pure(double):
  _, state, build = double
  step = parallel.data_parallel(build(parallel.AXIS))
  placed, batch = parallel.place(state), parallel.split(make_batch())
  first, second = step(placed, batch), step(placed, batch)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  jax.tree.map(np.testing.assert_array_equal, placed, state)


def test_synchronised_batch_norm_on_four_devices_is_one_device_with_the_whole_batch(double):
  _, state, build = double
  batch = make_batch()
  whole, whole_metrics = jax.jit(build(None))(state, batch)
  placed, split = parallel.place(state), parallel.split(batch)
  shared, metrics = parallel.data_parallel(build(parallel.AXIS, parallel.AXIS))(placed, split)
  assert_trees_close(shared.batch_stats, whole.batch_stats, 1e-12)
  assert_trees_close(shared.params, whole.params, 1e-6)
  for name, value in whole_metrics.items():
    assert relative_error(metrics[name], value) <= 1e-11, name
  # Statistics of each device's own images give something else.
  lone, _ = parallel.data_parallel(build(parallel.AXIS))(placed, split)
  stats = "stem/RepConv_0/conv3x3/bn/var"
  assert relative_error(leaves(lone.batch_stats)[stats], leaves(whole.batch_stats)[stats]) > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_the_types_of_its_state_and_gives_float32_metrics(dtype):
  model = repjax.create_model("repvgg_a0", dtype=dtype, **tiny.WITH_GATES_AND_HEADS)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  state = jax.eval_shape(lambda values: create_state(values, sgd), variables)
  new, metrics = jax.eval_shape(make_train_step(model, sgd, PREPROCESSING), state, make_batch())
  assert shapes(new) == shapes(state)
  for value in jax.tree.leaves((new.params, new.batch_stats, metrics)):
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_mixes_in_the_same_share_of_every_class(smoothing):
  model = Toy()
  state, sgd = toy_state(model)
  batch = make_batch(classes=3)
  step = jax.jit(make_train_step(model, sgd, PREPROCESSING, task=Classification(smoothing)))
  _, metrics = step(state, batch)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits = training_outputs(model, variables, batch)
  assert relative_error(metrics["loss"], cross_entropy(logits, batch["label"], smoothing)) <= 1e-6
  assert metrics["accuracy"] == np.mean(logits.argmax(-1) == batch["label"])


def test_each_auxiliary_head_adds_its_weighted_loss():
  model = Toy(aux=("first", "second"))
  state, sgd = toy_state(model)
  batch = make_batch(classes=3)
  step = make_train_step(model, sgd, PREPROCESSING, task=Classification(0.1), aux_weight=0.3)
  _, metrics = jax.jit(step)(state, batch)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits, aux = training_outputs(model, variables, batch)
  main, first, second = (
    cross_entropy(values, batch["label"], 0.1) for values in (logits, aux["first"], aux["second"])
  )
  assert relative_error(metrics["loss"], main + 0.3 * (first + second)) <= 1e-6
  assert metrics["accuracy"] == np.mean(logits.argmax(-1) == batch["label"])


@pytest.mark.parametrize("number", spread([0, 7], [7]))
@pytest.mark.parametrize(
  "alphas",
  [
    pytest.param({"mixup": 0.4}, marks=pytest.mark.proof),
    pytest.param({"cutmix": 1.0}, marks=pytest.mark.proof),
    {"mixup": 0.4, "cutmix": 1.0},
  ],
  ids=str,
)
def test_a_step_on_mixed_images_has_the_loss_of_mixed_targets(alphas, number):
  model = Toy(aux=("first",))
  state, sgd = toy_state(model)
  state = state.replace(step=jnp.asarray(number, jnp.int32))
  batch = make_batch(classes=3)
  step = make_train_step(
    model, sgd, PREPROCESSING, task=Classification(0.1, **alphas), aux_weight=0.3, seed=5
  )
  _, metrics = jax.jit(step)(state, batch)

  # The key of mixing is fixed, so that a run continues as it began under any later version.
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), number), 1)
  smooth = 0.9 * jnp.eye(3)[batch["label"]] + 0.1 / 3
  images = PREPROCESSING.normalize(batch["image"])
  images, targets = mixing.mix(images, smooth, key, **alphas)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  (logits, aux), _ = jax.jit(
    lambda values: model.apply(variables, values, train=True, mutable=["batch_stats"])
  )(images)

  def loss(values):
    log_p = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return -np.mean(np.sum(np.asarray(targets, np.float64) * log_p, -1))

  logits, first = np.asarray(logits, np.float64), np.asarray(aux["first"], np.float64)
  assert relative_error(metrics["loss"], loss(logits) + 0.3 * loss(first)) <= 1e-4
  assert metrics["accuracy"] == np.mean(logits.argmax(-1) == targets.argmax(-1))


class Shares(nn.Module):
  """Keeps the first image's mean on every device as running statistics."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, images, train=False):
    count = DEVICES if self.axis_name else 1
    held = self.variable("batch_stats", "shares", jnp.zeros, (count,))
    if train:
      mine = images[0].mean()
      held.value = jax.lax.all_gather(mine, self.axis_name) if self.axis_name else mine[None]
    return nn.Dense(3)(images.mean((1, 2)))


@functools.cache
def shares_step(mixup, cutmix, seed, axis_name):
  """A function from a step's number to the step's `Shares` of images that are white, then black."""
  plain = Preprocessing(16, 16, "bilinear", (0.0,) * 3, (1.0,) * 3)
  variables = jax.jit(Shares().init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
  state = create_state(variables, sgd)
  batch = make_batch(classes=3)
  batch["image"][:] = 0
  batch["image"][::EACH] = 255
  task = Classification(mixup=mixup, cutmix=cutmix)
  step = make_train_step(Shares(axis_name), sgd, plain, task=task, seed=seed, axis_name=axis_name)
  if axis_name is None:
    run = jax.jit(step)
  else:
    run, state, batch = parallel.data_parallel(step), parallel.place(state), parallel.split(batch)

  def shares(number):
    numbered = state.replace(step=parallel.place(jnp.asarray(number, jnp.int32)))
    return np.asarray(run(numbered, batch)[0].batch_stats["shares"])

  return shares


def test_the_mixture_follows_seed_and_step():
  first = shares_step(0.4, 1.0, 0, None)
  assert len({first(number).item() for number in range(5)}) == 5
  assert first(3) == first(3)
  assert shares_step(0.4, 1.0, 1, None)(3) != first(3)


def test_the_mixture_differs_between_devices():
  shares = shares_step(0.4, 0.0, 0, parallel.AXIS)
  assert len(set(shares(0))) == DEVICES
  np.testing.assert_array_equal(shares(0), shares(0))


def test_a_step_that_mixes_nothing_draws_nothing_for_it(monkeypatch):
  model = Toy(dropout=0.5)
  state, sgd = toy_state(model)
  monkeypatch.setattr("repjax.training.tasks.classification.mixing", None)
  step = make_train_step(model, sgd, PREPROCESSING, task=Classification(mixup=0.0, cutmix=0.0))
  text = str(jax.make_jaxpr(step)(state, make_batch(classes=3)))
  assert text.count("random_fold_in") == 2  # the step's key, and Flax's of dropout
  assert text.count("random_bits") == 1


def drawn_mask(state, sgd, seed=0, **alphas):
  task = Classification(**alphas)
  step = jax.jit(make_train_step(DropoutMask(), sgd, PREPROCESSING, task=task, seed=seed))
  return np.asarray(step(state, make_batch(classes=3))[0].batch_stats["mask"])


def test_dropout_follows_seed_and_step():
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
  variables = jax.jit(DropoutMask().init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  state = create_state(variables, sgd)
  mask = drawn_mask(state, sgd)
  assert set(mask) == {0.0, 2.0}
  np.testing.assert_array_equal(drawn_mask(state, sgd), mask)
  assert not np.array_equal(drawn_mask(state.replace(step=state.step + 1), sgd), mask)
  assert not np.array_equal(drawn_mask(state, sgd, seed=1), mask)
  np.testing.assert_array_equal(drawn_mask(state, sgd, mixup=0.4, cutmix=1.0), mask)


def test_dropout_differs_between_devices():
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
  variables = jax.jit(DropoutMask().init)(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  step = make_train_step(DropoutMask(), sgd, PREPROCESSING, axis_name=parallel.AXIS)
  state = parallel.place(create_state(variables, sgd))
  new, _ = parallel.data_parallel(step)(state, parallel.split(make_batch(classes=3)))
  # Means of four masks of 0 and 2: one mask on all devices would leave only these two values.
  assert set(np.asarray(new.batch_stats["mask"])) == {0.0, 0.5, 1.0, 1.5, 2.0}


@pytest.mark.parametrize("axis_name", [None, parallel.AXIS])
def test_evaluation_sums_over_unmasked_images_only(axis_name):
  model = Toy()
  variables = random_variables(model, jnp.ones((1, 16, 16, 3)))
  batch = make_batch(classes=3) | {"mask": np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)}
  step = make_eval_step(model.apply, PREPROCESSING, axis_name=axis_name)
  if axis_name is None:
    sums = jax.jit(step)(variables, batch)
  else:
    sums = parallel.data_parallel(step)(parallel.place(variables), parallel.split(batch))
  seen = batch["mask"]
  images = PREPROCESSING.normalize(jnp.asarray(batch["image"][seen]))
  logits = jax.jit(model.apply)(variables, images)
  labels = batch["label"][seen]
  assert sums["count"] == 5
  assert sums["correct"] == np.sum(logits.argmax(-1) == labels)
  assert relative_error(sums["loss"], 5 * cross_entropy(logits, labels)) <= 1e-6


def test_the_probabilities_of_ten_crops_are_averaged():
  model = Toy()
  variables = random_variables(model, jnp.ones((1, 16, 16, 3)))
  rng = np.random.default_rng(0)
  crops = rng.integers(0, 256, (DEVICES, 10, 16, 16, 3), np.uint8)
  labels = rng.integers(0, 3, DEVICES).astype(np.int32)
  step = make_eval_step(model.apply, PREPROCESSING, axis_name=parallel.AXIS)
  batch = {"image": crops, "label": labels, "mask": np.array([1, 1, 0, 1], bool)}
  sums = parallel.data_parallel(step)(parallel.place(variables), parallel.split(batch))
  mean = np.zeros((DEVICES, 3))
  for number in range(10):
    images = PREPROCESSING.normalize(jnp.asarray(crops[:, number]))
    mean += np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, images)), np.float64) / 10
  seen = batch["mask"]
  assert sums["count"] == 3
  assert sums["correct"] == np.sum((mean.argmax(-1) == labels)[seen])
  loss = -np.log(mean[np.arange(DEVICES), labels])[seen].sum()
  assert relative_error(sums["loss"], loss) <= 1e-5


def test_a_first_state_is_at_step_zero_without_momentum():
  model = Toy()
  state, _ = toy_state(model)
  assert isinstance(state, TrainState)
  assert state.step == 0
  assert state.step.dtype == jnp.int32
  assert not any(value.any() for value in jax.tree.leaves(state.opt_state))


def frozen_parts(**overrides):
  """A model with everything that behaves otherwise in training, its state and its frozen step."""
  overrides = {**tiny.WITH_GATES_AND_HEADS, "dropout": 0.5, **overrides}
  model = repjax.create_model("repvgg_a0", num_classes=CLASSES, **overrides)
  sgd = optimizer.sgd(
    lambda step: RATE, momentum=0.9, nesterov=False, weight_decay=DECAY, backbone_rate=0.0
  )
  state = create_state(random_variables(model, jnp.ones((1, 16, 16, 3))), sgd)

  def build(axis_name=None):
    return make_train_step(
      model, sgd, PREPROCESSING, task=Classification(SMOOTHING), axis_name=axis_name, frozen=True
    )

  return model, state, build


def bits(tree):
  return {path: np.asarray(leaf).tobytes() for path, leaf in leaves(tree).items()}


def test_a_frozen_backbone_stays_bit_for_bit_while_its_classifier_learns():
  _, state, build = frozen_parts()
  # Adding nothing to a negative zero makes it a positive one.
  state.params["stem"]["RepConv_0"]["conv3x3"]["bn"]["bias"] = jnp.full(8, -0.0)
  step = parallel.data_parallel(build(parallel.AXIS))
  new = parallel.place(state)
  for seed in range(3):
    new, _ = step(new, parallel.split(make_batch(seed)))
  assert bits(new.batch_stats) == bits(state.batch_stats)
  before, after = bits(state.params), bits(new.params)
  changed = {path for path in before if after[path] != before[path]}
  assert changed == {"head/kernel", "head/bias"}
  assert new.step == 3


def test_a_new_head_for_pixels_learns_its_statistics_over_a_frozen_backbone():
  overrides = FAMILIES["pspnet"].overrides | {"bins": (1,)}
  model = repjax.create_model("pspnet", num_classes=3, **overrides)
  sgd = optimizer.sgd(
    lambda step: RATE, momentum=0.9, nesterov=False, weight_decay=DECAY, backbone_rate=0.0
  )
  x = jnp.ones((1, 33, 33, 3))
  state = create_state(random_variables(model, x), sgd)
  step = make_train_step(
    model, sgd, PREPROCESSING, task=Segmentation(), axis_name=parallel.AXIS, frozen=True
  )
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (6, 33, 33, 3), np.uint8),
    "label": rng.integers(0, 3, (6, 33, 33)).astype(np.uint8),
  }
  three = jax.devices()[:3]  # a mean over three rounds
  cut = {name: value.reshape(3, 2, *value.shape[1:]) for name, value in batch.items()}
  new, _ = parallel.data_parallel(step, devices=three)(state, cut)
  heads = ("head", "pyramid")
  for half in ("params", "batch_stats"):
    before, after = bits(getattr(state, half)), bits(getattr(new, half))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {path for path in before if path.startswith(heads)}
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  features = jax.jit(model.clone(features_only=True).apply)(
    variables, PREPROCESSING.normalize(jnp.asarray(batch["image"]))
  )["stage4"]
  means = np.asarray(features.mean((1, 2)))  # the only bin
  kernel = np.asarray(state.params["pyramid"]["RepConv_bins1"]["conv1x1"]["conv"]["kernel"])[0, 0]
  old, found = (
    tree["pyramid"]["RepConv_bins1"]["conv1x1"]["bn"]["mean"]
    for tree in (state.batch_stats, new.batch_stats)
  )
  assert relative_error(found, 0.9 * old + 0.1 * (means @ kernel).mean(0)) <= 1e-5


def test_a_frozen_step_is_a_step_of_regression_on_features_in_evaluation_mode():
  model, state, build = frozen_parts()
  batch = make_batch()
  new, metrics = jax.jit(build())(state, batch)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  features = jax.jit(model.clone(features_only=True).apply)(
    variables, PREPROCESSING.normalize(jnp.asarray(batch["image"]))
  )["stage4"].mean((1, 2))

  def loss_of(head):
    return cross_entropy(features @ head["kernel"] + head["bias"][None], batch["label"], SMOOTHING)

  head = state.params["head"]
  loss, gradients = jax.value_and_grad(loss_of)(head)
  assert relative_error(metrics["loss"], loss) <= 1e-5
  kernel = head["kernel"] - RATE * (gradients["kernel"] + DECAY * head["kernel"])
  bias = head["bias"] - 2 * RATE * gradients["bias"]
  assert relative_error(new.params["head"]["kernel"], kernel) <= 1e-5
  assert relative_error(new.params["head"]["bias"], bias) <= 1e-5
  norm = np.sqrt(sum((value**2).sum() for value in jax.tree.leaves(gradients)))
  assert relative_error(metrics["grad_norm"], norm) <= 1e-5


def test_a_frozen_backbone_has_no_backward_pass():
  model, state, build = frozen_parts(aux_heads=False)
  batch = make_batch()

  def convolutions(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("conv_general_dilated[")

  variables = {"params": state.params, "batch_stats": state.batch_stats}
  images = PREPROCESSING.normalize(jnp.asarray(batch["image"]))
  forward = convolutions(model.apply, variables, images)
  assert convolutions(build(), state, batch) == forward == 2 * 6
  sgd = optimizer.sgd(lambda step: RATE, momentum=0.9, nesterov=False, weight_decay=DECAY)
  learning = make_train_step(model, sgd, PREPROCESSING)
  full = create_state(variables, sgd)
  assert convolutions(learning, full, batch) > 2 * forward
