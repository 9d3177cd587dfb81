"""The pure training and evaluation steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from repjax.algebra import wide_dtype
from repjax.spec import Preprocessing
from repjax.training import custom_l2 as penalty
from repjax.training import mixing
from repjax.training.accumulation import accumulate
from repjax.training.optimizer import classifier_only, overlay

Batch = dict[str, jax.Array]
Network = Callable[..., Any]
"""A function of variables and normalized images (N, S, S, 3) that returns logits (N, K)."""


@struct.dataclass
class TrainState:
  """All that a step changes, without a device axis.

  Attributes:
    step: steps taken, int32 ().
    params: the model's parameters.
    batch_stats: running statistics of the batch norms.
    opt_state: of the optimizer.
    ema: {"params", "batch_stats"} averaged over the steps, None where a run does not average.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """The model's variables as they learn."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
  variables: Any, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
  """The state at step 0 for the variables of a model, with an average of them on request."""
  own = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    **own,
    opt_state=optimizer.init(variables["params"]),
    # Copies: a step that reuses the memory of its state cannot be given an array twice.
    ema=jax.tree.map(jnp.copy, own) if ema else None,
  )


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  preprocessing: Preprocessing,
  *,
  label_smoothing: float = 0.0,
  mixup: float = 0.0,
  cutmix: float = 0.0,
  aux_weight: float = 0.1,
  custom_l2: float = 0.0,
  accumulate_steps: int = 1,
  ema_decay: float = 0.0,
  ema_start: int = 0,
  seed: int = 0,
  axis_name: str | None = None,
  frozen: bool = False,
  network: Network | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Builds `train_step(state, batch) -> (state, metrics)`.

  Args:
    model: in training form.
    optimizer: from gradients to updates.
    preprocessing: how uint8 images become inputs.
    label_smoothing: e of targets (1 - e) onehot + e / classes.
    mixup: alpha of Mixup, see `repjax.training.mixing`; 0: off.
    cutmix: alpha of CutMix; 0: off.
    aux_weight: of the loss of each auxiliary head, which has the same targets.
    custom_l2: weight w of a penalty 0.5 w `repjax.training.custom_l2`, with the statistics that
      the step has updated; part of the loss, where the step does update them.
    accumulate_steps: parts into which the batch is cut, see `repjax.training.accumulation`. Batch
      norms and mixing see one part at a time; running statistics are updated by each in turn.
    ema_decay: d of the average a <- d a + (1 - d) x of parameters and statistics behind the
      update, of a state that has one.
    ema_start: steps for which the average is a plain copy.
    seed: of dropout and mixing, with the step, the device and the part.
    axis_name: over which gradients, running statistics and metrics are averaged; None: alone.
    frozen: only the classifier learns, by an `optimizer` made with `backbone_rate=0`. The network
      runs as in evaluation: its batch norms use and keep their running statistics, dropout does
      nothing, auxiliary heads take no part. All but the classifier stays bit for bit what it was.
    network: what learns instead of the model in training mode, such as its deploy form in 8 bits:
      statistics stay what they are and auxiliary heads take no part, as in a frozen network. The
      model's dropout then does nothing, nor does its `axis_name`, as of `sync_batch_norm`: no
      batch norm sees statistics of the batch.

  Returns:
    A pure function of a state and {"image": uint8 (N, H, W, 3), "label": int32 (N,)}. The metrics
    are scalars: `loss`, `accuracy` and `grad_norm`, which is that before clipping. Of a mixed image
    the label with the larger share counts as right. An overflow in the update itself shows in the
    next step's metrics.
  """

  if frozen and network is None:
    network = model.apply

  def cross_entropy(
    logits: jax.Array, labels: jax.Array, share: jax.Array | None = None
  ) -> jax.Array:
    logits = logits.astype(wide_dtype(logits.dtype))
    targets = optax.smooth_labels(
      jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
    )
    if share is not None:
      targets = mixing.blend(targets, share)
    return optax.softmax_cross_entropy(logits, targets).mean()

  def gradients_of(variables: Any, batch: Batch, rng: jax.Array):
    images, labels, share = preprocessing.normalize(batch["image"]), batch["label"], None
    if mixup or cutmix:
      # A key of its own: what dropout draws does not depend on whether images are mixed.
      own, share = mixing.draw(
        jax.random.fold_in(rng, 1), images.shape[1:3], mixup=mixup, cutmix=cutmix
      )
      images = mixing.blend(images, own)

    def apply(learning):
      together = {**variables, "params": overlay(variables["params"], learning)}
      if network is not None:
        return network(together, images), {}
      return model.apply(
        together, images, train=True, mutable=["batch_stats"], rngs={"dropout": rng}
      )

    def loss_of(learning):
      outputs, updates = apply(learning)
      logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, {})
      loss = cross_entropy(logits, labels, share)
      for aux_logits in auxiliary.values():
        loss += aux_weight * cross_entropy(aux_logits, labels, share)
      if custom_l2 and network is None:
        loss += 0.5 * custom_l2 * penalty.custom_l2(learning, updates["batch_stats"])
      return loss, (logits, updates)

    params = variables["params"]
    learning = classifier_only(params) if frozen else params
    (loss, (logits, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learning)
    expected = labels if share is None else mixing.dominant(labels, share)
    correct = logits.argmax(-1) == expected
    return gradients, updates, {"loss": loss, "accuracy": correct.mean(dtype=jnp.float32)}

  def train_step(state: TrainState, batch: Batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    if axis_name is not None:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    results = accumulate(gradients_of, state.variables, batch, rng, accumulate_steps)
    if axis_name is not None:
      results = jax.lax.pmean(results, axis_name)
    gradients, collections, metrics = results
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    learning = classifier_only(state.params) if frozen else state.params
    learned: Any = optax.apply_updates(learning, updates)
    new: dict[str, Any] = {
      "params": overlay(state.params, learned),
      "batch_stats": collections.get("batch_stats", state.batch_stats),
    }
    average = None
    if state.ema is not None:
      decay = jnp.where(state.step < ema_start, 0.0, ema_decay)
      average = _averaged(state.ema, new, decay)
    new_state = TrainState(step=state.step + 1, **new, opt_state=opt_state, ema=average)
    return new_state, metrics | {"grad_norm": optax.tree.norm(gradients)}

  return train_step


def _averaged(average: Any, new: Any, decay: jax.Array) -> Any:
  """decay average + (1 - decay) new, which at a decay of 0 is `new` to the bit."""
  return jax.tree.map(lambda a, x: x + decay.astype(x.dtype) * (a - x), average, new)


def make_eval_step(
  network: Network, preprocessing: Preprocessing, *, axis_name: str | None = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Builds `eval_step(variables, batch) -> sums` over the batch's unmasked images.

  Args:
    network: such as a model's `apply`.
    preprocessing: how uint8 images become inputs.
    axis_name: over which the sums run as well; None: alone.

  Returns:
    A pure function of variables and {"image", "label", "mask": bool (N,)}; its sums are scalars:
    `correct`, `loss` and `count`. Of images (N, crops, H, W, 3) the crops' probabilities are
    averaged, as Krizhevsky et al. (NIPS 2012, section 4.1) do.
  """

  def scores_of(variables: Any, images: jax.Array) -> jax.Array:
    crops = images.shape[1:-3]
    images = images.reshape(-1, *images.shape[-3:])  # (N * crops, H, W, 3)
    logits = jnp.asarray(network(variables, preprocessing.normalize(images)), jnp.float32)
    if not crops:
      return logits
    log_probabilities = jax.nn.log_softmax(logits).reshape(-1, *crops, logits.shape[-1])
    return jax.nn.logsumexp(log_probabilities, axis=1)  # (N, K), up to a constant

  def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
    scores = scores_of(variables, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    mask = batch["mask"]
    sums = {
      "correct": jnp.sum((scores.argmax(-1) == batch["label"]) & mask),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "count": jnp.sum(mask),
    }
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)

  return eval_step
