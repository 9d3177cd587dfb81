"""RepVGG and RepVGGplus.

In training form every block is a RepConv with the branches conv3x3, conv1x1 and, where input and
output have the same shape, identity. In deploy form a block is one 3x3 convolution with bias, and
the activation. Squeeze-and-excitation is not affine, so it stays. The deploy form holds no batch
norm, no statistics and no auxiliary head.

References:
  Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021, section 3 and Table 2.
    https://arxiv.org/abs/2101.03697
  RepVGGplus: https://github.com/DingXiaoH/RepVGG
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import AuxHead, RepConv, RepLayer, ScaledConv, SqueezeExcite
from repjax.layers.base import training_of
from repjax.layers.composition import AFTER_SUM
from repjax.layers.grammar import layer_size, parse
from repjax.models.base import Block, BlockBuilder, Classifier, Stage
from repjax.models.checks import (
  check_multiplied_stages,
  check_output_stride,
)
from repjax.models.dilation import Striding, block_stridings, check_dilated_blocks, dilate
from repjax.models.resnet import BasicBlock, Place
from repjax.schema import shown

BRANCHES = ("conv3x3", "conv1x1", "identity")
MOST_TAPS = 31
"""Largest height and width of a block's kernel. The names of branches would allow any."""


class RepVGGBlock(Block):
  """A RepConv, an activation, and perhaps squeeze-and-excitation before or after the activation.

  Attributes:
    features: number of output channels.
    striding: stride and dilation. A block that shrinks the map has no identity branch, and neither
      has a block that dilates instead: both then have the same parameters.
    groups: number of groups of the convolutions.
    se: squeeze-and-excitation: None, "pre" (before the activation) or "post".
    se_reduction: ratio of `features` to the width of its hidden layer.
    branches: names of the branches of the RepConv. Blocks that change the shape of the map leave
      out the branches without a convolution, such as an identity.
    norm: which branches end with a norm, and whether one follows their sum, as in `RepConv`.
    first_scale: build a ScaledConv, whose scales begin with this value, in place of the RepConv.
      None: build the RepConv.
  """

  features: int
  striding: Striding
  groups: int
  se: str | None
  se_reduction: int
  branches: Sequence[str] = BRANCHES
  norm: Sequence[str] | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
  first_scale: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
    x = self.conv(x.shape[-1] == self.features and not self.striding.shrinks)(x, train)
    gate = SqueezeExcite(self.se_reduction, **self.dtypes()) if self.se else None
    if gate and self.se == "pre":
      x = gate(x)
    x = self.activate(x)
    return gate(x) if gate and self.se == "post" else x

  @nn.nowrap
  def conv(self, keeps_shape: bool) -> RepLayer:
    """Builds the sum of branches; those without a convolution need a block that keeps the shape."""
    attributes = {
      "strides": self.striding.strides,
      "groups": self.groups,
      "dilation": self.striding.dilation_before,
      **self.shared(),
    }
    if self.first_scale is not None:
      return ScaledConv(self.features, keeps_shape, first_scale=self.first_scale, **attributes)
    names = [name for name in self.branches if keeps_shape or parse(name).has_kernel]
    norm = self.norm and [name for name in self.norm if name in (*names, AFTER_SUM)]
    return RepConv(self.features, branches=names, norm=norm, **attributes)


class StageSpec(NamedTuple):
  """The description of one stage.

  Attributes:
    name: scope of the stage.
    blocks: number of blocks.
    features: number of output channels.
    stridings: stride and dilation of each block.
    first_block: number of the first block, counted from 1 after the stem.
  """

  name: str
  blocks: int
  features: int
  stridings: Sequence[Striding]
  first_block: int


