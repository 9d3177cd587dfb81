"""Measures an import: its time and memory, as a whole command, on a file of random weights.

python benchmarks/import_time.py --model repvgg_b3
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

import repjax
from repjax import weights

IMPORT = Path(__file__).with_name("import_weights.py")


def write_files(model: str, folder: Path) -> list[Path]:
  """A training-form checkpoint as .safetensors and, where torch is installed, as .pth."""
  variables = repjax.init(repjax.create_model(model), jax.random.key(0), image_size=224)
  state = weights.to_torch(model, variables)
  paths = [folder / f"{model}.safetensors"]
  save_file(state, paths[0])
  if importlib.util.find_spec("torch"):
    torch: Any = importlib.import_module("torch")
    paths.append(folder / f"{model}.pth")
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, paths[1])
  return paths


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="repvgg_b3")
  parser.add_argument("--repeats", type=int, default=3)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    # In a process of its own: a command's peak memory would start from that of this one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
      paths = other.submit(write_files, arguments.model, Path(folder)).result()
    for path in paths:
      for repeat in range(arguments.repeats):
        workdir = Path(folder, f"{path.name}-{repeat}")
        start = time.perf_counter()
        command = [sys.executable, IMPORT, "--from", path, "--workdir", workdir]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
          sys.exit(f"the import failed with status {os.waitstatus_to_exitcode(status)}")
        peak = usage.ru_maxrss * 1024  # from KiB
        size = path.stat().st_size
        print(
          f"{path.name}: {seconds:.1f} s for the whole command, {peak / 1e6:.0f} MB at most, "
          f"{peak / size:.2f} times the file's {size / 1e6:.0f} MB",
          flush=True,
        )


if __name__ == "__main__":
  main()
