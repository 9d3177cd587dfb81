"""Options of XLA that keep numbers right, and the options that an installed XLA knows.

XLA hands the reductions of a program for CPUs to YNNPACK, and merges a reduction, such as a
max-pool, with all convolutions before it. In jax 0.12 two or more of them give NaN in bfloat16. In
jax 0.10 two convolutions of one activation, one of them 1x3 or the like, can be wrong in float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

_NO_REDUCTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def safe_options(device: Any, dtype: jax.typing.DTypeLike) -> dict[str, str]:
  """Returns the options without which XLA computes wrong numbers, for `compiler_options` of JAX.

  `repjax.deploy.xla.compile_lowered` has options of its own, which avoid the same fault. Every
  other program of repjax that may compute convolutions in bfloat16 is compiled with these options.

  Args:
    device: a device that the program is for.
    dtype: dtype of the computation.
  """
  fails = device.platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
  # Versions before are right in bfloat16, and faster without the option. In float32 they are wrong
  # where convolutions are summed at once; in RepConv a norm lies between, and its sums are right.
  return known(_NO_REDUCTIONS) if fails and jax.__version_info__ >= (0, 11) else {}


def known(options: Mapping[str, str]) -> dict[str, str]:
  """Returns options for CPUs, or none of them if this version of XLA does not know one."""
  return dict(options) if _knows(tuple(options.items())) else {}


@functools.cache
def _knows(options: tuple[tuple[str, str], ...]) -> bool:
  """Tries options in a program of one number, for the CPU."""
  cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=cpu)
  try:
    jax.jit(lambda x: x).lower(number).compile(compiler_options=dict(options))
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    # Only an error about an option is forgiven; any other error of the compiler stays an error.
    if not any(name in str(error) for name, _ in options):
      raise
    return False
  return True
