"""Segmentation: its loss, its metrics and its evaluation against the same thing in NumPy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import training
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import evaluation, finetune, optimizer, parallel, planning
from repjax.training.state import create_state
from repjax.training.step import make_eval_step, make_train_step
from repjax.training.tasks import Segmentation
from repjax.training.tasks.segmentation import IGNORED, slide
from tests.helpers import leaves, relative_error
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

DEVICES, CLASSES, SIZE = 4, 3, (5, 6)
PLAIN = Preprocessing(8, 8, "bilinear", (0.0,) * 3, (1.0,) * 3)
WEIGHTS = (0.5, 2.0, 1.0)


class Pixels(nn.Module):
  """One linear layer on each pixel, and an auxiliary one in training."""

  aux: bool = False

  @nn.compact
  def __call__(self, images, train=False):
    self.variable("batch_stats", "none", jnp.zeros, ())
    logits, auxiliary = (nn.Dense(CLASSES, name=name)(images) for name in ("main", "aux"))
    return (logits, {"aux": auxiliary}) if train and self.aux else logits


def make_batch(count=16, seed=0):
  """Noise of which some pixels, and all those of the third image, have no label."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, (count, *SIZE)).astype(np.uint8)
  labels[rng.random(labels.shape) < np.linspace(0, 0.9, count)[:, None, None]] = IGNORED
  labels[2] = IGNORED
  return {"image": rng.integers(0, 256, (count, *SIZE, 3), np.uint8), "label": labels}


def pixels_of(batch):
  """The pixels (P, 3) in 0 ... 1 and labels (P,) of all pixels with a label."""
  seen = batch["label"] != IGNORED
  return batch["image"][seen].astype(np.float64) / 255, batch["label"][seen]


def loss_and_gradients(layer, pixels, labels, weights):
  """Weighted mean of the cross-entropy of a linear layer, and its gradients."""
  logits = pixels @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  share = np.asarray(weights)[labels] / np.asarray(weights)[labels].sum()
  slope = share[:, None] * (p - np.eye(CLASSES)[labels])
  loss = -(share * np.log(p[np.arange(len(labels)), labels])).sum()
  return loss, {"kernel": pixels.T @ slope, "bias": slope.sum(0)}, logits


@pytest.mark.parametrize(
  ("devices", "parts", "weights"),
  [(1, 1, None), (DEVICES, 1, None), (1, 4, WEIGHTS), (DEVICES, 2, WEIGHTS)],
)
def test_the_loss_is_the_mean_over_all_labelled_pixels_however_the_batch_is_cut(
  devices, parts, weights
):
  model, batch = Pixels(aux=True), make_batch()
  variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, *SIZE, 3)))
  sgd = optimizer.sgd(lambda step: 1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
  state = create_state(variables, sgd)
  step = make_train_step(
    model,
    sgd,
    PLAIN,
    task=Segmentation(class_weights=weights),
    aux_weight=0.4,
    accumulate_steps=parts,
    axis_name=parallel.AXIS if devices > 1 else None,
  )
  if devices == 1:
    new, metrics = jax.jit(step)(state, batch)
  else:
    new, metrics = parallel.data_parallel(step)(parallel.place(state), parallel.split(batch))
  pixels, labels = pixels_of(batch)
  params, total = jax.device_get(state.params), 0.0
  for name, factor in (("main", 1.0), ("aux", 0.4)):
    found = loss_and_gradients(params[name], pixels, labels, weights or (1.0,) * CLASSES)
    total += factor * found[0]
    for leaf, gradient in found[1].items():
      rate = 2.0 if leaf == "bias" else 1.0
      change = np.asarray(params[name][leaf]) - np.asarray(new.params[name][leaf])
      assert relative_error(change, rate * factor * gradient) <= 1e-5
    if name == "main":
      right = (found[2].argmax(-1) == labels).mean()
  assert relative_error(metrics["loss"], total) <= 1e-6
  assert relative_error(metrics["accuracy"], right) <= 1e-6


def test_a_batch_without_a_label_has_no_loss_and_changes_nothing():
  model, batch = Pixels(), make_batch(4)
  batch["label"][:] = IGNORED
  variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, *SIZE, 3)))
  sgd = optimizer.sgd(lambda step: 1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
  state = create_state(variables, sgd)
  new, metrics = jax.jit(make_train_step(model, sgd, PLAIN, task=Segmentation()))(state, batch)
  assert metrics["loss"] == metrics["grad_norm"] == 0
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, new.params, state.params)))


def ious(predictions, labels):
  """IoU of each class from sets of pixels, one class after another."""
  counted, found = labels != IGNORED, []
  for number in range(CLASSES):
    truth, guess = (labels == number) & counted, (predictions == number) & counted
    union = np.count_nonzero(truth | guess)
    found.append(np.count_nonzero(truth & guess) / union if union else None)
  return found


