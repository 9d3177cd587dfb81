"""The grammar of branches: what the name of a branch of a RepConv says.

A branch is a row of steps, which run from left to right. A norm follows every convolution and ends
every branch, unless `norm` of the layer says otherwise. The forward pass and the fold read the
same name, so that they cannot differ. The table lists the names; H and W are numbers of taps.
All numbers but N have at most four digits.

| name              | branch                                                            |
|-------------------|-------------------------------------------------------------------|
| `convHxW`         | HxW convolution, norm                                             |
| `convHxW_dR`      | HxW convolution with R pixels from tap to tap, norm               |
| `diracHxW`        | HxW convolution with kernel diag(a) I + diag(c) W / norm(W), norm   |
| `avgHxW`          | HxW average pool, norm                                            |
| `conv1x1_convHxW` | 1x1 convolution, norm, HxW convolution, norm; also with `_dR`     |
| `conv1x1_avgHxW`  | 1x1 convolution, norm, HxW average pool, norm                     |
| `avg2x2_conv1x1`  | 2x2 average pool at stride 2, 1x1 convolution, norm               |
| `identity`        | norm of the input                                                 |
| `skip`            | the input itself, without a norm                                  |
| any + `_relu`     | a ReLU at the end of the branch; such a layer has no deploy form  |
| any + `_N`        | a repeat, for example `conv3x3_1`                                 |

Pools count the zeros of the padding. Between the steps of `conv1x1_convHxW` and `conv1x1_avgHxW`
the border is padded with the values that zeros take in the first step, which differ by channel.
Only then are the two steps one convolution at the border too.

References:
  Ding et al., RepVGG, CVPR 2021, section 3.2. https://arxiv.org/abs/2101.03697
  Ding et al., ACNet, ICCV 2019, for the 1x3 and 3x1 branches. https://arxiv.org/abs/1908.03930
  Ding et al., Diverse Branch Block, CVPR 2021, for two steps. https://arxiv.org/abs/2103.13425
  Zagoruyko and Komodakis, DiracNets, 2017, for `diracHxW`. https://arxiv.org/abs/1706.00388
  Ding et al., UniRepLKNet, CVPR 2024, for dilated branches. https://arxiv.org/abs/2311.15599
  Goyal et al., Non-deep Networks, NeurIPS 2022, for `avg2x2_conv1x1`.
    https://arxiv.org/abs/2110.07641
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from repjax.errors import InputError, printable

POOLED = "avg2x2_conv1x1"
_NAME = re.compile(
  r"(?:(identity|skip|avg2x2_conv1x1)"
  r"|(conv1x1_)?(conv|avg|dirac)([1-9]\d{0,3})x([1-9]\d{0,3})(?:_d([2-9]|[1-9]\d{1,3}))?)"
  r"(_relu)?(?:_\d+)?",
  re.ASCII,
)


class Branch(NamedTuple):
  """The parts of a branch, as its name says them.

  Attributes:
    name: the whole name.
    kind: the last step, or the only one: "conv", "dirac", "avg", "identity", "skip" or
      "avg2x2_conv1x1".
    size: height and width of the last convolution or pool in taps; (1, 1) for the input itself, and
      (2, 2) for `avg2x2_conv1x1`.
    dilation: distance from tap to tap, in units of the dilation of the layer.
    two_steps: a 1x1 convolution and a norm come first.
    relu: a ReLU comes last.
  """

  name: str
  kind: str
  size: tuple[int, int] = (1, 1)
  dilation: int = 1
  two_steps: bool = False
  relu: bool = False

  @property
  def is_input(self) -> bool:
    """Tells if the branch is the input itself, with or without a norm."""
    return self.kind in ("identity", "skip")

  @property
  def has_kernel(self) -> bool:
    """Tells if a step of the branch is a convolution."""
    return self.kind in ("conv", "dirac", POOLED) or self.two_steps

  @property
  def span(self) -> tuple[int, int]:
    """The size (H, W) of the branch as a part of the layer's kernel; larger if it is dilated."""
    height, width = ((taps - 1) * self.dilation + 1 for taps in self.size)
    return height, width


def parse(name: str) -> Branch:
  """Returns the parts of a branch.

  Raises:
    InputError: the name is not in the grammar.
  """
  branch = find(name)
  if branch is None:
    raise InputError(
      f"unknown branch {printable(name, 80)!r}; a branch is called convHxW (conv3x3, conv1x1, "
      "conv1x3, ...), convHxW_dR with a dilation R, avgHxW, conv1x1_convHxW, conv1x1_avgHxW, "
      f"diracHxW, {POOLED}, identity or skip. Names may end with _relu; repeated names end with "
      "_1, _2, ..."
    )
  return branch


def find(name: object) -> Branch | None:
  """Returns the parts of a branch, or None if the name is not in the grammar."""
  match = _NAME.fullmatch(str(name))
  if match is None:
    return None
  plain, first, kind, height, width, dilation, relu = match.groups()
  shared = {"two_steps": bool(first), "relu": bool(relu)}
  if plain:
    return Branch(str(name), plain, (2, 2) if plain == POOLED else (1, 1), **shared)
  if (kind != "conv" and dilation) or (kind == "dirac" and first):
    return None
  return Branch(str(name), kind, (int(height), int(width)), int(dilation or 1), **shared)


def is_skip(name: object) -> bool:
  """Tells if a name is that of a skip, which a layer notes beside its statistics."""
  branch = find(name)
  return branch is not None and branch.kind == "skip"


def layer_size(branches: Iterable[Branch]) -> tuple[int, int]:
  """Returns the size (H, W) of the one kernel into which all branches fold.

  Raises:
    InputError: no branch holds a convolution.
  """
  branches = list(branches)
  if not any(branch.has_kernel for branch in branches):
    raise InputError(
      "a RepConv needs at least one convolution among its branches, got "
      f"{[branch.name for branch in branches]}; a batch norm alone is a RepNorm"
    )
  spans = [branch.span for branch in branches]
  return max(height for height, _ in spans), max(width for _, width in spans)


def branch_order(names: Iterable[str]) -> list[str]:
  """Sorts branch names for people: larger kernels first, the input itself last."""

  def key(name: str) -> tuple[bool, int, bool, str]:
    branch = parse(name)
    return branch.is_input, -branch.span[0] * branch.span[1], branch.two_steps, name

  return sorted(names, key=key)
