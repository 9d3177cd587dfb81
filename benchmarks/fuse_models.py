"""Times models plain, fused by `repjax.fuse` and in their deploy form, in turns; costs of planning.

  plain     the network as it is trained, in inference mode
  fused     what repjax.fuse returns, with folded parameters
  deploy    the deploy form of a model of repjax, with the parameters of repjax.reparameterize

All run under `jax.jit`. The ratio is the time of `plain` divided by the subject's time: the median
over the rounds, with quartiles. Two networks are no models of repjax: the ResNet-50 of `fuse.py`,
and an EfficientNet-B0. Planning runs in a process of its own, whose peak memory is read before
and after. The parameters are shapes there, and nothing is computed.

Example:
  taskset -c 0 python benchmarks/fuse_models.py --cpu-time --batch-sizes 1 8
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

import fuse
import jax
import jax.numpy as jnp
import timing
from flax import linen as nn

import repjax
from repjax.errors import one_paragraph

TOLERANCE = 1e-4
B0 = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
B0 = (*B0, (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
"""Expansion, channels, blocks, stride and kernel of each stage."""


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


OTHERS: dict[str, Callable[[], nn.Module]] = {
  "flax_resnet50": fuse.ResNet,
  "efficientnet_b0": EfficientNet,
}
MODELS = ("repvgg_a0", "parnet_s", *OTHERS)


def function_of(name: str) -> tuple[nn.Module, Callable[[Any, Any], Any]]:
  """Returns a network by name, and its function of variables and images."""
  if name in OTHERS:
    model = OTHERS[name]()
    return model, functools.partial(model.apply, train=False)
  model = repjax.create_model(name)
  return model, model.apply


def planned(name: str, size: int) -> dict[str, Any]:
  """Plans a network, and returns the seconds, the memory and the counts of products."""
  model, function = function_of(name)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
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


def planned_elsewhere(name: str, size: int) -> dict[str, Any]:
  """Returns what `planned` returns in a process of its own."""
  command = [sys.executable, __file__, "--plan", name, "--image-size", str(size)]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def _peak_bytes() -> int:
  # Linux hands the peak that `resource` knows down to child processes, and this one not.
  status = Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


def measure(name: str, batch_size: int, size: int, rounds: int, cpu_time: bool) -> dict[str, Any]:
  """Returns the row of results for one network and batch size."""
  model, function = function_of(name)
  variables = fuse.random_variables(model, size)
  shape = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
  fused = repjax.fuse(function, variables, shape, check=False)
  subjects = {
    "plain": timing.program(function, variables),
    "fused": timing.program(fused, fused.fold(variables)),
  }
  if name not in OTHERS:
    params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
    deploy = repjax.create_model(name, deploy=True)
    subjects["deploy"] = timing.program(deploy.apply, {"params": params})
  results = timing.race(
    subjects,
    timing.random_images(batch_size, size),
    rounds=rounds,
    clock=timing.cpu_time if cpu_time else time.perf_counter,
    check=lambda outputs: timing.relative_errors(outputs, outputs["plain"], TOLERANCE),
  )
  rows = {}
  for subject, result in results.items():
    spread = timing.spread_of_ratios(results["plain"].all_seconds, result.all_seconds)
    rows[subject] = {"ms": 1e3 * result.median, **spread, "memory": result.memory}
    low, high = spread["quartiles"]
    print(
      f"{name:<16}{batch_size:>3}  {subject:<8}{rows[subject]['ms']:>9.1f} ms   "
      f"ratio {spread['ratio']:.2f} ({low:.2f} to {high:.2f})",
      flush=True,
    )
  return {"model": name, "batch_size": batch_size, "subjects": rows}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=list(MODELS))
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--rounds", type=int, default=11)
  parser.add_argument("--cpu-time", action="store_true", help="measure CPU time of this process")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument("--plan", metavar="MODEL", help="only plan one model, and print JSON")
  arguments = parser.parse_args()
  size = arguments.image_size
  with one_paragraph():
    if arguments.plan:
      print(json.dumps(planned(arguments.plan, size)))
      return
    plans, rows = {}, []
    for name in arguments.models:
      plans[name] = planned_elsewhere(name, size)
      before, after = plans[name]["products"]
      seconds, (held, peak) = plans[name]["plan_s"], plans[name]["peak_bytes"]
      print(
        f"{name:<16}{before:>4} -> {after:<4} planned in {seconds:.1f} s, peak memory "
        f"{held / 1e6:.0f} MB before and {peak / 1e6:.0f} MB after"
      )
      rows += [
        measure(name, batch_size, size, arguments.rounds, arguments.cpu_time)
        for batch_size in arguments.batch_sizes
      ]
    if arguments.json:
      facts = {"image_size": size, "cpu_time": arguments.cpu_time, "plans": plans}
      timing.write_json(arguments.json, facts, rows=rows)


if __name__ == "__main__":
  main()
