"""The composition of a sum of branches: what a layer holds, and which branches fit together.

Both follow from the attributes of a layer alone, whatever its framework.
"""

from collections.abc import Collection, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol

from repjax.errors import InputError, printable
from repjax.layers.grammar import POOLED, Branch, layer_size, parse

Path = tuple[str, ...]
AFTER_SUM = "after_sum"
_PADDING_MODES = ("constant", "edge", "reflect", "wrap")


class Layer(Protocol):
  """The attributes of a sum of branches; `RepConv` documents them."""

  features: Any
  branches: Any
  strides: Any
  groups: Any
  dilation: Any
  padding: Any
  padding_mode: Any
  conv_bias: Any
  norm: Any
  statistics: Any
  deploy: Any


class Conv(NamedTuple):
  """A convolution of a layer: all that a framework needs to build it.

  Attributes:
    inputs: number of input channels I.
    features: number of output channels O.
    size: height and width in taps.
    strides: (vertical, horizontal), as all pairs below.
    padding: pixels of zeros added on each side; negative numbers crop.
    dilation: distance from tap to tap.
    groups: number of groups.
    use_bias: add a bias.
    is_dirac: the kernel is the sum of an identity and a normalised kernel, see `dirac_kernel`.
  """

  inputs: int
  features: int
  size: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[int, int]
  dilation: tuple[int, int]
  groups: int
  use_bias: bool
  is_dirac: bool = False


def pair(value: int | Sequence[int]) -> tuple[int, int]:
  """Returns (vertical, horizontal) from one number for both, or from two numbers."""
  return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)


def named_norms(layer: Layer) -> Sequence[str] | None:
  """Returns `norm` of a layer as a list; None for one norm in each branch."""
  return [layer.norm] if isinstance(layer.norm, str) else layer.norm


def is_normed(layer: Layer, branch: Branch) -> bool:
  """Tells if a branch ends with a norm."""
  named = named_norms(layer)
  return branch.kind != "skip" and (named is None or branch.name in named)


def is_normed_after_sum(layer: Layer) -> bool:
  """Tells if a norm follows the sum of the branches."""
  return AFTER_SUM in (named_norms(layer) or ())


def _is_biased(layer: Layer, branch: Branch) -> bool:
  """Tells if the convolutions of a branch have a bias."""
  return layer.conv_bias if isinstance(layer.conv_bias, bool) else branch.name in layer.conv_bias


