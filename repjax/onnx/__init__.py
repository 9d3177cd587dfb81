"""ONNX: translates a deploy form into a file for other runtimes, and checks that both agree.

The translation reads the traced program, a list of primitives over logical arrays (N, H, W, C), and
adds ONNX nodes one by one. Its idea is in `values`: what an axis means is kept apart from where its
numbers lie. So images are (N, C, H, W) throughout, and reshapes and transpositions cost nothing. An
order of channels that differs ends in the rows of the next kernel, which are known numbers.

  x.reshape(N, H, W, 2, C/2).swapaxes(3, 4).reshape(N, H, W, C)    adds no node
  the 1x1 convolution that reads it                                gets permuted weights

Files, in the order in which a model passes them:
  translation   traces a function and meets its equations in order
  operators     the table from primitives to emitters, which add nodes
  elementwise, shapes, reductions, products, resizing    emitters, by kind
  graph         nodes under construction; moves numbers where an operator needs a certain order
  values        axes, and how a tensor stores them
  proto         names the tensors and writes protocol buffers
  metadata      says in the file how images are prepared and what classes are called
  run_onnx      a program that labels images with a file, copied beside exported files
  check         compares a file with JAX in ONNX Runtime

Emitters find idioms again, since runtimes are fast on these: Relu, GELU, softmax, means, biases.
Where numbers have to move, it is a Gather within channels (ParNet's shuffles), or a Transpose
(RepMLP's tiles). The batch is a symbol while JAX traces, so that a file takes batches of any size.

Two other ways were weighed. jax2onnx (0.17) covers JAX widely, but puts Transposes around images,
and Max, ReduceSum and Div where runtimes look for Relu and GlobalAveragePool. An emitter for each
layer of repjax would be short, but blind to what a user writes between the layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError
from repjax.inference import checked_dtype, inference
from repjax.onnx import metadata
from repjax.onnx.proto import model_proto, need_onnx
from repjax.onnx.translation import IMAGES, EquationTensors, translated
from repjax.spec import Preprocessing

__all__ = ["to_onnx"]


def to_onnx(
  model: Any,
  variables: Any,
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike = "float32",
  preprocessing: Preprocessing | None = None,
  probabilities: bool = False,
  class_names: Sequence[str] = (),
) -> Any:
  """Returns a model's deploy form as an `onnx.ModelProto` of opset 17.

  The input is `images` (batch, 3, H, W). The output is `logits` (batch, K) or `probabilities`. With
  `features_only` the outputs are the maps (batch, C, h, w) by their stages' names. All outputs are
  float32.

  Args:
    model: in either form. A training form is re-parameterized first. Or a function of parameters
      and images, or what `repjax.fuse` returned for one, as in `repjax.deploy.compile`.
    variables: variables of the model, parameters of the function, or what `fold` returned.
    image_size: pixels, one number or (height, width).
    dtype: dtype of parameters, computation and images, "float32" or "float16".
    preprocessing: from the model's ModelSpec, to take uint8 images and normalize them in the graph.
      None: images are normalized and of `dtype`.
    probabilities: return a softmax of the logits.
    class_names: from the model's ModelSpec: the name of each class. With `preprocessing`, both are
      written into the metadata of the file (`repjax.onnx.metadata`).

  Returns:
    A model that `onnx.save` takes.

  Raises:
    InputError: the package onnx is not installed, the dtype is not supported, the model contains an
      operation that the translation lacks, or as in `repjax.deploy.compile`.

  Example:
    onnx.save(repjax.onnx.to_onnx(model, variables, image_size=224), "a0.onnx")
    onnx.save(repjax.onnx.to_onnx(fused, fused.fold(params), image_size=224), "fused.onnx")
  """
  dtype = written_dtype(dtype)
  function, tree, *_ = inference(
    model,
    variables,
    image_size=image_size,
    dtype=dtype,
    preprocessing=preprocessing,
    probabilities=probabilities,
  )
  made = of_function(function, tree, image_size, images_dtype(dtype, preprocessing), probabilities)
  if preprocessing is not None:
    metadata.describe(made, preprocessing, class_names)
  return made


def written_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
  """Checks that ONNX files are written in a dtype, and returns it as NumPy's.

  Raises:
    InputError: the dtype is not supported, or the package onnx is not installed.
  """
  need_onnx()
  dtype = checked_dtype(dtype)
  if dtype == jnp.bfloat16:
    raise InputError(
      "ONNX files are written in float32 or float16: few runtimes read bfloat16 weights. Write "
      "float32, and let the runtime compute in bfloat16, as OpenVINO and TensorRT can"
    )
  return dtype


def images_dtype(dtype: np.dtype, preprocessing: Preprocessing | None) -> np.dtype:
  """Returns the dtype of a graph's input."""
  return np.dtype(np.uint8) if preprocessing else dtype


def of_function(
  function: Callable[[Any, jax.Array], Any],
  tree: Any,
  image_size: int | tuple[int, int],
  dtype: np.dtype,
  probabilities: bool,
) -> Any:
  """Returns a function as an `onnx.ModelProto`.

  Args:
    function: takes the tree and images (N, H, W, 3), as `repjax.inference.inference` returns it.
    tree: parameters, which become constants.
    image_size: pixels, one number or (height, width).
    dtype: dtype of the images.
    probabilities: the name of a lone output is "probabilities" instead of "logits".
  """
  return with_tensors(function, tree, image_size, dtype, probabilities)[0]


def with_tensors(
  function: Callable[[Any, jax.Array], Any],
  tree: Any,
  image_size: int | tuple[int, int],
  dtype: np.dtype,
  probabilities: bool,
) -> tuple[Any, tuple[EquationTensors, ...]]:
  """Returns a function as an `onnx.ModelProto`, and the tensors of each of its equations.

  Args:
    function, tree, image_size, dtype, probabilities: as for `of_function`.

  Returns:
    The model, and one entry for each equation of the traced function. Tensors have the names that
    they have in the file.

  Raises:
    InputError: ONNX has no operator for an operation, or a result has the name of the input.
  """
  size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  graph, values, shapes, tensors = translated(function, tree, size, dtype)
  outputs = {}
  for (path, value), result in zip(values.items(), shapes):
    name = path or ("probabilities" if probabilities else "logits")
    if name == IMAGES:
      raise InputError(f"a result is called {name!r} like the input. Give it a different name")
    # Maps leave the graph with channels first, as images enter it.
    order = (0, 3, 1, 2) if len(value.axes) == 4 else range(len(value.axes))
    stored = tuple(value.axes[axis] for axis in order)
    shape = tuple(result.shape[axis] for axis in order)
    outputs[name] = graph.tensor(graph.arrange(value, stored)), shape, np.dtype(result.dtype)
  proto, names = model_proto(graph, ((3, *size), dtype), outputs)
  return proto, tuple(each.named(names) for each in tensors)
