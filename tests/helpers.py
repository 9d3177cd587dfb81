"""Helpers of many tests: errors, random variables, the golden fill rule, official names."""

import functools
import gzip
import inspect
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import program
from repjax.errors import InputError
from repjax.layers.linear import uniform_bound
from repjax.recognition import is_mark
from repjax.weights.naming import Naming, entries, tensor_name
from repjax.weights.repvgg import NAMINGS

GOLDENS = pathlib.Path(__file__).parent / "goldens"
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def relative_error(a: Any, b: Any) -> float:
  """Returns max|a - b| / max|b|, computed in float64."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, f"{a.shape} against {b.shape}"
  return float(np.abs(a - b).max() / np.abs(b).max())


def assert_close(a: Any, b: Any, tolerance: float) -> None:
  """Fails if the relative error of a against b exceeds the tolerance."""
  assert relative_error(a, b) <= tolerance


def assert_one_paragraph(error: Exception) -> None:
  """Fails unless the text of an error is short, and nothing in it controls a terminal."""
  assert str(error).isprintable(), str(error)
  assert len(str(error)) < 2500, len(str(error))


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles like `jax.jit`, but fast and to slow code: tests run a program once or twice."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def primitives(function: Callable[..., Any], *arguments: Any, **axes: int) -> list[str]:
  """Returns the names of the primitives in a traced function, with its calls inlined.

  Args:
    function: function to trace.
    *arguments: arguments of the function, or their shapes.
    **axes: names and sizes of mapped axes that the function may use.
  """

  def names(traced: program.Program) -> Iterator[str]:
    for equation in traced.equations:
      yield equation.primitive
      for inner in program.inner_programs(equation):
        yield from names(inner)

  jaxpr = jax.make_jaxpr(function, axis_env=list(axes.items()))(*arguments)
  return list(names(program.flat(jaxpr)))


def convolve(x, kernel, bias=None, strides=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
  """Computes a convolution by its definition, in NumPy.

  Args:
    x: (N, H, W, I).
    kernel: (h, w, I/g, O).
    bias: (O,), None for zeros.
    strides, dilation: (vertical, horizontal).
    padding: (vertical, horizontal) zeros, each one number for both sides or (before, after).
    groups: number of groups g.
  """
  x, kernel = np.asarray(x), np.asarray(kernel)
  sides = [(pad, pad) if isinstance(pad, int) else pad for pad in padding]
  x = np.pad(x, ((0, 0), *sides, (0, 0)))
  x = x.reshape(*x.shape[:3], groups, -1)  # (N, H, W, g, I/g)
  taps = kernel.reshape(*kernel.shape[:3], groups, -1)  # (h, w, I/g, g, O/g)
  size = [
    (x.shape[1 + axis] - dilation[axis] * (kernel.shape[axis] - 1) - 1) // strides[axis] + 1
    for axis in (0, 1)
  ]
  y = 0
  for row, column in np.ndindex(*kernel.shape[:2]):
    top, left = row * dilation[0], column * dilation[1]
    seen = x[
      :,
      top : top + strides[0] * (size[0] - 1) + 1 : strides[0],
      left : left + strides[1] * (size[1] - 1) + 1 : strides[1],
    ]
    y = y + np.einsum("nhwgi,igo->nhwgo", seen, taps[row, column])
  y = y.reshape(*y.shape[:3], -1)
  return y if bias is None else y + np.asarray(bias)


def leaves(tree: Any) -> dict[str, Any]:
  """Returns every leaf of a tree of dicts by its path: {"params/stem/RepConv_0/...": leaf}."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(entry.key for entry in path): leaf for path, leaf in flat}


def shapes(tree: Any) -> Any:
  """Returns the tree with (shape, dtype) for leaves, to compare with `==`."""
  return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


