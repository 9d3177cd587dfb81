"""Changes small valid files at random, and shows that every reader refuses them politely.

Each attempt copies a valid file or folder, changes some of its bytes, and reads it in a forked
process. The reader may succeed or raise an InputError. Anything else is a finding: a different
error, the death of the process, too much time or memory, or a file that was written. For each
finding, the file or folder is kept. The exit status is then 1.

Readers are rows of the table READERS. A new one is a function that makes valid files in a folder,
and a function that reads one of them.

Examples:
  python scripts/fuzz_files.py --seconds 300
  python scripts/fuzz_files.py --readers pictures checkpoints --seed 7
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are no part of the installed package

import jax
import numpy as np
import safetensors.numpy
from PIL import Image

import repjax
from repjax import disk, runs
from repjax.data import class_table, files, open_source, read_image, tfrecords, transforms
from repjax.data.augmentation import crops
from repjax.data.augmentation.pairs import scale_and_crop
from repjax.data.decode import Picture
from repjax.data.folder import prepare_folder
from repjax.data.mask_folder import prepare_mask_folder, read_pair
from repjax.data.pairs import pair_of
from repjax.data.reading import find_fault
from repjax.disk import trees
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.weights import files as weight_files
from tests.weights import torch_writer

PREPROCESSING = Preprocessing(32, 36)
OVERRIDES = {"stage_sizes": [1, 1, 1, 1], "width_multipliers": [0.125] * 4}


class Reader(NamedTuple):
  """A kind of files: how valid ones are made, and how one is read.

  Attributes:
    make: writes valid files into a folder. Each entry of the folder is one target.
    read: reads a target, given its path.
    seconds: the longest that one attempt may take.
    megabytes: the memory that one attempt may need.
  """

  make: Callable[[Path], None]
  read: Callable[[Path], Any]
  seconds: int = 10
  megabytes: int = 600


class Finding(NamedTuple):
  """A fault that an attempt has shown. Findings with the same signature count as one."""

  signature: str
  text: str


# ---------------------------------------------------------------- readers


def make_pictures(folder: Path) -> None:
  """Writes a picture of each kind."""
  rng = np.random.default_rng(0)
  rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 30))
  tags = Image.Exif()
  tags[0x0112], tags[0x010E] = 6, "a description"
  kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "plain.jpg": (rgb, {}),
    "progressive.jpg": (rgb, {"progressive": True}),
    "exif.jpg": (rgb, {"exif": tags}),
    "cmyk.jpg": (rgb.convert("CMYK"), {}),
    "rgb.png": (rgb, {"exif": tags}),
    "palette.png": (rgb.convert("P"), {"transparency": 3}),
    "grey.png": (Image.fromarray(rng.integers(0, 65536, (30, 40), np.uint16)), {}),
    "alpha.png": (rgb.convert("RGBA"), {}),
    "lossy.webp": (rgb, {"exif": tags}),
    "lossless.webp": (rgb.convert("RGBA"), {"lossless": True}),
    "rgb.bmp": (rgb, {}),
    "palette.bmp": (rgb.convert("P"), {}),
    "rgb.gif": (rgb, {}),
  }
  for name, (image, options) in kinds.items():
    image.save(folder / name, **options)


def read_picture(path: Path) -> None:
  """Reads a picture as preparation, prediction, evaluation and training do."""
  fault = find_fault(path.read_bytes())
  try:
    read_image(path, PREPROCESSING)
    picture = Picture(path.read_bytes(), str(path))
    transforms.ten_crop(picture, 32, 36, "bicubic")
    crops.random_resized_crop()(picture, 32, "bilinear", np.random.default_rng(0))
  except InputError:
    assert fault is not None, "refused by prediction and not by preparation"
    raise
  assert fault is None, f"refused by preparation and not by prediction: {fault}"


def make_data_sets(folder: Path) -> None:
  """Writes a prepared data set of two classes."""
  with tempfile.TemporaryDirectory() as photos:
    for split, name, number in itertools.product(("train", "val"), ("cat", "dog"), range(2)):
      path = Path(photos, split, name, f"{number}.png")
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8, 8), (number, 9, len(name + split))).save(path)
    prepare_folder(photos, "pets", data_dir=folder / "sets", num_workers=1)


def read_data_set(path: Path) -> None:
  """Opens both splits, and reads and decodes every image."""
  for split in ("train", "validation"):
    source = open_source("pets", split, data_dir=str(path))
    for index in range(min(len(source.examples), 100)):
      example = source.examples[index]
      Picture(example["image"], example["name"]).pixels()


def make_masks(folder: Path) -> None:
  """Writes folders of an image and a mask, with masks of values, of a palette and of colours."""
  classes = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 3).resize((16, 12))
  palette = classes.copy()
  palette.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
  masks = {"grey": classes, "palette": palette, "colours": palette.convert("RGB")}
  for name, mask in masks.items():
    for inner, image in (("images", classes.convert("RGB")), ("masks", mask)):
      path = folder / name / inner / "0.png"
      path.parent.mkdir(parents=True)
      image.save(path)
    table = {"names": ["a", "b", "c"], "colors": [[0, 0, 0], [9, 9, 9]], "ignore": [7]}
    table["colors"] += [[200, 0, 0]]
    (folder / name / class_table.NAME).write_text(json.dumps(table))


def read_mask(path: Path) -> None:
  """Reads a mask as preparation does."""
  rules = class_table.read(path / class_table.NAME).rules
  pair = read_pair(path / "images/0.png", path / "masks/0.png", ("image", "mask"), rules)
  if pair.fault is not None:
    raise InputError(pair.fault)


def make_mask_sets(folder: Path) -> None:
  """Writes a prepared data set of images and masks."""
  with tempfile.TemporaryDirectory() as photos:
    for split, inner, number in itertools.product(("train", "val"), ("images", "masks"), range(2)):
      path = Path(photos, split, inner, f"{number}.png")
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (8, 8), number).save(path)
    prepare_mask_folder(photos, "pets", data_dir=folder / "sets", num_workers=1)


def read_mask_set(path: Path) -> None:
  """Opens both splits, and reads every pair as training and evaluation do."""
  for split in ("train", "validation"):
    source = open_source("pets", split, data_dir=str(path), task="segmentation")
    canvas = source.canvas()
    assert canvas is not None
    for index in range(min(len(source.examples), 100)):
      pair = pair_of(source.examples[index], (0, 0, 0))
      scale_and_crop()(pair, 32, "bicubic", np.random.default_rng(0))


def make_tfrecords(folder: Path) -> None:
  """Writes a TFRecord file."""
  records = []
  for data in (b"first", b"", b"the third record"):
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", tfrecords.masked_crc32c(each)) for each in (length, data)]
    records += [length, checksums[0], data, checksums[1]]
  (folder / "a.tfrecord").write_bytes(b"".join(records))


def make_lists(folder: Path) -> None:
  """Writes lists of paths in several encodings."""
  text = '"pets\\cat 1.jpg"\r\ngröße.jpg\n\n  x/y.png\t\n'
  for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
    (folder / f"{encoding}.txt").write_bytes(text.encode(encoding))


def make_checkpoints(folder: Path) -> None:
  """Writes a state dict in each format of checkpoints."""
  state = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "bn.running_mean": np.ones(2, np.float32),
    "bn.num_batches_tracked": np.array(7),
  }
  dense = {name: torch_writer.dense(value) for name, value in state.items()}
  torch_writer.save_zip(folder / "zip.pth", {"state_dict": dense, "epoch": 3})
  torch_writer.save_legacy(folder / "legacy.pth", dense)
  safetensors.numpy.save_file(state, folder / "a.safetensors", {"format": "pt"})
  np.savez(folder / "a.npz", **state)


def read_checkpoint(path: Path) -> None:
  """Reads a checkpoint and every value in it."""
  for name, value in weight_files.read(path).items():
    assert value.nbytes < 2**24, f"{name} has {value.nbytes} bytes in a file of a few kilobytes"
    np.asarray(value).tobytes()


def make_model_json(folder: Path) -> None:
  """Writes the description of a small model."""
  (folder / "model").mkdir()
  small_model().write(folder / "model")


def read_model_json(path: Path) -> None:
  """Reads the description, and builds the model."""
  spec = repjax.ModelSpec.read(path)
  spec.create_model()
  spec.variable_shapes(deploy=True)


def make_deploy(folder: Path) -> None:
  """Writes deploy folders with parameters of zeros, without a manifest and with one."""
  spec = small_model()
  shapes = spec.variable_shapes(deploy=True)["params"]
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  for name in ("old", "new"):
    (folder / name).mkdir()
    trees.write_tree(runs.params_folder(folder / name), zeros)
    spec.write(folder / name)
  disk.write_manifest(folder / "new")


def small_model() -> repjax.ModelSpec:
  """Returns the description of a small model with three classes."""
  names = ("cat", "dog", "emu")
  return repjax.ModelSpec("repvgg_a0", 3, OVERRIDES, PREPROCESSING, names)


READERS = {
  "pictures": Reader(make_pictures, read_picture),
  "data sets": Reader(make_data_sets, read_data_set),
  "masks": Reader(make_masks, read_mask),
  "mask sets": Reader(make_mask_sets, read_mask_set),
  "tfrecords": Reader(make_tfrecords, lambda path: list(tfrecords.read_tfrecord(path))),
  "lists": Reader(make_lists, files.read_list),
  "checkpoints": Reader(make_checkpoints, read_checkpoint),
  "model.json": Reader(make_model_json, read_model_json, seconds=30, megabytes=1500),
  "deploy": Reader(make_deploy, repjax.load, seconds=30, megabytes=1500),
}


# ---------------------------------------------------------------- changes


def change(rng: random.Random, target: Path, others: list[bytes]) -> None:
  """Changes one file of a target, or removes one."""
  inside = sorted(path for path in target.rglob("*") if path.is_file()) or [target]
  # With their checksums, folders would show every change before anything else could go wrong.
  for manifest in [path for path in inside if path.name == disk.MANIFEST]:
    if rng.random() < 0.8:
      manifest.unlink()
      inside.remove(manifest)
  path = rng.choice(inside)
  if target.is_dir() and rng.random() < 0.03:
    path.unlink()
    return
  data = path.read_bytes()
  if path.suffix == ".json" or path.name == ".zarray":
    changed = changed_json(rng, data) if rng.random() < 0.8 else changed_bytes(rng, data, others)
  elif zipfile.is_zipfile(path) and rng.random() < 0.6:
    changed = changed_zip(rng, path, others)
  elif path.suffix == ".safetensors" and rng.random() < 0.6:
    changed = changed_header(rng, data)
  else:
    changed = changed_bytes(rng, data, others)
    if data.startswith(b"\x89PNG") and rng.random() < 0.6:
      changed = with_checksums(changed)
  path.write_bytes(changed)


NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS_OF_8 = (*NUMBERS, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 4, 2**64 - 1)


def changed_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
  """Returns bytes after one to six random changes."""
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
    # Headers, where sizes are, lie at the beginning.
    end = min(len(result), 64) if rng.random() < 0.5 else len(result)
    at = rng.randrange(end + 1)
    length = rng.choice((1, 2, 4, 8, 32, len(result) // 3))
    match rng.randrange(8):
      case 0 | 1:
        result[at : at + 1] = bytes([rng.randrange(256)])
      case 2 | 3:
        size = rng.choice((1, 2, 4, 8))
        number = rng.choice(NUMBERS_OF_8) % 256**size
        result[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
      case 4:
        del result[at : at + length]
      case 5:
        result[at:at] = result[at : at + length] * rng.choice((1, 1, 100))
      case 6:
        del result[at:]
      case 7:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        result[at : at + length] = other[start : start + length]
  return bytes(result)


EVIL = (
  *(None, True, False, 0, -1, -4, 1e9, 10**30, 10**400, float("nan"), float("inf"), 0.5, "", "x"),
  *("../../x", "a\0b", "\x1b[2J\n", "\udcff", "y" * 10000, [], {}, [[]], [1e308] * 3, {"": 0}),
)


def changed_json(rng: random.Random, data: bytes) -> bytes:
  """Returns a JSON text in which a random place holds something else."""
  content = json.loads(data)
  places = list(places_of(content))
  if rng.random() < 0.03:
    return b"[" * 100_000 + b"]" * 100_000
  holder, key = rng.choice(places)
  match rng.randrange(6):
    case 0 | 1 | 2:
      holder[key] = rng.choice(EVIL)
    case 3:
      holder[key] = holder[rng.choice(keys_of(holder))]
    case 4:
      del holder[key]
    case 5 if isinstance(holder, dict):
      holder[rng.choice(("x", "type", "pythonClassName", "name", "\x1b[2J"))] = rng.choice(EVIL)
    case 5:
      holder += [rng.choice(EVIL)] * rng.choice((1, 1000))
  return json.dumps(content).encode()


def keys_of(holder: Any) -> list[Any]:
  return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def places_of(content: Any) -> Iterator[tuple[Any, Any]]:
  """Yields (table or list, key or index) of everything in JSON."""
  if isinstance(content, dict | list):
    for key in keys_of(content):
      yield content, key
      yield from places_of(content[key])


def changed_zip(rng: random.Random, path: Path, others: list[bytes]) -> bytes:
  """Returns a ZIP file with right checksums in which one entry is changed."""
  result = io.BytesIO()
  with zipfile.ZipFile(path) as archive, zipfile.ZipFile(result, "w") as new:
    names = archive.namelist()
    chosen = rng.choice(names)
    for name in names:
      data = archive.read(name)
      new.writestr(name, changed_bytes(rng, data, others) if name == chosen else data)
  return result.getvalue()


def changed_header(rng: random.Random, data: bytes) -> bytes:
  """Returns a safetensors file whose JSON is changed: its length comes first, in eight bytes."""
  length = int.from_bytes(data[:8], "little")
  header = changed_json(rng, data[8 : 8 + length])
  return len(header).to_bytes(8, "little") + header + data[8 + length :]


def with_checksums(data: bytes) -> bytes:
  """Returns a PNG in which the checksums of all chunks are right."""
  result, position = bytearray(data), 8
  while position + 12 <= len(result):
    length = int.from_bytes(result[position : position + 4])
    end = position + 12 + length
    if end > len(result):
      break
    result[end - 4 : end] = struct.pack(">I", zlib.crc32(result[position + 4 : end - 4]))
    position = end
  return bytes(result)


# ---------------------------------------------------------------- attempts


def attempt(reader: Reader, target: Path, empty: Path) -> Finding | None:
  """Reads a target in a forked process.

  Args:
    reader: how to read.
    target: what to read.
    empty: an empty folder, in which the process works.
  """
  before = snapshot(target)
  pipe, end = os.pipe()
  child = os.fork()
  if child == 0:
    run_child(reader, target, empty, end)
  os.close(end)
  with os.fdopen(pipe, "rb") as file:
    said = file.read()
  _, status = os.waitpid(child, 0)
  if os.WIFSIGNALED(status):
    number = os.WTERMSIG(status)
    if number == signal.SIGALRM:
      return Finding("hang", f"took more than {reader.seconds} s")
    return Finding(f"signal {number}", f"ended by {signal.Signals(number).name}")
  if said:
    return Finding(*json.loads(said))
  if snapshot(target) != before or any(empty.iterdir()):
    return Finding("written", "a file was written or removed")
  return None


def run_child(reader: Reader, target: Path, empty: Path, end: int) -> None:
  """Reads a target, writes a finding into a pipe, and ends the process."""
  null = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)  # decoders in C print what they find wrong
  os.chdir(empty)
  before = memory()
  # Beyond what is allowed, so that the memory of an attempt is measured, not masked by errors.
  limit = virtual_memory() + 8 * reader.megabytes * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a loop in C
  signal.alarm(reader.seconds)
  finding = None
  try:
    reader.read(target)
  except InputError:
    pass
  except BaseException as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/repjax/" in frame.filename] or frames
    place = f"{Path(own[-1].filename).name}:{own[-1].name}"
    finding = (f"{type(error).__name__} in {place}", traceback.format_exc()[-4000:])
  megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
  if finding is None and megabytes > reader.megabytes:
    finding = ("memory", f"needed {megabytes:,.0f} MB")
  if finding is not None:
    os.write(end, json.dumps(finding).encode())
  os._exit(0)


def snapshot(target: Path) -> list[tuple[str, int, int]]:
  """Returns the names, sizes and times of everything in the folder of a target."""
  found = sorted(target.parent.rglob("*"))
  states = [(str(path), path.lstat()) for path in found]
  return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def memory() -> float:
  """Returns the megabytes that this process holds."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def virtual_memory() -> int:
  """Returns the bytes of this process's address space."""
  return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def make_seeds(names: list[str], folder: Path) -> None:
  """Makes the valid files of all readers, in a process of its own.

  Some of them start threads or devices, which the process that forks must not have.

  Raises:
    SystemExit: the process failed.
  """
  child = os.fork()
  if child == 0:
    try:
      for name in names:
        (folder / name).mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
          READERS[name].make(folder / name)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
    os._exit(0)
  if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
    raise SystemExit("the valid files cannot be made, see above")


