"""Recognition of CPUs that add products of 8 bits in 16."""

import pytest

from repjax.quantization.processor import saturates

pytest_plugins = ["tests.training.fixtures"]


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ("flags\t\t: fpu sse2 avx avx2", True),
    ("flags\t\t: fpu sse2 avx avx2 avx512f avx512bw", True),
    ("flags\t\t: fpu sse2 avx2 avx_vnni", False),
    ("flags\t\t: fpu sse2 avx512f avx512_vnni", False),
    ("flags\t\t: sse2 amx_tile amx_int8", False),
    ("Features\t: fp asimd asimddp", False),  # ARM
    ("", False),
  ],
)
def test_x86_without_vnni_does(tmp_path, flags, expected):
  path = tmp_path / "cpuinfo"
  path.write_text(f"processor\t: 0\nvmx flags\t: vnmi\n{flags}\nbugs\t\t: spectre\n\n" * 2)
  assert saturates(path) == expected


def test_a_system_that_does_not_say_is_not_warned_about(tmp_path):
  assert not saturates(tmp_path / "cpuinfo")
