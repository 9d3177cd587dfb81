"""Times the algorithms for each convolution of a model's deploy form, on one device.

Every shape of convolution, followed by bias and ReLU, is timed with all algorithms in turns.
`repjax.deploy.compile` chooses among the first five. The last two were never the fastest.

  direct            XLA's convolution
  matmul            the pixels under a kernel in a row, times the kernel
  shifts            a sum of shifted maps, each times its tap, for depthwise convolutions
  winograd2, 4      F(2x2, 3x3) and F(4x4, 3x3)
  space_to_depth    blocks of 2x2 pixels as channels, for the stem (XLA's convolution at stride 1)
  nine_products     the sum of one matrix product for each tap of the kernel

GFLOP/s count the multiplications of the definition, so that an algorithm with fewer multiplications
shows more. Errors are relative root mean squares against float64. The last line adds up all layers
of the model: computed by `direct`, and by the fastest algorithm that `compile` chooses among.

Example:
  python benchmarks/convolutions.py --model repvgg_a0 --batch-size 1
"""

import argparse
import collections
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from timing import Subject

import repjax
from repjax.deploy import rewrite
from repjax.deploy.convolutions import ALGORITHMS, Algorithm, Convolution
from repjax.deploy.xla import compile_lowered
from repjax.errors import InputError, one_paragraph
from repjax.spec import shapes_of


