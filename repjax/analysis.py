"""Costs of a model: output shapes, parameters and multiplications by stage, and depth.

Every number is read off the traced program. No array is computed.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.devices import need_devices
from repjax.errors import InputError
from repjax.functions import name_of
from repjax.fusion import Fused
from repjax.fusion.modules import check_callable, check_params, traced
from repjax.layers.resampling import RESIZING
from repjax.models import image_size_of
from repjax.models.checks import check_image_size
from repjax.program import (
  Equation,
  Program,
  constants_and_carries,
  flat,
  inner_programs,
  interpret,
  trace,
)
from repjax.spec import evaluation_options, shapes_of
from repjax.trees import leaf_name


class Cost(NamedTuple):
  """The cost of a model or of one of its stages, in one form and for one image.

  Attributes:
    params: number of trainable values.
    macs: multiply-accumulates of convolutions and matrix products. Biases, norms, pooling, resizing
      and the products of gates are not counted.
    winograd: multiplications where a 3x3 convolution at stride 1 counts 4/9, as F(2x2, 3x3) needs.
  """

  params: int = 0
  macs: int = 0
  winograd: int = 0


class StageCost(NamedTuple):
  """The cost of one top-level scope of a model.

  Attributes:
    name: name of the scope.
    output_shape: shape of what the scope returns for one image, without the batch axis. None if the
      scope does not return one array.
    train: cost in the training form, or in the only form. None if only the deploy form has the
      scope.
    deploy: cost in the deploy form. None if the deploy form lacks the scope, or the model has only
      one form.
  """

  name: str
  output_shape: tuple[int, ...] | None
  train: Cost | None
  deploy: Cost | None


class Summary(NamedTuple):
  """The costs of a model's stages in the order in which they run, and their totals.

  Attributes:
    stages: one entry for each top-level scope that computes or has parameters.
    train: total of the training form, or of the only form.
    deploy: total of the deploy form. None if the model has only one form.
  """

  stages: tuple[StageCost, ...]
  train: Cost
  deploy: Cost | None


def summary(model: Any, image_size: int | tuple[int, int], params: Any = None) -> Summary:
  """Counts what a model's evaluation costs by stage, in both forms where the model has two.

  Any Linen module works that maps images (N, H, W, 3), and perhaps train=False, to something. Every
  number is read off the traced program. Auxiliary heads count in the training form, since they are
  part of it. The body of a scan counts as often as it runs. All branches of a `cond` count, and one
  pass of a `while_loop`.

  A function `function(params, images)` of any library works too. Its stages are the names at the
  top of its tree of parameters. What `repjax.fuse` returned has two forms: the function before, in
  the place of the training form, and the fused function, in the place of the deploy form.

  Args:
    model: both forms are counted if the model has an attribute `deploy`, as repjax's models have.
    image_size: pixels, one number or (height, width).
    params: for a function, its parameters, as arrays or as shapes and dtypes.

  Raises:
    InputError: a model of repjax does not take images of this size, a function comes without its
      parameters, or cannot be traced.

  References:
    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, for 4/9.
      https://arxiv.org/abs/1509.09308
    Ding et al., RepVGG, CVPR 2021, Table 4, for which convolutions count 4/9.
      https://arxiv.org/abs/2101.03697
  """
  if not isinstance(model, nn.Module):
    forms = [
      _costs_of_function(_evaluation(form, image_size, given))
      for form, given in _forms_of_function(model, params)
    ]
    return _summary_of(forms, {})
  has_forms = hasattr(model, "deploy") and dataclasses.is_dataclass(model)
  train, shapes = _costs(_in_form(model, False) if has_forms else model, image_size)
  if not has_forms:
    return _summary_of([train], shapes)
  deploy, deploy_shapes = _costs(_in_form(model, True), image_size)
  return _summary_of([train, deploy], deploy_shapes | shapes)


def _summary_of(forms: Sequence[dict[str, Cost]], shapes: Mapping[str, tuple[int, ...]]) -> Summary:
  """Returns the summary of the costs of one form, or of both forms, by stage."""
  train, deploy = forms[0], forms[1] if len(forms) > 1 else None
  stages = tuple(
    StageCost(name, shapes.get(name), train.get(name), deploy.get(name) if deploy else None)
    for name in dict.fromkeys([*train, *(deploy or ())])
  )
  return Summary(stages, _total(train), _total(deploy) if deploy else None)


def depth(model: Any, image_size: int | tuple[int, int] | None = None, params: Any = None) -> int:
  """Counts the layers on the longest path from the images to an output, in evaluation.

  A layer is a convolution or a matrix product that reads something computed from the images. Paths
  side by side count once: branches, streams, and a gate beside the convolution that the gate
  scales. The body of a scan counts as often as it runs, a `cond` as its longest branch, and a
  `while_loop` as one pass.

  Args:
    model: as for `summary`, in the form to be counted. Of a fused function, what is fused counts.
    image_size: pixels, one number or (height, width). None: the size that the model is made for.
    params: for a function, its parameters, as arrays or as shapes and dtypes.

  Raises:
    InputError: as in `summary`, or a function comes without a size.

  Example:
    >>> import repjax
    >>> repjax.analysis.depth(repjax.create_model("resnet50"))
    50

  References:
    Goyal et al., Non-deep Networks, NeurIPS 2022, section 1. https://arxiv.org/abs/2110.07641
  """
  if isinstance(model, nn.Module):
    size = image_size_of(model) if image_size is None else image_size
    given = _evaluation(model, size)
  else:
    form, params = _forms_of_function(model, params)[-1]
    given = _evaluation(form, _size_of(model) if image_size is None else image_size, params)
  program = traced("repjax", given.function, given.variables, given.images)
  variables = given.variables
  # Variables are no images: a product of parameters alone is no layer.
  inputs = [*[_UNREACHED] * len(jax.tree.leaves(variables)), 0]
  return int(max(0, *_layers_before(program, inputs)))


def format_summary(found: Summary) -> str:
  """Formats a summary as a table for people."""
  forms = ("training form", "deploy form") if found.deploy else ("",)
  table = [["stage", "output", *("parameters", "MACs", "Winograd") * len(forms)]]
  for stage in (*found.stages, StageCost("total", None, found.train, found.deploy)):
    shape = "x".join(map(str, stage.output_shape)) if stage.output_shape else ""
    row = [stage.name, shape]
    for cost in (stage.train, stage.deploy)[: len(forms)]:
      row += [f"{number:,}" for number in cost] if cost else ["", "", ""]
    table.append(row)
  widths = [max(map(len, column)) + 2 for column in zip(*table)]
  # The name of a form ends where the last of its three columns ends.
  headline = "".join(
    f"{form:>{sum(widths[2 + 3 * index : 5 + 3 * index])}}" for index, form in enumerate(forms)
  )
  lines = [
    f"{name:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:]))
    for name, *cells in table
  ]
  return "\n".join([(" " * sum(widths[:2]) + headline).rstrip(), *lines])


def _costs(
  model: nn.Module, image_size: int | tuple[int, int]
) -> tuple[dict[str, Cost], dict[str, tuple[int, ...]]]:
  """Returns the cost and the output shape of each top-level scope, in the order of the program."""
  variables, images, options = _evaluation(model, image_size)[1:]
  called = []  # in the order of the program, norms and other layers without products included

  def is_stage(module: nn.Module, method: str) -> bool:
    if len(module.path) != 1:
      return False
    called.append(module.path[0])
    return method == "__call__"

  def run(variables: Any, images: jax.Array) -> Any:
    _, state = model.apply(
      variables, images, capture_intermediates=is_stage, mutable=["intermediates"], **options
    )
    return state.get("intermediates", {})

  program = trace(run, variables, images)
  own = type(model).__name__
  params = defaultdict(int)
  for name, tree in variables.get("params", {}).items():
    params[name if isinstance(tree, Mapping) else own] += sum(x.size for x in jax.tree.leaves(tree))
  macs, winograd = defaultdict(int), defaultdict(Fraction)
  for scope, count, is_winograd in _products(program, 1):
    stage = _stage_name(scope, {*params, *called}, own)
    macs[stage] += count
    winograd[stage] += count * (Fraction(4, 9) if is_winograd else 1)
  shapes = {
    name: value["__call__"][0].shape[1:]
    for name, value in program.results.items()
    if hasattr(value.get("__call__", (None,))[0], "shape")
  }
  costs = {
    name: Cost(params[name], macs[name], round(winograd[name]))
    for name in dict.fromkeys([*called, *macs, *params])
    if macs[name] or params[name]
  }
  return costs, shapes


class _Evaluation(NamedTuple):
  """A function of variables and of images, and what to trace it on."""

  function: Callable[[Any, Any], Any]
  variables: Any
  images: jax.ShapeDtypeStruct
  options: Mapping[str, Any]


def _evaluation(model: Any, image_size: int | tuple[int, int], params: Any = None) -> _Evaluation:
  """Returns what to trace a module or a function on: variables, one image, and evaluation options.

  Args:
    model: a Linen module, or a function of `params` and of images.
    image_size: pixels, one number or (height, width).
    params: the parameters of a function.
  """
  need_devices()
  check_image_size(image_size)
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  if not isinstance(model, nn.Module):
    if isinstance(model, Fused):
      images = jax.ShapeDtypeStruct(images.shape, model.arguments[0].dtype)
    return _Evaluation(model, params, images, {})
  options = evaluation_options(model)
  apply = functools.partial(model.apply, **options)
  return _Evaluation(apply, shapes_of(model, image_size), images, options)


def _forms_of_function(model: Any, params: Any) -> list[tuple[Any, Any]]:
  """Returns a function and its parameters; of a fused function, the one before it too."""
  if isinstance(model, Fused):
    return [model.original, (model, model.shapes)]
  check_callable(model)
  if params is None:
    raise InputError(
      f"{name_of(model)} is a function, whose parameters are wanted too: pass params, as arrays or "
      "as shapes such as jax.eval_shape gives"
    )
  check_params(params, or_shapes=True)
  return [(model, params)]


def _size_of(model: Any) -> tuple[int, int]:
  """Returns the (height, width) of the images that a fused function was made for."""
  shape = model.arguments[0].shape if isinstance(model, Fused) else ()
  if len(shape) != 4:
    raise InputError(f"{name_of(model)} does not say its image size: pass image_size")
  return shape[1:3]


class _Origin(NamedTuple):
  """The origin of a value of a program: the images, and the largest parameter.

  Attributes:
    moving: the value depends on the images.
    stage: the stage of the largest parameter that the value depends on, "" for none.
    size: the number of elements of this parameter.
  """

  moving: bool = False
  stage: str = ""
  size: int = 0


def _costs_of_function(given: _Evaluation) -> dict[str, Cost]:
  """Returns the cost of each stage of a function: of all that reads one stage's parameters."""
  own = name_of(given.function)
  leaves = [
    (leaf_name(path), math.prod(jnp.shape(leaf)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(given.variables)
  ]
  program = traced("repjax", given.function, given.variables, given.images)
  origins = [_Origin(False, _stage_of(name, own), size) for name, size in leaves]
  macs, winograd, params = defaultdict(int), defaultdict(Fraction), defaultdict(int)
  for stage, count, is_winograd in _owned_products(program, [*origins, _Origin(True)], 1):
    macs[stage or own] += count
    winograd[stage or own] += count * (Fraction(4, 9) if is_winograd else 1)
  trained = [name.startswith("params/") for name, _ in leaves]
  for (name, size), is_trained in zip(leaves, trained):
    # Only Linen says which arrays are trained. Of other trees, all count.
    params[_stage_of(name, own)] += size if is_trained or not any(trained) else 0
  return {
    name: Cost(params[name], macs[name], round(winograd[name]))
    for name in dict.fromkeys([*macs, *params])
    if macs[name] or params[name]
  }


def _stage_of(name: str, own: str) -> str:
  """Returns the stage of a parameter: the first name of its path, with a number beside it.

  Args:
    name: name of the parameter, such as "params/Conv_0/kernel" or "layers/3/weight".
    own: name of the function, for a parameter at the top.
  """
  parts = name.split("/")
  parts = parts[1:] if parts[0] in ("params", "batch_stats") else parts
  if len(parts) < 2:
    return own
  numbered = parts[0].isdigit() or parts[1].isdigit()  # an entry of a list
  return "/".join(parts[: min(2 if numbered else 1, len(parts) - 1)])


def _owned_products(
  program: Program, origins: Sequence[_Origin], times: int
) -> Iterator[tuple[str, int, bool]]:
  """Yields each product's stage, multiply-accumulates, and whether Winograd's algorithm applies.

  A product belongs to the stage of its weights. A product of two values that depend on the images,
  as in attention, belongs to no stage.
  """
  found: dict[Any, _Origin] = dict(zip(program.inputs, origins))
  for equation in program.equations:
    given = [found.get(operand, _Origin()) for operand in equation.inputs]
    fixed = [origin for origin in given if not origin.moving]
    largest = max(fixed, key=lambda origin: origin.size, default=_Origin())
    for count, is_winograd in _product(equation):
      yield largest.stage, times * count, is_winograd
    passes = equation.params["length"] if equation.primitive == "scan" else 1
    for inner in inner_programs(equation):
      # The inputs of a program inside are the last ones of its equation.
      passed = given[max(0, len(given) - len(inner.inputs)) :]
      yield from _owned_products(inner, passed, times * passes)
    moving = any(origin.moving for origin in given)
    found |= dict.fromkeys(equation.outputs, largest._replace(moving=moving))


def _stage_name(scope: str, stages: Collection[str], model: str) -> str:
  """Returns the top-level scope that a name stack such as "RepVGG/stage1/block0" belongs to.

  Transformations show as vmap(stage1), and methods as stage1.method. Operations in no scope belong
  to the model, under the name of its class.
  """
  for name in scope.split("/"):
    while match := re.fullmatch(r"\w+\((.*)\)", name):
      name = match[1]
    if name.partition(".")[0] in stages:
      return name.partition(".")[0]
  return model


def _in_form(model: nn.Module, deploy: bool) -> nn.Module:
  fields: Any = {"deploy": deploy}
  return model.clone(**fields)


def _total(costs: dict[str, Cost]) -> Cost:
  return Cost(*(sum(column) for column in zip(*costs.values()))) if costs else Cost()


def _products(program: Program, times: int) -> Iterator[tuple[str, int, bool]]:
  """Yields each product's scope, multiply-accumulates, and whether Winograd's algorithm applies."""
  for equation in program.equations:
    for count, is_winograd in _product(equation):
      yield equation.scope, times * count, is_winograd
    passes = equation.params["length"] if equation.primitive == "scan" else 1
    for inner in inner_programs(equation):
      yield from _products(inner, times * passes)


def _product(equation: Equation) -> Iterator[tuple[int, bool]]:
  """Yields a product's multiply-accumulates, and whether Winograd's algorithm applies."""
  if _is_resizing(equation):
    return
  if equation.primitive == "conv_general_dilated":
    yield _convolution(equation), _is_winograd(equation)
  elif equation.primitive == "dot_general":
    yield _matrix_product(equation), False


def _is_resizing(equation: Equation) -> bool:
  """Tells if an equation resizes maps. Papers count no operation for this, nor a layer."""
  return RESIZING in equation.scope.split("/")


_UNREACHED = -math.inf  # the number of layers before a value that does not depend on the images


def _layers_before(program: Program, inputs: list[float]) -> list[float]:
  """Counts the layers on the longest path to each output, given those before each input."""
  return interpret(program, inputs, _layers_after, lambda constant: _UNREACHED)


def _layers_after(equation: Equation, given: list[float]) -> list[float]:
  """Counts the layers before each output of one equation, given those before each input."""
  name, params = equation.primitive, equation.params
  if name == "cond":
    branches = [_layers_before(flat(branch), given[1:]) for branch in params["branches"]]
    return [max(given[0], *column) for column in zip(*branches)]
  if name == "while":
    consts = params["cond_nconsts"]
    carry = given[consts + params["body_nconsts"] :]
    one_pass = _layers_before(flat(params["body_jaxpr"]), given[consts:])
    # The loop may run no pass at all: then its inputs are its outputs.
    return [max(pair) for pair in zip(carry, one_pass)]
  if name == "scan":
    return _layers_after_scan(equation, given)
  for inner in inner_programs(equation):
    if len(inner.inputs) == len(given):
      return _layers_before(inner, given)
  is_layer = name in ("conv_general_dilated", "dot_general") and not _is_resizing(equation)
  return [max(given, default=_UNREACHED) + is_layer] * len(equation.outputs)


def _layers_after_scan(equation: Equation, given: list[float]) -> list[float]:
  """Counts the layers before each output of a scan, by running its body on counts."""
  body = flat(equation.params["jaxpr"])
  held, moving = constants_and_carries(equation)
  consts, carry, rows = given[:held], given[held : held + moving], given[held + moving :]
  stacked = [_UNREACHED] * (len(equation.outputs) - moving)
  for _ in range(equation.params["length"]):
    outputs = _layers_before(body, [*consts, *carry, *rows])
    carry, stacked = outputs[:moving], [max(pair) for pair in zip(stacked, outputs[moving:])]
  return [*carry, *stacked]


def _convolution(equation: Equation) -> int:
  """Counts multiply-accumulates: each output is a sum over one output channel's kernel."""
  kernel = equation.inputs[1].aval
  outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return math.prod(equation.outputs[0].aval.shape) * kernel.size // outputs


def _is_winograd(equation: Equation) -> bool:
  """Checks whether a convolution is 3x3 at stride 1 without dilation."""
  params = equation.params
  spatial = params["dimension_numbers"].rhs_spec[2:]
  size = tuple(equation.inputs[1].aval.shape[axis] for axis in spatial)
  plain = (*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"])
  return size == (3, 3) and set(plain) == {1}


def _matrix_product(equation: Equation) -> int:
  """Counts multiply-accumulates: each output is a sum over the contracted axes."""
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.inputs[0].aval.shape
  return math.prod(equation.outputs[0].aval.shape) * math.prod(left[axis] for axis in contracted)
