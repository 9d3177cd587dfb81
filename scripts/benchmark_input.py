"""Times the training input on JPEGs of ImageNet's usual size against plain Pillow.

The images are 500 x 375 pieces of the photographs that scikit-image ships, as JPEGs of several
qualities; ImageNet's own files have about 110 kB. Seconds are of the processor, so images/s are
those of one core that does nothing else.

    python scripts/benchmark_input.py --qualities 75 90 95
"""

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from repjax.data import train_batches
from repjax.data.decode import Picture
from repjax.data.transforms import flip, random_box, random_resized_crop
from repjax.errors import InputError, one_paragraph

WIDTH, HEIGHT = 500, 375
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket")


class Jpegs:
  """A data set of encoded images; here, where worker processes find it."""

  def __init__(self, files: list[bytes], length: int):
    self._files, self._length = files, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._files[index % len(self._files)], "label": 0}


def make_jpegs(count: int, quality: int) -> list[bytes]:
  """JPEGs of random 4:3 pieces, at least half as wide as the photograph."""
  try:
    import skimage.data
  except ModuleNotFoundError:
    raise InputError("the photographs come with scikit-image: pip install scikit-image") from None
  sources = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
  rng, files = np.random.default_rng(0), []
  for number in range(count):
    photograph = sources[number % len(sources)]
    most = min(photograph.width, photograph.height * 4 // 3)
    width = int(rng.integers(most // 2, most + 1))
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


def with_pillow(file: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
  """Decode, RandomResizedCrop and flip as a PyTorch user has them, with Pillow alone."""
  image = Image.open(io.BytesIO(file)).convert("RGB")
  box = random_box(*image.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
  image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
  if rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def with_repjax() -> Callable[[bytes, int, np.random.Generator], np.ndarray]:
  """The same by the package."""
  crop, mirror = random_resized_crop(), flip()

  def transform(file: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    return mirror(crop(Picture(file), size, "bilinear", rng), rng)

  return transform


def seconds_in_turns(
  transforms: list[Callable[..., np.ndarray]], files: list[bytes], size: int, rounds: int
) -> list[list[float]]:
  """Processor seconds an image of each transform in each round, after a warm-up."""
  times = [[] for _ in transforms]
  for number in range(rounds + 1):
    for transform, row in zip(transforms, times):
      rng = np.random.default_rng(number)
      start = time.process_time()
      for file in files:
        transform(file, size, rng)
      row.append((time.process_time() - start) / len(files))
  return [row[1:] for row in times]


def pipeline_rate(
  files: list[bytes], size: int, batch_size: int, batches: int, num_workers: int
) -> tuple[float, float]:
  """Images a second, and processor seconds an image, of the pipeline that training uses."""
  examples = Jpegs(files, batch_size * batches)
  source = train_batches(
    examples,
    batch_size=batch_size,
    image_size=size,
    augment="random_resized_crop | flip",
    interpolation="bilinear",
    seed=0,
    num_workers=num_workers,
  )
  for _ in range(2 + 2 * num_workers):  # starting up, and what was prepared meanwhile
    next(source)
  start, own = time.perf_counter(), time.process_time()
  for _ in range(batches):
    next(source)
  seconds, own = time.perf_counter() - start, time.process_time() - own
  source.close()
  images = batch_size * batches
  return images / seconds, own / images


def measure(quality: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """One quality: both transforms alone, and the pipeline by number of workers."""
  files = make_jpegs(arguments.images, quality)
  pillow, ours = seconds_in_turns(
    [with_pillow, with_repjax()], files, arguments.image_size, arguments.rounds
  )
  result = {
    "quality": quality,
    "kilobytes": sum(map(len, files)) / len(files) / 1e3,
    "pillow_images_per_second": 1 / statistics.median(pillow),
    "repjax_images_per_second": 1 / statistics.median(ours),
    "ratio": statistics.median(a / b for a, b in zip(pillow, ours)),
    "ratio_range": [f(a / b for a, b in zip(pillow, ours)) for f in (min, max)],
    "pipeline": {},
  }
  for workers in arguments.workers:
    rate, own = pipeline_rate(
      files, arguments.image_size, arguments.batch_size, arguments.batches, workers
    )
    result["pipeline"][workers] = {
      "images_per_second": rate,
      **({"images_per_second_per_core": 1 / own} if workers == 0 else {}),
    }
  return result


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--qualities", type=int, nargs="+", default=[75, 90, 95], help="of the JPEGs")
  parser.add_argument("--images", type=int, default=200, help="different images")
  parser.add_argument("--image-size", type=int, default=224, help="of the crops, in pixels")
  parser.add_argument("--rounds", type=int, default=7, help="over all images, of each transform")
  parser.add_argument("--batch-size", type=int, default=64)
  parser.add_argument("--batches", type=int, default=40, help="measured, of the pipeline")
  parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--output", type=Path, help="a JSON file for the results")
  arguments = parser.parse_args()
  cv2.setNumThreads(1)
  with one_paragraph():
    results = []
    print(
      f"{'kB':>6}{'Pillow':>9}{'repjax':>9}  {'ratio':<18}"
      + "".join(f"{n:>4} workers" for n in arguments.workers)
      + "    images/s"
    )
    for quality in arguments.qualities:
      row = measure(quality, arguments)
      results.append(row)
      ratio = f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f})"
      print(
        f"{row['kilobytes']:>6.0f}{row['pillow_images_per_second']:>9.0f}"
        f"{row['repjax_images_per_second']:>9.0f}  {ratio:<18}"
        + "".join(f"{p['images_per_second']:>12.0f}" for p in row["pipeline"].values()),
        flush=True,
      )
  print("Pillow and repjax: decode, random crop and flip alone, on one core; then the pipeline")
  if arguments.output:
    machine = {
      "processor": _processor(),
      "cpus": os.cpu_count(),
      "python": platform.python_version(),
      "opencv": cv2.__version__,
      "pillow": Image.__version__,
      "image_size": arguments.image_size,
    }
    arguments.output.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


if __name__ == "__main__":
  main()
