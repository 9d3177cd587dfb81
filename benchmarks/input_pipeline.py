"""Times the training input on JPEGs of ImageNet's usual size against plain Pillow.

The images are 500 x 375 pieces of the photographs that scikit-image ships, as JPEGs of several
qualities. ImageNet's files have about 110 kB. The table shows images per second:

  transform alone      decode, random crop and flip, on one core, in turns
  pipeline, one core   the whole input pipeline
  N workers            the pipeline with N worker processes on N cores

Example:
  python benchmarks/input_pipeline.py
"""

import argparse
import io
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from repjax.data import augmentation, train_batches
from repjax.data.augmentation.crops import random_box
from repjax.data.decode import Picture
from repjax.errors import one_paragraph
from repjax.extras import need

WIDTH, HEIGHT = 500, 375
LINES = {"pillow": "pillow | flip", "repjax": "random_resized_crop | flip"}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket")


class Jpegs:
  """A data set of encoded images. Worker processes import the class from this module."""

  def __init__(self, files: list[bytes], length: int):
    self._files, self._length = files, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._files[index % len(self._files)], "label": 0}


def make_jpegs(count: int, quality: int) -> list[bytes]:
  """Returns JPEGs of random 4:3 pieces, nearly as large as the photographs."""
  need("skimage", "the photographs")
  import skimage.data

  sources = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
  rng, files = np.random.default_rng(0), []
  for number in range(count):
    photograph = sources[number % len(sources)]
    most = min(photograph.width, photograph.height * 4 // 3)
    width = int(rng.integers(most * 4 // 5, most + 1))
    height = width * 3 // 4
    left = int(rng.integers(photograph.width - width + 1))
    top = int(rng.integers(photograph.height - height + 1))
    piece = photograph.resize(
      (WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    file = io.BytesIO()
    piece.save(file, "JPEG", quality=quality)
    files.append(file.getvalue())
  return files


def crop_with_pillow(
  picture: Picture, size: int, interpolation: str, rng: np.random.Generator
) -> np.ndarray:
  """Decodes and crops with Pillow alone, as torchvision's RandomResizedCrop does."""
  del interpolation
  assert isinstance(picture.image, bytes)
  image = Image.open(io.BytesIO(picture.image)).convert("RGB")
  box = random_box(*image.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
  return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def seconds_in_turns(
  lines: dict[str, str], files: list[bytes], size: int, rounds: int
) -> dict[str, list[float]]:
  """Returns the CPU seconds per image of each augmentation in each round, after a warm-up."""
  times = {name: [] for name in lines}
  for number in range(rounds + 1):
    for name, line in lines.items():
      transform, rng = augmentation.parse(line), np.random.default_rng(number)
      start = time.process_time()
      for file in files:
        transform(Picture(file), size, "bilinear", rng)
      times[name].append((time.process_time() - start) / len(files))
  return {name: row[1:] for name, row in times.items()}


def pipeline_rate(
  line: str, files: list[bytes], arguments: argparse.Namespace, num_workers: int, cores: int
) -> float:
  """Returns the images per second of the training input pipeline on the first `cores` cores."""
  whole = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(whole)[:cores])
  source = train_batches(
    Jpegs(files, arguments.batch_size * arguments.batches),
    batch_size=arguments.batch_size,
    image_size=arguments.image_size,
    augment=line,
    interpolation="bilinear",
    seed=0,
    num_workers=num_workers,
  )
  for _ in range(8):  # skips the start-up, and the batches that were prepared during it
    next(source)
  start = time.perf_counter()
  for _ in range(arguments.batches):
    next(source)
  seconds = time.perf_counter() - start
  source.close()
  os.sched_setaffinity(0, whole)
  return arguments.batch_size * arguments.batches / seconds


def measure(quality: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """Measures JPEGs of one quality: transforms alone, the pipeline, the pipeline with workers."""
  files = make_jpegs(arguments.images, quality)
  times = seconds_in_turns(LINES, files, arguments.image_size, arguments.rounds)
  ratios = [a / b for a, b in zip(times["pillow"], times["repjax"])]
  result: dict[str, Any] = {
    "quality": quality,
    "kilobytes": sum(map(len, files)) / len(files) / 1e3,
    "transform": {name: 1 / statistics.median(row) for name, row in times.items()},
    "transform_ratio": statistics.median(ratios),
    "transform_ratio_range": [min(ratios), max(ratios)],
    "pipeline_on_one_core": {
      name: statistics.median(pipeline_rate(line, files, arguments, 0, 1) for _ in range(3))
      for name, line in LINES.items()
    },
  }
  rates = result["pipeline_on_one_core"]
  result["pipeline_ratio"] = rates["repjax"] / rates["pillow"]
  result["by_workers"] = {
    workers: pipeline_rate(LINES["repjax"], files, arguments, workers, workers)
    for workers in arguments.workers
  }
  return result


def format_row(row: dict[str, Any]) -> str:
  """Returns the line of a row in the table."""
  alone, pipeline = row["transform"], row["pipeline_on_one_core"]
  low, high = row["transform_ratio_range"]
  ratio = f"{row['transform_ratio']:.2f} ({low:.2f}-{high:.2f})"
  return (
    f"{row['kilobytes']:>4.0f}  {alone['pillow']:>6.0f}  {alone['repjax']:>6.0f}  {ratio:<18}"
    f"  {pipeline['pillow']:>6.0f}  {pipeline['repjax']:>6.0f}  {row['pipeline_ratio']:<8.2f}"
    + "".join(f"{rate:>12.0f}" for rate in row["by_workers"].values())
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--qualities", type=int, nargs="+", default=[75, 90, 95, 98], help="of the JPEGs"
  )
  parser.add_argument("--images", type=int, default=200, help="number of different images")
  parser.add_argument("--image-size", type=int, default=224, help="side of the crops in pixels")
  parser.add_argument("--rounds", type=int, default=7, help="rounds over all images")
  parser.add_argument("--batch-size", type=int, default=64, help="images in a batch")
  parser.add_argument("--batches", type=int, default=40, help="timed batches of the pipeline")
  parser.add_argument(
    "--workers", type=int, nargs="+", default=[1, 2], help="numbers of worker processes"
  )
  parser.add_argument("--output", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  cv2.setNumThreads(1)
  augmentation.CROPS["pillow"] = lambda: crop_with_pillow
  with one_paragraph():
    results = []
    workers = "".join(f"{n:>4} workers" for n in arguments.workers)
    print(f"{'':>4}  {'transform alone':<34}  {'pipeline, one core':<24}")
    columns = f"  {'Pillow':>6}  {'repjax':>6}  "
    print(f"{'kB':>4}{columns}{'ratio':<18}{columns}{'ratio':<8}{workers}")
    for quality in arguments.qualities:
      row = measure(quality, arguments)
      results.append(row)
      print(format_row(row), flush=True)
  if arguments.output:
    machine = {
      "processor": _processor(),
      "cpus": os.cpu_count(),
      "system": platform.platform(),
      "python": platform.python_version(),
      "opencv": cv2.__version__,
      "pillow": Image.__version__,
      "image_size": arguments.image_size,
      "images": arguments.images,
      "rounds": arguments.rounds,
      "batch_size": arguments.batch_size,
      "batches": arguments.batches,
    }
    arguments.output.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


def _processor() -> str:
  """Returns the name of the CPU."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


if __name__ == "__main__":
  main()
