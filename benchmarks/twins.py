"""RepVGG and ResNet written in PyTorch, to be timed beside ours: same network, same weights.

Submodules are called as in the authors' code (for ResNet: torchvision's), so that what
`repjax.weights.to_torch` writes can be loaded.
"""

import functools
import importlib
import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import timing

from repjax import weights
from repjax.models.repvgg import RepVGG
from repjax.models.resnet import ResNet


def has_twin(model: Any) -> bool:
  """Whether there is such a network for a model."""
  if isinstance(model, RepVGG):
    return model.se is None and not model.aux_heads and model.act == "relu"
  return type(model) is ResNet and model.act == "relu"


def twin(name: str, model: Any, variables: Mapping[str, Any]) -> Any:
  """The PyTorch network of a model, in its form and with its variables, on the CPU.

  Args:
    name: of the model, for the names of its weights.
    model: one that `has_twin`, without dilation.
    variables: of the model.
  """
  torch: Any = importlib.import_module("torch")
  network = _repvgg(torch.nn, model) if isinstance(model, RepVGG) else _resnet(torch.nn, model)
  state = weights.to_torch(name, variables)
  # Copied, since PyTorch warns of arrays that it may not write to.
  tensors = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in state.items()}
  missing, unexpected = network.load_state_dict(tensors, strict=False)
  unknown = [key for key in missing if not key.endswith("num_batches_tracked")]
  assert not unexpected, unexpected
  assert not unknown, unknown
  return network.eval()


def device() -> Any:
  """Where PyTorch computes: where JAX does."""
  torch: Any = importlib.import_module("torch")
  if jax.default_backend() == "cpu":
    torch.set_num_threads(timing.cpus())
    return torch.device("cpu")
  torch.backends.cudnn.benchmark = True
  torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does by default; convolutions do anyway
  torch.cuda.reset_peak_memory_stats()
  return torch.device("cuda")


def memory() -> int | None:
  """The most that PyTorch has held on a GPU since `device`."""
  torch: Any = importlib.import_module("torch")
  return torch.cuda.max_memory_allocated() if jax.default_backend() != "cpu" else None


def wait(output: Any) -> None:
  if output.is_cuda:
    importlib.import_module("torch").cuda.synchronize()


def compiled(network: Any) -> Any:
  """The network by torch.compile, for inference at its best: weights as constants, CUDA graphs."""
  torch: Any = importlib.import_module("torch")
  inductor: Any = importlib.import_module("torch._inductor.config")
  inductor.force_disable_caches = True  # so that the time to compile is one
  inductor.freezing = not network.training
  torch.compiler.reset()
  gpu = next(network.parameters()).is_cuda
  return torch.compile(network, mode="reduce-overhead" if gpu else None)


def _conv_bn(nn: Any, inputs: int, outputs: int, size: int, stride: int, groups: int) -> Any:
  conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
  return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


def _classifier(nn: Any, name: str, features: int, classes: int) -> dict[str, Any]:
  return {
    "pool": nn.AdaptiveAvgPool2d(1),
    "flatten": nn.Flatten(),
    name: nn.Linear(features, classes),
  }


def _repvgg(nn: Any, model: RepVGG) -> Any:
  class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
      super().__init__()
      if model.deploy:
        self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
      else:
        self.rbr_dense = _conv_bn(nn, inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = _conv_bn(nn, inputs, outputs, 1, stride, groups)
        if inputs == outputs and stride == 1:
          self.rbr_identity = nn.BatchNorm2d(inputs)

    def forward(self, x: Any) -> Any:
      # Not sum(), which would add a zero first.
      return functools.reduce(operator.add, [branch(x) for branch in self.children()]).relu_()

  features = min(64, int(64 * model.width_multipliers[0]))
  stages: dict[str, Any] = {"stage0": Block(3, features, model.strides[0], 1)}
  for stage in model.stages():
    blocks = []
    for index in range(stage.blocks):
      stride = stage.striding.strides if index == 0 else 1
      groups = model.groups_of(stage.first_block + index)
      blocks.append(Block(features, stage.features, stride, groups))
      features = stage.features
    stages[stage.name] = nn.Sequential(*blocks)
  return nn.Sequential(
    OrderedDict(**stages, **_classifier(nn, "linear", features, model.num_classes))
  )


def _resnet(nn: Any, model: ResNet) -> Any:
  def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[Any, Any]:
    """A convolution and its norm; in deploy form it has a bias, and nothing follows."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=model.deploy)
    return conv, nn.Identity() if model.deploy else nn.BatchNorm2d(outputs)

  class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
      super().__init__()
      if model.block == "basic":
        self.conv1, self.bn1 = layer(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = layer(outputs, outputs, 3)
      else:
        inner = outputs // 4
        self.conv1, self.bn1 = layer(inputs, inner, 1)
        self.conv2, self.bn2 = layer(inner, inner, 3, stride)
        self.conv3, self.bn3 = layer(inner, outputs, 1)
      self.downsample = nn.Identity()
      if inputs != outputs or stride > 1:
        self.downsample = nn.Sequential(*layer(inputs, outputs, 1, stride))

    def forward(self, x: Any) -> Any:
      y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
      if model.block == "bottleneck":
        y = self.bn3(self.conv3(y.relu_()))
      return (y + self.downsample(x)).relu_()

  features = model.stem_features
  conv, norm = layer(3, features, 7, 2)
  stages: dict[str, Any] = {"conv1": conv, "bn1": norm, "relu": nn.ReLU(inplace=True)}
  stages["maxpool"] = nn.MaxPool2d(3, 2, 1)
  for name, places in model.stages():
    blocks = []
    for place in places:
      blocks.append(Block(features, place.features, place.strides))
      features = place.features
    stages[name.replace("stage", "layer")] = nn.Sequential(*blocks)
  return nn.Sequential(OrderedDict(**stages, **_classifier(nn, "fc", features, model.num_classes)))
