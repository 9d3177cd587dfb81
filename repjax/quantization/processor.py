"""Whether this machine's CPU adds products of 8 bits as it should."""

from pathlib import Path

SATURATES = (
  "note: this CPU has no VNNI, so that ONNX Runtime computes wrong sums of uint8 activations and "
  "weights in 8 bits, and what is measured here of such files is worse than on CPUs that have it, "
  "and GPUs; weights of 7 bits are right on all:"
)
_ENOUGH = {"avx512_vnni", "avx_vnni", "amx_int8"}


def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
  """Whether ONNX Runtime computes wrong sums of weights in 8 bits here.

  On x86 without VNNI it takes an instruction that adds two products of uint8 and int8 in 16 bits:
  up to 2 * 255 * 127, where 32767 is the most that fits, or 2 * 255 * 64 with weights in 7 bits.

  Args:
    cpuinfo: what Linux says of its CPUs.

  Returns:
    False too where it cannot be told: other systems, and CPUs that are no x86.

  References:
    ONNX Runtime, Quantize ONNX models, "When and why do I need to try U8U8?".
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
  """
  try:
    lines = cpuinfo.read_text().splitlines()
  except OSError:
    return False
  flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
  return any("sse2" in each and not each & _ENOUGH for each in flags)
