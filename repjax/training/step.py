"""The pure training step and evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from repjax.spec import Preprocessing
from repjax.training import custom_l2 as penalty
from repjax.training.optimizer import head_only, overlay
from repjax.training.state import TrainState
from repjax.training.tasks import CLASSIFICATION, Task

Batch = dict[str, jax.Array]
Network = Callable[..., Any]
"""A function of variables and normalized images (N, H, W, 3) that returns logits (N, ..., K)."""
Gradients = Callable[[Any, Batch, jax.Array], tuple[Any, Any, Any]]
"""A function of variables, batch and key that returns gradients, new collections and metrics."""


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  preprocessing: Preprocessing,
  *,
  task: Task = CLASSIFICATION,
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
    task: the task, which says what the loss of logits is.
    aux_weight: weight of the loss of each auxiliary head. The heads have the same targets.
    custom_l2: weight w of the penalty 0.5 w `repjax.training.custom_l2` in the loss, with the
      running statistics that the step has updated. Without such an update there is no penalty.
    accumulate_steps: parts into which the batch is cut, see `accumulate`. Batch norms and targets
      see one part at a time. Each part updates the running statistics in turn.
    ema_decay: d in the average a <- d a + (1 - d) x of the updated parameters and statistics, in a
      state that holds an average.
    ema_start: number of first steps in which the average is a plain copy.
    seed: seed of dropout and of random targets. Step, device and part are folded into the key.
    axis_name: axis over which gradients, running statistics and metrics are averaged; None: none.
    frozen: only the head learns, see `optimizer.head_only`. `optimizer` must have been made with
      `backbone_rate=0`. All else runs as in evaluation: batch norms use and keep their running
      statistics, dropout does nothing, and auxiliary heads take no part. The head of a classifier
      runs so too. The head of a segmenter runs as in training, since its norms may be new, and a
      new norm knows no statistics. All other parameters and statistics keep their bits.
    network: computes the logits in place of the model in training mode. An example is the deploy
      form in 8 bits. As in a frozen network, statistics stay and auxiliary heads take no part. The
      model's dropout and its `axis_name` have no effect.

  Returns:
    A pure function of a state and {"image": uint8 (N, H, W, 3), "label": labels of the task}. Its
    metrics are the scalars `loss`, `accuracy` and `grad_norm`. `grad_norm` is the norm before
    clipping. If the update overflows, the metrics of the next step show it.
  """

  trains_norms = frozen and network is None and hasattr(model, "frozen_backbone")
  if trains_norms:
    model = model.clone(frozen_backbone=True)
  elif frozen and network is None:
    network = model.apply

  def gradients_of(variables: Any, batch: Batch, rng: jax.Array):
    images, targets = task.targets(preprocessing.normalize(batch["image"]), batch, rng)

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
      loss = task.loss(logits, targets)
      for aux_logits in auxiliary.values():
        loss += aux_weight * task.loss(aux_logits, targets)
      if custom_l2 and network is None and not frozen:
        loss += 0.5 * custom_l2 * penalty.custom_l2(learning, updates["batch_stats"])
      return loss, (logits, updates)

    params = variables["params"]
    learning = head_only(params) if frozen else params
    (loss, (logits, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(learning)
    return gradients, updates, {"loss": loss, "accuracy": task.accuracy(logits, targets)}

  def train_step(state: TrainState, batch: Batch):
    # The key follows from seed, step and device alone, so a continued run draws the same values.
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    if axis_name is not None:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    batch = task.weigh(batch, axis_name)
    results = accumulate(gradients_of, state.variables, batch, rng, accumulate_steps)
    if axis_name is not None:
      # Statistics are averaged too: normalisation is per device, but the state is the same on all.
      results = jax.lax.pmean(results, axis_name)
    gradients, collections, metrics = results
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    learning = head_only(state.params) if frozen else state.params
    learned: Any = optax.apply_updates(learning, updates)
    # A network that keeps its statistics returns no such collection.
    statistics = collections.get("batch_stats", state.batch_stats)
    if trains_norms:  # A mean over devices may round, even of equal numbers.
      statistics = overlay(state.batch_stats, head_only(statistics))
    new: dict[str, Any] = {"params": overlay(state.params, learned), "batch_stats": statistics}
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
  network: Network,
  preprocessing: Preprocessing,
  *,
  task: Task = CLASSIFICATION,
  axis_name: str | None = None,
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Builds `eval_step(variables, batch) -> sums`, which judges the unmasked images of a batch.

  Args:
    network: computes the logits, such as the `apply` of a model.
    preprocessing: how uint8 images become inputs.
    task: the task, which says what the sums are.
    axis_name: axis over which the sums run as well; None: none.

  Returns:
    A pure function of variables and {"image", "label", "mask": bool (N,)}, which returns
    `task.sums`.
  """

  def eval_step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
    def forward(images: jax.Array) -> jax.Array:
      return network(variables, preprocessing.normalize(images))

    sums = task.sums(task.predict(forward, batch["image"]), batch)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)

  return eval_step
