"""The first steps of a RepVGG, and evaluation after them, against passes written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.spec import Preprocessing
from repjax.training import optimizer
from repjax.training.state import create_state
from repjax.training.step import make_train_step
from repjax.training.tasks import Classification
from tests.helpers import (
  F64,
  assert_close,
  convolve,
  fill_variables,
  init_shapes,
  leaves,
  official_name,
)
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

# The stem and four blocks, of which the first has an identity; strides 1, 1, 2, 2, 2.
BLOCKS = ["stem", *(f"stage{number}/block0" for number in range(1, 5))]
STRIDES = tiny.OVERRIDES["strides"]
RATES, DECAY, MOMENTUM, PENALTY, SMOOTHING, STEPS = (0.2, 0.1), 0.05, 0.9, 0.03, 0.1, 5


def batch_norm(x, scale, bias):
  """Output, mean and variance of the batch, and the backward pass: dy to (dx, dscale, dbias)."""
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  deviation = np.sqrt(var + 1e-5)
  normal = (x - mean) / deviation

  def backward(dy):
    dscale, dbias = (dy * normal).sum((0, 1, 2)), dy.sum((0, 1, 2))
    count = dy.size / len(scale)
    return scale / deviation * (dy - dbias / count - normal * dscale / count), dscale, dbias

  return normal * scale + bias, mean, var, backward


def convolution(x, kernel, stride):
  """Output, and the backward pass: dy to (dx, dkernel)."""
  pad = kernel.shape[0] // 2

  def backward(dy):
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    dpadded, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    height, width = dy.shape[1:3]
    for row, column in np.ndindex(*kernel.shape[:2]):
      seen = np.s_[
        :, row : row + stride * height : stride, column : column + stride * width : stride
      ]
      dkernel[row, column] = np.einsum("nhwi,nhwo->io", padded[seen], dy)
      dpadded[seen] += dy @ kernel[row, column].T
    inside = slice(pad, -pad or None)
    return dpadded[:, inside, inside], dkernel

  return convolve(x, kernel, strides=(stride, stride), padding=(pad, pad)), backward


class Network:
  """Parameters and running statistics by path, and one training step at a time."""

  def __init__(self, variables):
    self.params = {path: np.asarray(value) for path, value in leaves(variables["params"]).items()}
    stats = leaves(variables["batch_stats"]).items()
    self.mean, self.var = (
      {path[: -len(name)]: np.asarray(value) for path, value in stats if path.endswith(name)}
      for name in ("/mean", "/var")
    )
    self.trace = {}

  def evaluate(self, x):
    """Logits with the running statistics."""
    for block, stride in zip(BLOCKS, STRIDES):
      scopes = [f"{block}/RepConv_0/{branch}" for branch in ("conv3x3", "conv1x1", "identity")]
      x = np.maximum(
        sum(self._evaluated(scope, x, stride) for scope in scopes if f"{scope}/bn" in self.var), 0
      )
    return x.mean((1, 2)) @ self.params["head/kernel"] + self.params["head/bias"]

  def _evaluated(self, scope, x, stride):
    kernel = self.params.get(f"{scope}/conv/kernel")
    y = x if kernel is None else convolution(x, kernel, stride)[0]
    scale, bias = (self.params[f"{scope}/bn/{name}"] for name in ("scale", "bias"))
    mean, var = self.mean[f"{scope}/bn"], self.var[f"{scope}/bn"]
    return (y - mean) / np.sqrt(var + 1e-5) * scale + bias

  def loss_and_gradients(self, x, labels):
    gradients, steps_back = {}, []
    for block, stride in zip(BLOCKS, STRIDES):
      total, back = 0, []
      for branch in ("conv3x3", "conv1x1", "identity"):
        scope = f"{block}/RepConv_0/{branch}"
        if f"{scope}/bn/scale" in self.params:
          y, backward = self._branch(scope, x, stride, gradients)
          total, back = total + y, [*back, backward]
      x = np.maximum(total, 0)
      steps_back.append((total > 0, back))
    pixels, features = x.shape[1] * x.shape[2], x.mean((1, 2))
    kernel, bias = self.params["head/kernel"], self.params["head/bias"]
    loss, dlogits = cross_entropy(features @ kernel + bias, labels)
    gradients["head/kernel"], gradients["head/bias"] = features.T @ dlogits, dlogits.sum(0)
    dx = np.broadcast_to((dlogits @ kernel.T / pixels)[:, None, None], x.shape)
    for positive, back in reversed(steps_back):
      dx = sum(backward(dx * positive) for backward in back)
    return loss, gradients

  def _branch(self, scope, x, stride, gradients):
    kernel = self.params.get(f"{scope}/conv/kernel")
    y, conv_back = (x, None) if kernel is None else convolution(x, kernel, stride)
    norm = (self.params[f"{scope}/bn/{name}"] for name in ("scale", "bias"))
    y, mean, var, norm_back = batch_norm(y, *norm)
    # PyTorch averages the variance that divides by n - 1, and normalises with the one of n.
    count = y.size / len(var)
    self.var[f"{scope}/bn"] = 0.9 * self.var[f"{scope}/bn"] + 0.1 * var * count / (count - 1)
    self.mean[f"{scope}/bn"] = 0.9 * self.mean[f"{scope}/bn"] + 0.1 * mean

    def backward(dy):
      dx, gradients[f"{scope}/bn/scale"], gradients[f"{scope}/bn/bias"] = norm_back(dy)
      if conv_back is not None:
        dx, gradients[f"{scope}/conv/kernel"] = conv_back(dx)
      return dx

    return y, backward

  def penalty_and_gradients(self):
    """0.5 PENALTY times the custom L2, with the variances of after this step's forward pass."""
    total, gradients = 0.0, {}
    for block in BLOCKS:
      scopes = [f"{block}/RepConv_0/{branch}" for branch in ("conv3x3", "conv1x1")]
      k3, k1 = (self.params[f"{scope}/conv/kernel"] for scope in scopes)
      t3, t1 = (
        self.params[f"{scope}/bn/scale"] / np.sqrt(self.var[f"{scope}/bn"] + 1e-5)
        for scope in scopes
      )
      ratio = (k3[1, 1] * t3 + k1[0, 0] * t1) / (t3**2 + t1**2)
      outer = k3.copy()
      outer[1, 1] = 0
      total += (outer**2).sum() + (ratio**2 * (t3**2 + t1**2)).sum()
      outer[1, 1] = ratio * t3
      gradients[f"{scopes[0]}/conv/kernel"] = PENALTY * outer
      gradients[f"{scopes[1]}/conv/kernel"] = PENALTY * (ratio * t1)[None, None]
    return 0.5 * PENALTY * total, gradients

  def update(self, gradients, rate, *, decays, nesterov):
    """torch.optim.SGD by its documentation."""
    for path, gradient in gradients.items():
      gradient = gradient + DECAY * decays(official_name(path)) * self.params[path]
      trace = gradient + MOMENTUM * self.trace.get(path, 0)
      self.trace[path] = trace
      step = gradient + MOMENTUM * trace if nesterov else trace
      factor = 2 if "bias" in official_name(path) else 1
      self.params[path] = self.params[path] - factor * rate * step


