"""Dilation in place of strides, for networks whose last maps shall stay large.

References:
  Yu et al., Dilated Residual Networks, CVPR 2017, section 2. https://arxiv.org/abs/1705.09914
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Striding(NamedTuple):
  """The stride of a stage, and the dilation of its convolutions.

  Attributes:
    strides: ratio of the size of the stage's input to the size of its output.
    dilation_before: dilation of the convolutions before the stage's dilation grows.
    dilation: dilation of all later convolutions of the stage.
  """

  strides: int
  dilation_before: int
  dilation: int

  @property
  def shrinks(self) -> bool:
    """True if the map gets smaller, or would if the stage did not dilate instead."""
    return self.strides > 1 or self.dilation > self.dilation_before

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
      yield Striding(1, before, dilation)
