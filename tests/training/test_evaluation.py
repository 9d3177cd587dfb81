"""Evaluation against the same thing computed by hand."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import repjax
from repjax import training
from repjax.data import open_source
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture(scope="module")
def test_images(digits_dir):
  """The test split as the tiny model sees it, and its labels."""
  examples = open_source("digits", "test", data_dir=str(digits_dir)).examples
  rows = [examples[index] for index in range(len(examples))]
  pixels = [
    Image.open(io.BytesIO(row["image"])).resize((16, 16), Image.Resampling.BILINEAR) for row in rows
  ]
  grey = (np.array([np.asarray(image) for image in pixels]) / 255 - 0.3) / 0.35
  images = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
  return images, np.array([row["label"] for row in rows])


# On four devices 30 becomes 32; either way the last of the 360 images fill a quarter of a batch.
@pytest.mark.parametrize(("deploy", "batch_size"), [(False, 32), (True, 32), (True, 30)])
def test_accuracy_and_loss_are_those_of_every_image_counted_once(
  finished, digits_dir, test_images, deploy, batch_size
):
  config = tiny.config(digits_dir, batch_size=batch_size)
  result = training.evaluate(config, finished[0], deploy=deploy)
  images, labels = test_images
  model, variables, _ = repjax.load(finished[0], deploy=deploy)
  logits = np.asarray(jax.jit(model.apply)(variables, images), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert result == {
    "accuracy": np.mean(logits.argmax(-1) == labels),
    "loss": pytest.approx(-np.mean(log_p[np.arange(360), labels]), rel=1e-5),
    "count": 360,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
  }


def test_a_run_evaluates_the_deploy_form_to_the_bit(finished, digits_dir):
  workdir, report, _ = finished
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  losses_of_steps = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
  config = tiny.config(digits_dir)
  losses = [training.evaluate(config, workdir, deploy=deploy)["loss"] for deploy in (True, False)]
  assert losses_of_steps[report["step"]] == losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_the_report_says_is_what_evaluation_finds(finished, digits_dir):
  workdir, report, _ = finished
  for form, accuracy in report["accuracy"].items():
    result = training.evaluate(tiny.config(digits_dir), workdir, deploy=form == "deploy")
    assert result["accuracy"] == accuracy


def test_ten_crops_of_images_that_just_fit_are_five_copies_and_their_mirror_images(
  finished, digits_dir, test_images
):
  # Digits are resized to 16 px and 16 px wide, so that every corner is the centre.
  images, labels = test_images
  result = training.evaluate(tiny.config(digits_dir), finished[0], ten_crop=True)
  model, variables, _ = repjax.load(finished[0], deploy=False)
  apply = jax.jit(model.apply)
  both = [apply(variables, x) for x in (images, images[:, :, ::-1])]
  mean = sum(np.asarray(jax.nn.softmax(logits), np.float64) for logits in both) / 2
  assert result["count"] == 360
  assert result["accuracy"] == np.mean(mean.argmax(-1) == labels)
  loss = -np.mean(np.log(mean[np.arange(360), labels]))
  assert result["loss"] == pytest.approx(loss, rel=1e-5)
