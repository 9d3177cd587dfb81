"""What a model costs: shapes, parameters and multiplications by stage, and its depth.

Everything is read off the traced program; nothing is computed.
"""

import dataclasses
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.models import image_size_of


class Cost(NamedTuple):
  """Of one form of a stage or a model, for one image.

  Attributes:
    params: trainable numbers.
    macs: multiply-accumulates of convolutions and matrix products; biases, norms, pooling and the
      products of gates are not counted.
    winograd: multiplications where a 3x3 convolution at stride 1 counts 4/9, as F(2x2, 3x3) needs.
  """

  params: int = 0
  macs: int = 0
  winograd: int = 0


class Stage(NamedTuple):
  """One top-level scope of a model.

  Attributes:
    name: of the scope.
    output_shape: of what it returns for one image, without the batch axis; None where it returns
      something else than an array.
    train: cost in training form, or in the only form; None where only the deploy form has it.
    deploy: cost in deploy form; None where the form has no such scope, or the model no such form.
  """

  name: str
  output_shape: tuple[int, ...] | None
  train: Cost | None
  deploy: Cost | None


class Summary(NamedTuple):
  """A model's stages in the order in which they run, and its totals.

  Attributes:
    stages: one for each top-level scope that computes or has parameters.
    train: total of the form that was passed, or of the training form.
    deploy: total of the deploy form; None where the model has only one.
  """

  stages: tuple[Stage, ...]
  train: Cost
  deploy: Cost | None


def summary(model: nn.Module, image_size: int | tuple[int, int]) -> Summary:
  """Counts what a model's evaluation costs by stage, in both forms where it has two.

  Everything is read off the traced program, so that any Linen module works that maps images
  (N, H, W, 3), and perhaps train=False, to something. Nothing is computed. In the training form
  auxiliary heads count, as they are part of it. A scan counts as often as it runs; of a `cond` all
  branches count, of a `while_loop` one pass.

  Args:
    model: with an attribute `deploy`, as the models of repjax have, both forms are counted.
    image_size: pixels, one number or (height, width).

  Raises:
    ValueError: the model does not take images of that size.

  References:
    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, for 4/9.
      https://arxiv.org/abs/1509.09308
    Ding et al., RepVGG, CVPR 2021, Table 4, for which convolutions it is counted.
      https://arxiv.org/abs/2101.03697
  """
  has_forms = hasattr(model, "deploy") and dataclasses.is_dataclass(model)
  train, shapes = _costs(_in_form(model, False) if has_forms else model, image_size)
  deploy = None
  if has_forms:
    deploy, deploy_shapes = _costs(_in_form(model, True), image_size)
    shapes = deploy_shapes | shapes
  stages = tuple(
    Stage(name, shapes.get(name), train.get(name), deploy.get(name) if deploy else None)
    for name in dict.fromkeys([*train, *(deploy or ())])
  )
  return Summary(stages, _total(train), _total(deploy) if deploy else None)


