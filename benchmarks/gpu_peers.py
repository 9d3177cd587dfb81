"""Networks of timm that repjax does not have, as tasks of benchmarks/gpu.py."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import timing


class Task:
  """A network of timm with random weights, for the subjects in PyTorch alone.

  Attributes:
    name: timm:NAME.
    batch_size: number of images.
    image_size: side of the images in pixels.
    dtype: dtype of the computation.
    model: None, since repjax has no such model.
  """

  model = None

  def __init__(self, name: str, batch_size: int, image_size: int, dtype: str):
    self.name, self.batch_size, self.image_size, self.dtype = name, batch_size, image_size, dtype

  @functools.cached_property
  def twin(self) -> Any:
    """The network in PyTorch, in float32 on the CPU."""
    timm: Any = importlib.import_module("timm")
    torch: Any = importlib.import_module("torch")
    torch.manual_seed(0)
    return timm.create_model(self.name.removeprefix("timm:"), pretrained=False).eval()

  @functools.cached_property
  def inputs(self) -> list[np.ndarray]:
    """Four batches of images (N, H, W, 3), float32."""
    return timing.random_images(self.batch_size, self.image_size, 4)

  @functools.cached_property
  def _macs(self) -> int:
    """Multiply-accumulates of an image in convolutions and fully connected layers."""
    torch: Any = importlib.import_module("torch")
    total = 0

    def add(layer: Any, inputs: Any, output: Any) -> None:
      nonlocal total
      total += output.numel() * layer.weight[0].numel()

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = [layer for layer in self.twin.modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.inference_mode():
      self.twin(torch.zeros(1, 3, self.image_size, self.image_size))
    for hook in hooks:
      hook.remove()
    return total

  def flops(self, name: str) -> int:
    """Returns the FLOP of a call: two for each multiply-accumulate."""
    del name
    return 2 * self._macs * self.batch_size

  def expected(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the logits for the first input in float32 on the CPU."""
    del outputs
    torch: Any = importlib.import_module("torch")
    with torch.inference_mode():
      images = torch.from_numpy(self.inputs[0].transpose(0, 3, 1, 2).copy())
      return self.twin(images).numpy()
