"""Kills a small training run again and again, and counts the bits that then differ at its end.

First a run on the digits ends without a kill. Then the same command starts again and again. Each
time SIGKILL ends the process at a random moment of a random phase, until the run reaches its end.
Then the next run begins. All that runs write is compared: every checkpoint (parameters, statistics,
their averages, the state of the optimizer), metrics.jsonl, re-estimated statistics and the deploy
form. The exit status is 1 where a bit differs.

Examples:
  python scripts/torture.py --kills 50
  python scripts/torture.py --kills 20 --config scenes
  python scripts/torture.py --kills 5 -- --config.nesterov=True
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm

from repjax import runs

ROOT = Path(__file__).resolve().parents[1]
_OF_ALL = {
  "log_every_steps": 7,
  "save_every_minutes": 0.003,
  "recalibrate_batches": 2,
  "accumulate_steps": 2,
  "ema_decay": 0.9,
}
CHANGES: dict[str, dict[str, Any]] = {
  "digits": {
    **_OF_ALL,
    "model_overrides.stage_sizes": (1, 1, 1, 1),
    "model_overrides.width_multipliers": (0.125,) * 4,
    "batch_size": 32,
    "num_steps": 40,
    "eval_every_epochs": 0.2,  # 9 steps
    "mixup": 0.2,
  },
  "scenes": {
    **_OF_ALL,
    "batch_size": 4,
    "num_steps": 24,
    "eval_every_epochs": 0.07,  # 9 steps
    "sync_batch_norm": True,
  },
}
"""Name of a config to what makes its run short."""
# First word of a printed line, and the phase that starts with the line.
PHASES = {
  "compiling": "compilation",
  "step": "steps",
  "re-estimating": "recalibration",
  "re-parameterizing": "conversion",
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
  parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
  parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
  parser.add_argument("--json", type=Path, help="also write the result to this file")
  parser.add_argument(
    "--config", choices=CHANGES, default="digits", help="config to run (default: digits)"
  )
  parser.add_argument("rest", nargs="*", metavar="-- ARGUMENT", help="more arguments for main.py")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
    result = torture(
      arguments.folder or Path(temporary),
      arguments.kills,
      arguments.seed,
      [*_flags(arguments.config), *arguments.rest],
    )
  text = (
    f"survived {result['kills']} kills in {result['runs']} runs "
    f"({', '.join(f'{count} in {phase}' for phase, count in result['phases'].items())}); "
    f"differing bits: {result['differing_bits']} in {result['bits_of_a_run']:,} of each run"
  )
  print(text)
  if arguments.json:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
  sys.exit(1 if result["differing_bits"] else 0)


def _flags(config: str) -> list[str]:
  """Returns the arguments of main.py for the short run of a config."""
  changes = [f"--config.{field}={value}" for field, value in CHANGES[config].items()]
  return [f"--config={ROOT}/configs/{config}.py", *changes]


def torture(folder: Path, kills: int, seed: int, more: list[str]) -> dict[str, Any]:
  """Runs the reference and the killed runs, and returns the counts.

  Args:
    folder: folder for all runs.
    kills: number of kills.
    seed: seed of the moments.
    more: arguments for main.py, the config among them.

  Raises:
    SystemExit: a run ended with an error.
  """
  start = time.perf_counter()
  print("two runs without kills; the first run compiles", flush=True)
  run_once(folder / "first", folder / "cache", more)
  seen, _ = run_once(folder / "reference", folder / "cache", more)
  expected = contents(folder / "reference")
  rng, phases, runs = random.Random(seed), collections.Counter(), 0
  differing = count_differing(contents(folder / "first"), expected)
  with tqdm.tqdm(total=kills, desc="kills", disable=None) as bar:
    while phases.total() < kills:
      runs += 1
      for phase in run_with_kills(folder, f"run{runs}", more, rng, seen, kills, phases):
        phases[phase] += 1
        bar.update()
        bar.set_postfix_str(f"run {runs}, {phase}")
      differing += count_differing(contents(folder / f"run{runs}"), expected)
      bar.write(f"{phases.total()} kills, run {runs} has ended, differing bits: {differing}")
  return {
    "kills": phases.total(),
    "runs": runs,
    "phases": dict(phases.most_common()),
    "differing_bits": differing,
    "bits_of_a_run": 8 * sum(len(data) for data in expected.values()),
    "undisturbed_seconds": round(seen["end"], 1),
    "seconds": round(time.perf_counter() - start, 1),
    "seed": seed,
  }


def run_with_kills(
  folder: Path,
  name: str,
  more: list[str],
  rng: random.Random,
  seen: dict[str, float],
  kills: int,
  phases: collections.Counter[str],
) -> Iterator[str]:
  """Starts a run until the run reaches its end; yields the phase of each kill, at most `kills`."""
  times = list(seen.items())
  while True:
    moment = None
    if phases.total() < kills:
      number = rng.randrange(len(times) - 1)
      moment = times[number][0], rng.uniform(0, times[number + 1][1] - times[number][1])
    _, phase = run_once(folder / name, folder / "cache_of_the_killed", more, moment)
    if phase is None:
      return
    yield phase


def run_once(
  workdir: Path, cache: Path, more: list[str], moment: tuple[str, float] | None = None
) -> tuple[dict[str, float], str | None]:
  """Starts or continues a run; kills the run `moment[1]` seconds after phase `moment[0]` begins.

  Returns:
    phase to the second when it began, "end" included; and the phase of the kill, or None if the
    run ended before the kill.

  Raises:
    SystemExit: the run ended with an error.
  """
  command = [sys.executable, "-u", str(ROOT / "main.py"), f"--workdir={workdir}"]
  environment = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "TFDS_DATA_DIR": str(cache / "tfds"),
    "XDG_CACHE_HOME": str(cache),
  }
  workdir.parent.mkdir(parents=True, exist_ok=True)
  log = workdir.with_suffix(".log")
  with log.open("w") as out:
    process = subprocess.Popen(
      command + more, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
    )
    seen = follow(process, log, moment)
    killed = process.poll() is None
    process.kill()
    process.wait()
  if killed:
    return seen, phase_of(workdir, seen)
  if process.returncode:
    raise SystemExit(f"status {process.returncode} from {' '.join(command)}\n{log.read_text()}")
  return seen, None


def follow(
  process: subprocess.Popen[str], log: Path, moment: tuple[str, float] | None
) -> dict[str, float]:
  """Waits for the end of a process, or for the moment of its kill.

  Returns:
    phase to the second when it began, "end" included.
  """
  start, seen = time.perf_counter(), {"start-up": 0.0}
  while process.poll() is None:
    now = time.perf_counter() - start
    for line in log.read_text().splitlines():
      phase = PHASES.get(line.split(" ")[0])
      if phase:
        seen.setdefault(phase, now)
    if moment and moment[0] in seen and now >= seen[moment[0]] + moment[1]:
      break
    time.sleep(0.002)
  return {**seen, "end": time.perf_counter() - start}


def phase_of(workdir: Path, seen: dict[str, float]) -> str:
  """Returns the phase of a killed run."""
  if list(runs.checkpoints_folder(workdir).glob("*.orbax-checkpoint-tmp*")):
    return "a save"
  return [phase for phase in seen if phase != "end"][-1]


# The names of files that depend on the time of a run.
_TIMED = {
  path(Path()).name for path in (runs.timing_file, runs.picture_file, runs.tensorboard_folder)
}


def contents(workdir: Path) -> dict[str, bytes]:
  """Returns all that a run wrote: the bytes of arrays by their path, and of files by their name.

  The checksums of files are left out. Orbax notes the time in its files, and names some at random.
  """
  found = {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in workdir.rglob("*.json*")
    if "checkpoints" not in path.parts
    and "params" not in path.parts
    and path.name not in _TIMED
    and path.name != runs.manifest_file(workdir).name
  }
  folders = [runs.params_folder(runs.deploy_folder(workdir))]
  if runs.recalibrated_folder(workdir).exists():
    folders.append(runs.batch_stats_folder(runs.recalibrated_folder(workdir)))
  for step in runs.checkpoints(workdir):
    folders += [runs.checkpoint_folder(workdir, step) / item for item in ("variables", "training")]
  for folder in folders:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(folder.absolute())
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      name = f"{folder.relative_to(workdir)}{jax.tree_util.keystr(path)}"
      found[name] = np.asarray(leaf).tobytes()
  names = sorted({path.name for path in workdir.iterdir()} - _TIMED)
  return {**found, "names": " ".join(names).encode()}


def count_differing(ours: dict[str, bytes], theirs: dict[str, bytes]) -> int:
  """Returns the number of bits in which two runs differ; missing bytes count with all bits."""
  count = 0
  for name in ours.keys() | theirs.keys():
    pair = [np.frombuffer(side.get(name, b""), np.uint8) for side in (ours, theirs)]
    shorter = min(map(len, pair))
    count += int(np.bitwise_count(pair[0][:shorter] ^ pair[1][:shorter]).sum())
    count += 8 * (max(map(len, pair)) - shorter)
  return count


if __name__ == "__main__":
  main()
