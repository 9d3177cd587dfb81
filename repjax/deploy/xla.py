"""Compiles programs by XLA with the options that suit inference."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
"""Options for CPUs: YNNPACK computes all convolutions, where by default it takes only small ones.

YNNPACK is not asked to compute matrix products. It would pack their constant side anew in every
call, which costs most in the many small products of Winograd's convolution.

YNNPACK is not asked to compute reductions either, which it takes by default since jax 0.12. It then
merges a reduction, such as a max-pool, with all convolutions before it, and in bfloat16 two or more
of them give NaN.
"""


_NO_REDUCTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compile_lowered(lowered: Any, device: Any, options: Mapping[str, Any] | None = None) -> Any:
  """Compiles a lowered program with the options that suit a device in inference.

  Args:
    lowered: the program.
    device: a device that the program is for.
    options: further options.
  """
  suiting = known(CPU_OPTIONS) if device.platform == "cpu" else {}
  return lowered.compile(compiler_options={**(options or {}), **suiting} or None)


def safe_options(device: Any, dtype: jax.typing.DTypeLike) -> dict[str, str]:
  """Returns the options without which XLA computes wrong numbers, for `compiler_options` of JAX.

  `compile_lowered` needs none of them: CPU_OPTIONS avoids the same fault. Every other program that
  may compute convolutions in bfloat16 is compiled with these options.

  Args:
    device: a device that the program is for.
    dtype: dtype of the computation.
  """
  fails = device.platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
  # Versions before do not merge reductions, and are faster without the option.
  return known(_NO_REDUCTIONS) if fails and jax.__version_info__ >= (0, 11) else {}


def known(options: Mapping[str, str]) -> dict[str, str]:
  """Returns options for CPUs, or none of them if this version of XLA does not know one."""
  return dict(options) if _knows(tuple(options.items())) else {}


@functools.cache
def _knows(options: tuple[tuple[str, str], ...]) -> bool:
  """Tries options in a program of one number, for the CPU."""
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(_cpu()))
  try:
    jax.jit(lambda x: x).lower(number).compile(compiler_options=dict(options))
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    # Only an error about an option is forgiven; any other error of the compiler stays an error.
    if not any(name in str(error) for name, _ in options):
      raise
    return False
  return True


def _cpu() -> Any:
  return jax.local_devices(backend="cpu")[0]


def planned_bytes(executable: Any) -> int | None:
  """Returns the bytes that a compiled program needs: arguments, results and intermediate values.

  None if XLA does not say. Memory that a result shares with an argument counts once.
  """
  plan = executable.memory_analysis()
  if plan is None:
    return None
  total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  return total - plan.alias_size_in_bytes
