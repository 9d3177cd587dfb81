"""How XLA is asked to compile for inference."""

from typing import Any

import jax

CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
"""YNNPACK for convolutions, where by default it takes small ones only; and not for matrix products,
since it packs their constant side anew in every call, which Winograd's many small ones feel most.
"""


def compiled(lowered: Any, device: Any) -> Any:
  """What `lowered.compile()` gives, with the options that are good for a device.

  An XLA that does not know an option any more compiles without.
  """
  if device.platform != "cpu":
    return lowered.compile()
  try:
    return lowered.compile(compiler_options=CPU_OPTIONS)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    if not any(name in str(error) for name in CPU_OPTIONS):
      raise
    return lowered.compile()


def planned_bytes(executable: Any) -> int | None:
  """What XLA plans for a compiled program: arguments, results and what lies in between."""
  plan = executable.memory_analysis()
  if plan is None:
    return None
  total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  return total - plan.alias_size_in_bytes