def contents(target: Path) -> list[bytes]:
  """Returns the bytes of the files of a target."""
  paths = [path for path in target.rglob("*") if path.is_file()] or [target]
  return [path.read_bytes() for path in paths]


def fuzz(
  names: list[str], seconds: float, seed: int, keep: Path
) -> tuple[collections.Counter[str], dict[tuple[str, str], list[Finding]]]:
  """Makes attempts in turns until the time is over.

  Returns:
    The number of attempts of each reader, and the findings by reader and signature.
  """
  rng, attempts = random.Random(seed), collections.Counter()
  findings: dict[tuple[str, str], list[Finding]] = {}
  with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
    base = Path(temporary)
    for name in ("seeds", "work", "empty"):
      (base / name).mkdir()
    make_seeds(names, base / "seeds")
    seeds = {name: sorted((base / "seeds" / name).iterdir()) for name in names}
    others = {
      name: [data for each in found for data in contents(each)] for name, found in seeds.items()
    }
    check_seeds(seeds, base / "empty")
    ends = time.monotonic() + seconds
    for name in itertools.cycle(names):
      if time.monotonic() > ends:
        return attempts, findings
      source = rng.choice(seeds[name])
      target = base / "work" / source.name
      copy_target(source, target)
      change(rng, target, others[name])
      attempts[name] += 1
      finding = attempt(READERS[name], target, base / "empty")
      if finding is not None:
        same = findings.setdefault((name, finding.signature), [])
        same.append(finding)
        if len(same) == 1:
          report(name, finding, target, keep / f"{name.replace(' ', '_')}-{len(findings)}")
      for left in (*(base / "work").iterdir(), *(base / "empty").iterdir()):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
  raise AssertionError("the cycle has no end")


