"""Measures products of one source side by side, against one product and slices of its result.

`repjax.fuse` keeps such products apart, and this script shows why. For matrix products and 1x1
convolutions of several sizes, it prints processor time of both forms, and their ratio: below 1, one
product is faster. Both forms end with an activation of each result, as networks do.

  python scripts/measure_side_by_side.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Case(NamedTuple):
  """Products to be measured.

  Attributes:
    name: what they stand for.
    source: shape of the source, channels last.
    outputs: channels of each product.
    convolution: 1x1 convolutions in place of matrix products.
  """

  name: str
  source: tuple[int, ...]
  outputs: tuple[int, ...]
  convolution: bool = False


CASES = [
  Case("ViT-Ti, one image", (1, 197, 192), (192,) * 3),
  Case("ViT-S, one image", (1, 197, 384), (384,) * 3),
  Case("ViT-B, one image", (1, 197, 768), (768,) * 3),
  Case("ViT-Ti, 8 images", (8, 197, 192), (192,) * 3),
  Case("decoder, one token", (1, 1, 768), (768,) * 3),
  Case("decoder, one token, gated", (1, 1, 768), (3072,) * 2),
  Case("GoogLeNet 3a", (1, 28, 28, 192), (64, 96, 16), True),
  Case("GoogLeNet 4a", (1, 14, 14, 480), (192, 96, 16), True),
  Case("GoogLeNet 5a", (1, 7, 7, 832), (256, 160, 32), True),
  Case("Inception C", (1, 17, 17, 768), (192, 128, 128), True),
  Case("narrow, large map", (1, 56, 56, 64), (16, 16), True),
  Case("shortcut and reduction", (1, 56, 56, 64), (256, 64), True),
]


def forms(case: Case) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns both forms, as functions of the source, kernels and biases."""

  def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if not case.convolution:
      return x @ kernel
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", dimension_numbers=spec)

  def apart(x: jax.Array, kernels: Sequence[jax.Array], biases: Sequence[jax.Array]):
    return [jax.nn.relu(product(x, one) + two) for one, two in zip(kernels, biases)]

  def together(x: jax.Array, kernel: jax.Array, bias: jax.Array):
    y = product(x, kernel) + bias
    ends = np.cumsum(case.outputs)
    return [jax.nn.relu(y[..., end - size : end]) for end, size in zip(ends, case.outputs)]

  return jax.jit(apart), jax.jit(together)


def seconds(function: Callable[..., Any], args: Sequence[Any], least: float) -> float:
  """Returns processor time of a call, from calls that take at least some time together."""
  count, start = 0, time.process_time()
  while time.process_time() - start < least or count < 3:
    jax.block_until_ready(function(*args))
    count += 1
  return (time.process_time() - start) / count


def main() -> None:
  """Prints a line for each case."""
  parser = argparse.ArgumentParser(description="Measures products side by side.")
  parser.add_argument("--rounds", type=int, default=9, help="rounds for each case, in turn")
  flags = parser.parse_args()
  rng = np.random.default_rng(0)
  for case in CASES:
    inputs = case.source[-1]
    x = jnp.asarray(rng.normal(size=case.source), jnp.float32)
    kernels = [jnp.asarray(rng.normal(size=(inputs, each)), jnp.float32) for each in case.outputs]
    biases = [jnp.zeros(each) for each in case.outputs]
    apart, together = forms(case)
    one, many = (x, jnp.concatenate(kernels, 1), jnp.concatenate(biases)), (x, kernels, biases)
    jax.block_until_ready((apart(*many), together(*one)))
    pairs = [
      (seconds(apart, many, 0.05), seconds(together, one, 0.05)) for _ in range(flags.rounds)
    ]
    first, second = (statistics.median(each) * 1e6 for each in zip(*pairs))
    ratio = statistics.median(two / one for one, two in pairs)
    print(f"{case.name:<28}{first:>10.0f} us {second:>10.0f} us   ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
  main()
