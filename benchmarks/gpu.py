"""Measures everything that needs a GPU, in one run of a few minutes: `make gpu`.

The program needs jax, flax, optax, orbax, chex, and for comparison torch and timm. It needs no
network and no package that reads data sets. Each part runs in a process of its own under a limit of
time. Results are written after every measurement, so that a run that is cut keeps what it has. A
second run with the same folder continues with what is missing.

Parts:
  machine    the device, versions, rates of matrix products and of copies
  tests      the tests that need no data sets, on the CPU and with the packages of this machine
  inference  compiled deploy forms against PyTorch, eager in channels last and by torch.compile
  training   training steps against PyTorch with automatic mixed precision

Files:
  rows.jsonl   one line for each measurement, or for the reason why there is none
  log.txt      what the parts print
  results.json and accuracy.png, at the end, from rows.jsonl

Example:
  make gpu
  python benchmarks/gpu.py --rehearse --to /tmp/rehearsal     # tiny sizes, on a CPU
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(1, str(ROOT))  # repjax need not be installed
SHARES = {"machine": 0.07, "tests": 0.18, "inference": 0.55, "training": 0.2}
"""Part to its share of the time; what a part leaves goes to the parts after it."""

OURS = ("repjax-deploy",)
PLAIN = ("repjax-deploy", "torch-eager")
GRAPHS = ("repjax-deploy", "repjax-graphs", "torch-eager")
COMPILED = ("repjax-deploy", "torch-eager", "torch-compile")
SUMS = ("repjax-deploy", "repjax-untuned", "torch-eager")  # depthwise convolutions as sums, or not
PEERS = ("torch-eager",)
TESTS = (
  *("tests/test_algebra.py", "tests/test_reparam.py", "tests/test_recognition.py"),
  *("tests/test_program.py", "tests/test_trees.py", "tests/layers"),
)


class Job(NamedTuple):
  """A measurement of inference or training.

  Attributes:
    part: "inference" or "training".
    model: name of a model, or timm:NAME for one that PyTorch alone has.
    dtype: dtype of the computation.
    batch_size: number of images.
    subjects: names of the programs to compare.
  """

  part: str
  model: str
  dtype: str
  batch_size: int
  subjects: tuple[str, ...]

  @property
  def key(self) -> str:
    """A text that is the same in every run."""
    return " ".join(map(str, (*self[:4], *self.subjects)))


def jobs(rehearse: bool) -> list[Job]:
  """Returns the measurements, the most telling first, since time may not suffice for all."""
  main = ("repvgg_a0", "repvgg_a2", "resnet50", "repvgg_b1g4")
  peers = ("timm:efficientnet_b0", "timm:regnetx_032")
  mobile, sizes = ("mobileone_s0", "repvit_m0_9"), (1, 32, 128)
  if rehearse:
    main, mobile, sizes = ("repvgg_a0",), ("mobileone_s0",), (1, 2)
    peers = ("timm:efficientnet_b0",)
  found = [Job("inference", model, "bfloat16", size, PLAIN) for model in main for size in sizes]
  found += [Job("inference", model, "bfloat16", sizes[0], GRAPHS) for model in main]
  parnets = ("parnet_s", "parnet_s_96")  # 92 channels, and 96, which tensor cores take whole
  found += [Job("inference", each, "bfloat16", size, OURS) for each in parnets for size in sizes]
  found += [Job("inference", model, "bfloat16", size, SUMS) for model in mobile for size in sizes]
  found += [Job("inference", each, "bfloat16", size, PEERS) for each in peers for size in sizes]
  found += [Job("inference", model, "bfloat16", size, COMPILED) for model in main for size in sizes]
  found += [
    Job("inference", model, dtype, size, PLAIN)
    for dtype in ("float16", "float32")
    for size in reversed(sizes)
    for model in main
  ]
  steps = ("repjax-train-form", "torch-eager")
  batch = sizes[-1]
  found += [Job("training", model, "bfloat16", batch, steps) for model in main[:3]]
  found += [Job("training", main[0], "bfloat16", batch, (*steps, "torch-compile"))]
  found += [Job("training", main[0], "float32", batch, steps)]
  return found


def append(folder: Path, row: dict[str, Any]) -> None:
  """Writes a row at the end of rows.jsonl, at once."""
  with (folder / "rows.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())


def rows(folder: Path) -> list[dict[str, Any]]:
  """Returns all whole rows of rows.jsonl; a run that was killed may have cut the last one."""
  file = folder / "rows.jsonl"
  found = []
  for text in file.read_text().splitlines() if file.exists() else ():
    try:
      found.append(json.loads(text))
    except ValueError:
      continue
  return found


def measure_machine(folder: Path, rehearse: bool, left: Callable[[], float]) -> None:
  """Measures the rates of large matrix products, and of copies on the device."""
  import jax
  import jax.numpy as jnp
  import timing

  if any(row["key"] == "copy" for row in rows(folder)):
    return
  append(folder, {"key": "machine", "part": "machine", **timing.machine()})
  size = 256 if rehearse else 8192

  def best(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(3 if rehearse else 10):
      begin = time.perf_counter()
      jax.block_until_ready([call() for _ in range(5)])
      seconds.append((time.perf_counter() - begin) / 5)
    return min(seconds)

  for dtype in ("bfloat16", "float16", "float32"):
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    rate = 2 * size**3 / best(lambda product=product, matrix=matrix: product(matrix, matrix))
    append(folder, {"key": f"product {dtype}", "part": "machine", "tflops": rate / 1e12})
  numbers = jnp.ones(2**16 if rehearse else 2**30, jnp.float32)
  add = jax.jit(lambda x: x + 1)  # reads and writes each number once
  moved = 2 * numbers.nbytes / best(lambda: add(numbers))
  append(folder, {"key": "copy", "part": "machine", "gb_per_s": moved / 1e9})


def run_tests(folder: Path, rehearse: bool, left: Callable[[], float]) -> None:
  """Runs the tests that need no data sets, on this machine's CPU, and counts them."""
  if any(row["key"] == "tests" and row["exit_status"] is not None for row in rows(folder)):
    return
  tests = TESTS[:1] if rehearse else TESTS
  options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]  # one -q, which prints the counts
  command = [sys.executable, "-m", "pytest", *options, *tests]
  try:
    done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, timeout=max(left() - 5, 1)
    )
    output, code = done.stdout + done.stderr, done.returncode
  except subprocess.TimeoutExpired as error:
    output, code = (error.stdout or b"").decode(errors="replace"), None
  print(output[-6000:], flush=True)
  last = (output.strip().splitlines() or ["nothing was printed"])[-1]
  append(folder, {"key": "tests", "part": "tests", "exit_status": code, "last_line": last})


