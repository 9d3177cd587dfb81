"""Times networks plain, fused by `repjax.fuse` and in their deploy form, in turns.

Two networks are no models of repjax: `flax_resnet50`, bottlenecks of `nn.Conv` and `nn.BatchNorm`
as in flax/examples/imagenet, and `efficientnet_b0`. Every subject has one turn in each round, so
that all meet the same noise.

  jit                jax.jit of the network as it is trained, in inference mode
  jit-fused          jax.jit of what repjax.fuse returns, with folded parameters
  deploy             jax.jit of the deploy form of a model of repjax
  compile-unfused    repjax.deploy.compile with fuse=False: convolutions by the fastest algorithms
  compile            repjax.deploy.compile as it is by default
  onnx               the network as it is, by repjax.onnx.to_onnx, in ONNX Runtime
  onnx-fused         the fused network, by repjax.onnx.to_onnx, in ONNX Runtime

`jit` computes by XLA's default options, and `compile` by those for inference. The ratio is the time
of `jit`, or of `onnx`, divided by the subject's time: the median over the rounds, with quartiles.
On a machine that other programs use, measure CPU time on one core.

With `--plans`, each network is also planned in a process of its own, whose peak memory is read
before and after. The parameters are shapes there, and nothing is computed.

Examples:
  taskset -c 0 python benchmarks/fuse.py --cpu-time --batch-sizes 1 8
  python benchmarks/fuse.py --plans --models repvgg_a0 parnet_s --subjects jit jit-fused deploy
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
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
from repjax.errors import one_paragraph, unknown

TOLERANCE = 1e-4
B0 = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
B0 = (*B0, (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
"""Expansion, channels, blocks, stride and kernel of each stage."""


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


class EfficientNet(nn.Module):
  """EfficientNet-B0: inverted residuals with gates."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    """Maps images (N, H, W, 3) to logits (N, 1000)."""
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-3)
    conv = functools.partial(nn.Conv, use_bias=False)
    x = nn.silu(norm()(conv(32, (3, 3), (2, 2))(x)))
    for expansion, features, blocks, stride, size in B0:
      for block in range(blocks):
        steps, wide = (1 if block else stride), expansion * x.shape[-1]
        y = x if expansion == 1 else nn.silu(norm()(conv(wide, (1, 1))(x)))
        y = conv(wide, (size, size), (steps, steps), feature_group_count=wide)(y)
        y = nn.silu(norm()(y))
        gate = nn.silu(nn.Conv(x.shape[-1] // 4, (1, 1))(y.mean((1, 2), keepdims=True)))
        y = norm()(conv(features, (1, 1))(y * nn.sigmoid(nn.Conv(wide, (1, 1))(gate))))
        x = x + y if x.shape == y.shape else y
    x = nn.silu(norm()(conv(1280, (1, 1))(x)))
    return nn.Dense(1000)(x.mean((1, 2)))


OTHERS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
  "flax_resnet50": lambda flags: ResNet(tuple(flags.stages), flags.width),
  "efficientnet_b0": lambda flags: EfficientNet(),
}
"""Networks that are no models of repjax."""

SUBJECTS = ("jit", "jit-fused", "deploy", "compile-unfused", "compile", "onnx", "onnx-fused")


def function_of(
  name: str, flags: argparse.Namespace
) -> tuple[nn.Module, Callable[[Any, Any], Any]]:
  """Returns a network by name, and its function of variables and images."""
  model = OTHERS[name](flags) if name in OTHERS else repjax.create_model(name)
  return model, functools.partial(model.apply, train=False)


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


def planned(name: str, flags: argparse.Namespace) -> dict[str, Any]:
  """Plans a network, and returns the seconds, the memory and the counts of products."""
  model, function = function_of(name, flags)
  images = jax.ShapeDtypeStruct((1, flags.image_size, flags.image_size, 3), jnp.float32)
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  jax.make_jaxpr(function)(variables, images)  # what tracing alone takes is not counted
  held, began = _peak_bytes(), time.perf_counter()
  fused = repjax.fuse(function, variables, images, check=False)
  seconds = time.perf_counter() - began
  before, after = fused.report.before.products, fused.report.after.products
  return {
    "plan_s": seconds,
    "peak_bytes": [held, _peak_bytes()],
    "products": [before, after],
    "norms_left": len(fused.report.norms),
  }


def planned_elsewhere(name: str) -> dict[str, Any]:
  """Returns what `planned` returns in a process of its own with the same flags, and prints it."""
  command = [sys.executable, __file__, *sys.argv[1:], "--plan", name]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  plan = json.loads(done.stdout.splitlines()[-1])
  (before, after), (held, peak) = plan["products"], plan["peak_bytes"]
  print(
    f"{name:<16}{before:>4} -> {after:<4} planned in {plan['plan_s']:.1f} s, peak memory "
    f"{held / 1e6:.0f} MB before and {peak / 1e6:.0f} MB after"
  )
  return plan


def _peak_bytes() -> int:
  # Linux hands the peak that `resource` knows down to child processes, and this one not.
  status = Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def subjects_of(name: str, flags: argparse.Namespace) -> tuple[dict[str, Subject], float]:
  """Returns the subjects of a network that the flags name, and the seconds to plan and check."""
  model, function = function_of(name, flags)
  size = flags.image_size
  variables = random_variables(model, size)
  began = time.perf_counter()
  fused = repjax.fuse(function, variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
  seconds = time.perf_counter() - began
  fused, small = fused.without_checks(), fused.fold(variables)

  def deploy_form() -> Subject:
    params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
    return timing.program(repjax.create_model(name, deploy=True).apply, {"params": params})

  makers: dict[str, Callable[[], Subject]] = {
    "jit": lambda: timing.program(function, variables),
    "jit-fused": lambda: timing.program(fused, small),
    "deploy": deploy_form,
    "compile-unfused": lambda: compiled(model, variables, size, fuse=False),
    "compile": lambda: compiled(model, variables, size, fuse=True),
    "onnx": lambda: in_onnxruntime(model, variables, size),
    "onnx-fused": lambda: in_onnxruntime(fused, small, size),
  }
  chosen = [each for each in flags.subjects if each != "deploy" or name not in OTHERS]
  return {each: makers[each]() for each in chosen}, seconds


def measure(name: str, batch_size: int, flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the row of results for one network and batch size."""
  subjects, seconds = subjects_of(name, flags)

  def agree(outputs: dict[str, np.ndarray]) -> None:
    timing.relative_errors(outputs, outputs["jit"], TOLERANCE)

  results = timing.race(
    subjects,
    timing.random_images(batch_size, flags.image_size),
    rounds=flags.rounds,
    clock=timing.cpu_time if flags.cpu_time else time.perf_counter,
    check=agree,
  )
  rows = {}
  for each, result in results.items():
    base = results["onnx" if each.startswith("onnx") and "onnx" in results else "jit"].all_seconds
    spread = timing.spread_of_ratios(base, result.all_seconds)
    rows[each] = {
      "ms": 1e3 * result.median,
      **spread,
      "compile_s": result.compile_s[0],
      "memory": result.memory,
    }
    low, high = spread["quartiles"]
    print(
      f"{name:<16}{batch_size:>5}  {each:<16}{rows[each]['ms']:>10.1f} ms   "
      f"ratio {spread['ratio']:.2f} ({low:.2f} to {high:.2f})",
      flush=True,
    )
  return {"model": name, "batch_size": batch_size, "plan_and_check_s": seconds, "subjects": rows}