def check_seeds(seeds: dict[str, list[Path]], empty: Path) -> None:
  """Raises unless every valid file can be read."""
  for name, targets in seeds.items():
    for target in targets:
      if finding := attempt(READERS[name], target, empty):
        raise SystemExit(f"{name}: {target.name} is not read as it is: {finding.text}")


def copy_target(source: Path, target: Path) -> None:
  """Copies a file or a folder."""
  if source.is_dir():
    shutil.copytree(source, target, dirs_exist_ok=True)
  else:
    shutil.copyfile(source, target)


def report(name: str, finding: Finding, target: Path, kept: Path) -> None:
  """Prints a finding, and keeps what was read."""
  kept.mkdir(parents=True, exist_ok=True)
  copy_target(target, kept / target.name)
  (kept / "finding.txt").write_text(f"{finding.signature}\n\n{finding.text}\n", errors="replace")
  print(f"{name}: {finding.signature}, kept in {kept}", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
  parser.add_argument(
    "--readers", nargs="+", choices=READERS, default=list(READERS), help="which (default: all)"
  )
  parser.add_argument("--seed", type=int, default=0, help="seed of the changes (default: 0)")
  parser.add_argument(
    "--keep", type=Path, default=Path("fuzz-findings"), help="folder for what was found"
  )
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  warnings.filterwarnings("ignore", message="os.fork")  # this process starts no device
  attempts, findings = fuzz(
    arguments.readers, arguments.seconds, arguments.seed, arguments.keep.absolute()
  )
  for name in arguments.readers:
    own = {key[1]: len(found) for key, found in findings.items() if key[0] == name}
    what = "; ".join(f"{count} x {signature}" for signature, count in own.items()) or "none"
    print(f"{name}: {attempts[name]:,} attempts, findings: {what}")
  print(f"{attempts.total():,} attempts, {len(findings)} different findings")
  raise SystemExit(1 if findings else 0)


if __name__ == "__main__":
  main()
