"""RepVGG and ResNet in PyTorch, with the same layers and weights as the models of repjax.

MobileOne, RepViT and FastViT are timm's networks with the same weights, converted by timm.

Submodules have the names of the authors' code (for ResNet, of torchvision), so that the networks
load the state dicts that `repjax.weights.to_torch` returns.
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
from repjax.models.fastvit import FastViT
from repjax.models.mobileone import MobileOne
from repjax.models.repvgg import RepVGG
from repjax.models.repvit import RepViT
from repjax.models.resnet import ResNet


def is_of_timm(model: Any) -> bool:
  """Returns whether a model is timm's in PyTorch, by `timm_twin`."""
  return isinstance(model, (MobileOne, RepViT, FastViT))


def timm_twin(name: str, variables: Mapping[str, Any]) -> Any:
  """Returns timm's network with the weights of a training form, in timm's own deploy form.

  The network is on the CPU, in float32 and in evaluation mode. timm keeps some norms and factors
  that repjax folds.

  Args:
    name: name of the model, the same in both libraries.
    variables: variables of the training form.
  """
  timm: Any = importlib.import_module("timm")
  manipulate: Any = importlib.import_module("timm.utils.model")
  network = timm.create_model(name, pretrained=False)
  _load(network, weights.to_torch(name, variables, "timm"))
  return manipulate.reparameterize_model(network.eval())


def has_twin(model: Any) -> bool:
  """Returns whether a model can be built in PyTorch by `twin`."""
  if isinstance(model, RepVGG):
    return model.se is None and not model.aux_heads and model.act == "relu"
  return type(model) is ResNet and model.act == "relu"


def twin(name: str, model: Any, variables: Mapping[str, Any]) -> Any:
  """Returns the PyTorch network of a model, in the model's form and with its variables.

  The network is on the CPU, in float32 and in evaluation mode.

  Args:
    name: name of the model, which decides the names of its weights.
    model: a model for which `has_twin` is true, without dilation.
    variables: variables of the model.
  """
  torch: Any = importlib.import_module("torch")
  network = _repvgg(torch.nn, model) if isinstance(model, RepVGG) else _resnet(torch.nn, model)
  _load(network, weights.to_torch(name, variables))
  return network.eval()


def _load(network: Any, state: Mapping[str, np.ndarray]) -> None:
  """Loads a state dict of arrays, which must have every weight and no other."""
  torch: Any = importlib.import_module("torch")
  # PyTorch warns about read-only arrays, so the arrays are copied.
  tensors = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in state.items()}
  missing, unexpected = network.load_state_dict(tensors, strict=False)
  unknown = [key for key in missing if not key.endswith("num_batches_tracked")]
  assert not unexpected, unexpected
  assert not unknown, unknown


def device() -> Any:
  """Returns the PyTorch device of the same kind as the JAX device, and prepares it for timing."""
  torch: Any = importlib.import_module("torch")
  if jax.default_backend() == "cpu":
    torch.set_num_threads(timing.cpus())
    return torch.device("cpu")
  torch.backends.cudnn.benchmark = True
  # JAX uses TF32 by default. PyTorch uses TF32 in convolutions by default, but not in products.
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.cuda.reset_peak_memory_stats()
  return torch.device("cuda")


def memory() -> int | None:
  """Returns the largest number of bytes that PyTorch held on a GPU since `device`, or None."""
  torch: Any = importlib.import_module("torch")
  return torch.cuda.max_memory_allocated() if jax.default_backend() != "cpu" else None


def wait(output: Any) -> None:
  """Waits until a tensor has been computed."""
  if output.is_cuda:
    importlib.import_module("torch").cuda.synchronize()


def compiled(network: Any) -> Any:
  """Returns a network compiled by torch.compile: CUDA graphs, and constant weights in inference."""
  torch: Any = importlib.import_module("torch")
  inductor: Any = importlib.import_module("torch._inductor.config")
  inductor.force_disable_caches = True  # so that every start really compiles
  inductor.freezing = not network.training
  torch.compiler.reset()
  gpu = next(network.parameters()).is_cuda
  return torch.compile(network, mode="max-autotune" if gpu else None)


def _conv_bn(nn: Any, inputs: int, outputs: int, size: int, stride: int, groups: int) -> Any:
  """Returns a convolution followed by a batch norm."""
  conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
  return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


def _classifier(nn: Any, name: str, features: int, classes: int) -> dict[str, Any]:
  """Returns the layers after the last stage, by name."""
  return {
    "pool": nn.AdaptiveAvgPool2d(1),
    "flatten": nn.Flatten(),
    name: nn.Linear(features, classes),
  }


def _repvgg(nn: Any, model: RepVGG) -> Any:
  """Returns RepVGG in PyTorch, in the form of `model`."""

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
      # sum() would start from 0 and so compute one more addition.
      return functools.reduce(operator.add, [branch(x) for branch in self.children()]).relu_()

  features = min(64, int(64 * model.width_multipliers[0]))
  stages: dict[str, Any] = {"stage0": Block(3, features, model.strides[0], 1)}
  for stage in model.stages():
    blocks = []
    for index, striding in enumerate(stage.stridings):
      groups = model.groups_of(stage.first_block + index)
      blocks.append(Block(features, stage.features, striding.strides, groups))
      features = stage.features
    stages[stage.name] = nn.Sequential(*blocks)
  return nn.Sequential(
    OrderedDict(**stages, **_classifier(nn, "linear", features, model.num_classes))
  )


def _resnet(nn: Any, model: ResNet) -> Any:
  """Returns ResNet in PyTorch, in the form of `model`."""

  def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[Any, Any]:
    """Returns a convolution and its norm. In deploy form the convolution has a bias instead."""
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
