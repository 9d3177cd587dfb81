"""The pure training step and evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from repjax.algebra import wide_dtype
from repjax.spec import Preprocessing
from repjax.training import custom_l2 as penalty
from repjax.training import mixing
from repjax.training.optimizer import classifier_only, overlay
from repjax.training.state import TrainState

Batch = dict[str, jax.Array]
Network = Callable[..., Any]
"""A function of variables and normalized images (N, S, S, 3) that returns logits (N, K)."""
Gradients = Callable[[Any, Batch, jax.Array], tuple[Any, Any, Any]]
"""A function of variables, batch and key that returns gradients, new collections and metrics."""


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
    model: the network in training form.
    optimizer: turns gradients into updates.
    preprocessing: how uint8 images become inputs.
    label_smoothing: e in the targets (1 - e) onehot + e / classes.
    mixup: alpha of Mixup, see `repjax.training.mixing`; 0: off.
    cutmix: alpha of CutMix; 0: off.
    aux_weight: weight of the loss of each auxiliary head. The heads have the same targets.
    custom_l2: weight w of the penalty 0.5 w `repjax.training.custom_l2` in the loss, with the
      running statistics that the step has updated. Without such an update there is no penalty.
    accumulate_steps: parts into which the batch is cut, see `accumulate`. Batch norms and mixing
      see one part at a time. Each part updates the running statistics in turn.
    ema_decay: d in the average a <- d a + (1 - d) x of the updated parameters and statistics, in a
      state that holds an average.
    ema_start: number of first steps in which the average is a plain copy.
    seed: seed of dropout and mixing. Step, device and part are folded into the key.
    axis_name: axis over which gradients, running statistics and metrics are averaged; None: none.
    frozen: only the classifier learns. `optimizer` must have been made with `backbone_rate=0`. The
      network runs as in evaluation: batch norms use and keep their running statistics, dropout does
      nothing, and auxiliary heads take no part. All other parameters keep their bits.
    network: computes the logits in place of the model in training mode. An example is the deploy
      form in 8 bits. As in a frozen network, statistics stay and auxiliary heads take no part. The
      model's dropout and its `axis_name` have no effect.

  Returns:
    A pure function of a state and {"image": uint8 (N, H, W, 3), "label": int32 (N,)}. Its metrics
    are the scalars `loss`, `accuracy` and `grad_norm`. For a mixed image, the label with the larger
    share counts as right. `grad_norm` is the norm before clipping. If the update overflows, the
    metrics of the next step show it.
  """

  if frozen and network is None:
    network = model.apply

  def cross_entropy(
    logits: jax.Array, labels: jax.Array, share: jax.Array | None = None
  ) -> jax.Array:
    # In bfloat16 the sum over classes would lose most digits, so the loss is float32 or wider.
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
      # Mixing folds its own number into the key, so dropout draws the same values without mixing.
      kept, share = mixing.draw(
        jax.random.fold_in(rng, 1), images.shape[1:3], mixup=mixup, cutmix=cutmix
      )
      images = mixing.blend(images, kept)

    def apply(learning):
      # Only `learning` is differentiated; the rest of a frozen network enters as a constant.
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
    # The key follows from seed, step and device alone, so a continued run draws the same values.
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    if axis_name is not None:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    results = accumulate(gradients_of, state.variables, batch, rng, accumulate_steps)
    if axis_name is not None:
      # Statistics are averaged too: normalisation is per device, but the state is the same on all.
      results = jax.lax.pmean(results, axis_name)
    gradients, collections, metrics = results
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    learning = classifier_only(state.params) if frozen else state.params
    learned: Any = optax.apply_updates(learning, updates)
    new: dict[str, Any] = {
      "params": overlay(state.params, learned),
      # A network that keeps its statistics returns no such collection.
      "batch_stats": collections.get("batch_stats", state.batch_stats),
    }
    average = None
    if state.ema is not None:
      decay = jnp.where(state.step < ema_start, 0.0, ema_decay)
      average = _averaged(state.ema, new, decay)
    # On GPUs, XLA computes most sums of this norm in the kernels that update the parameters. One
    # long vector of all gradients would take fewer kernels, but would be written and read again.
    norm = optax.tree.norm(gradients)
    new_state = TrainState(step=state.step + 1, **new, opt_state=opt_state, ema=average)
    return new_state, metrics | {"grad_norm": norm}

  return train_step