def run_jobs(part: str, folder: Path, rehearse: bool, left: Callable[[], float]) -> None:
  """Measures the jobs of a part that earlier runs have not, until the time is over."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well
  import gpu_peers
  import inference
  import subjects
  import training_subjects

  new, kinds = subjects.Task, subjects.KINDS
  if part == "training":
    new, kinds = training_subjects.TrainingTask, training_subjects.KINDS
  done = {row["key"] for row in rows(folder) if "results" in row}
  longest = 0.0
  for job in jobs(rehearse):
    if job.part != part or job.key in done:
      continue
    if longest * 1.2 > left():
      append(folder, {"key": job.key, "part": part, "reason": "no time was left"})
      continue
    begin = time.perf_counter()
    print(job.key, flush=True)
    try:
      make = gpu_peers.Task if job.model.startswith("timm:") else new
      task: Any = make(job.model, job.batch_size, 32 if rehearse else 224, job.dtype)
      race = {"rounds": 2 if rehearse else 10, "calls": 2 if rehearse else 20}
      found = inference.measure(kinds, task, _able(kinds, task, job.subjects), **race)
      append(folder, {"key": job.key, "part": part, "results": found})
      print(*map(inference.line, found), sep="\n", flush=True)
    except Exception as error:  # One model that fails must not cost the measurements of the rest.
      reason = f"{type(error).__name__}: {error}"[:600]
      append(folder, {"key": job.key, "part": part, "reason": reason})
      print(reason, flush=True)
    longest = max(longest, time.perf_counter() - begin)


def _able(kinds: Any, task: Any, names: Sequence[str]) -> list[str]:
  """Returns the names of the subjects that can do a task here; prints the reasons of the others."""
  import subjects

  reasons = {name: subjects.why_not(kinds[name], task) for name in names}
  for name, reason in reasons.items():
    if reason:
      print(f"  without {name}: {reason}", flush=True)
  return [name for name, reason in reasons.items() if not reason]


def collect(folder: Path) -> None:
  """Writes results.json and the picture from the rows that there are."""
  found = rows(folder)
  measured = [row for row in found if "results" in row]
  facts = [row for row in found if "results" not in row]
  results = [{"part": row["part"], **each} for row in measured for each in row["results"]]
  (folder / "results.json").write_text(
    json.dumps({"facts": facts, "results": results}, indent=2) + "\n"
  )
  try:
    import plot

    drawn = [each for each in results if each["part"] == "inference"]
    drawn = [each for each in drawn if each["dtype"] == "bfloat16"]
    plot.save(list(_last_of_each(drawn)), folder / "accuracy.png")
  except Exception as error:  # The numbers matter more than the picture.
    print(f"no picture: {error}", flush=True)


def _last_of_each(results: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
  """Yields the last row of each subject, model and batch size, which several jobs may measure."""
  names = ("model", "batch_size", "dtype", "subject")
  yield from {tuple(each[name] for name in names): each for each in results}.values()


PARTS: dict[str, Callable[[Path, bool, Callable[[], float]], None]] = {
  "machine": measure_machine,
  "tests": run_tests,
  "inference": lambda *rest: run_jobs("inference", *rest),
  "training": lambda *rest: run_jobs("training", *rest),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--to", type=Path, default=HERE / "results" / "gpu", help="folder of results")
  parser.add_argument("--minutes", type=float, default=8.5, help="time for all parts")
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
  parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of a part
  parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  arguments.to.mkdir(parents=True, exist_ok=True)
  if arguments.part:
    end = time.perf_counter() + arguments.seconds
    PARTS[arguments.part](arguments.to, arguments.rehearse, lambda: end - time.perf_counter())
  else:
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
  """Runs the parts one after the other, each in a process, and collects their results."""
  end = time.perf_counter() + 60 * arguments.minutes
  waiting = list(arguments.parts)
  while waiting:
    part = waiting.pop(0)
    rest = sum(SHARES[each] for each in waiting) + SHARES[part]
    seconds = (end - time.perf_counter()) * SHARES[part] / rest
    _run_part(part, seconds, arguments)
    collect(arguments.to)
  print((arguments.to / "results.json"), flush=True)


def _run_part(part: str, seconds: float, arguments: argparse.Namespace) -> None:
  """Runs a part in a process, and ends the process when its time is over."""
  print(f"{part}: {seconds:.0f} s", flush=True)
  command = [sys.executable, __file__, "--part", part, "--seconds", str(seconds)]
  command += ["--to", str(arguments.to)] + ["--rehearse"] * arguments.rehearse
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
  if arguments.rehearse:
    environment["JAX_PLATFORMS"] = "cpu"
  with (arguments.to / "log.txt").open("a") as log:
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      code = "time"
  if code:
    append(arguments.to, {"key": f"{part} ended", "part": part, "reason": f"exit status {code}"})
    print(f"  {part} ended early ({code}); see log.txt", flush=True)


if __name__ == "__main__":
  main()
