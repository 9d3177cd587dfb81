"""What all layers of a network share, streams side by side, and strides that become dilation."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from flax import linen as nn

from repjax.layers import RepConv


class Settings(NamedTuple):
  """What all layers of a network share; attributes as those of the networks."""

  act: str
  axis_name: str | None
  deploy: bool
  dtype: Any
  param_dtype: Any

  @classmethod
  def of(cls, network: nn.Module) -> Self:
    """Those of a network."""
    return cls(*(getattr(network, field) for field in cls._fields))

  def of_layers(self) -> dict[str, Any]:
    """The arguments that all layers that fold have in common."""
    arguments = self._asdict()
    del arguments["act"]
    return arguments

  def conv_bn(
    self, name: str, features: int, size: int, strides: int = 1, dilation: int = 1
  ) -> RepConv:
    """A convolution and its batch norm, in the scope `RepConv_<name>`; for compact methods."""
    return RepConv(
      features,
      branches=(f"conv{size}x{size}",),
      strides=strides,
      dilation=dilation,
      **self.of_layers(),
      name=f"RepConv_{name}",
    )


class Part(NamedTuple):
  """A top-level scope of a network in streams.

  Such a network has `streams`, {scope: Part}; `outputs`, its result with scopes in the place of
  their maps; and `run(maps, scopes)`, which adds to maps by scope what scopes make of them.

  Attributes:
    stream: that it belongs to, from 1.
    reads: scopes, or "images", whose maps it takes.
  """

  stream: int
  reads: tuple[str, ...]


class Step(NamedTuple):
  """How a stage's map follows from the one before it.

  Attributes:
    strides: how many times smaller it is.
    dilation_before: of convolutions up to the one that has the stride.
    dilation: of convolutions behind it.
  """

  strides: int
  dilation_before: int
  dilation: int

  @property
  def shrinks(self) -> bool:
    """Whether the map is smaller, or would be if the stage did not dilate instead."""
    return self.strides > 1 or self.dilation > self.dilation_before

  @property
  def later(self) -> "Step":
    """The same for blocks behind the first."""
    return Step(1, self.dilation, self.dilation)


def dilate(strides: Iterable[int], output_stride: int | None) -> Iterator[Step]:
  """Strides one after another, turned into dilation from where they would exceed a total.

  A convolution behind a stride that is left out reaches as many times further apart. What it
  computes at the pixels that the stride would have left is then the same.

  Args:
    strides: how many times each stage shrinks the map.
    output_stride: how many times all together may; None: as many as they do.
  """
  total = dilation = 1
  for stride in strides:
    before = dilation
    if output_stride is None or total * stride <= output_stride:
      total *= stride
      yield Step(stride, before, dilation)
    else:
      dilation *= stride
      yield Step(1, before, dilation)
