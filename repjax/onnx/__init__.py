"""ONNX: a deploy form as other people's runtimes like it best, and a check that it is the same.

How it is made, and why so. Three ways were weighed:

- jax2onnx (0.17): covers JAX widely, and asks for Transposes around what is written for images
  (N, H, W, C), Max, ReduceSum and Div where runtimes look for Relu and GlobalAveragePool, dozens of
  Reshapes and Transposes in ParNet, and opset 23; all of that would have to be found and undone;
- an emitter for each layer of ours: short, but blind to what a user writes between the layers;
- a translation of the traced program, which this is.

A traced program is 30-odd primitives over logical arrays (N, H, W, C). `values` keeps apart what an
axis means and where its numbers lie: axes are products of atoms, and a tensor stores the atoms in
an order of its own. So reshapes and transpositions cost nothing, images are (N, C, H, W) throughout
with nobody turning them, and an order of channels or of flattened pixels that differs ends in the
rows of the next kernel. `graph` moves numbers where an operator needs another order: a Gather
within channels (ParNet's shuffles), a Transpose elsewhere (RepMLP's tiles). `operators` is the
table from primitives to operators, with `products` and `reductions` for the large ones; they find
biases, means, GELU and softmax again. `program` walks a trace, and `proto` names and writes.

The batch is a symbol while JAX traces, so that what a shape owes to it is known.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.errors import InputError
from repjax.inference import checked_dtype, inference
from repjax.onnx.proto import model_proto, need_onnx
from repjax.onnx.translation import IMAGES, Step, translated
from repjax.spec import Preprocessing

__all__ = ["to_onnx"]


def to_onnx(
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike = "float32",
  preprocessing: Preprocessing | None = None,
  probabilities: bool = False,
) -> Any:
  """A model's deploy form as an `onnx.ModelProto` of opset 17.

  Its input is `images` (batch, 3, H, W), its output `logits` (batch, K) or `probabilities`, or with
  `features_only` the maps (batch, C, h, w) by their stages' names; outputs are float32.

  Args:
    model: in either form; a training form is re-parameterized first.
    variables: of the model.
    image_size: pixels, one number or (height, width).
    dtype: "float32" or "float16": of parameters, computation and images.
    preprocessing: of the model's ModelSpec, to take uint8 images; their normalization is in the
      graph. None: images are normalized and of `dtype`.
    probabilities: return a softmax of the logits.

  Returns:
    What `onnx.save` takes.

  Raises:
    InputError: the package onnx is missing, another dtype, the model contains what ONNX or the
      translation has not, or as in `repjax.deploy.compile`.

  Example:
    onnx.save(repjax.onnx.to_onnx(model, variables, image_size=224), "a0.onnx")
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
  return of_function(function, tree, image_size, images_dtype(dtype, preprocessing), probabilities)


def written_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
  """A dtype that ONNX files are written in.

  Raises:
    InputError: another one, or the package onnx is missing.
  """
  need_onnx()
  dtype = checked_dtype(dtype)
  if dtype == jnp.bfloat16:
    raise InputError(
      "ONNX files are written in float32 or float16: few runtimes read bfloat16 weights. Write "
      "float32, and let the runtime compute in bfloat16 where it can (OpenVINO and TensorRT do)"
    )
  return dtype


def images_dtype(dtype: np.dtype, preprocessing: Preprocessing | None) -> np.dtype:
  """Of a graph's input."""
  return np.dtype(np.uint8) if preprocessing else dtype


def of_function(
  function: Callable[[Any, jax.Array], Any],
  tree: Any,
  image_size: int | tuple[int, int],
  dtype: np.dtype,
  probabilities: bool,
) -> Any:
  """What `repjax.inference.inference` returns as an `onnx.ModelProto`; `dtype` of images."""
  return with_steps(function, tree, image_size, dtype, probabilities)[0]


def with_steps(
  function: Callable[[Any, jax.Array], Any],
  tree: Any,
  image_size: int | tuple[int, int],
  dtype: np.dtype,
  probabilities: bool,
) -> tuple[Any, tuple[Step, ...]]:
  """The same, with what became of each equation of the traced function, in the file's names."""
  size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  graph, values, facts, steps = translated(function, tree, size, dtype)
  outputs = {}
  for (path, value), fact in zip(values.items(), facts):
    name = path or ("probabilities" if probabilities else "logits")
    if name == IMAGES:
      raise InputError(f"a result is called {name!r} like the input; give it another name")
    order = (0, 3, 1, 2) if len(value.axes) == 4 else range(len(value.axes))
    stored = tuple(value.axes[axis] for axis in order)
    shape = tuple(fact.shape[axis] for axis in order)
    outputs[name] = graph.tensor(graph.arrange(value, stored)), shape, np.dtype(fact.dtype)
  proto, names = model_proto(graph, ((3, *size), dtype), outputs)
  return proto, tuple(step.named(names) for step in steps)
