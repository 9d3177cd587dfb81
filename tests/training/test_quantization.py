"""Quantization-aware training: one step by hand, a run from its start to its file, its mistakes."""

import jax
import numpy as np
import pytest

import repjax
from repjax import disk, runs, training
from repjax.data import Source, open_source
from repjax.errors import InputError
from repjax.quantization import roundings_of, simulated
from repjax.quantization.sensitivity import compared
from repjax.spec import Preprocessing
from repjax.training import evaluation, optimizer, planning, quantization
from repjax.training.quantization import calibration_images, check_apart
from repjax.training.state import create_state
from repjax.training.step import make_train_step
from tests.helpers import halves, leaves, quick_jit, random_variables, relative_error
from tests.quantization.int8 import needs_onnx
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

LAYERS = ["stem/RepConv_0", *(f"stage{stage}/block0/RepConv_0" for stage in (1, 2, 3, 4)), "head"]
PREPROCESSING = Preprocessing(16, 16, "bilinear", (0.3,) * 3, (0.35,) * 3)
SPEC = repjax.ModelSpec("repvgg_a0", 10, tiny.OVERRIDES, PREPROCESSING, ())
PLAIN = {"weight_decay_rule": "more_than_one_axis"}  # all learn at one rate


def qat(digits_dir, trained, **changes):
  return tiny.config(
    digits_dir, **{"init_from": str(trained), "qat": True, "qat_images": 32, **changes}
  )


def test_a_step_moves_parameters_by_the_gradient_of_the_network_that_it_is_given():
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  labels = np.arange(8) % 10
  model = SPEC.create_model()
  variables = random_variables(model, np.zeros((1, 16, 16, 3), np.float32))
  sgd = optimizer.sgd(lambda step: 0.01, momentum=0.9, nesterov=False, weight_decay=0.0, **PLAIN)

  def network(variables, images):
    plain = repjax.reparameterize(variables["params"], variables["batch_stats"])
    return SPEC.create_model(deploy=True).apply({"params": plain}, images)

  def loss(params):
    x = PREPROCESSING.normalize(images)
    logits = network({**variables, "params": params}, x)
    return -jax.nn.log_softmax(logits)[np.arange(8), labels].mean()

  step = make_train_step(model, sgd, PREPROCESSING, network=network)
  batch = {"image": images, "label": labels}
  state, metrics = quick_jit(step)(create_state(variables, sgd), batch)
  value, gradients = quick_jit(jax.value_and_grad(loss))(variables["params"])
  assert relative_error(metrics["loss"], value) < 1e-5
  before, after, slopes = (leaves(t) for t in (variables["params"], state.params, gradients))
  for path, leaf in after.items():
    assert relative_error(before[path] - leaf, 0.01 * slopes[path]) < 1e-3, path
  for old, new in zip(*map(jax.tree.leaves, (variables["batch_stats"], state.batch_stats))):
    np.testing.assert_array_equal(old, new)


@pytest.mark.proof
@needs_onnx
def test_the_network_of_a_run_is_the_fold_in_8_bits():
  model = SPEC.create_model()
  x = np.random.default_rng(0).standard_normal((8, 16, 16, 3)).astype(np.float32)
  variables = random_variables(model, x)
  roundings = roundings_of(repjax.onnx.to_onnx(model, variables, image_size=16), x)
  params = quick_jit(repjax.reparameterize)(*halves(variables))
  here = quantization.network(SPEC, variables, roundings)(variables, x)
  there = simulated(model, variables, roundings, image_size=16)({"params": params}, x)
  plain = SPEC.create_model(deploy=True).apply({"params": params}, x)
  off, _ = compared(plain, there)
  # The folds of two programs differ in the last bit, which may move a weight by a step.
  assert compared(here, there)[0] < 0.1 * off


@needs_onnx
def test_a_trained_run_learns_in_8_bits_and_is_exported(finished, digits_dir, tmp_path, capsys):
  workdir = tmp_path / "run"
  config = qat(digits_dir, finished[0], recalibrate_batches=1, num_steps=4)
  training.train(config, workdir)
  printed = capsys.readouterr().out.splitlines()
  for line in (
    "calibrating the ranges of 8 bits on 32 training images",
    "quantization-aware: weights of 7 bits, activations in uint8; accuracies are those in 8 bits",
    "the network in 8 bits keeps its statistics; they are not re-estimated",
    f"saved: {workdir}/int8",
  ):
    assert line in printed
  facts = disk.read_json(workdir / "int8" / "export.json")
  assert {path.name for path in (workdir / "int8").iterdir()} == {
    *("model.onnx", "run_onnx.py", "model.json", "export.json", "manifest.json"),
  }
  with pytest.raises(InputError, match="holds a network as an ONNX file alone"):
    repjax.load(workdir / "int8")
  accuracy = facts["accuracy"]
  assert any(f"in 8 bits: {accuracy['int8']:.2%} in ONNX Runtime" in line for line in printed)
  assert abs(accuracy["int8"] - accuracy["simulated"]) <= 2 / 360
  assert facts["bytes"] == (workdir / "int8" / "model.onnx").stat().st_size
  before, after = (repjax.load(folder, deploy=False)[1] for folder in (finished[0], workdir))
  for old, new in zip(*(jax.tree.leaves(tree["batch_stats"]) for tree in (before, after))):
    np.testing.assert_array_equal(old, new)
  assert all(
    (old != new).any() for old, new in zip(*(jax.tree.leaves(t["params"]) for t in (before, after)))
  )
  _goes_on_as_it_began(config, workdir)


