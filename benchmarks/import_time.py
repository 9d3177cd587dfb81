"""Measures the time and the memory of `repjax import`, on a file of random weights.

Example:
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


def write_files(model: str, folder: Path) -> list[Path]:
  """Writes the training form as .safetensors and, if torch is installed, as .pth."""
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
  parser.add_argument("--model", default="repvgg_b3", help="default: repvgg_b3")
  parser.add_argument("--repeats", type=int, default=3, help="imports of each file (default: 3)")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    # A new process writes the files. Otherwise the peak memory of a command that this process
    # starts would include the memory of this process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
      paths = writer.submit(write_files, arguments.model, Path(folder)).result()
    for path in paths:
      for repeat in range(arguments.repeats):
        workdir = Path(folder, f"{path.name}-{repeat}")
        start = time.perf_counter()
        command = [sys.executable, "-m", "repjax", "import", "--from", path, "--workdir", workdir]
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
