"""Times main.py from the command to the first step, with a cold and with a warm compilation cache.

Every start is a new process and a new run of one step on noise. The first start finds an empty
cache and fills it. The printed times are the first start, and the medians of the warm starts:

  imports      start of Python, imports, and the command line
  set-up       check of the config, opening of the data, initialization of variables
  first step   the program is traced, loaded from the cache or compiled, and run

Example:
  python benchmarks/startup.py --json benchmarks/results/startup_cpu_2cores.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The start of the line that main.py prints at the end of each part.
PARTS = {"imports": "workdir: ", "set-up": "compiling", "first step": "step 1/1 "}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="repvgg_a0", help="name of a config (default: repvgg_a0)")
  parser.add_argument("--image-size", type=int, default=64, help="pixels")
  parser.add_argument("--batch-size", type=int, default=8, help="images in a batch")
  parser.add_argument("--starts", type=int, default=5, help="starts with a warm cache (default: 5)")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="startup-") as folder:
    times = [start_once(Path(folder), f"run{n}", arguments) for n in range(1 + arguments.starts)]
  results = {"cold": times[0], "warm": times[1:]}
  median = {part: statistics.median(each[part] for each in times[1:]) for part in (*PARTS, "all")}
  for name, parts in (("cold", times[0]), ("warm", median)):
    print(f"{name}  " + "  ".join(f"{part} {parts[part]:.1f} s" for part in parts))
  if arguments.json:
    facts = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    facts |= {name: getattr(arguments, name) for name in ("config", "image_size", "batch_size")}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**facts, **results}, indent=2) + "\n")


def start_once(folder: Path, name: str, arguments: Any) -> dict[str, float]:
  """Starts main.py once, and returns the seconds of each part and of all parts."""
  command = [
    *(sys.executable, ROOT / "main.py", f"--config={ROOT}/configs/{arguments.config}.py"),
    *(f"--workdir={folder / name}", "--config.dataset=synthetic", "--config.num_steps=1"),
    *(f"--config.image_size={arguments.image_size}", f"--config.batch_size={arguments.batch_size}"),
  ]
  environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
  parts, begin = {}, time.perf_counter()
  last = begin
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout or ():
      part = next((part for part, text in PARTS.items() if line.startswith(text)), None)
      if part is not None and part not in parts:
        now = time.perf_counter()
        parts[part], last = now - last, now
  if process.returncode or len(parts) < len(PARTS):
    raise SystemExit(f"error: main.py ended with status {process.returncode}, see above")
  return {**parts, "all": last - begin}


if __name__ == "__main__":
  main()
