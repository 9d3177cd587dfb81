"""Compiles programs by XLA with the options that suit inference."""

from collections.abc import Mapping
from typing import Any

from repjax.xla import known

CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
"""Options for CPUs: YNNPACK computes all convolutions, where by default it takes only small ones.

YNNPACK is not asked to compute matrix products. It would pack their constant side anew in every
call, which costs most in the many small products of Winograd's convolution.

YNNPACK is not asked to compute reductions either, which it takes by default since jax 0.12. It then
merges a reduction, such as a max-pool, with all convolutions before it, and in bfloat16 two or more
of them give NaN.
"""


def compile_lowered(lowered: Any, device: Any, options: Mapping[str, Any] | None = None) -> Any:
  """Compiles a lowered program with the options that suit a device in inference.

  Args:
    lowered: the program.
    device: a device that the program is for.
    options: further options.
  """
  suiting = known(CPU_OPTIONS) if device.platform == "cpu" else {}
  return lowered.compile(compiler_options={**(options or {}), **suiting} or None)


def planned_bytes(executable: Any) -> int | None:
  """Returns the bytes that a compiled program needs: arguments, results and intermediate values.

  None if XLA does not say. Memory that a result shares with an argument counts once.
  """
  plan = executable.memory_analysis()
  if plan is None:
    return None
  total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  return total - plan.alias_size_in_bytes
