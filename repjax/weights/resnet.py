"""ResNet's names in torchvision (called official here), in timm, and in RepMLP's repository.

timm has the names of torchvision, so a state dict of timm is recognized as official. In the deploy
form a convolution keeps its name and gets a bias. PyTorch's fusion of convolutions and batch norms
leaves the same names, and so does the code of RepMLP's authors.

References:
  https://github.com/pytorch/vision, torchvision/models/resnet.py
  https://github.com/huggingface/pytorch-image-models, timm/models/resnet.py
  https://github.com/DingXiaoH/RepMLP at 2aba6f5, repmlp_resnet.py
"""

from repjax.models.resnet import VARIANTS
from repjax.weights.naming import Naming, Row

_CONV = r"(?:/conv\dx\d)?/conv"  # A training form has a branch around it, a deploy form has none.
_NORM = r"/conv\dx\d/bn"

_TORCHVISION = (
  Row(f"stem/RepConv_0{_CONV}", "conv1"),
  Row(f"stem/RepConv_0{_NORM}", "bn1"),
  Row(r"stage(\d)/block(\d+)", r"layer\1.\2"),
  Row(rf"RepConv_conv(\d){_CONV}", r"conv\1"),
  Row(rf"RepConv_conv(\d){_NORM}", r"bn\1"),
  Row(f"RepConv_shortcut{_CONV}", "downsample.0"),
  Row(f"RepConv_shortcut{_NORM}", "downsample.1"),
  Row("head", "fc"),
)

REPMLP_LAYERS = (
  Row(f"stem/RepConv_0{_CONV}", "stage0.0.conv"),
  Row(f"stem/RepConv_0{_NORM}", "stage0.0.bn"),
  Row(r"(stage\d)/block(\d+)", r"\1.\2"),
  Row(rf"RepConv_(\w+){_CONV}", r"\1.conv"),
  Row(rf"RepConv_(\w+){_NORM}", r"\1.bn"),
  Row("head", "linear"),
)
"""Names in RepMLP's repository for the layers that its networks share with a ResNet."""

_OF_ALL: dict[str, Naming] = {"official": _TORCHVISION, "timm": _TORCHVISION}

NAMINGS: dict[str, dict[str, Naming]] = {
  **dict.fromkeys(VARIANTS, _OF_ALL),
  "resnet50": {**_OF_ALL, "repmlp": REPMLP_LAYERS},
}
"""Model to source to table of names."""
