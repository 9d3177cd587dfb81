"""What all layers of a network share."""

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
