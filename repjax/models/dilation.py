"""Dilation in place of strides, for networks whose last maps shall stay large.

Two conventions exist. In that of Yu et al., the convolution that lost its stride still has the
dilation of the stage before, so that the larger maps agree with the smaller ones. In the code of
PSPNet, every convolution of a stage that lost its stride dilates. RepVGG's paper lets the dilation
begin later, in the middle of a stage: `block_stridings` takes the number of blocks that dilate.

References:
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2. https://arxiv.org/abs/1705.09914
  Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 3.
    https://arxiv.org/abs/1612.01105
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from repjax.errors import InputError


class Striding(NamedTuple):
  """The stride of a stage or block, and the dilation of its convolutions.

  Attributes:
    strides: ratio of the size of the input to the size of the output.
    dilation_before: dilation of the convolutions before the stage's dilation grows.
    dilation: dilation of all later convolutions.
    replaced: True if a stride was left out here, and the stage dilates instead.
  """

  strides: int
  dilation_before: int = 1
  dilation: int = 1
  replaced: bool = False

  @property
  def shrinks(self) -> bool:
    """True if the map gets smaller, or would if the stage did not dilate instead."""
    return self.strides > 1 or self.replaced

  @property
  def later(self) -> "Striding":
    """The striding of all blocks of the stage but the first, which keep the size."""
    return Striding(1, self.dilation, self.dilation)


def dilate(strides: Iterable[int], output_stride: int | None) -> Iterator[Striding]:
  """Turns strides into dilation from the stage where their product would exceed a total.

  A convolution after a stride that is left out has its taps as many times further apart. At the
  pixels that the stride would have kept, the convolution then computes the same.

  Args:
    strides: stride of each stage, in order.
    output_stride: largest product of all strides. None leaves all strides as they are.

  Yields:
    The striding of each stage.
  """
  total = dilation = 1
  for stride in strides:
    before = dilation
    if output_stride is None or total * stride <= output_stride:
      total *= stride
      yield Striding(stride, before, dilation)
    else:
      dilation *= stride
      yield Striding(1, before, dilation, replaced=stride > 1)


def block_stridings(
  stage_sizes: Sequence[int], stridings: Sequence[Striding], dilated_blocks: int | None
) -> list[list[Striding]]:
  """Returns the striding of every block, for each stage.

  Args:
    stage_sizes: number of blocks in each stage.
    stridings: stride and dilation of each stage, as `dilate` gives them.
    dilated_blocks: number of last blocks of the network that have the dilation of their stage, in
      all their convolutions. The blocks before have none. None: the convention of Yu et al.
  """
  rows = [
    [striding, *(size - 1) * [striding.later]] for size, striding in zip(stage_sizes, stridings)
  ]
  if dilated_blocks is None:
    return rows
  undilated = sum(stage_sizes) - dilated_blocks
  starts = [sum(stage_sizes[:stage]) for stage in range(len(stage_sizes))]
  rates = [
    [striding.dilation if start + index >= undilated else 1 for index in range(size)]
    for start, size, striding in zip(starts, stage_sizes, stridings)
  ]
  return [
    [each._replace(dilation_before=rate, dilation=rate) for each, rate in zip(row, row_rates)]
    for row, row_rates in zip(rows, rates)
  ]


def check_dilated_blocks(
  value: Any, stage_sizes: Sequence[int], stridings: Iterable[Striding]
) -> None:
  """Raises InputError if a network cannot dilate so many blocks.

  Args:
    value: number of blocks, or None, as in `block_stridings`.
    stage_sizes: number of blocks in each stage.
    stridings: stride and dilation of each stage.
  """
  most = sum(size for size, each in zip(stage_sizes, stridings) if each.dilation > 1)
  whole = isinstance(value, int) and not isinstance(value, bool)
  if value is not None and not (whole and 0 < value <= most):
    way_out = (
      f"Take a number from 1 to {most}, or None; in a PSPNet or FCN, take a different dilation"
      if most
      else "Take a smaller output_stride too, such as 8, or leave dilated_blocks out"
    )
    raise InputError(
      f"dilated_blocks counts blocks of the stages that dilate instead of striding, of which this "
      f"network has {most}; got {value!r}. {way_out}"
    )