def cross_entropy(logits, labels):
  """Mean loss of smoothed labels, and its gradient."""
  count, classes = logits.shape
  targets = (1 - SMOOTHING) * np.eye(classes)[labels] + SMOOTHING / classes
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return -(targets * np.log(p)).sum() / count, (p - targets) / count


def no_bias_or_bn(name):
  return "bias" not in name and "bn" not in name


def no_branch_either(name):
  return no_bias_or_bn(name) and "rbr_dense" not in name and "rbr_1x1" not in name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("rule", "decays", "nesterov", "penalised"),
  [
    pytest.param("kernels_and_fast_biases", no_bias_or_bn, False, False, marks=pytest.mark.proof),
    ("all_but_penalised_kernels", no_branch_either, True, True),
  ],
)
def test_several_steps_and_evaluation_after_them_are_those_of_numpy(
  rule, decays, nesterov, penalised
):
  model = repjax.create_model("repvgg_a0", num_classes=10, **tiny.OVERRIDES, **F64)
  variables = fill_variables(init_shapes(model, jnp.ones((1, 16, 16, 3))))
  sgd = optimizer.sgd(
    lambda step: jnp.where(step % 2 == 0, *RATES),
    momentum=MOMENTUM,
    nesterov=nesterov,
    weight_decay=DECAY,
    weight_decay_rule=rule,
  )
  preprocessing = Preprocessing(16, 16, "bilinear", (0.0,) * 3, (1.0,) * 3)
  step = jax.jit(
    make_train_step(
      model,
      sgd,
      preprocessing,
      task=Classification(SMOOTHING),
      custom_l2=PENALTY * penalised,
    )
  )
  state, network = create_state(variables, sgd), Network(variables)
  rng = np.random.default_rng(0)
  ours, theirs = [], []
  for number in range(STEPS):
    batch = {
      "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
      "label": rng.integers(0, 10, 4).astype(np.int32),
    }
    with jax.numpy_dtype_promotion("standard"):
      state, metrics = step(state, batch)
    ours.append(float(metrics["loss"]))
    # The division by 255 is in float32.
    x = (batch["image"].astype(np.float32) * np.float32(1 / 255)).astype(np.float64)
    loss, gradients = network.loss_and_gradients(x, batch["label"])
    if penalised:
      penalty, more = network.penalty_and_gradients()
      loss, gradients = loss + penalty, gradients | {p: gradients[p] + more[p] for p in more}
    theirs.append(loss)
    network.update(gradients, RATES[number % 2], decays=decays, nesterov=nesterov)
  np.testing.assert_allclose(ours, theirs, rtol=1e-12)
  assert len({round(loss, 3) for loss in theirs}) == STEPS
  for path, value in leaves(state.params).items():
    np.testing.assert_allclose(value, network.params[path], rtol=1e-10, atol=1e-12, err_msg=path)
  for name, running in (("mean", network.mean), ("var", network.var)):
    found = {path: value for path, value in leaves(state.batch_stats).items() if name in path}
    assert found.keys() == {f"{path}/{name}" for path in running}
    for path, value in found.items():
      wanted = running[path.removesuffix(f"/{name}")]
      np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-12, err_msg=path)
  images = rng.standard_normal((2, 16, 16, 3))
  assert_close(model.apply(state.variables, images), network.evaluate(images), 1e-10)