def layer_padding(layer: Layer, size: tuple[int, int]) -> tuple[int, int]:
  """Returns the pixels (vertical, horizontal) added on each side for the layer's kernel."""
  if layer.padding is not None:
    return pair(layer.padding)
  dilation = pair(layer.dilation)
  return dilation[0] * ((size[0] - 1) // 2), dilation[1] * ((size[1] - 1) // 2)


def centred_padding(layer: Layer, size: tuple[int, int], span: tuple[int, int]) -> tuple[int, int]:
  """Returns the padding of a smaller kernel, so that its centre lies under the layer's.

  Negative padding crops the input. In other modes than zeros, the map is padded for the layer's
  kernel already.
  """
  padding = layer_padding(layer, size) if layer.padding_mode == "constant" else (0, 0)
  dilation = pair(layer.dilation)
  margins = [(big - small) // 2 for big, small in zip(size, span)]
  return padding[0] - dilation[0] * margins[0], padding[1] - dilation[1] * margins[1]


def convolutions(layer: Layer, inputs: int) -> dict[Path, Conv]:
  """Returns the convolutions of a layer in its form, by their paths in the tree.

  Args:
    layer: the layer.
    inputs: number of input channels.
  """
  branches = [parse(name) for name in layer.branches]
  size = layer_size(branches)
  plain = Conv(
    inputs,
    layer.features,
    size,
    pair(layer.strides),
    centred_padding(layer, size, size),
    pair(layer.dilation),
    layer.groups,
    use_bias=True,
  )
  if layer.deploy:
    return {("conv",): plain}
  return {
    path: conv
    for branch in branches
    for path, conv in _of_branch(layer, branch, plain._replace(use_bias=_is_biased(layer, branch)))
  }


def _of_branch(layer: Layer, branch: Branch, plain: Conv) -> Iterator[tuple[Path, Conv]]:
  """Yields the convolutions of a branch by path, made from the one with the layer's kernel."""
  pointwise = plain._replace(size=(1, 1), strides=(1, 1), padding=(0, 0))
  rate = branch.dilation
  spatial = plain._replace(
    size=branch.size, dilation=(rate * plain.dilation[0], rate * plain.dilation[1])
  )
  if branch.two_steps:
    # Between the steps are as many channels as in front. A pool keeps the number of channels.
    middle = layer.features if branch.kind == "avg" else plain.inputs
    yield (branch.name, "first", "conv"), pointwise._replace(features=middle)
    if branch.kind == "conv":
      # The map between the steps is padded before this convolution.
      yield (branch.name, "second", "conv"), spatial._replace(padding=(0, 0))
  elif branch.kind == POOLED:
    # The pool has the stride already, and its zeros at an odd edge are the only padding.
    yield (branch.name, "conv"), pointwise
  elif branch.kind in ("conv", "dirac"):
    padding, is_dirac = centred_padding(layer, plain.size, branch.span), branch.kind == "dirac"
    yield (branch.name, "conv"), spatial._replace(padding=padding, is_dirac=is_dirac)


def check(layer: Layer, shape: Sequence[int], where: str) -> None:
  """Raises InputError if the branches do not fit the input or each other.

  Args:
    layer: the layer.
    shape: shape of the input, (N, H, W, I).
    where: name of the layer for messages.
  """
  _check_numbers(layer, where)
  if len(shape) < 3:
    raise InputError(f"{where}: the input must be (N, H, W, C), got the shape {tuple(shape)}")
  inputs = shape[-1]
  if isinstance(layer.branches, str):
    raise InputError(
      f"{where}: branches takes several names, got {layer.branches!r}. Pass ({layer.branches!r},)"
    )
  if not isinstance(layer.branches, Collection):
    raise InputError(
      f"{where}: branches takes a tuple of names such as ('conv3x3', 'conv1x1'), got "
      f"{printable(repr(layer.branches), 60)}"
    )
  branches = [parse(name) for name in layer.branches]
  size = layer_size(branches)
  if len({branch.name for branch in branches}) != len(branches):
    raise InputError(f"{where}: branch names must differ (conv3x3, conv3x3_1): {layer.branches}")
  if inputs % layer.groups or layer.features % layer.groups:
    raise InputError(
      f"{where}: {inputs} input and {layer.features} output channels do not both divide into "
      f"{layer.groups} groups"
    )
  if layer.padding_mode not in _PADDING_MODES:
    raise InputError(f"{where}: padding_mode {layer.padding_mode!r} is none of {_PADDING_MODES}")
  _check_norms(layer, branches, where)
  _check_map(layer, size, shape, where)
  for branch in branches:
    _check_branch(layer, branch, size, inputs, where)


def _check_map(layer: Layer, size: tuple[int, int], shape: Sequence[int], where: str) -> None:
  """Raises InputError if the layer's kernel finds no place on the map.

  Smaller kernels crop the map, so that the branches would not have outputs of the same size.
  """
  padding, dilation = layer_padding(layer, size), pair(layer.dilation)
  for side, pad, taps, rate in zip(shape[-3:-1], padding, size, dilation):
    # A side can be a symbol, with which a program is exported for all sizes.
    if isinstance(side, Integral) and side + 2 * pad < rate * (taps - 1) + 1:
      raise InputError(
        f"{where}: the kernel covers {rate * (taps - 1) + 1} pixels, but the map has {side} and "
        f"its padding adds {2 * pad} (input {tuple(shape)}, padding={layer.padding}). Use larger "
        "maps, or more padding"
      )


def _check_numbers(layer: Layer, where: str) -> None:
  """Raises InputError if an attribute is no number of pixels or channels, nor two of them."""
  for field in ("features", "groups", "strides", "dilation", "padding"):
    value = getattr(layer, field)
    is_pair = field not in ("features", "groups") and isinstance(value, list | tuple)
    numbers = value if is_pair else [value]
    # A convolution with negative padding crops the map, which `jnp.pad` cannot.
    is_free = field == "padding" and layer.padding_mode == "constant"
    least = None if is_free else 0 if field == "padding" else 1
    fits = (not is_pair or len(value) == 2) and all(
      isinstance(number, Integral) and (least is None or int(number) >= least) for number in numbers
    )
    if not fits and not (field == "padding" and value is None):
      pairs = "" if field in ("features", "groups") else ", or two for (vertical, horizontal)"
      wanted = "a whole number" if least is None else f"a whole number of at least {least}"
      raise InputError(f"{where}: {field} takes {wanted}{pairs}, got {printable(repr(value), 60)}")


def _check_branch(
  layer: Layer, branch: Branch, size: tuple[int, int], inputs: int, where: str
) -> None:
  """Raises InputError if a branch cannot be part of this layer."""
  name, is_even = branch.name, not (size[0] % 2 and size[1] % 2)
  keeps_channels = inputs == layer.features
  if branch.relu and layer.deploy:
    raise InputError(
      f"{where}: {name} has a ReLU inside of the branch, so that the layer has no deploy form. Use "
      "the training form, or leave _relu out"
    )
  if branch.kind == POOLED:
    _check_pooled(layer, name, size, where)
  elif branch.is_input:
    if not keeps_channels or pair(layer.strides) != (1, 1) or is_even:
      raise InputError(
        f"{where}: {'an identity' if branch.kind == 'identity' else 'a skip'} branch needs stride "
        "1, as many output as input channels and odd kernels; got strides "
        f"{layer.strides}, {inputs} -> {layer.features} channels, kernel {size[0]}x{size[1]}. "
        "Leave the branch out: branches=('conv3x3', 'conv1x1')"
      )
  elif any((big - small) % 2 for big, small in zip(size, branch.span)):
    raise InputError(
      f"{where}: {name} has no centre in the layer's {size[0]}x{size[1]} kernel; "
      "heights must be all odd or all even, and widths too"
    )
  if branch.kind == "dirac" and (layer.groups != 1 or is_even):
    raise InputError(
      f"{where}: {name} needs one group and an odd kernel, got {layer.groups} groups and a kernel "
      f"{size[0]}x{size[1]}. Use conv{name.removeprefix('dirac')} and a skip"
    )
  if not branch.has_kernel and branch.kind == "avg" and not keeps_channels:
    raise InputError(
      f"{where}: {name} maps each channel to itself, so it needs as many output as input channels, "
      f"got {inputs} -> {layer.features}. Use conv1x1_{name}"
    )


def _check_pooled(layer: Layer, name: str, size: tuple[int, int], where: str) -> None:
  """Raises InputError if a pool at stride 2 is not four taps of the layer's kernel."""
  shape = size, pair(layer.strides), layer_padding(layer, size), pair(layer.dilation)
  if shape != ((3, 3), (2, 2), (1, 1), (1, 1)) or layer.padding_mode != "constant":
    raise InputError(
      f"{where}: {name} lies beside a 3x3 convolution at stride 2 with one pixel of zeros around "
      f"the map and no dilation; got kernel {size[0]}x{size[1]}, strides {layer.strides}, padding "
      f"{layer.padding} of mode {layer.padding_mode!r}, dilation {layer.dilation}. Use conv1x1"
    )


def _check_names(value: Any, known: set[str], where: str) -> None:
  """Raises InputError if a value is no list of known names."""
  is_list = isinstance(value, Collection) and not isinstance(value, str)
  if not is_list or not all(name in known for name in value):
    raise InputError(
      f"{where} takes a tuple of names, each one of {sorted(known)}, got {value!r}"
      + (f". Pass ({value!r},)" if isinstance(value, str) and value in known else "")
    )


def _check_norms(layer: Layer, branches: Sequence[Branch], where: str) -> None:
  """Raises InputError if `norm` or `conv_bias` names something else than branches of the layer."""
  names = {branch.name for branch in branches}
  named = named_norms(layer)
  if named is not None:
    _check_names(named, names | {AFTER_SUM}, f"{where}: norm")
  if not isinstance(layer.conv_bias, bool):
    _check_names(layer.conv_bias, names, f"{where}: conv_bias")
  for branch in branches:
    if branch.kind == "skip" and branch.name in (named or ()):
      raise InputError(
        f"{where}: {branch.name} has no norm, but norm names it. With a norm it is an identity"
      )
    if branch.kind != "skip" and not branch.has_kernel and not is_normed(layer, branch):
      raise InputError(
        f"{where}: {branch.name} holds nothing but a norm, so that norm must name it. An identity "
        "without a norm is called skip"
      )
  bare = [branch for branch in branches if branch.has_kernel and not is_normed(layer, branch)]
  if is_normed_after_sum(layer) and not bare:
    raise InputError(
      f"{where}: with a norm after the sum, at least one convolution goes without a norm, which "
      f"norm={layer.norm!r} does not leave"
    )
  if named is not None and not named:
    raise InputError(
      f'{where}: norm names no norm at all; "after_sum" is one norm after the sum, None is one in '
      "each branch"
    )
