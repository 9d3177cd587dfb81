"""Windows: the inputs that each output reads along one axis.

Output o of a convolution reads, through tap t, the input at o * stride - low + t * dilation. What
lies outside the input is zero. A slice, zero padding and a sum over a window have the same form,
so one class describes them all. A chain of two windows is a window, and so is the union of two
windows that stand side by side.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Window:
  """The inputs that each output along an axis reads.

  Attributes:
    size: number of outputs.
    taps: number of inputs that an output reads.
    stride: inputs between the first taps of two neighbouring outputs.
    dilation: inputs between two neighbouring taps.
    low: zeros before the first input. Negative where inputs are cut off.
    spread: distance of two inputs after zeros were put between them, as a transposed convolution
      does. 1 puts none.
  """

  size: int
  taps: int = 1
  stride: int = 1
  dilation: int = 1
  low: int = 0
  spread: int = 1

  def plain(self, inputs: int) -> bool:
    """Checks if each output is the input at the same place."""
    return self == Window(inputs)

  def padding(self, inputs: int) -> tuple[int, int]:
    """Returns how many zeros are read before and after the inputs; negative numbers cut off.

    The last inputs stay where the stride jumps over them: runtimes have no negative padding.
    """
    last = (self.size - 1) * self.stride - self.low + (self.taps - 1) * self.dilation
    if self.size == 0:  # a long stride must not cut more than there is
      last = max(last, -self.low - 1)
    high = last - (inputs - 1) * self.spread
    jumped = self.stride - 1 if self.size else 0
    return self.low, max(high, min(0, high + jumped))

  def uniform(self, inputs: int) -> bool:
    """Checks if no output reads a zero that is not an input."""
    return self.spread == 1 and max(self.padding(inputs)) <= 0

  def zero_outside(self, inputs: int, outputs: int) -> bool:
    """Checks if an output before the first, or after the last of `outputs`, reads zeros only.

    If so, zero padding after this window is the same as the window over more zero padding.
    """
    before = -self.stride - self.low + (self.taps - 1) * self.dilation < 0
    return before and outputs * self.stride - self.low >= (inputs - 1) * self.spread + 1

  def then(self, second: "Window") -> "Window | None":
    """Returns the window of a second window over the outputs of this one, None if it is none.

    Exact if the second window is `uniform`, or this window is `zero_outside`.
    """
    if second.spread != 1:
      return second if self == Window(self.size) else None
    steps = [self.dilation] if self.taps > 1 else []
    steps += [second.dilation * self.stride] if second.taps > 1 else []
    dilation = math.gcd(*steps) or 1
    reach = (self.taps - 1) * self.dilation + (second.taps - 1) * second.dilation * self.stride
    low = self.low + self.stride * second.low
    stride = self.stride * second.stride
    return Window(second.size, reach // dilation + 1, stride, dilation, low, self.spread)

  def union(self, other: "Window") -> "Window | None":
    """Returns the smallest window that holds the taps of both, None if there is none."""
    same = (self.stride, self.size, self.spread) == (other.stride, other.size, other.spread)
    if not same:
      return None
    steps = [each.dilation for each in (self, other) if each.taps > 1]
    dilation = math.gcd(*steps, abs(self.low - other.low)) or 1
    low = max(self.low, other.low)
    last = max((each.taps - 1) * each.dilation - each.low for each in (self, other))
    taps = (last + low) // dilation + 1
    return Window(self.size, taps, self.stride, dilation, low, self.spread)

  def place_in(self, larger: "Window") -> tuple[int, int, int]:
    """Returns the zero taps before, after and between this window's taps in a larger window."""
    between = self.dilation // larger.dilation - 1 if self.taps > 1 else 0
    before = (larger.low - self.low) // larger.dilation
    return before, larger.taps - before - (self.taps - 1) * (between + 1) - 1, between