def evaluated(task, network, batch, devices):
  """Results over a batch, in two batches on some devices."""
  axis = parallel.AXIS if devices > 1 else None
  step = make_eval_step(network, PLAIN, task=task, axis_name=axis)
  if devices > 1:
    step = parallel.data_parallel(step, devices=jax.devices()[:devices])
    cut = {name: value.reshape(2, devices, -1, *value.shape[1:]) for name, value in batch.items()}
  else:
    step = jax.jit(step)
    cut = {name: value.reshape(2, -1, *value.shape[1:]) for name, value in batch.items()}
  parts = [{name: value[number] for name, value in cut.items()} for number in range(2)]
  return evaluation.run(task, step, {}, parts)


@pytest.mark.parametrize("devices", [1, 2, DEVICES])
def test_each_labelled_pixel_of_each_image_counts_once(devices):
  batch = make_batch() | {"mask": np.arange(16) < 13}
  batch["label"][batch["label"] == 2] = 1  # the last class is absent from the truth
  kernel = np.random.default_rng(1).standard_normal((3, CLASSES)).astype(np.float32)
  bias = np.array([0, 0, -100], np.float32)  # and from predictions

  def network(variables, images):
    logits = jnp.einsum("nhwi,io->nhwo", images, kernel) + bias.reshape(1, 1, 1, -1)
    # Images of padding may give anything.
    return jnp.where(images.max((1, 2, 3), keepdims=True) == 0, jnp.nan, logits)

  batch["image"][13:] = 0
  result = evaluated(Segmentation(), network, batch, devices)
  images, labels = batch["image"][:13], batch["label"][:13]
  logits = images / 255 @ kernel.astype(np.float64) + bias
  wanted = ious(logits.argmax(-1), labels)
  assert wanted[2] is None
  assert result["iou"] == pytest.approx(wanted)
  assert result["miou"] == pytest.approx(np.mean(wanted[:2]))
  counted = labels != IGNORED
  assert result["accuracy"] == np.mean((logits.argmax(-1) == labels)[counted])
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss = -np.take_along_axis(log_p, np.where(counted, labels, 0)[..., None], -1)[..., 0]
  assert result["loss"] == pytest.approx(loss[counted].mean(), rel=1e-5)
  assert result["count"] == 13


def test_a_split_without_a_label_is_refused():
  batch = make_batch() | {"mask": np.ones(16, bool)}
  batch["label"][:] = IGNORED
  with pytest.raises(InputError, match=r"none of the 16 images .* has a labelled pixel"):
    evaluated(Segmentation(), lambda _, images: images, batch, 1)


def place_dependent(images):
  """Logits that differ between a window and the whole image: a pixel less the mean of its row."""
  x = images.astype(jnp.float32) / 40
  return x - x.mean(2, keepdims=True)


def probabilities(images):
  logits = np.asarray(place_dependent(images), np.float64)
  return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize(
  ("size", "window", "rows", "columns"),
  [
    ((9, 14), 6, [0, 3], [0, 4, 8]),
    ((6, 7), 6, [0], [0, 1]),
    ((5, 16), 6, [0], [0, 4, 8, 10]),
    ((4, 5), 6, [0], [0]),
  ],
)
def test_windows_overlap_by_a_third_and_their_probabilities_are_averaged(
  size, window, rows, columns
):
  images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  total, count = np.zeros((2, *size, 3)), np.zeros((*size, 1))
  for top in rows:
    for left in columns:
      cut = np.s_[top : top + window, left : left + window]
      total[:, *cut] += probabilities(images[:, *cut])
      count[cut] += 1
  found = np.asarray(jax.jit(functools.partial(slide, place_dependent, window=window))(images))
  found = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
  assert relative_error(found, total / count) <= 1e-5


def test_a_flipped_evaluation_averages_an_image_and_its_mirror_image():
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)

  def sloped(images):  # not the same from the other side
    return place_dependent(images) * jnp.arange(1.0, 6.0).reshape(1, 1, -1, 1)

  logits = np.asarray(jax.jit(lambda x: Segmentation(eval_flip=True).predict(sloped, x))(images))
  found = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  both = [np.asarray(sloped(images)), np.asarray(sloped(images[:, :, ::-1]))[:, :, ::-1]]
  wanted = sum(np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in both) / 2
  assert relative_error(found, wanted) <= 1e-5


