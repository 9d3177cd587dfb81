"""RepVGG and RepVGGplus.

Training form: every block is a RepConv of conv3x3, conv1x1 and, where input and output have one
shape, identity. Deploy form: one 3x3 convolution with bias a block, the activation, and what is not
affine: squeeze-and-excitation. It holds no batch norm, no statistics and no auxiliary head.

References:
  Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021, section 3 and Table 2.
    https://arxiv.org/abs/2101.03697
  RepVGGplus: https://github.com/DingXiaoH/RepVGG
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2, for `output_stride`.
    https://arxiv.org/abs/1705.09914
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError
from repjax.layers import AuxHead, RepConv, SqueezeExcite, activation, linear
from repjax.layers.base import refuse_training
from repjax.models.base import Step, dilate
from repjax.models.checks import check_classifier, is_whole


class RepVGGBlock(nn.Module):
  """RepConv, squeeze-and-excitation before or after the activation, activation.

  Where `shrinks`, there is no identity, even if the block dilates instead of striding.
  """

  features: int
  strides: int
  groups: int
  se: str | None
  se_reduction: int
  act: str
  axis_name: str | None
  deploy: bool
  dtype: Any
  param_dtype: Any
  dilation: int = 1
  shrinks: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    keeps_shape = x.shape[-1] == self.features and self.strides == 1 and not self.shrinks
    x = RepConv(
      self.features,
      branches=("conv3x3", "conv1x1") + ("identity",) * keeps_shape,
      strides=self.strides,
      groups=self.groups,
      dilation=self.dilation,
      axis_name=self.axis_name,
      deploy=self.deploy,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )(x, train)
    gate = SqueezeExcite(self.se_reduction, self.dtype, self.param_dtype) if self.se else None
    if gate and self.se == "pre":
      x = gate(x)
    x = activation(self.act)(x)
    if gate and self.se == "post":
      x = gate(x)
    return x


class Stage(NamedTuple):
  """What is needed to build one stage: its scope, size, and the number of its first block."""

  name: str
  blocks: int
  features: int
  step: Step
  first_block: int


class _Stage(nn.Module):
  """The blocks of one stage, called `block0`, `block1`, ... in its scope."""

  stage: Stage
  build: Callable[[int, Step, int, str], nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    _, blocks, features, step, first_block = self.stage
    for index in range(blocks):
      here = step.later if index else step
      x = self.build(features, here, first_block + index, f"block{index}")(x, train)
    return x


class RepVGG(nn.Module):
  """A stack of 3x3 convolutions in five stages, global mean, linear classifier.

  Scopes: `stem`, `stage1` ... `stage4` with `block0`, `block1`, ..., `head`. With auxiliary heads
  stage 3 is two scopes, `stage3_first` and `stage3_second`, and the heads are `AuxHead_stage1`,
  `AuxHead_stage2` and `AuxHead_stage3_first`.

  Attributes:
    stage_sizes: blocks in each of the four stages behind the stem.
    width_multipliers: of 64, 128, 256 and 512 channels; the stem has at most 64.
    num_classes: outputs.
    groups: of blocks 2, 4, ..., 26, counted from 1 behind the stem; or {block number: groups}.
    se: squeeze-and-excitation: None, "pre" (before the activation) or "post".
    se_reduction: how many times narrower its hidden layer is.
    strides: of the stem and of the first block of each stage.
    output_stride: how many times the last stage's map is smaller than the image: what `strides`
      come to, for which None stands too, or do up to an earlier stage (32, 16, 8, ...). Stages
      behind that dilate instead of striding. Parameters are the same, and so is what the maps hold
      at every second or fourth pixel; not so with `se`, whose means are then over more pixels.
    aux_heads: build the auxiliary heads.
    act: "relu", "silu" or "gelu".
    dropout: rate in front of the classifier.
    remat: recompute each block in the backward pass instead of keeping what is in it.
    axis_name: of the pmapped axis over which batch norms share statistics; None: per device.
    features_only: return the outputs of the stages instead of logits, and build no classifier.
    deploy: build the deploy form.
    dtype: of the computation and the result.
    param_dtype: of the parameters.
  """

  stage_sizes: Sequence[int]
  width_multipliers: Sequence[float]
  num_classes: int = 1000
  groups: int | Mapping[int, int] = 1
  se: str | None = None
  se_reduction: int = 16
  strides: Sequence[int] = (2, 2, 2, 2, 2)
  output_stride: int | None = None
  aux_heads: bool = False
  act: str = "relu"
  dropout: float = 0.0
  remat: bool = False
  axis_name: str | None = None
  features_only: bool = False
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    for field, length in (("stage_sizes", 4), ("width_multipliers", 4), ("strides", 5)):
      value = getattr(self, field)
      if isinstance(value, str | int | float) or len(value) != length or not min(value) > 0:
        raise InputError(f"{field} takes {length} numbers above 0, got {value!r}")
    if not all(isinstance(number, int) for number in (*self.stage_sizes, *self.strides)):
      raise InputError(f"stage_sizes and strides are whole: {self.stage_sizes}, {self.strides}")
    totals = sorted(set(itertools.accumulate(self.strides, operator.mul)))
    stride = self.output_stride
    if stride is not None and not (is_whole(stride) and stride in totals):
      raise InputError(
        f"output_stride is one of {', '.join(map(str, totals))}, which strides={self.strides} come "
        f"to stage by stage, got {self.output_stride!r}"
      )
    if self.aux_heads and self.stage_sizes[2] < 2:
      raise InputError("aux_heads needs two blocks in stage 3, one on each side of its third head")
    if int(64 * min(self.width_multipliers)) < 1:
      raise InputError(f"width_multipliers {self.width_multipliers} leave a stage no channel")
    check_classifier(self.num_classes, self.dropout, self.act)
    blocks = sum(self.stage_sizes)
    groups = self.groups if isinstance(self.groups, Mapping) else {1: self.groups}
    if not all(0 < int(block) <= blocks and count > 0 for block, count in groups.items()):
      raise InputError(f"groups is a number, or {{block 1 to {blocks}: number}}, got {self.groups}")
    if self.se not in (None, "pre", "post"):
      raise InputError(f'se is None, "pre" or "post" (of the activation), got {self.se!r}')
    super().__post_init__()

  def stages(self) -> Iterator[Stage]:
    """The stages behind the stem, in order."""
    block = 1
    _, *steps = dilate(self.strides, self.output_stride)  # the stem first
    rows = zip(self.stage_sizes, self.width_multipliers, steps)
    for index, (size, multiplier, step) in enumerate(rows):
      name, features = f"stage{index + 1}", int(64 * 2**index * multiplier)
      halves = ((name, size, step),)
      if self.aux_heads and index == 2:
        first = size // 2
        halves = ((f"{name}_first", first, step), (f"{name}_second", size - first, step.later))
      for half, blocks, half_step in halves:
        yield Stage(half, blocks, features, half_step, block)
        block += blocks

  def groups_of(self, block: int) -> int:
    """Groups of a block, counted from 1 behind the stem."""
    if isinstance(self.groups, int):
      return self.groups if block in range(2, 27, 2) else 1
    # JSON turns the numbers into strings.
    return {int(number): groups for number, groups in self.groups.items()}.get(block, 1)

  def _auxiliary_stages(self) -> tuple[str, ...]:
    present = self.aux_heads and not self.deploy and not self.features_only
    return ("stage1", "stage2", "stage3_first") if present else ()

  def _check_size(self, images: jax.Array) -> None:
    total = self.output_stride or math.prod(self.strides)
    if images.ndim != 4 or min(images.shape[1:3]) < total:
      raise InputError(
        f"this RepVGG shrinks images {total} times, so they must be (N, H, W, C) with H and W at "
        f"least {total}; got {images.shape}: use a larger image size or smaller strides"
      )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Classifies images.

    Args:
      images: (N, H, W, 3), normalised; H and W at least the total stride. Odd sizes are rounded up.
      train: use and update batch statistics, apply dropout, return auxiliary logits.

    Returns:
      Logits (N, num_classes). With auxiliary heads and `train`: (logits, {stage name: logits}).
      With `features_only`: {"stage1": (N, H/4, W/4, C1), ..., "stage4": (N, H/32, W/32, C4)},
      other sizes with other `strides`, the last ones larger with a smaller `output_stride`.

    Raises:
      ValueError: images smaller than the total stride, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    self._check_size(images)
    build = nn.remat(RepVGGBlock, static_argnums=(2,)) if self.remat else RepVGGBlock

    def block(features: int, step: Step, number: int, name: str) -> nn.Module:
      return build(
        features=features,
        strides=step.strides,
        dilation=step.dilation_before,
        shrinks=step.shrinks,
        groups=self.groups_of(number),
        se=self.se,
        se_reduction=self.se_reduction,
        act=self.act,
        axis_name=self.axis_name,
        deploy=self.deploy,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    stem_features = min(64, int(64 * self.width_multipliers[0]))
    stem_step = next(dilate(self.strides, self.output_stride))
    x = block(stem_features, stem_step, 0, "stem")(images.astype(self.dtype), train)
    features, auxiliary = {}, {}
    for stage in self.stages():
      x = _Stage(stage, block, name=stage.name)(x, train)
      features[stage.name.removesuffix("_first").removesuffix("_second")] = x
      if stage.name in self._auxiliary_stages():
        # Called in evaluation too, so that `init` creates it; XLA drops what nobody reads.
        head = AuxHead(
          self.num_classes,
          stage.step.dilation,
          self.axis_name,
          self.dtype,
          self.param_dtype,
          name=f"AuxHead_{stage.name}",
        )
        auxiliary[stage.name] = head(x, train)
    if self.features_only:
      return features
    x = x.mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    logits = linear(
      x, self.num_classes, name="head", dtype=self.dtype, param_dtype=self.param_dtype
    )
    return (logits, auxiliary) if auxiliary and train else logits


_A = {"stage_sizes": (2, 4, 14, 1)}
_B = {"stage_sizes": (4, 6, 16, 1)}
_D = {"stage_sizes": (8, 14, 24, 1)}


def _width(a: float, b: float) -> dict[str, Any]:
  """The paper's a, for all stages but the last, and its b."""
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