class RepVGG(Classifier, kw_only=True):
  """A stack of 3x3 convolutions: a stem, four stages, a global mean, and a linear classifier.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., and `head`. With auxiliary
  heads stage 3 is two scopes, `stage3_first` and `stage3_second`, and the heads are
  `AuxHead_stage1`, `AuxHead_stage2` and `AuxHead_stage3_first`.

  Images are at least as high and wide as the total stride; odd sizes are rounded up. A call with
  auxiliary heads and `train` returns (logits, {stage name: logits}). With `features_only` the maps
  are "stage1" (N, H/4, W/4, C1) to "stage4" (N, H/32, W/32, C4). Maps have different sizes with
  different `strides`, and the last maps are larger with a smaller `output_stride`.

  Attributes besides those of `Classifier`:
    stage_sizes: number of blocks in each of the four stages after the stem.
    width_multipliers: factors of 64, 128, 256 and 512 channels. The stem has at most 64 channels.
    groups: number of groups of blocks 2, 4, ..., 26, counted from 1 after the stem; or a table
      {block number: groups}.
    branches: names of the branches of every block, as in `RepConv`. Plain networks have
      ("conv3x3",). Blocks that change the shape of the map leave out the branches without a
      convolution, such as an identity.
    norm: which branches end with a norm, and whether one follows their sum, as in `RepConv`.
    residual: replace every two blocks of a stage by a residual block of two plain 3x3 convolutions,
      with the shortcut of ResNet-18. The last block of a stage with an odd number stays.
    scaled: end each branch with a trained scale for each channel in place of a batch norm, and the
      sum of the branches with one batch norm. The hyper-search of RepOptimizer trains such a
      network.
    se: squeeze-and-excitation: None, "pre" (before the activation) or "post".
    se_reduction: ratio of a block's channels to the width of its hidden layer.
    strides: strides of the stem and of the first block of each stage.
    output_stride: ratio of the size of the image to the size of the last map. None is the product
      of all `strides`. The products up to earlier stages (16, 8, ...) are allowed too; later stages
      then dilate instead of striding. Parameters stay the same, and so do the maps at every second
      or fourth pixel. With `se` the maps change, because its means are then over more pixels.
    dilated_blocks: number of last blocks that dilate, with a smaller `output_stride`. All
      convolutions of these blocks then have the dilation of their stage, and blocks before have
      none. At `output_stride=8` the paper's PSPNets dilate the last two stages, or as "fast" the
      last 5 blocks. None: the first block of a stage that dilates has the dilation of the stage
      before, which keeps the maps at every second or fourth pixel.
    aux_heads: build the auxiliary heads.
  """

  stage_sizes: Sequence[int]
  width_multipliers: Sequence[float]
  groups: int | Mapping[int, int] = 1
  branches: Sequence[str] = BRANCHES
  norm: Sequence[str] | None = None
  residual: bool = False
  scaled: bool = False
  se: str | None = None
  se_reduction: int = 16
  strides: Sequence[int] = (2, 2, 2, 2, 2)
  output_stride: int | None = None
  dilated_blocks: int | None = None
  aux_heads: bool = False

  def __post_init__(self):
    check_multiplied_stages(self)
    check_output_stride(self)
    _, *stridings = dilate(self.strides, self.output_stride)
    check_dilated_blocks(self.dilated_blocks, self.stage_sizes, stridings)
    if self.aux_heads and self.stage_sizes[2] < 2:
      raise InputError("aux_heads needs two blocks in stage 3, one on each side of its third head")
    blocks = sum(self.stage_sizes)
    groups = dict(self.groups) if isinstance(self.groups, Mapping) else {1: self.groups}
    if not all(0 < int(block) <= blocks and count > 0 for block, count in groups.items()):
      raise InputError(
        f"groups is a number, or {{block 1 to {blocks}: number}}, got {shown(groups)}"
      )
    _check_branches(self)
    if self.se not in (None, "pre", "post"):
      raise InputError(f'se is None, "pre" or "post" (of the activation), got {self.se!r}')
    super().__post_init__()

  @nn.nowrap
  def total_stride(self) -> int:
    """Returns the ratio of the size of the image to the size of the last map."""
    return self.output_stride or math.prod(self.strides)

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
    """Runs the stem and the stages, and returns the output of each stage.

    Among the maps is that of "stage3_first", if its auxiliary head reads it.
    """
    stem = min(64, int(64 * self.width_multipliers[0]))
    first, *_ = dilate(self.strides, self.output_stride)
    x = self.build(stem, first, 0)(name="stem")(x, train)
    maps = {}
    for stage in self.stages():
      x = Stage(list(self.blocks_of(stage)), name=stage.name)(x, train)
      if stage.name in self.auxiliary_stages():
        maps[stage.name] = x
      maps[stage.name.removesuffix("_first").removesuffix("_second")] = x
    return maps

  @nn.nowrap
  def classify(self, maps: Mapping[str, jax.Array], train: bool) -> Any:
    """Returns logits and, in training, those of the auxiliary heads by stage."""
    logits, auxiliary = super().classify(maps, train), {}
    for stage in self.stages():
      if stage.name in self.auxiliary_stages():
        # Heads run in evaluation too, so that `init` creates them. XLA drops outputs nobody reads.
        head = AuxHead(
          self.num_classes,
          stage.stridings[-1].dilation,
          **training_of(self),
          **self.dtypes(),
          name=f"AuxHead_{stage.name}",
        )
        auxiliary[stage.name] = head(maps[stage.name], train)
    return (logits, auxiliary) if auxiliary and train else logits

  @nn.nowrap
  def blocks_of(self, stage: StageSpec) -> Iterator[BlockBuilder]:
    """Yields the builders of the blocks of a stage."""
    pairs = stage.blocks // 2 if self.residual else 0
    for number in range(pairs):
      first, second = stage.stridings[2 * number : 2 * number + 2]
      # A number of the stage above 1 gives the first block a convolution in its shortcut.
      rates = first.dilation_before, second.dilation
      place = Place(2, number, stage.features, first.strides, *rates)
      yield functools.partial(self.builder(BasicBlock), place=place)
    for index in range(2 * pairs, stage.blocks):
      yield self.build(stage.features, stage.stridings[index], stage.first_block + index, index)

  @nn.nowrap
  def build(self, features: int, striding: Striding, number: int, index: int = 0) -> BlockBuilder:
    """Returns the builder of a block.

    Args:
      features: number of output channels.
      striding: stride and dilation.
      number: number of the block, from 1 after the stem, which is 0.
      index: number of the block in its stage, from 0.
    """
    return functools.partial(
      self.builder(RepVGGBlock),
      features=features,
      striding=striding,
      groups=self.groups_of(number),
      branches=self.branches,
      norm=self.norm,
      first_scale=_first_scale(index) if self.scaled else None,
      se=self.se,
      se_reduction=self.se_reduction,
    )

  @nn.nowrap
  def start(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns freshly drawn variables with the scales of branches at their initial values."""
    if not self.scaled or self.deploy:
      return variables
    params = dict(variables["params"])
    for stage in self.stages():
      params[stage.name] = {
        name: _with_scales(block, _first_scale(int(name.removeprefix("block"))))
        for name, block in params[stage.name].items()
      }
    return {**variables, "params": params}

  def stages(self) -> Iterator[StageSpec]:
    """Yields the description of each stage after the stem, in order."""
    block = 1
    _, *stridings = dilate(self.strides, self.output_stride)  # the stem comes first
    rows = block_stridings(self.stage_sizes, stridings, self.dilated_blocks)
    for index, (multiplier, row) in enumerate(zip(self.width_multipliers, rows)):
      name, features = f"stage{index + 1}", int(64 * 2**index * multiplier)
      halves = {name: row}
      if self.aux_heads and index == 2:
        first = len(row) // 2
        halves = {f"{name}_first": row[:first], f"{name}_second": row[first:]}
      for half, blocks in halves.items():
        yield StageSpec(half, len(blocks), features, blocks, block)
        block += len(blocks)

  def groups_of(self, block: int) -> int:
    """Returns the number of groups of a block, by its number from 1 after the stem."""
    if isinstance(self.groups, int):
      return self.groups if block in range(2, 27, 2) else 1
    # JSON turns the numbers of blocks into strings.
    return {int(number): groups for number, groups in self.groups.items()}.get(block, 1)

  @nn.nowrap
  def auxiliary_stages(self) -> tuple[str, ...]:
    """Returns the names of the stages with an auxiliary head; none without the heads."""
    present = self.aux_heads and not self.deploy and not self.features_only
    return ("stage1", "stage2", "stage3_first") if present else ()


def _first_scale(index: int) -> float:
  """Returns the initial value of the scales of the convolutions in a block: sqrt(2 / index).

  Args:
    index: number of the block in its stage, from 0. The first block, and the stem, begin with 1.

  References:
    https://github.com/DingXiaoH/RepOptimizers at 1d41318, repoptimizer/repoptvgg_model.py
  """
  return math.sqrt(2 / index) if index else 1.0


def _with_scales(block: Mapping[str, Any], value: float) -> dict[str, Any]:
  """Returns the parameters of a block in which the scales of both convolutions have a value."""
  conv = block["ScaledConv_0"]
  scaled = {
    name: {**conv[name], "scale": jnp.full_like(conv[name]["scale"], value)}
    for name in ("conv3x3", "conv1x1")
  }
  return {**block, "ScaledConv_0": {**conv, **scaled}}


# A function, not a method: interceptors of methods cannot take a module that is not set up yet.
def _check_branches(network: RepVGG) -> None:
  """Raises InputError if the branches, or what goes with them, make no block."""
  names, size = network.branches, (0, 0)
  try:
    if not isinstance(names, str) and len(set(names)) == len(names):
      size = layer_size(map(parse, names))
  except ValueError as error:
    raise InputError(f"branches: {error}") from None
  if not all(taps % 2 and 3 <= taps <= MOST_TAPS for taps in size):
    raise InputError(
      f"branches takes different names, the largest with 3 to {MOST_TAPS} taps each way, an odd "
      f"number, such as ('conv3x3', 'conv1x1', 'identity'), got {shown(names)}"
    )
  known = {*names, AFTER_SUM}
  if network.norm is not None and not (network.norm and set(network.norm) <= known):
    raise InputError(f"norm takes some of {sorted(known)}, or None, got {shown(network.norm)}")
  other = network.se or network.aux_heads or network.norm or network.scaled or network.groups != 1
  if network.residual and (other or tuple(names) != ("conv3x3",)):
    raise InputError(
      'residual is for plain networks: branches=("conv3x3",), one group, and no norms, se, '
      "scaled or aux_heads"
    )
  if network.scaled and (tuple(names) != BRANCHES or network.norm):
    raise InputError(
      f"scaled builds the branches {shown(BRANCHES)} and one norm, got branches={shown(names)} and "
      f"norm={shown(network.norm)}. Leave these out, or scaled"
    )


_A = {"stage_sizes": (2, 4, 14, 1)}
_B = {"stage_sizes": (4, 6, 16, 1)}
_D = {"stage_sizes": (8, 14, 24, 1)}


def _width(a: float, b: float) -> dict[str, Any]:
  """Returns the multipliers from the a and b of the paper: a for three stages, b for the last."""
  return {"width_multipliers": (a, a, a, b)}


VARIANTS: dict[str, dict[str, Any]] = {
  "repvgg_a0": _A | _width(0.75, 2.5),
  "repvgg_a1": _A | _width(1, 2.5),
  "repvgg_a2": _A | _width(1.5, 2.75),
  "repvgg_b0": _B | _width(1, 2.5),
  "repvgg_b1": _B | _width(2, 4),
  "repvgg_b1g2": _B | _width(2, 4) | {"groups": 2},
  "repvgg_b1g4": _B | _width(2, 4) | {"groups": 4},
  "repvgg_b2": _B | _width(2.5, 5),
  "repvgg_b2g2": _B | _width(2.5, 5) | {"groups": 2},
  "repvgg_b2g4": _B | _width(2.5, 5) | {"groups": 4},
  "repvgg_b3": _B | _width(3, 5),
  "repvgg_b3g2": _B | _width(3, 5) | {"groups": 2},
  "repvgg_b3g4": _B | _width(3, 5) | {"groups": 4},
  "repvgg_d2se": _D | _width(2.5, 5) | {"se": "pre"},
  "repvggplus_l2pse": _D | _width(2.5, 5) | {"se": "post", "se_reduction": 4, "aux_heads": True},
}