def randomise(variables: Any, seed: int = 0, epsilon: float = 0.1) -> Any:
  """Draws random values for every leaf of a tree of arrays or shapes, in the dtype of the leaf.

  Fresh variables (mean 0, variance 1, scale 1) hide every folding bug. Notes of layers get the
  given epsilon, and one for marks and skips.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    if kind == "kernel":
      values = rng.standard_normal(leaf.shape) * uniform_bound(leaf.shape)
    elif kind in ("scale", "var", "diagonal", "gain", "gamma"):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    elif kind in ("bias", "mean"):
      values = rng.uniform(-0.3, 0.3, leaf.shape)
    elif kind == "epsilon":
      values = np.full(leaf.shape, epsilon)
    elif is_mark(kind):  # notes of layers, whose values mean nothing
      values = np.ones(leaf.shape)
    else:
      raise ValueError(f"no rule for a leaf called {kind!r}")
    return jnp.asarray(values.astype(leaf.dtype))

  return jax.tree_util.tree_map_with_path(draw, variables)


def spread(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
  """Returns the cases of a parametrized test, where all but those that are kept are proofs.

  A proof repeats a test on one more case. `make test` leaves it out, `make proofs` runs it.
  """
  cases = list(cases)
  assert {*kept} <= {*cases}
  return [pytest.param(case, marks=() if case in kept else pytest.mark.proof) for case in cases]


def init_shapes(module: nn.Module, x: Any, train: bool = False) -> Any:
  """Returns the variables of a module as shapes and dtypes, without computing anything."""
  x64 = jax.config.jax_enable_x64  # part of what is remembered: it changes dtypes
  try:
    found = _init_shapes(module, jnp.shape(x), jnp.result_type(x), train, x64)
  except TypeError:  # a module that cannot be hashed
    found = _init_shapes.__wrapped__(module, jnp.shape(x), jnp.result_type(x), train, x64)
  return jax.tree.map(lambda leaf: leaf, found)


@functools.cache
def _init_shapes(module: nn.Module, shape: Any, dtype: Any, train: bool, x64: bool) -> Any:
  del x64
  arguments = (train,) if "train" in inspect.signature(module.__call__).parameters else ()
  x = jax.ShapeDtypeStruct(shape, dtype)
  return jax.eval_shape(lambda key, x: module.init(key, x, *arguments), jax.random.key(0), x)


def random_variables(module: nn.Module, x: Any, seed: int = 0) -> Any:
  """Draws random variables for a module, without compiling the module's `init`."""
  return randomise(init_shapes(module, x), seed, getattr(module, "epsilon", 0.1))


def forms_differ_by(model: nn.Module, x: Any) -> float:
  """Returns the relative error of a model's deploy form against its training form.

  Variables are random. Fails if `reparameterize` does not return the tree of the deploy form.
  """
  own: dict[str, Any] = {"deploy": True}
  deploy, variables = model.clone(**own), random_variables(model, x)

  @quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables))
    return deploy.apply({"params": params}, x), model.apply(variables, x), params

  deployed, trained, params = outputs(variables)
  assert shapes(params) == shapes(init_shapes(deploy, x)["params"])
  return relative_error(deployed, trained)


def random_input(*shape: int, seed: int = 1) -> np.ndarray:
  """Draws standard normal values in float64."""
  return np.random.default_rng(seed).standard_normal(shape)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Computes a PyTorch tensor from its name and shape by the golden fill rule, in float64."""
  u = _uniform(name, math.prod(shape)).reshape(shape)
  if name.endswith("running_mean"):
    return 0.2 * u
  if name.endswith("running_var"):
    return 1 + u
  if len(shape) == 1:
    return 1 + 0.4 * u if name.endswith("weight") else 0.2 * u
  return u * math.sqrt(12 / math.prod(shape[1:]))


def golden_input(shape_nchw: tuple[int, ...]) -> np.ndarray:
  """Returns the input of the golden cases, (N, H, W, C)."""
  x = 2 * _uniform("input", math.prod(shape_nchw)).reshape(shape_nchw)
  return x.transpose(0, 2, 3, 1)


def _uniform(name: str, count: int) -> np.ndarray:
  mask, half = np.uint64(0xFFFFFFFF), np.uint64(16)
  seed = sum(position * ord(char) for position, char in enumerate(name, 1)) % 65521
  h = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(40503 * seed)
  h &= mask
  h ^= h >> half
  h = (h * np.uint64(0x45D9F3B)) & mask
  h ^= h >> half
  return h / 2.0**32 - 0.5


def official_name(path: str, plus: bool = False) -> str:
  """Returns the name of a leaf in official state dicts of RepVGG.

  Args:
    path: path below "params" or "batch_stats", in the network or in a lone block.
    plus: use the names of RepVGGplus, which differ in the blocks and the gate.
  """
  return tensor_name(_official(plus), tuple(path.split("/")), axes=4)[0]


def _official(plus: bool) -> Naming:
  return NAMINGS["repvggplus_l2pse" if plus else "repvgg_a0"]["official"]


def oihw(kernel: Any) -> np.ndarray:
  """Returns a kernel in the layout of PyTorch, and vectors unchanged."""
  kernel = np.asarray(kernel)
  return kernel.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[kernel.ndim])


def nchw(maps: Any) -> np.ndarray:
  """Returns feature maps (N, H, W, C) in the layout of PyTorch, (N, C, H, W)."""
  return np.asarray(maps).transpose(0, 3, 1, 2)


def fill_state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """Returns a state dict by the fill rule, from a list of keys."""
  return {name: fill(name, tuple(shape)) for name, shape in shapes.items()}


def fill_variables(variables: Any, plus: bool = False) -> Any:
  """Returns variables of RepVGG, or of a lone block, by the fill rule."""
  filled = {
    entry.path: entry.layout.from_torch(fill(name, entry.shape))
    for name, entry in entries(_official(plus), variables).items()
  }
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(filled[tuple(key.key for key in path)].astype(leaf.dtype)),
    variables,
  )


def keys(source: str, model: str) -> dict[str, dict[str, list[int]]]:
  """Returns the keys of a checkpoint: {"train": {name: shape}, "deploy": {name: shape}}."""
  return key_lists()[source][model]


@functools.cache
def key_lists() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
  """Reads the lists of keys: {source: {model: {kind: {name: shape}}}}."""
  with gzip.open(GOLDENS / "keys.json.gz", "rt") as file:
    return json.load(file)


def goldens() -> dict[str, dict[str, Any]]:
  """Reads the golden RepVGG cases by id: {"spec", "input", "expect", ...}."""
  return {case["id"]: case for case in json.loads((GOLDENS / "repvgg.json").read_text())}


def repmlpnet_goldens() -> dict[str, Any]:
  """Reads {"counts": {model: {...}}, "cases": [{"id", "spec", "input", "expect", ...}, ...]}."""
  return json.loads((GOLDENS / "repmlpnet.json").read_text())


def repmlpnet_keys() -> dict[str, dict[str, dict[str, list[int]]]]:
  """Reads {model: {kind: {name: shape}}}, as in the authors' checkpoints of RepMLPNet."""
  with gzip.open(GOLDENS / "repmlpnet_keys.json.gz", "rt") as file:
    return json.load(file)


