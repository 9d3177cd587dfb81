"""Semantic segmentation: one label for each pixel, 255 where a pixel has none."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repjax.algebra import wide_dtype
from repjax.data.pairs import window_starts
from repjax.errors import InputError
from repjax.training.tasks.base import Batch, Forward

IGNORED = 255
"""The label of pixels that do not count, in training and in evaluation."""


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """The task of segmentation, with batches {"image": (N, H, W, 3), "label": uint8 (N, H, W)}.

  Attributes:
    class_weights: weight of each class in the loss; None: all are 1.
    eval_window: side in pixels of the square windows that evaluation slides over an image, see
      `slide`; 0: the whole image at once.
    eval_flip: average the probabilities of each image and of its mirror image in evaluation.
  """

  scores: ClassVar[tuple[str, ...]] = ("miou", "accuracy")
  unit: ClassVar[str] = "pixels"
  ten_crop: ClassVar[bool] = False

  class_weights: tuple[float, ...] | None = None
  eval_window: int = 0
  eval_flip: bool = False

  def weigh(self, batch: Batch, axis_name: str | None) -> Batch:
    """Adds the mean weight and the mean number of labelled pixels of an image, over all devices.

    The loss of a part is its sum over pixels, divided by the mean weight times the images of the
    part. The mean over all parts and devices is then the sum over all pixels of the batch, divided
    by the weight of all pixels of the batch. A mean in each part would give pixels of images with
    few labels a larger share.
    """
    labels = batch["label"]
    pixels = (labels != IGNORED).sum((1, 2), dtype=jnp.int32).astype(jnp.float32)
    weight = pixels if self.class_weights is None else self._weights(labels).sum((1, 2))
    means = {"pixels": pixels.mean(), "weight": weight.mean()}
    if axis_name is not None:
      means = jax.lax.pmean(means, axis_name)
    # A batch without any label has the loss 0, not 0 / 0.
    means = {name: jnp.where(mean > 0, mean, 1.0) for name, mean in means.items()}
    return {**batch, **{name: jnp.full(len(labels), mean) for name, mean in means.items()}}

  def _weights(self, labels: jax.Array) -> jax.Array:
    """Returns the weight of each pixel, float32 (N, H, W)."""
    table = np.zeros(IGNORED + 1, np.float32)
    table[: len(self.class_weights or ())] = self.class_weights
    return jnp.asarray(table)[labels.astype(jnp.int32)]

  def targets(self, images: jax.Array, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the images, and the labels with what `weigh` has added."""
    del key
    return images, batch

  def loss(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the weighted mean of the cross-entropy of labelled pixels, in the sense of `weigh`.

    The weighted mean is sum_i w_i loss_i / sum_i w_i, with the class weight w_i of pixel i. The
    sums run over the labelled pixels of the whole batch: of all devices, and of all parts that a
    device computes one after another.
    """
    logits = logits.astype(wide_dtype(logits.dtype))
    losses = _cross_entropy(logits, targets["label"])
    if self.class_weights is not None:
      losses *= self._weights(targets["label"]).astype(losses.dtype)
    return losses.sum() / targets["weight"].sum().astype(losses.dtype)

  def accuracy(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the share of right pixels among those with a label."""
    right = logits.argmax(-1) == targets["label"].astype(jnp.int32)
    return right.sum(dtype=jnp.int32).astype(jnp.float32) / targets["pixels"].sum()

  def predict(self, forward: Forward, images: jax.Array) -> jax.Array:
    """Returns logits (N, H, W, K), from windows and mirror images if the task has them."""

    def whole(images: jax.Array) -> jax.Array:
      return jnp.asarray(forward(images), jnp.float32)

    def both(images: jax.Array) -> jax.Array:
      traced_once = jax.jit(whole)
      mirrored = traced_once(images[:, :, ::-1])[:, :, ::-1]
      return jnp.logaddexp(*(jax.nn.log_softmax(each) for each in (traced_once(images), mirrored)))

    one = both if self.eval_flip else whole
    return slide(one, images, self.eval_window) if self.eval_window else one(images)

  def views(self, images: jax.Array) -> jax.Array:
    """Returns the windows of `slide`, or the images as the only view."""
    if not self.eval_window:
      return images[None]
    size, corners = windows(images.shape[1:3], self.eval_window)
    return jnp.stack(
      [images[:, top : top + size[0], left : left + size[1]] for top, left in corners]
    )

  def sums(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Returns the confusion matrix int32 (K, K) of truth and prediction, `loss` and `count`.

    Every labelled pixel of every unmasked image is in one entry of the matrix.
    """
    labels = _counted(batch)
    return {
      "confusion": confusion(labels, logits.argmax(-1), logits.shape[-1]),
      "loss": _cross_entropy(logits, labels).sum(),
      "count": jnp.sum(batch["mask"]),
    }

  def agreement(self, logits: tuple[jax.Array, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Counts the labelled pixels that both forms put into one class."""
    first, second = (each.argmax(-1) for each in logits)
    counted = _counted(batch) != IGNORED
    return {"agree": jnp.sum((first == second) & counted), "units": jnp.sum(counted)}

  def summary(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns `miou`, `accuracy`, mean `loss`, `count` and `iou`.

    `iou` lists the intersection over union of each class: TP / (TP + FP + FN), counted over all
    labelled pixels of the split. `miou` is its mean. A class that is neither in the truth nor in a
    prediction has no IoU: it is None in the list and left out of the mean. `accuracy` is the share
    of right pixels, `loss` is a mean over pixels without class weights, and `count` is the number
    of images.

    Raises:
      InputError: no pixel of the split has a label.
    """
    matrix = np.asarray(sums["confusion"]).astype(np.int64)
    pixels = int(matrix.sum())
    if not pixels:
      raise InputError(
        f"none of the {int(sums['count']):,} images of the evaluation split has a labelled pixel, "
        f"since all masks hold {IGNORED} alone. Name a split with labels"
      )
    right = np.diagonal(matrix)
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = [float(own / both) if both else None for own, both in zip(right, union)]
    return {
      "miou": float(np.mean([value for value in iou if value is not None])),
      "accuracy": float(right.sum() / pixels),
      "loss": float(sums["loss"]) / pixels,
      "count": int(sums["count"]),
      "iou": iou,
    }


def _counted(batch: Batch) -> jax.Array:
  """Returns the labels of a batch, int32 (N, H, W), with no label for masked images."""
  masked = batch["mask"].reshape(-1, 1, 1)
  return jnp.where(masked, batch["label"].astype(jnp.int32), IGNORED)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the cross-entropy of each pixel (N, H, W), 0 where there is no label."""
  counted, labels = labels != IGNORED, labels.astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
  # Replaced and not multiplied, since the logits of a masked image may be NaN.
  return jnp.where(counted, losses, 0.0)


def confusion(labels: jax.Array, predictions: jax.Array, classes: int) -> jax.Array:
  """Counts pixels by their label, the row, and their prediction, the column.

  Args:
    labels: int32 (N, H, W); IGNORED is not counted.
    predictions: integers (N, H, W).
    classes: number of classes K.

  Returns:
    int32 (K, K). Integers make the sum exact, in whatever order devices add. A batch over all
    devices may have 2^31 pixels.
  """
  # One more bin takes the pixels that do not count.
  cells = labels * classes + predictions.astype(jnp.int32)
  cells = jnp.where(labels == IGNORED, classes**2, cells)
  counts = jnp.zeros(classes**2 + 1, jnp.int32).at[cells.ravel()].add(1)
  return counts[:-1].reshape(classes, classes)


def windows(sides: Sequence[int], window: int) -> tuple[list[int], list[tuple[int, ...]]]:
  """Returns the height and width of the windows over an image, and their upper left corners.

  Args:
    sides: height and width of the image.
    window: side of the windows. They are cut off where the image is narrower or lower.
  """
  corners = itertools.product(*(window_starts(side, window) for side in sides))
  return [min(window, side) for side in sides], list(corners)


def slide(forward: Forward, images: jax.Array, window: int) -> jax.Array:
  """Averages the probabilities of overlapping square windows over each pixel.

  Windows begin every two thirds of their side. The last one of a row or column ends at the border.
  A window is cut off where the image is narrower or lower than the window.

  Args:
    forward: function of images (N, h, w, 3) that returns logits (N, h, w, K).
    images: uint8 (N, H, W, 3).
    window: side of the windows in pixels.

  Returns:
    Logarithms of probabilities, float32 (N, H, W, K), up to a constant over the classes.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017. https://arxiv.org/abs/1612.01105
    Its evaluation, https://github.com/hszhao/semseg, tool/test.py: the stride of two thirds.
  """
  count, *sides = images.shape[:3]
  size, corners = windows(sides, window)
  shape = jax.ShapeDtypeStruct((count, *size, 3), images.dtype)
  classes = jax.eval_shape(forward, shape).shape[-1]

  # A scan compiles the network once, however many windows there are.
  def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
    start = (0, corner[0], corner[1], 0)
    cut = jax.lax.dynamic_slice(images, start, (count, *size, 3))
    new = jax.nn.log_softmax(jnp.asarray(forward(cut), jnp.float32))
    # Logarithms are added as probabilities. Probabilities themselves would round to zero, whose
    # loss is infinite.
    new = jnp.logaddexp(jax.lax.dynamic_slice(total, start, new.shape), new)
    return jax.lax.dynamic_update_slice(total, new, start), None

  nothing = jnp.full((count, *sides, classes), -jnp.inf, jnp.float32)
  # The missing division by the number of windows over a pixel adds one constant to all classes.
  return jax.lax.scan(add, nothing, jnp.asarray(corners, jnp.int32))[0]