def accumulate(
  gradients_of: Gradients, variables: Any, batch: Any, rng: jax.Array, parts: int
) -> tuple[Any, Any, Any]:
  """Averages the gradients and the metrics of a batch's parts, computed one after another.

  Only one part is in memory at a time. Part i holds the images i B / parts to (i + 1) B / parts of
  the batch. All parts see the same parameters. For a network without batch norm, the mean equals
  the gradient of the whole batch. A batch norm normalises each part by itself. Running statistics
  pass from part to part, so that a step updates them `parts` times.

  Args:
    gradients_of: function of variables, batch and key.
    variables: variables of the model.
    batch: arrays (B, ...).
    rng: key. The number of each part is folded into it; a whole batch gets the key itself.
    parts: number of parts, which divides B.

  Returns:
    The same as `gradients_of`, with the collections of the last part.
  """
  if parts == 1:
    return gradients_of(variables, batch, rng)

  def add_part(carry: Any, numbered: Any) -> Any:
    collections, sums = carry
    number, part = numbered
    gradients, updates, metrics = gradients_of(
      {**variables, **collections}, part, jax.random.fold_in(rng, number)
    )
    return (updates, jax.tree.map(jnp.add, sums, (gradients, metrics))), None

  cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)  # (parts, B / parts, ...)
  # A scan needs its first carry in advance. The shapes come from tracing one part: sums start at
  # zero, collections at the values that the model has.
  first = jax.tree.map(lambda x: x[0], cut)
  gradients, updates, metrics = jax.eval_shape(gradients_of, variables, first, rng)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
  held = {name: variables[name] for name in updates}
  (updates, sums), _ = jax.lax.scan(add_part, (held, zeros), (jnp.arange(parts), cut))
  gradients, metrics = jax.tree.map(lambda x: x / parts, sums)
  return gradients, updates, metrics


def _averaged(average: Any, new: Any, decay: jax.Array) -> Any:
  """Returns decay * average + (1 - decay) * new.

  The sum is written so that a decay of 0 gives `new` to the bit.
  """
  return jax.tree.map(lambda a, x: x + decay.astype(x.dtype) * (a - x), average, new)


def make_eval_step(
  network: Network, preprocessing: Preprocessing, *, axis_name: str | None = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Builds `eval_step(variables, batch) -> sums`, which counts the unmasked images of a batch.

  Args:
    network: computes the logits, such as the `apply` of a model.
    preprocessing: how uint8 images become inputs.
    axis_name: axis over which the sums run as well; None: none.

  Returns:
    A pure function of variables and {"image", "label", "mask": bool (N,)}. Its sums are the scalars
    `correct`, `loss` and `count`. For images (N, crops, H, W, 3), the probabilities of the crops
    are averaged.

  References:
    Averaged crops: Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural
      Networks, NIPS 2012, section 4.1.
  """

  def scores_of(variables: Any, images: jax.Array) -> jax.Array:
    crops = images.shape[1:-3]  # () or (crops,)
    images = images.reshape(-1, *images.shape[-3:])  # (N * crops, H, W, 3)
    logits = jnp.asarray(network(variables, preprocessing.normalize(images)), jnp.float32)
    if not crops:
      return logits
    log_probabilities = jax.nn.log_softmax(logits).reshape(-1, *crops, logits.shape[-1])
    # The log of summed probabilities. The missing division by the crops adds one constant to all
    # classes, which changes neither the prediction nor the cross-entropy.
    return jax.nn.logsumexp(log_probabilities, axis=1)  # (N, K)

  def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
    scores = scores_of(variables, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    # Masked images pad the last batch. Their loss may be NaN, so it is replaced, not multiplied.
    mask = batch["mask"]
    sums = {
      "correct": jnp.sum((scores.argmax(-1) == batch["label"]) & mask),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "count": jnp.sum(mask),
    }
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)

  return eval_step