def test_a_run_records_and_reports_the_scores_of_segmentation(segmented):
  workdir, report = segmented
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  printed = json.loads(workdir.with_suffix(".json").read_text())[1]
  for sentence in ("note: crops of 16 x 16 px", "note: windows of 12 x 12 px", "17 x 17 px do not"):
    assert sentence in printed
  scores = {row["step"]: row["eval_miou"] for row in rows if "eval_miou" in row}
  assert list(scores) == [4, 8, 12]
  assert report["miou"]["train"] == pytest.approx(scores[report["step"]], abs=1e-3)
  best = max(scores, key=lambda step: (scores[step], step))
  assert report["step"] == best
  held = json.loads((workdir / f"checkpoints/{best}/metrics/metrics").read_text())
  assert held == {"miou": scores[best]}
  assert (report["images"], report["pixels"]) == (16, 16 * 16 * 16)
  assert report["agreement"] > 0.99
  assert report["logits_difference"] <= 1e-5
  assert {"miou", "accuracy"} <= report.keys()
  assert not any("AuxHead" in path for path in leaves(repjax.load(workdir)[1]))


def test_evaluation_agrees_on_both_forms_and_takes_windows_and_flips(segmented, run_command):
  workdir, report = segmented
  config = tiny.segmentation()
  deployed, trained = (
    training.evaluate(config, workdir, deploy=deploy) for deploy in (True, False)
  )
  # The conversion has judged both forms in the windows and with the flips of the run.
  for name in ("miou", "accuracy", "iou"):
    assert deployed[name] == report[name]["deploy"]
    assert trained[name] == report[name]["train"]
  assert len(deployed["iou"]) == CLASSES
  printed = run_command("evaluate", "--workdir", workdir, "--form", "deploy", "--no-flip")
  assert "in windows of 12 px" in printed
  assert "mirror image" not in printed
  assert [line.split()[0] for line in printed.splitlines()[2:6]] == ["class", "0", "1", "2"]
  with pytest.raises(InputError, match="ten crops are for classification"):
    training.evaluate(config, workdir, ten_crop=True)


def test_windows_are_refused_where_there_are_no_pixels_to_classify(finished, digits_dir):
  config = tiny.config(digits_dir, eval_window=8)
  with pytest.raises(InputError, match=r"config\.eval_window = 8 is for segmentation"):
    training.evaluate(config, finished[0])


@pytest.mark.parametrize("own", [None, {"output_stride": 4, "dilated_blocks": 1}])
def test_a_classifier_becomes_the_backbone_and_loses_its_head(finished, own):
  config = tiny.segmentation(init_from=str(finished[0]))
  config.model = "fcn"
  config.model_overrides.update({"backbone": None, "backbone_overrides": own, "bins": None})
  full = finetune.resolve(config)
  spec = planning.model_spec(full, ())
  assert spec.overrides["backbone"] == "repvgg_a0"
  model = spec.create_model()
  fresh = repjax.init(model, jax.random.key(0), 16)
  variables, text = finetune.first_variables(
    finished[0], spec, fresh, key=jax.random.key(0), images=None
  )
  assert text.endswith("its classifier is dropped, the head is new")
  held = leaves(repjax.load(finished[0], deploy=False)[1])
  ours, drawn = leaves(variables), leaves(fresh)
  assert ours.keys() == drawn.keys()
  for path, value in ours.items():
    half, scope, *rest = path.split("/")
    wanted = held["/".join([half, *rest])] if scope == "backbone" else drawn[path]
    np.testing.assert_array_equal(value, wanted, err_msg=path)


def test_a_folder_with_a_different_backbone_is_refused(finished):
  config = tiny.segmentation(init_from=str(finished[0]), model="fcn")
  config.model_overrides.update({"backbone": "resnet18", "bins": None})
  with pytest.raises(InputError, match=r"holds the model repvgg_a0, but .* is resnet18"):
    finetune.resolve(config)
  config.model_overrides.update({"backbone": "repvgg_a0", "backbone_overrides": {"act": "gelu"}})
  full = finetune.resolve(config)
  spec = planning.model_spec(full, ())
  with pytest.raises(InputError, match="act relu -> gelu"):
    finetune.first_variables(finished[0], spec, {}, key=jax.random.key(0), images=None)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_model_of_a_different_task_is_refused(digits_dir, task):
  config = tiny.config(digits_dir) if task == "segmentation" else tiny.segmentation()
  config.task = task
  config.update({"class_weights": None, "eval_window": 0, "eval_flip": False})
  with pytest.raises(InputError, match=rf"config\.task is '{task}'"):
    planning.model_spec(config, ())


def test_the_head_learns_at_its_own_rate_with_its_norms_and_auxiliary_head():
  config = tiny.segmentation()
  shapes = planning.model_spec(config, ()).variable_shapes()["params"]
  scopes = {path.split("/")[0] for path, own in leaves(optimizer.head_mask(shapes)).items() if own}
  assert scopes == {"head", "pyramid", "AuxHead_stage3"}
  classifiers = leaves(optimizer.classifier_mask(shapes))
  heads = ("head/classifier", "AuxHead_stage3/classifier")
  wanted = {f"{head}/{leaf}" for head in heads for leaf in ("kernel", "bias")}
  assert {path for path, own in classifiers.items() if own} == wanted
  assert optimizer.head_only(shapes).keys() == {"head", "pyramid"}
