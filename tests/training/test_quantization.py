"""Quantization-aware training: one step by hand, a run from its start to its file, its mistakes."""

import importlib.util

import jax
import numpy as np
import pytest

import repjax
from repjax import disk, training
from repjax.deploy import Rounding, simulated
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import optimizer, quantization, settings
from repjax.training.step import create_state, make_train_step
from tests.helpers import leaves, quick_jit, random_variables, relative_error
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

needs_onnx = pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
  reason="ONNX Runtime calibrates and runs the file: pip install onnx onnxruntime",
)
LAYERS = ["stem/RepConv_0", *(f"stage{stage}/block0/RepConv_0" for stage in (1, 2, 3, 4)), "head"]
PREPROCESSING = Preprocessing(16, 16, "bilinear", (0.3,) * 3, (0.35,) * 3)
PLAIN = {"weight_decay_rule": "more_than_one_axis"}  # all learn at one rate
HOW = [Rounding(LAYERS[0], 0.02, 100, False), *(Rounding(n, 0.05, 0, False) for n in LAYERS[1:])]


def qat(digits_dir, trained, **changes):
  return tiny.config(
    digits_dir, **{"init_from": str(trained), "qat": True, "qat_images": 32, **changes}
  )


def test_a_step_moves_branches_by_the_gradient_through_fold_and_rounding(digits_dir):
  spec = repjax.ModelSpec("repvgg_a0", 10, tiny.OVERRIDES, PREPROCESSING, ())
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  labels, x = np.arange(8) % 10, spec.preprocessing.normalize(images)
  model = spec.create_model()
  variables = random_variables(model, x)
  sgd = optimizer.sgd(lambda step: 0.01, momentum=0.9, nesterov=False, weight_decay=0.0, **PLAIN)
  network = quantization.network(qat(digits_dir, "trained"), spec, HOW)
  step = make_train_step(model, sgd, spec.preprocessing, network=network)
  batch = {"image": images, "label": labels}
  state, metrics = quick_jit(step)(create_state(variables, sgd), batch)

  def loss(params):
    plain = repjax.reparameterize(params, variables["batch_stats"])
    logits = simulated(spec.create_model(deploy=True).apply, HOW)({"params": plain}, x)
    return -jax.nn.log_softmax(logits)[np.arange(8), labels].mean()

  value, gradients = quick_jit(jax.value_and_grad(loss))(variables["params"])
  assert relative_error(metrics["loss"], value) < 1e-5
  before, after, slopes = (leaves(t) for t in (variables["params"], state.params, gradients))
  for path, leaf in after.items():
    assert relative_error(before[path] - leaf, 0.01 * slopes[path]) < 1e-3, path
  for old, new in zip(*map(jax.tree.leaves, (variables["batch_stats"], state.batch_stats))):
    np.testing.assert_array_equal(old, new)


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
    *("model.onnx", "model.json", "export.json"),
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
  rows = disk.read_json(workdir / "rounding.json")
  assert [row["layer"] for row in rows] == LAYERS
  rows[0]["scale"] *= 2
  disk.write_json(workdir / "rounding.json", rows)
  plan = settings.make_plan(config)
  how = quantization.begin(config, plan, None, workdir)
  assert how[0].scale == rows[0]["scale"]
  model = (workdir / "int8" / "model.onnx").read_bytes()
  quantization.write_int8(config, plan, how, workdir)
  assert (workdir / "int8" / "model.onnx").read_bytes() != model
  (workdir / "rounding.json").write_text('[{"layers": 3}]')
  with pytest.raises(InputError, match=r"rounding\.json is damaged: it does not hold how layers"):
    quantization.begin(config, plan, None, workdir)


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"dtype": "bfloat16"}, r"config\.qat rounds to 8 bits what config\.dtype = 'bfloat16' has"),
    ({"custom_l2": 1e-4, "weight_decay_rule": "all_but_penalised_kernels"}, "reads statistics of"),
    ({"qat_weight_bits": 4}, "qat_weight_bits is 7 or 8, got 4"),
    ({"qat_activations": "int4"}, "unknown value of config.qat_activations 'int4'; did you mean"),
    ({"qat_images": 0}, "qat_images must be at least 1, got 0"),
    ({"init_from": None}, "config.qat fine-tunes a network that was trained in float; name its"),
    ({"qat_images": 5000}, "5000 images to calibrate with are asked for, and the split has 1437"),
  ],
)
def test_what_cannot_learn_in_8_bits_is_said_before_anything_is_written(
  finished, digits_dir, tmp_path, changes, text
):
  with pytest.raises(InputError, match=text):
    training.train(qat(digits_dir, finished[0], **changes), tmp_path)
  assert not list(tmp_path.glob("*.json"))


def test_a_run_in_float_does_not_become_one_in_8_bits(finished, digits_dir):
  with pytest.raises(InputError, match="began with another config: qat False -> True"):
    training.train(tiny.config(digits_dir, qat=True), finished[0])
