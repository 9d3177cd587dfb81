"""CPUs on which ONNX Runtime computes wrong sums of products in 8 bits."""

from pathlib import Path

SATURATES = (
  "note: this CPU has no VNNI, so that ONNX Runtime computes wrong sums of uint8 activations and "
  "weights in 8 bits, and what is measured here of such files is worse than on CPUs that have it, "
  "and GPUs; weights of 7 bits are right on all:"
)
_ENOUGH = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""Flags of x86 CPUs with an instruction that adds such products in 32 bits."""


def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
  """Checks whether ONNX Runtime computes wrong sums of 8-bit weights on this machine.

  x86 without VNNI has an instruction that adds two products of uint8 and int8 in 16 bits. The sum
  may be 2 * 255 * 127, and 32767 is the most that fits. With 7-bit weights, 2 * 255 * 64 fits.

  Args:
    cpuinfo: file in which Linux describes the CPUs.

  Returns:
    True on such a CPU. False on other systems and other CPUs, where the file does not tell.

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