def depth(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
  """How many layers lie on the longest path from the images to an output, in evaluation.

  A layer is a convolution or a matrix product that reads something made of the images. What runs
  side by side counts once: branches, streams, and a gate beside the convolution that it scales. A
  scan counts as often as it runs, of a `cond` the longest branch, of a `while_loop` one pass.

  Args:
    model: as for `summary`, in the form to be counted.
    image_size: pixels, one number or (height, width); None: the size that the model is made for.

  Raises:
    ValueError: the model does not take images of that size.

  Example:
    >>> import repjax
    >>> repjax.analysis.depth(repjax.create_model("resnet50"))
    50

  References:
    Goyal et al., Non-deep Networks, NeurIPS 2022, section 1. https://arxiv.org/abs/2110.07641
  """
  size = image_size_of(model) if image_size is None else image_size
  variables, images, form = _arguments(model, size)
  program = jax.make_jaxpr(lambda *given: model.apply(*given, **form))(variables, images)
  before = [*[_NOT_AT_ALL] * len(jax.tree.leaves(variables)), 0]
  return int(max(0, *_layers_before(program.jaxpr, before)))


def format_summary(found: Summary) -> str:
  """The summary as a table for people."""
  forms = ("training form", "deploy form") if found.deploy else ("",)
  table = [["stage", "output", *("parameters", "MACs", "Winograd") * len(forms)]]
  for stage in (*found.stages, Stage("total", None, found.train, found.deploy)):
    shape = "x".join(map(str, stage.output_shape)) if stage.output_shape else ""
    row = [stage.name, shape]
    for cost in (stage.train, stage.deploy)[: len(forms)]:
      row += [f"{number:,}" for number in cost] if cost else ["", "", ""]
    table.append(row)
  widths = [max(map(len, column)) + 2 for column in zip(*table)]
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
  """The cost of each top-level scope in the order of the program, and what it returns."""
  variables, images, form = _arguments(model, image_size)
  called = []  # in the order of the program, norms and other layers without products included

  def is_stage(module: nn.Module, method: str) -> bool:
    if len(module.path) != 1:
      return False
    called.append(module.path[0])
    return method == "__call__"

  def run(variables: Any, images: jax.Array) -> Any:
    _, state = model.apply(
      variables, images, capture_intermediates=is_stage, mutable=["intermediates"], **form
    )
    return state.get("intermediates", {})

  program, outputs = jax.make_jaxpr(run, return_shape=True)(variables, images)
  own = type(model).__name__
  params = defaultdict(int)
  for name, tree in variables.get("params", {}).items():
    params[name if isinstance(tree, Mapping) else own] += sum(x.size for x in jax.tree.leaves(tree))
  macs, winograd = defaultdict(int), defaultdict(Fraction)
  for scope, count, is_winograd in _products(program.jaxpr, (), 1):
    stage = _stage_name(scope, {*params, *called}, own)
    macs[stage] += count
    winograd[stage] += count * (Fraction(4, 9) if is_winograd else 1)
  shapes = {
    name: value["__call__"][0].shape[1:]
    for name, value in outputs.items()
    if hasattr(value.get("__call__", (None,))[0], "shape")
  }
  costs = {
    name: Cost(params[name], macs[name], round(winograd[name]))
    for name in dict.fromkeys([*called, *macs, *params])
    if macs[name] or params[name]
  }
  return costs, shapes


def _arguments(
  model: nn.Module, image_size: int | tuple[int, int]
) -> tuple[Any, jax.ShapeDtypeStruct, dict[str, Any]]:
  """What a model is traced on: variables and one image as shapes, and `train` where it takes it."""
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  takes_train = "train" in inspect.signature(type(model).__call__).parameters
  return variables, images, {"train": False} if takes_train else {}


def _stage_name(scope: tuple[str, ...], stages: Collection[str], model: str) -> str:
  """The top-level scope that a name stack such as RepVGG/stage1/block0/... belongs to.

  Transformations show as vmap(stage1), methods as stage1.method. What a model computes in no scope
  is its own, under the name of its class.
  """
  for name in scope:
    while match := re.fullmatch(r"\w+\((.*)\)", name):
      name = match[1]
    if name.partition(".")[0] in stages:
      return name.partition(".")[0]
  return model


def _in_form(model: nn.Module, deploy: bool) -> nn.Module:
  settings: Any = {"deploy": deploy}
  return model.clone(**settings)


def _total(costs: dict[str, Cost]) -> Cost:
  return Cost(*(sum(column) for column in zip(*costs.values()))) if costs else Cost()


def _products(
  jaxpr: Any, outer: tuple[str, ...], times: int
) -> Iterator[tuple[tuple[str, ...], int, bool]]:
  """Scope, multiply-accumulates, and whether Winograd's algorithm does it, of each product."""
  for equation in jaxpr.eqns:
    scope = (*outer, *filter(None, str(equation.source_info.name_stack).split("/")))
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
      yield scope, times * _convolution(equation), _is_winograd(equation)
    elif name == "dot_general":
      yield scope, times * _matrix_product(equation), False
    inner_times = times * (params["length"] if name == "scan" else 1)
    for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(inner):
        yield from _products(getattr(inner, "jaxpr", inner), scope, inner_times)


_NOT_AT_ALL = -math.inf  # layers before what does not depend on the images


def _layers_before(jaxpr: Any, inputs: Sequence[float]) -> list[float]:
  """Layers on the longest path to each output of a program, from those to each of its inputs."""
  before = dict(zip(jaxpr.invars, inputs))

  def of(variables: Sequence[Any]) -> list[float]:
    # Literals have no hash, and constants are no inputs.
    return [
      _NOT_AT_ALL if hasattr(variable, "val") else before.get(variable, _NOT_AT_ALL)
      for variable in variables
    ]

  for equation in jaxpr.eqns:
    before.update(zip(equation.outvars, _layers_behind(equation, of(equation.invars))))
  return of(jaxpr.outvars)


def _layers_behind(equation: Any, given: list[float]) -> list[float]:
  """The same for the outputs of one equation."""
  name, params = equation.primitive.name, equation.params

  def through(program: Any, given: Sequence[float]) -> list[float]:
    return _layers_before(getattr(program, "jaxpr", program), given)

  if name == "cond":
    branches = [through(branch, given[1:]) for branch in params["branches"]]
    return [max(given[0], *column) for column in zip(*branches)]
  if name == "while":
    consts = params["cond_nconsts"]
    carry = given[consts + params["body_nconsts"] :]
    return [max(pair) for pair in zip(carry, through(params["body_jaxpr"], given[consts:]))]
  if name == "scan":
    held, moving = params["num_consts"], params["num_carry"]
    consts, carry, rows = given[:held], given[held : held + moving], given[held + moving :]
    stacked = [_NOT_AT_ALL] * (len(equation.outvars) - moving)
    for _ in range(params["length"]):
      outputs = through(params["jaxpr"], [*consts, *carry, *rows])
      carry, stacked = outputs[:moving], [max(pair) for pair in zip(stacked, outputs[moving:])]
    return [*carry, *stacked]
  for inner in params.values():
    if _is_jaxpr(inner) and len(getattr(inner, "jaxpr", inner).invars) == len(given):
      return through(inner, given)
  is_layer = name in ("conv_general_dilated", "dot_general")
  return [max(given, default=_NOT_AT_ALL) + is_layer] * len(equation.outvars)


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _convolution(equation: Any) -> int:
  kernel = equation.invars[1].aval
  outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return math.prod(equation.outvars[0].aval.shape) * kernel.size // outputs


def _is_winograd(equation: Any) -> bool:
  params = equation.params
  spatial = params["dimension_numbers"].rhs_spec[2:]
  size = tuple(equation.invars[1].aval.shape[axis] for axis in spatial)
  plain = (*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"])
  return size == (3, 3) and set(plain) == {1}


def _matrix_product(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
