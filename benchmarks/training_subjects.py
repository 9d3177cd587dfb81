"""The subjects of `benchmarks/inference.py --training`: a training step on data on the device.

A step is the step of `repjax train`: normalise uint8 images, forward pass, backward pass, average
over all devices, and SGD with momentum. The step in PyTorch runs on one device. On a GPU its layout
is channels last, and half precision means automatic mixed precision. All subjects start from the
same parameters, and their first losses are compared.
"""

import copy
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import subjects
import twins
from subjects import DTYPES, Kind
from timing import Running, Subject, plan_of

from repjax.deploy.xla import planned_bytes
from repjax.spec import Preprocessing
from repjax.training import optimizer, parallel
from repjax.training.state import create_state
from repjax.training.step import make_train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


class TrainingTask(subjects.Task):
  """A task for training. The batch size is the sum over all devices."""

  def __init__(self, name: str, batch_size: int, image_size: int, dtype: str):
    parallel.check_batch_size(batch_size)
    super().__init__(name, batch_size, image_size, dtype)

  @functools.cached_property
  def inputs(self) -> list[Any]:
    """Two batches of uint8 images (N, H, W, 3) with labels (N,)."""
    rng = np.random.default_rng(0)
    shape = (self.batch_size, self.image_size, self.image_size, 3)
    return [
      {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, self.model.num_classes, self.batch_size, np.int32),
      }
      for _ in range(2)
    ]

  @property
  def has_twin(self) -> bool:
    """True if the training form can be built in PyTorch here."""
    return twins.has_twin(self.model)

  @functools.cached_property
  def twin(self) -> Any:
    """The training form in PyTorch, in float32 on the CPU."""
    return twins.twin(self.name, self.model, self.variables)

  def expected(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the loss of the first step of the first subject."""
    return next(iter(outputs.values()))

  def flops(self, name: str) -> int:
    """Returns the FLOP of a step: the backward pass costs twice as much as the forward pass."""
    return 3 * super().flops(name)


def in_jax(task: TrainingTask) -> Subject:
  """Returns the training step of repjax on all devices."""
  sgd = optimizer.sgd(lambda step: RATE, momentum=MOMENTUM, nesterov=False, weight_decay=DECAY)
  preprocessing = Preprocessing(task.image_size, task.image_size, "bilinear", MEAN, STD)
  model = task.create(dtype=DTYPES[task.dtype])
  step: Any = parallel.data_parallel(
    make_train_step(model, sgd, preprocessing, axis_name=parallel.AXIS),
    donate=True,
    dtype=task.dtype,
  )

  def start(batch: Any) -> Running:
    held = parallel.place(create_state(jax.tree.map(jnp.copy, task.variables), sgd))
    executable = step.lower(held, batch).compile()

    def run(batch: Any) -> Any:
      nonlocal held
      held, metrics = executable(held, batch)
      return metrics["loss"]

    return Running(run, lambda: planned_bytes(executable), lambda: plan_of(executable))

  return Subject(start, lambda batch: next(iter(parallel.prefetch([batch]))))


def in_torch(task: TrainingTask, compiled: bool = False) -> Subject:
  """Returns the same training step in PyTorch on one device."""
  torch: Any = importlib.import_module("torch")
  device = twins.device()
  layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

  def prepare(batch: Any) -> tuple[Any, Any]:
    images, labels = (torch.from_numpy(batch[name]).to(device) for name in ("image", "label"))
    return images.permute(0, 3, 1, 2).contiguous(memory_format=layout), labels.long()

  def start(batch: Any) -> Running:
    del batch
    network = copy.deepcopy(task.twin).to(device).to(memory_format=layout).train()
    call = twins.compiled(network) if compiled else network
    sgd = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    mixed = torch.autocast(device.type, getattr(torch, task.dtype), enabled=task.dtype != "float32")

    def run(batch: Any) -> Any:
      images, labels = batch
      sgd.zero_grad(set_to_none=True)
      with mixed:
        logits = call((images.float() / 255 - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
      loss.backward()
      sgd.step()
      return loss.detach()

    return Running(run, twins.memory)

  return Subject(start, prepare, twins.wait, lambda loss: loss.cpu().numpy())


KINDS: dict[str, Kind] = {
  "repjax-train-form": Kind(in_jax),
  "torch-eager": Kind(in_torch, ("torch",), one_device=True),
  # On a CPU, compiled training in PyTorch 2.13 ended the process with a segmentation fault.
  "torch-compile": Kind(
    functools.partial(in_torch, compiled=True), ("torch",), ("gpu",), one_device=True
  ),
}
