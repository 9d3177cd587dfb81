"""Compiles functions so that XLA chooses how their parameters lie in memory.

A convolution of cuDNN reads its kernel output channel by output channel, and Flax holds kernels
with the output channels last. A program that takes arrays as they are would reorder every kernel in
every call. Programs here say which layouts they want instead, and the parameters are laid out once.
Their values and shapes stay. On CPUs, XLA wants the layouts that arrays have anyway.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from repjax.deploy import gpu
from repjax.functions import Function
from repjax.trees import is_key, leaf_name


def trace(
  function: Function,
  tree: Any,
  inputs: Any,
  whole: Sharding,
  axes: Mapping[str, int] | None = None,
) -> Any:
  """Traces a function for devices that all hold the whole tree, with layouts left to XLA.

  Args:
    function: a function of the tree and of inputs. Each of several devices computes it for its
      share of the inputs.
    tree: arrays, or their shapes and dtypes.
    inputs: shapes, dtypes and shardings of the inputs. Several devices split the first axis.
    whole: sharding of the tree, for one device or for all devices of a mesh with one axis.
    axes: as `summed_axes` of `repjax.deploy.gpu` finds them; None finds them here. An exported
      function hides its products.

  Returns:
    JAX's traced function, whose `lower` and `out_info` are of use. What is compiled from it takes
    the tree as `lay_out` returns it.
  """
  device = next(iter(whole.device_set))
  axes = wanted_axes(function, tree, jax.tree.map(share, inputs), device, axes)
  if device.platform == "gpu":
    function = gpu.split_sums(function)
  results: dict[str, Any] = {}
  if isinstance(whole, NamedSharding):
    split = PartitionSpec(*whole.mesh.axis_names)
    function = jax.shard_map(
      function,
      mesh=whole.mesh,
      in_specs=(PartitionSpec(), split),
      out_specs=split,
      # The check refuses a scan whose carry starts equal on all devices and later differs.
      check_vma=False,
    )
    results = {"out_shardings": NamedSharding(whole.mesh, split)}

  def wanted(path: Any, leaf: Any) -> Any:
    if is_key(leaf):
      return whole  # JAX gives random keys no layout.
    return Format(layout_of(axes.get(leaf_name(path))), whole)

  formats = jax.tree_util.tree_map_with_path(wanted, tree)
  shardings = jax.tree.map(lambda shape: shape.sharding, inputs)
  # Shapes alone: an array would bring the layout that it has.
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  return jax.jit(function, in_shardings=(formats, shardings), **results).trace(shapes, inputs)


def wanted_axes(
  function: Function, tree: Any, inputs: Any, device: Any, known: Mapping[str, int] | None = None
) -> Mapping[str, int]:
  """Returns the matrices for which XLA's own choice is not the best, by name; see `layout_of`."""
  if device.platform != "gpu":
    return {}
  return gpu.summed_axes(function, tree, inputs) if known is None else known


def layout_of(summed_axis: int | None) -> Any:
  """Returns the layout to ask for: XLA's choice, or of a matrix the one with an axis side by side.

  Args:
    summed_axis: the axis of a matrix whose numbers are added up; None for any other array.
  """
  return Layout.AUTO if summed_axis is None else Layout((1 - summed_axis, summed_axis))


def lay_out(tree: Any, executable: Any) -> Any:
  """Returns a tree in the layouts that an executable wants.

  A leaf that has its layout already is not copied.

  Args:
    tree: arrays on the devices of the executable, or on more of them.
    executable: compiled from a function of `trace`.
  """
  formats = executable.input_formats[0][0]

  def lay(leaf: Any, wanted: Any) -> Any:
    if is_key(leaf) or leaf.format.layout == wanted.layout:
      return leaf
    return jax.device_put(leaf, Format(wanted.layout, leaf.sharding))

  return jax.tree.map(lay, tree, formats)


def share(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of the share that one device has of an array."""
  return jax.ShapeDtypeStruct(shape.sharding.shard_shape(shape.shape), shape.dtype)
