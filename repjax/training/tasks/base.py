"""The interface of a task: what a model's outputs mean, how they are judged, and by which score."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

Batch = dict[str, jax.Array]
Forward = Callable[[jax.Array], jax.Array]
"""A function of uint8 images that returns logits, with the classes on the last axis."""


class Task(Protocol):
  """A task that a model can learn.

  The training step, the loop, evaluation and conversion know a task by these members alone. A task
  is a frozen dataclass. Its fields are fields of the config, of the same names.

  Attributes:
    scores: names of the shares in a summary, between 0 and 1. Checkpoints are compared by the first
      one, which `repjax.config.SCORES` lists.
    unit: what is right or wrong, in the plural, such as "images".
    ten_crop: evaluation can average ten crops of an image.
  """

  scores: ClassVar[tuple[str, ...]]
  unit: ClassVar[str]
  ten_crop: ClassVar[bool]

  def weigh(self, batch: Batch, axis_name: str | None) -> Batch:
    """Adds what each part of a batch must know of the whole batch.

    Args:
      batch: a batch of training on one device, which may be cut into parts afterwards.
      axis_name: axis of the devices; None: a single device.

    Returns:
      The batch, perhaps with more arrays (N, ...).
    """
    ...

  def targets(self, images: jax.Array, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the images and the targets to train on.

    Args:
      images: normalised images (N, H, W, 3) of a batch or of a part of a batch.
      batch: the batch or the part, from `weigh`.
      key: random key.
    """
    ...

  def loss(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the loss of a part. The loss of a batch is the mean over its parts and devices."""
    ...

  def accuracy(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the share of right predictions in a part, float32, averaged as the loss is."""
    ...

  def predict(self, forward: Forward, images: jax.Array) -> jax.Array:
    """Returns the logits of evaluation in float32, up to a constant over the classes.

    Args:
      forward: the network.
      images: uint8 images of a batch of evaluation.
    """
    ...

  def views(self, images: jax.Array) -> jax.Array:
    """Returns what a network sees of images in `predict`, without mirror images: (V, N, h, w, 3).

    Conversion compares both forms on each view. V is 1 if the network sees whole images alone.

    Args:
      images: uint8 images of a batch of evaluation (N, H, W, 3).
    """
    ...

  def sums(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Returns what a batch of evaluation adds to the sums over a split.

    Sums of integers are exact on any number of devices. `count` is the number of unmasked images.

    Args:
      logits: logits from `predict`.
      batch: {"label", "mask": bool (N,)}. Masked images do not count.
    """
    ...

  def agreement(self, logits: tuple[jax.Array, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Counts on how many units two forms agree: "agree" of "units".

    Args:
      logits: logits of both forms.
      batch: as in `sums`.
    """
    ...

  def summary(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the results of an evaluation from the sums over a split.

    The results are a number for each of `scores`, in this order, then the mean `loss`, and `count`.
    More entries, such as lists over classes, may follow.
    """
    ...
