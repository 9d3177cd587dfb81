"""Compiles programs for NVIDIA GPUs on a machine without one; the only user of JAX's private names.

XLA's compiler for GPUs is a file of the package jax-cuda13-pjrt. The package is unpacked and not
installed, so that JAX itself still computes on the CPU:

  python benchmarks/gpu_compiler.py --fetch ~/.cache/repjax/cuda
  export REPJAX_CUDA_PLUGIN=~/.cache/repjax/cuda/xla_cuda_plugin.so

Nothing is tuned without a GPU, so the choice between several algorithms of cuDNN stays open. What
is launched, in which layouts, and how much memory is planned does not depend on this choice, except
for the work space of cuDNN.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpu_targets import TARGETS, description

from repjax.errors import InputError, one_paragraph, unknown

VARIABLE = "REPJAX_CUDA_PLUGIN"
"""Name of the environment variable with the path of the compiler."""
JAXLIB = importlib.metadata.version("jaxlib")
PACKAGE = "jax-cuda13-pjrt"
PLUGIN = "xla_cuda_plugin.so"
_VERSION_FILE = "version.py"  # of the package, beside the compiler
_WAY_OUT = (
  f"Get it by: python benchmarks/gpu_compiler.py --fetch FOLDER, and set {VARIABLE}=FOLDER/{PLUGIN}"
)


class Compiled(NamedTuple):
  """A compiled program, and how its kernels are launched.

  Attributes:
    executable: the program; it cannot run here.
    graphs: number of CUDA graphs. The host launches a graph as one.
    inside: number of kernels in graphs.
    outside: number of kernels and library calls that the host launches one by one.
  """

  executable: Any
  graphs: int
  inside: int
  outside: int


def missing() -> str:
  """Returns why nothing can be compiled for GPUs here, or "" if everything is there."""
  path = os.environ.get(VARIABLE, "")
  if not path:
    return f"{VARIABLE} does not name XLA's compiler for GPUs. {_WAY_OUT}"
  if not Path(path).is_file():
    return f"{VARIABLE} names {path}, which is no file. {_WAY_OUT}"
  found = _version(Path(path))
  if found != JAXLIB:
    return (
      f"{path} is of {PACKAGE} {found or '(unknown version)'}, and this is jaxlib "
      f"{JAXLIB}. Both must have the same version. {_WAY_OUT}"
    )
  return ""


def _version(plugin: Path) -> str:
  """Returns the version of a compiler from the file beside it, or "" if there is no such file."""
  beside = plugin.parent / _VERSION_FILE
  match = beside.is_file() and re.search(r'^_version = "(.+?)"', beside.read_text(), re.MULTILINE)
  return match[1] if match else ""


@functools.cache
def devices(gpu: str, count: int = 1) -> tuple[Any, ...]:
  """Returns GPUs that exist for the compiler alone.

  Args:
    gpu: a name of TARGETS.
    count: number of GPUs in one machine.

  Raises:
    InputError: the compiler is missing, or is of a different version than jaxlib; or the GPU is
      unknown.
  """
  if gpu not in TARGETS:
    raise unknown("GPU", gpu, TARGETS)
  if reason := missing():
    raise InputError(reason)
  topology = _client().make_c_api_device_topology(
    _plugin(), "", topology=f"1x1x{count}", target_config=description(gpu)
  )
  return tuple(topology._make_compile_only_devices())


def _client() -> Any:
  """Returns JAX's private module of clients."""
  return importlib.import_module("jax._src.lib").xla_client


@functools.cache
def _plugin() -> Any:
  """Loads the compiler into this process, once."""
  client = _client()
  loaded = client.load_pjrt_plugin_dynamically("cuda", os.environ[VARIABLE])
  client.initialize_pjrt_plugin("cuda")
  return loaded


def compile_lowered(lowered: Any, options: Mapping[str, Any] | None = None) -> Compiled:
  """Compiles a program that was lowered for `devices`.

  Args:
    lowered: the result of `jax.jit(...).lower(...)` for arguments on `devices`.
    options: options of XLA.
  """
  # The sequence of launches is part of what XLA dumps and of nothing else.
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    executable = lowered.compile(compiler_options={**dump, **(options or {})})
    texts = {file.name: file.read_text() for file in Path(folder).glob("*thunk_sequence*.txt")}
  if not texts:
    raise InputError(
      f"XLA of jaxlib {JAXLIB} writes no sequence of launches. This program is made "
      "for jaxlib 0.10; mend benchmarks/gpu_compiler.py for this version"
    )
  # The sequence after the passes exists only where a pass has changed it.
  last = max(texts, key=lambda name: "after_thunk_passes" in name)
  return Compiled(executable, *count_launches(texts[last]))


_NO_LAUNCHES = {"kSequential", "kWhile", "kConditional", "kCommandBuffer"}


def count_launches(sequence: str) -> tuple[int, int, int]:
  """Returns the number of graphs, of launches in them and of launches outside.

  Args:
    sequence: XLA's list of thunks. What belongs to a thunk is indented below it.
  """
  graphs = inside = outside = 0
  depth = None  # the indentation of the graph that the current line may belong to
  for line in sequence.splitlines():
    match = re.match(r"^( *)\d+: (k\w+)", line)
    if not match:
      continue
    indentation, kind = len(match[1]), match[2]
    if depth is not None and indentation <= depth:
      depth = None
    if kind == "kCommandBuffer":
      graphs, depth = graphs + 1, indentation
    elif kind not in _NO_LAUNCHES:
      inside, outside = (inside, outside + 1) if depth is None else (inside + 1, outside)
  return graphs, inside, outside


def fetch(folder: Path) -> Path:
  """Downloads the compiler of this version of jaxlib by pip, unless the folder has it already.

  Args:
    folder: the folder to unpack it into.

  Returns:
    The path for the environment variable.

  Raises:
    InputError: the package index does not have the package, or cannot be reached.
  """
  plugin = folder / PLUGIN
  if plugin.is_file() and _version(plugin) == JAXLIB:
    return plugin
  folder.mkdir(parents=True, exist_ok=True)
  wanted = f"{PACKAGE}=={JAXLIB}"
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, wanted]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(Path(temporary).glob("*.whl"))
    if done.returncode or not wheels:
      reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
      raise InputError(f"pip cannot download {wanted}: {reason}. It exists for Linux on x86-64")
    with zipfile.ZipFile(wheels[0]) as wheel:
      # The version comes last, so that an interrupted download is not taken for a whole one.
      for file in (PLUGIN, _VERSION_FILE):
        name = next(name for name in wheel.namelist() if name.endswith(f"/{file}"))
        Path(wheel.extract(name, temporary)).replace(folder / file)
  return plugin


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--fetch", type=Path, required=True, help="folder to unpack the compiler to")
  arguments = parser.parse_args()
  with one_paragraph():
    print(fetch(arguments.fetch.expanduser().resolve()))


if __name__ == "__main__":
  main()