def _blocks(x: Any) -> Any:
  """Returns (..., H, W, C) as (..., H/2, W/2, 4 C), for even H and W."""
  *rest, height, width, channels = x.shape
  x = x.reshape(*rest, height // 2, 2, width // 2, 2, channels)
  return x.swapaxes(-4, -3).reshape(*rest, height // 2, width // 2, 4 * channels)


def _prepare_blocks(kernel: np.ndarray, wanted: Convolution) -> np.ndarray:
  """Returns the 2x2 kernel over blocks that equals a 3x3 kernel (3, 3, I, O) at stride 2."""
  del wanted
  kernel = np.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # (4, 4, I, O), which 2x2 divides
  return np.moveaxis(_blocks(np.moveaxis(kernel, 3, 0)), 0, 3)


def _by_blocks(x: jax.Array, kernel: jax.Array, wanted: Convolution) -> jax.Array:
  """Computes the stem's convolution over 2x2 blocks, at stride 1."""
  x = _blocks(jnp.pad(x, ((0, 0), *wanted.padding, (0, 0))))
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


def _nine_products(x: jax.Array, kernel: jax.Array, wanted: Convolution) -> jax.Array:
  """Computes a convolution as the sum of one matrix product for each tap of the kernel."""
  height, width = wanted.kernel[:2]
  x = jnp.pad(x, ((0, 0), *wanted.padding, (0, 0)))
  (down, across), rows, columns = wanted.strides, x.shape[1] - height, x.shape[2] - width
  terms = [
    x[:, i : i + rows + 1 : down, j : j + columns + 1 : across] @ kernel[i, j]
    for i in range(height)
    for j in range(width)
  ]
  return sum(terms[1:], terms[0])


def _is_stem(wanted: Convolution) -> bool:
  """Returns whether a convolution is a 3x3 at stride 2 over images with even sides."""
  plain = wanted.groups == 1 and wanted.dilation == (1, 1) and wanted.strides == (2, 2)
  small = wanted.kernel[:3] == (3, 3, 3) and wanted.padding == ((1, 1), (1, 1))
  return plain and small and not any(side % 2 for side in wanted.images[1:3])


REJECTED = {
  "space_to_depth": Algorithm(_is_stem, _prepare_blocks, _by_blocks),
  "nine_products": Algorithm(
    lambda wanted: wanted.groups == 1 and wanted.dilation == (1, 1) and wanted.kernel[0] > 1,
    lambda kernel, wanted: kernel,
    _nine_products,
  ),
}


def subject(algorithm: Algorithm, wanted: Convolution, kernel: np.ndarray) -> Subject:
  """Returns the subject that computes a convolution, bias and ReLU by an algorithm."""
  device = jax.devices()[0]
  held = jnp.asarray(algorithm.prepare(kernel, wanted), wanted.dtype)
  bias = jnp.zeros((1, 1, 1, wanted.kernel[-1]), wanted.dtype)

  def layer(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(algorithm.compute(x, kernel, wanted) + bias)

  def start(x: jax.Array) -> timing.Running:
    run = compile_lowered(jax.jit(layer).lower(x, held, bias), device)
    return timing.Running(lambda x: run(x, held, bias))

  return Subject(start)


def exact(x: np.ndarray, kernel: np.ndarray, wanted: Convolution) -> np.ndarray:
  """Returns the output of the convolution and ReLU in float64."""
  with jax.enable_x64(True):
    y = ALGORITHMS["direct"].compute(
      jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64), wanted
    )
    return np.asarray(jax.nn.relu(y))


def measure(wanted: Convolution, rounds: int) -> dict[str, dict[str, float]]:
  """Returns the milliseconds and the error of each algorithm that suits the convolution."""
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal(wanted.kernel) / math.sqrt(math.prod(wanted.kernel[:3]))
  x = rng.standard_normal(wanted.images, np.float32)
  suitable = {name: one for name, one in {**ALGORITHMS, **REJECTED}.items() if one.suits(wanted)}
  errors = {}

  def check(outputs: dict[str, np.ndarray]) -> None:
    expected = exact(x, kernel, wanted)
    for name, y in outputs.items():
      errors[name] = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

  subjects = {name: subject(one, wanted, kernel) for name, one in suitable.items()}
  results = timing.race(subjects, [x], rounds=rounds, clock=timing.cpu_time, check=check)
  return {
    name: {"ms": 1e3 * result.median, "error": errors[name]} for name, result in results.items()
  }


def flops(wanted: Convolution) -> int:
  """Returns the FLOP of the definition: two for each multiply-accumulate."""
  sides = [
    (size + sum(pads) - dilation * (taps - 1) - 1) // stride + 1
    for size, pads, dilation, taps, stride in zip(
      wanted.images[1:3], wanted.padding, wanted.dilation, wanted.kernel, wanted.strides
    )
  ]
  return 2 * wanted.images[0] * math.prod(sides) * math.prod(wanted.kernel)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="repvgg_a0", help="default: repvgg_a0")
  parser.add_argument("--batch-size", type=int, default=1, help="images in a call (default: 1)")
  parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
  parser.add_argument("--rounds", type=int, default=8, help="rounds of timed calls (default: 8)")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with one_paragraph():
    if min(arguments.batch_size, arguments.image_size, arguments.rounds) < 1:
      raise InputError("--batch-size, --image-size and --rounds are 1 or more")
    model: Any = repjax.create_model(arguments.model, deploy=True)
    size = arguments.image_size
    images = jax.ShapeDtypeStruct((arguments.batch_size, size, size, 3), jnp.float32)
    found = rewrite.convolutions_in(model.apply, shapes_of(model, size), images)
    counts = collections.Counter(found.values())
    rows, totals = [], {"direct": 0.0, "fastest": 0.0}
    for wanted, count in counts.items():
      times = measure(wanted, arguments.rounds)
      print(f"{count} x {describe(wanted)}", flush=True)
      for name, row in times.items():
        rate = flops(wanted) / row["ms"] / 1e6
        mark = "" if name in ALGORITHMS else "   (not chosen among)"
        error = f"error {row['error']:.1e}"
        print(f"    {name:<16}{row['ms']:>9.2f} ms{rate:>7.0f} GFLOP/s   {error}{mark}", flush=True)
      rows.append({"count": count, **wanted._asdict(), "algorithms": times})
      totals["direct"] += count * times["direct"]["ms"]
      totals["fastest"] += count * min(times[name]["ms"] for name in times if name in ALGORITHMS)
    ratio = totals["direct"] / totals["fastest"]
    print(
      f"all layers: direct {totals['direct']:.1f} ms, fastest {totals['fastest']:.1f} ms, "
      f"ratio {ratio:.2f}"
    )
    if arguments.json:
      facts = {name: getattr(arguments, name) for name in ("model", "batch_size", "image_size")}
      timing.write_json(arguments.json, facts, convolutions=rows, totals=totals)


def describe(wanted: Convolution) -> str:
  """Returns a convolution in a few words."""
  (height, width, _, features), (_, rows, columns, channels) = wanted.kernel, wanted.images
  groups = f", {wanted.groups} groups" if wanted.groups > 1 else ""
  return (
    f"{height}x{width}, {channels} -> {features} channels, {rows} x {columns} pixels, "
    f"stride {wanted.strides[0]}{groups}"
  )


if __name__ == "__main__":
  main()
