"""The programs that benchmarks/inspect_gpu.py compiles: those of users, lowered on shapes alone."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax.deploy import layouts
from repjax.deploy.rewrite import with_depthwise_sums
from repjax.inference import inference
from repjax.spec import Preprocessing, shapes_of
from repjax.training import optimizer, parallel
from repjax.training.state import create_state
from repjax.training.step import make_eval_step, make_train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


class Wanted(NamedTuple):
  """A program to compile.

  Attributes:
    model: name of the model.
    form: one of FORMS.
    dtype: dtype of the computation.
    batch_size: number of images.
    image_size: side of the images in pixels.
  """

  model: str
  form: str
  dtype: str
  batch_size: int
  image_size: int


def deploy(wanted: Wanted, device: Any, most_taps: int = 0) -> Any:
  """Lowers the program of `repjax.deploy.compile`.

  Args:
    wanted: the program.
    device: the device to lower for.
    most_taps: depthwise convolutions with at most so many taps are sums over their taps.
  """
  model = repjax.create_model(wanted.model, deploy=True)
  found: Any = None

  def build(variables: Any) -> Any:
    nonlocal found
    found = inference(
      model,
      variables,
      image_size=wanted.image_size,
      dtype=wanted.dtype,
      preprocessing=None,
      probabilities=False,
    )
    return found.tree

  tree = jax.eval_shape(build, shapes_of(model, wanted.image_size))
  images = _on(device, _images(wanted, jnp.float32))
  function = with_depthwise_sums(found.function, most_taps) if most_taps else found.function
  return layouts.trace(function, tree, images, images.sharding).lower()


def train(wanted: Wanted, device: Any) -> Any:
  """Lowers the training form in evaluation mode."""
  model = repjax.create_model(wanted.model, dtype=jnp.dtype(wanted.dtype))
  shapes = shapes_of(model, wanted.image_size)
  return jax.jit(model.apply).lower(*_on(device, (shapes, _images(wanted, wanted.dtype))))


def evaluate(wanted: Wanted, device: Any) -> Any:
  """Lowers the evaluation step of a training run, which computes the deploy form."""
  model = repjax.create_model(wanted.model, deploy=True, dtype=jnp.dtype(wanted.dtype))
  step = make_eval_step(model.apply, _preprocessing(wanted), axis_name=parallel.AXIS)
  mask = jax.ShapeDtypeStruct((1, wanted.batch_size), np.bool_)
  shapes = shapes_of(model, wanted.image_size)
  return parallel.data_parallel(step, devices=[device]).lower(
    shapes, _batch(wanted) | {"mask": mask}
  )


def step(wanted: Wanted, device: Any) -> Any:
  """Lowers the training step of `repjax train` with SGD, whose state is donated."""
  model = repjax.create_model(wanted.model, dtype=jnp.dtype(wanted.dtype))
  sgd = optimizer.sgd(lambda step: RATE, momentum=MOMENTUM, nesterov=False, weight_decay=DECAY)
  train_step = make_train_step(model, sgd, _preprocessing(wanted), axis_name=parallel.AXIS)
  shapes = shapes_of(model, wanted.image_size)
  state = jax.eval_shape(lambda variables: create_state(variables, sgd), shapes)
  on_device = parallel.data_parallel(train_step, donate=True, devices=[device], dtype=wanted.dtype)
  return on_device.lower(state, _batch(wanted))


FORMS: dict[str, Callable[[Wanted, Any], Any]] = {
  "deploy": deploy,
  "sums": functools.partial(deploy, most_taps=sys.maxsize),
  "train": train,
  "evaluate": evaluate,
  "step": step,
}
"""Name of a form to the function that lowers it for a device."""


def _preprocessing(wanted: Wanted) -> Preprocessing:
  return Preprocessing(wanted.image_size, wanted.image_size, "bilinear", MEAN, STD)


def _images(wanted: Wanted, dtype: Any) -> jax.ShapeDtypeStruct:
  size = wanted.image_size
  return jax.ShapeDtypeStruct((wanted.batch_size, size, size, 3), dtype)


def _batch(wanted: Wanted) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns uint8 images and labels for one device, with the axis of devices."""
  size = wanted.image_size
  return {
    "image": jax.ShapeDtypeStruct((1, wanted.batch_size, size, size, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((1, wanted.batch_size), np.int32),
  }


def _on(device: Any, shapes: Any) -> Any:
  """Returns shapes that lie on a device."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
  )
