"""Classification: one label for each image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from repjax.algebra import wide_dtype
from repjax.training import mixing
from repjax.training.tasks.base import Batch, Forward


@dataclasses.dataclass(frozen=True)
class Classification:
  """The task of classification, with batches {"image": (N, H, W, 3), "label": int32 (N,)}.

  Attributes:
    label_smoothing: e in the targets (1 - e) onehot + e / classes.
    mixup: alpha of Mixup, see `repjax.training.mixing`; 0: off.
    cutmix: alpha of CutMix; 0: off.
  """

  scores: ClassVar[tuple[str, ...]] = ("accuracy",)
  unit: ClassVar[str] = "images"
  ten_crop: ClassVar[bool] = True

  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0

  def weigh(self, batch: Batch, axis_name: str | None) -> Batch:
    """Returns the batch. All images count the same, so that a part need not know the others."""
    del axis_name
    return batch

  def targets(self, images: jax.Array, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
    """Returns images, perhaps mixed, and the pair of labels and the share that images keep."""
    labels, share = batch["label"], None
    if self.mixup or self.cutmix:
      # Mixing folds its own number into the key, so dropout draws the same values without mixing.
      kept, share = mixing.draw(
        jax.random.fold_in(key, 1), images.shape[1:3], mixup=self.mixup, cutmix=self.cutmix
      )
      images = mixing.blend(images, kept)
    return images, (labels, share)

  def loss(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the mean cross-entropy over the images."""
    labels, share = targets
    # In bfloat16 the sum over classes would lose most digits, so the loss is float32 or wider.
    logits = logits.astype(wide_dtype(logits.dtype))
    smooth = optax.smooth_labels(
      jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), self.label_smoothing
    )
    if share is not None:
      smooth = mixing.blend(smooth, share)
    return optax.softmax_cross_entropy(logits, smooth).mean()

  def accuracy(self, logits: jax.Array, targets: Any) -> jax.Array:
    """Returns the share of right images. The label with the larger share of a mixture is right."""
    labels, share = targets
    expected = labels if share is None else mixing.dominant(labels, share)
    correct = logits.argmax(-1) == expected
    return correct.mean(dtype=jnp.float32)

  def predict(self, forward: Forward, images: jax.Array) -> jax.Array:
    """Returns logits (N, K). For images (N, crops, H, W, 3), the crops' probabilities are averaged.

    References:
      Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012,
        section 4.1.
    """
    if images.ndim == 4:
      return jnp.asarray(forward(images), jnp.float32)
    each = images.reshape(-1, *images.shape[-3:])  # (N * crops, H, W, 3)
    logits = jnp.asarray(forward(each), jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits).reshape(*images.shape[:2], logits.shape[-1])
    # The log of summed probabilities. The missing division by the crops adds one constant to all
    # classes, which changes neither the prediction nor the cross-entropy.
    return jax.nn.logsumexp(log_probabilities, axis=1)  # (N, K)

  def views(self, images: jax.Array) -> jax.Array:
    """Returns the images as the only view."""
    return images[None]

  def sums(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Returns the scalars `correct`, `loss` and `count`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    # Masked images pad the last batch. Their loss may be NaN, so it is replaced, not multiplied.
    mask = batch["mask"]
    return {
      "correct": jnp.sum((logits.argmax(-1) == batch["label"]) & mask),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "count": jnp.sum(mask),
    }

  def agreement(self, logits: tuple[jax.Array, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Counts the images that both forms put into one class."""
    first, second = (each.argmax(-1) for each in logits)
    mask = batch["mask"]
    return {"agree": jnp.sum((first == second) & mask), "units": jnp.sum(mask)}

  def summary(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns `accuracy`, mean `loss`, and `count`, the number of images."""
    count = float(sums["count"])
    return {
      "accuracy": float(sums["correct"]) / count,
      "loss": float(sums["loss"]) / count,
      "count": int(count),
    }