def _goes_on_as_it_began(config, workdir):
  """A run that continues rounds as it began, or says why it cannot; its file is written anew."""
  path = workdir / "rounding.json"
  facts = disk.read_json(path)
  scale, zero = facts["tensors"]["images"]
  facts["tensors"]["images"] = [2 * scale, zero]
  runs.write_roundings(workdir, facts)
  plan = planning.make_plan(config)
  roundings = quantization.begin(config, plan, None, workdir)
  assert roundings.tensors["images"] == [2 * scale, zero]
  model = (workdir / "int8" / "model.onnx").read_bytes()
  quantization.write_int8(config, plan, roundings, workdir)
  assert (workdir / "int8" / "model.onnx").read_bytes() != model
  path.write_text('{"layers": 3}')
  for _ in range(2):
    with pytest.raises(InputError, match=r"rounding\.json (does not exist|is damaged)"):
      quantization.begin(config, plan, None, workdir)
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"dtype": "bfloat16"}, r"config\.qat computes in float32.*config\.dtype = 'bfloat16'"),
    ({"custom_l2": 1e-4}, r"config\.custom_l2.*statistics of the batch"),
    ({"qat_weight_bits": 4}, "qat_weight_bits must be a whole number from 7 to 8, got 4"),
    ({"qat_activations": "int4"}, "qat_activations must be one of uint8, int8 .did you mean"),
    ({"qat_images": 0}, "qat_images must be a whole number of at least 1, got 0"),
    ({"init_from": None}, "config.qat fine-tunes a network that was trained in float; name its"),
  ],
)
def test_what_cannot_learn_in_8_bits_is_said_before_anything_is_written(
  finished, digits_dir, tmp_path, changes, text
):
  with pytest.raises(InputError, match=text):
    training.train(qat(digits_dir, finished[0], **changes), tmp_path)
  assert not list(tmp_path.glob("*.json"))


def test_a_run_in_float_does_not_become_one_in_8_bits(finished, digits_dir):
  with pytest.raises(InputError, match="config: qat False -> True"):
    training.train(tiny.config(digits_dir, qat=True), finished[0])


CALIBRATION_PREPROCESSING = Preprocessing(12, 14, "bicubic", (0.3,) * 3, (0.35,) * 3)
SOURCE = open_source("synthetic", "validation", num_classes=10, image_size=16)


@pytest.mark.parametrize("count", [1, 3, 64, 100, 128])
def test_images_are_at_equal_distances_and_as_evaluation_has_them(count):
  images = calibration_images(SOURCE, count, CALIBRATION_PREPROCESSING)
  assert (images.shape, images.dtype) == ((count, 12, 12, 3), np.uint8)
  (whole,) = evaluation.host_batches(SOURCE, CALIBRATION_PREPROCESSING, batch_size=128)
  places = [128 * i // count for i in range(count)]
  assert (images == whole["image"][places]).all()
  assert set(np.diff(places)) <= {128 // count, 128 // count + 1}


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_is_an_error(count):
  with pytest.raises(InputError, match=f"{count} images to calibrate .* split has 128"):
    calibration_images(SOURCE, count, CALIBRATION_PREPROCESSING)


def test_all_images_are_taken_where_there_are_too_few(capsys):
  images = calibration_images(SOURCE, 129, CALIBRATION_PREPROCESSING)
  assert len(images) == 128
  assert "warning: the split has 128 images, and 129 were asked for" in capsys.readouterr().err
  few = SOURCE._replace(examples=[SOURCE.examples[place] for place in range(3)])
  assert len(calibration_images(few, 64, CALIBRATION_PREPROCESSING)) == 3
  assert "All 3 are taken; ranges of so few are unreliable" in capsys.readouterr().err


def test_an_image_that_cannot_be_decoded_is_named():
  source = Source([{"image": b"no", "label": 0, "index": 0, "name": "image 0 of it"}], ("0",), {})
  with pytest.raises(InputError, match="image 0 of it"):
    calibration_images(source, 1, CALIBRATION_PREPROCESSING)


def with_facts(split="train", **facts):
  return Source([], (), {"name": "sky", "version": "1.0.0", "split": split, "bytes": 5} | facts)


@pytest.mark.parametrize(
  ("one", "other", "text"),
  [
    (with_facts(), with_facts(), "are the same: the train split of sky. "),
    (
      with_facts(checksum="ab"),
      with_facts("test", checksum="ab"),
      "are the same: the test split of sky and the train split of sky. ",
    ),
  ],
)
def test_accuracy_is_not_measured_on_images_that_calibrate(one, other, text):
  with pytest.raises(InputError, match=f"{text}.*flatter.*--calibration-split or --split"):
    check_apart(one, other)


@pytest.mark.parametrize(
  ("one", "other"),
  [
    (with_facts(), with_facts("test")),
    (with_facts(), with_facts(name="sea")),
    (with_facts(checksum="ab"), with_facts("test", checksum="cd")),
  ],
)
def test_other_splits_are_taken(one, other):
  check_apart(one, other)


@pytest.mark.parametrize("split", ["train[:50%]", "train+test", "all"])
def test_parts_of_a_split_which_could_overlap_are_not_opened(digits_dir, split):
  with pytest.raises(InputError, match="unknown split of digits"):
    open_source("digits", split, data_dir=str(digits_dir))
