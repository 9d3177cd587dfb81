"""Exports every model as ONNX with random parameters, and compares the outputs with those of JAX.

Each file first passes the ONNX checker with shape inference. A relative error is against JAX on the
CPU in float32; the larger error of batch sizes 1 and 3 counts, and the limit is 1e-5. Networks that
accept any image size see small images, since the size does not change the translated operators.

Examples:
  python scripts/prove_onnx.py
  python scripts/prove_onnx.py --models repvgg_a0 parnet_s --image-size 224 --openvino
  python scripts/prove_onnx.py --openvino --json benchmarks/results/onnx.json
"""

import argparse
import collections
import functools
import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax.errors import InputError, one_paragraph
from repjax.extras import missing
from repjax.inference import inference
from repjax.models import image_size_of
from repjax.onnx import of_function
from repjax.onnx.check import TOLERANCES, checked
from repjax.onnx.proto import OPSET

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # two helpers of the benchmarks
timing, subjects = (importlib.import_module(name) for name in ("timing", "subjects"))

SMALL = 64  # pixels, enough for a stride of 32


def smallest(model: Any) -> int:
  """Returns the smallest usable side of images, in pixels."""
  tiled = hasattr(model, "tile") or hasattr(model, "tiles")
  return image_size_of(model) if tiled else min(SMALL, image_size_of(model))


def random_variables(model: Any, size: int) -> Any:
  """Returns variables of a deploy form, with random scales and biases as in a trained network."""
  rng = np.random.default_rng(0)

  def stir(path: Any, leaf: jax.Array) -> jax.Array:
    if path[-1].key == "kernel":
      return leaf
    return leaf + jnp.asarray(rng.uniform(-0.3, 0.3, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(stir, repjax.init(model, jax.random.key(0), size))


def openvino_error(content: bytes, wanted: np.ndarray, images: np.ndarray) -> float:
  """Returns the relative error of the logits in OpenVINO."""
  openvino = subjects.openvino_alone()
  core = openvino.Core()
  precision = {"INFERENCE_PRECISION_HINT": "f32"}
  network = core.compile_model(core.read_model(content), "CPU", precision)
  got = network(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))[0]
  return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def prove(name: str, image_size: int | None, openvino: bool) -> dict[str, Any]:
  """Exports and compares a model; prints a line, and returns the facts in the line."""
  start = time.perf_counter()
  model = repjax.create_model(name, deploy=True)
  size = image_size or smallest(model)
  function, tree, *_ = inference(
    model,
    random_variables(model, size),
    image_size=size,
    dtype="float32",
    preprocessing=None,
    probabilities=False,
  )
  proto = of_function(function, tree, size, np.dtype(np.float32), False)
  content = proto.SerializeToString()
  found = checked(content, function, tree, (size, size))
  if not found:
    raise missing("onnxruntime", "the comparison")
  errors, more = {"onnxruntime": found["relative_error"]}, ""
  if openvino:
    images = np.random.default_rng(2).standard_normal((2, size, size, 3), np.float32)
    wanted = np.asarray(jax.jit(functools.partial(function, tree))(images))
    errors["openvino"] = openvino_error(content, wanted, images)
    more = f" {errors['openvino']:9.1e}"
  kinds = collections.Counter(node.op_type for node in proto.graph.node)
  operators = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
  print(
    f"{name:<30}{size:>5} px{len(content) / 1e6:>8.1f} MB{found['relative_error']:>9.1e}{more}"
    f"{time.perf_counter() - start:>7.1f} s  {operators}",
    flush=True,
  )
  return {
    "image_size": size,
    "bytes": len(content),
    "relative_errors": errors,
    "operators": dict(kinds.most_common()),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=repjax.list_models(), help="default: all")
  parser.add_argument("--image-size", type=int, help="pixels (default: 64, or the model's)")
  parser.add_argument("--openvino", action="store_true", help="also compare with OpenVINO")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph():
    if arguments.openvino and not importlib.util.find_spec("openvino"):
      raise InputError("--openvino needs the package openvino: pip install -e .[bench]")
    found = {
      name: prove(name, arguments.image_size, arguments.openvino) for name in arguments.models
    }
    if arguments.json:
      timing.write_json(arguments.json, {"opset": OPSET}, models=found)
    errors = {name: max(facts["relative_errors"].values()) for name, facts in found.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{len(errors)} models, largest relative error {errors[worst]:.1e} ({worst})")
    if errors[worst] > TOLERANCES["float32"]:
      raise InputError(f"{worst} differs by more than {TOLERANCES['float32']:.0e}")


if __name__ == "__main__":
  main()
