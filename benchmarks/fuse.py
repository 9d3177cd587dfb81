"""Times a ResNet-50 of Flax's own example, plain and fused by `repjax.fuse`, in turns.

The network is no model of repjax: bottlenecks of `nn.Conv` and `nn.BatchNorm`, as in
flax/examples/imagenet. Every subject has one turn in each round, so that all meet the same noise.

  jit                jax.jit of the network as it is
  jit-fused          jax.jit of what repjax.fuse returns
  compile-unfused    repjax.deploy.compile with fuse=False: convolutions by the fastest algorithms
  compile            repjax.deploy.compile as it is by default
  onnx               the network as it is, by repjax.onnx.to_onnx, in ONNX Runtime
  onnx-fused         the fused network, by repjax.onnx.to_onnx, in ONNX Runtime

`jit` computes by XLA's default options, and `compile` by those for inference. The ratio is the time
of `jit`, or of `onnx`, divided by the subject's time: the median over the rounds. On a machine that
other programs use, measure CPU time on one core.

Example:
  taskset -c 0 python benchmarks/fuse.py --cpu-time --batch-sizes 1 8
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import linen as nn
from timing import Running, Subject

import repjax
from repjax.deploy import runtimes
from repjax.errors import one_paragraph

TOLERANCE = 1e-4


class Bottleneck(nn.Module):
  """A bottleneck block with a projection where shapes change."""

  features: int
  strides: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / strides, W / strides, 4 features)."""
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-5)
    y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
    y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(y)))
    y = norm()(conv(4 * self.features, (1, 1))(y))
    if x.shape != y.shape:
      x = norm(name="norm_proj")(conv(4 * self.features, (1, 1), self.strides, name="conv_proj")(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet of bottlenecks, 50 layers deep by default."""

  stages: tuple[int, ...] = (3, 4, 6, 3)
  width: int = 64

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    """Maps images (N, H, W, 3) to logits (N, 1000)."""
    x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False, name="conv_init")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_init")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for stage, count in enumerate(self.stages):
      for block in range(count):
        strides = 2 if stage > 0 and block == 0 else 1
        x = Bottleneck(self.width * 2**stage, strides)(x, train)
    return nn.Dense(1000)(x.mean((1, 2)))


def random_variables(model: nn.Module, size: int) -> Any:
  """Returns variables of a model whose norms do something."""
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  rng = np.random.default_rng(0)

  def drawn(leaf: Any) -> Any:
    if len(leaf.shape) > 1:
      fan_in = leaf.size / leaf.shape[-1]
      return rng.standard_normal(leaf.shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
    return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

  return jax.tree.map(drawn, shapes)


def compiled(model: Any, variables: Any, size: int, fuse: bool) -> Subject:
  """Returns the subject that `repjax.deploy.compile` makes. A call copies logits to the host."""

  def start(images: Any) -> Running:
    made = repjax.deploy.compile(
      model, variables, image_size=size, batch_sizes=(len(images),), fuse=fuse
    )
    return Running(made, lambda: made.plans[len(images)].memory)

  return Subject(start)


def in_onnxruntime(model: Any, variables: Any, size: int) -> Subject:
  """Returns a network in ONNX Runtime on the CPU."""
  content = repjax.onnx.to_onnx(model, variables, image_size=size).SerializeToString()

  def start(images: Any) -> Running:
    del images
    run = runtimes.in_onnxruntime(content)
    return Running(lambda images: run(images)[0])

  return Subject(
    start, lambda images: np.ascontiguousarray(images.transpose(0, 3, 1, 2)), lambda output: output
  )


def measure(
  model: nn.Module, batch_size: int, size: int, rounds: int, cpu_time: bool
) -> dict[str, Any]:
  """Returns the row of results for one batch size."""
  variables = random_variables(model, size)
  function = functools.partial(model.apply, train=False)
  began = time.perf_counter()
  fused = repjax.fuse(function, variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  planned = time.perf_counter() - began
  fused, small = fused.without_checks(), fused.fold(variables)
  subjects = {
    "jit": timing.program(function, variables),
    "jit-fused": timing.program(fused, small),
    "compile-unfused": compiled(model, variables, size, fuse=False),
    "compile": compiled(model, variables, size, fuse=True),
    "onnx": in_onnxruntime(model, variables, size),
    "onnx-fused": in_onnxruntime(fused, small, size),
  }

  def agree(outputs: dict[str, np.ndarray]) -> None:
    timing.relative_errors(outputs, outputs["jit"], TOLERANCE)

  results = timing.race(
    subjects,
    timing.random_images(batch_size, size),
    rounds=rounds,
    clock=timing.cpu_time if cpu_time else time.perf_counter,
    check=agree,
  )
  rows = {}
  for name, result in results.items():
    base = results["onnx" if name.startswith("onnx") else "jit"].all_seconds
    rows[name] = {
      "ms": 1e3 * result.median,
      **timing.spread_of_ratios(base, result.all_seconds),
      "compile_s": result.compile_s[0],
      "memory": result.memory,
    }
    print(
      f"{batch_size:>5}  {name:<16}{rows[name]['ms']:>10.1f} ms   ratio {rows[name]['ratio']:.2f} "
      f"({rows[name]['quartiles'][0]:.2f} to {rows[name]['quartiles'][1]:.2f})",
      flush=True,
    )
  return {"batch_size": batch_size, "plan_and_check_s": planned, "subjects": rows}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--stages", type=int, nargs="+", default=[3, 4, 6, 3])
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=11)
  parser.add_argument("--cpu-time", action="store_true", help="measure CPU time of this process")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph():
    model = ResNet(tuple(arguments.stages), arguments.width)
    rows = [
      measure(model, size, arguments.image_size, arguments.rounds, arguments.cpu_time)
      for size in arguments.batch_sizes
    ]
    if arguments.json:
      facts = {name: getattr(arguments, name) for name in ("image_size", "stages", "cpu_time")}
      timing.write_json(arguments.json, facts, rows=rows)


if __name__ == "__main__":
  main()