def parse() -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=["flax_resnet50"])
  parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="default: all")
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--stages", type=int, nargs="+", default=[3, 4, 6, 3], help="flax_resnet50's")
  parser.add_argument("--width", type=int, default=64, help="channels of flax_resnet50's stem")
  parser.add_argument("--rounds", type=int, default=11)
  parser.add_argument("--cpu-time", action="store_true", help="measure CPU time of this process")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument("--plans", action="store_true", help="time and memory of planning, too")
  parser.add_argument("--plan", metavar="MODEL", help="only plan one model, and print JSON")
  return parser.parse_args()


def main() -> None:
  flags = parse()
  with one_paragraph():
    for name in flags.subjects:
      if name not in SUBJECTS:
        raise unknown("subject", name, SUBJECTS)
    if flags.plan:
      print(json.dumps(planned(flags.plan, flags)))
      return
    plans, rows = {}, []
    flags.subjects = list(dict.fromkeys(["jit", *flags.subjects]))  # all are compared with it
    for name in flags.models:
      if flags.plans:
        plans[name] = planned_elsewhere(name)
      rows += [measure(name, batch_size, flags) for batch_size in flags.batch_sizes]
    if flags.json:
      facts = {name: getattr(flags, name) for name in ("image_size", "stages", "cpu_time")}
      timing.write_json(flags.json, facts, plans=plans, rows=rows)


if __name__ == "__main__":
  main()