def parnet_goldens() -> dict[str, Any]:
  """Reads {"counts": {model: {...}}, "cases": [{"id", "spec", "input", "expect"}, ...]}."""
  return json.loads((GOLDENS / "parnet.json").read_text())


def mobile_goldens() -> dict[str, Any]:
  """Reads the golden numbers of MobileOne, RepViT and FastViT, which timm has computed.

  {"counts": {model: {...}}, "cases": networks of full size, "small": small ones with all maps}.
  """
  return json.loads((GOLDENS / "mobile.json").read_text())


@functools.cache
def mobile_keys() -> dict[str, dict[str, dict[str, list[int]]]]:
  """Reads {model: {kind: {name: shape}}} of timm's MobileOne, RepViT and FastViT."""
  with gzip.open(GOLDENS / "mobile_keys.json.gz", "rt") as file:
    return json.load(file)


def folded_beyond_timm(model: nn.Module) -> int:
  """Returns how many more parameters timm's deploy form has than ours.

  Each FFN of a FastViT has 2 C parameters more, for C channels: of its norm C stay as a bias, and
  its factors go. Attention has as many as ours: its norm and factors go, and qkv gets 3 C biases.
  """
  if type(model).__name__ != "FastViT":
    return 0
  return 2 * sum(blocks * width for blocks, width in zip(model.stage_sizes, model.widths))


def folded_beyond_the_authors(model: nn.Module) -> int:
  """Returns how many more parameters the authors' deploy form of a RepMLPNet has than ours.

  A norm after a convolution of C outputs has 2 C parameters, of which C stay as a bias. A norm
  before a layer with a bias has 2 C parameters, of which none stays.
  """
  embeddings = sum(model.widths)
  ffns = sum(
    blocks * (4 * width + width + 2 * width)  # norms after its two layers, and before the first
    for blocks, width in zip(model.stage_sizes, model.widths)
  )
  return embeddings + ffns + 2 * model.widths[-1]


def halves(variables: Mapping[str, Any]) -> tuple[Any, Any]:
  """Returns parameters and statistics, the arguments of `reparameterize`."""
  return variables["params"], variables["batch_stats"]


def counts() -> dict[str, dict[str, int]]:
  """Reads the numbers of parameters and batch norm buffers of every RepVGG in both forms."""
  return json.loads((GOLDENS / "counts.json").read_text())


def assert_golden(array: Any, record: dict[str, Any], tolerance: float = 1e-9) -> None:
  """Fails if an array in the layout of PyTorch differs from a golden record."""
  array = np.asarray(array)
  assert list(array.shape) == record["shape"]
  flat = array.ravel()
  assert abs(flat.sum() - record["sum"]) <= tolerance * record["abs_sum"]
  assert abs(np.abs(flat).sum() - record["abs_sum"]) <= tolerance * record["abs_sum"]
  known = np.asarray(record.get("values", record.get("first10"))).ravel()
  assert np.abs(flat[: known.size] - known).max() <= tolerance * np.abs(flat).max()
  if "argmax" in record:
    per_row = isinstance(record["argmax"], list)
    assert np.argmax(array, -1 if per_row else None).tolist() == record["argmax"]


def error_in_child(call):
  """Calls a function in a forked process, and returns the text of the InputError that it raises."""
  read, write = os.pipe()
  if (child := os.fork()) == 0:
    try:
      call()
    except InputError as error:
      os.write(write, str(error).encode())
    os._exit(0)
  os.close(write)
  os.waitpid(child, 0)
  with os.fdopen(read) as said:
    return said.read()
