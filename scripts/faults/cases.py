"""The commands that get faults: what each finds, what each writes, and how the result is read.

All of them work on a tiny RepVGG on the digits, or on a few small images.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import repjax
from faults.contents import Reader, Reading, digest
from faults.server import FAULTS, Server
from repjax import data, runs, weights

STEPS, EVAL_STEPS = 8, 4
_OVERRIDES = {
  "stage_sizes": (1, 1, 1, 1),
  "width_multipliers": (0.125,) * 4,
  "strides": (1, 1, 2, 2, 2),
}


class Case(NamedTuple):
  """A command, the folder that it finds, and how its result is read.

  Attributes:
    arguments: name of the command, and its arguments.
    before: folder of which the command finds a copy.
    readers: name to reader, in the order in which the command changes what they read.
    targets: paths of the folders and files that the command makes or replaces as a whole.
    beside: more paths beside which other people's files lie.
    between: name of a reader to the readings that may be found on the way.
    growing: files that the command extends.
    in_steps: the command writes JSON files outside of its targets more than once.
    refuses: the command refuses what is done already, and a second run may say so.
  """

  arguments: Sequence[str]
  before: Path
  readers: Mapping[str, Reader]
  targets: Sequence[str]
  beside: Sequence[str] = ()
  between: Mapping[str, frozenset[Reading]] = {}
  growing: Sequence[str] = ()
  in_steps: bool = False
  refuses: bool = False


def _deploy_form(path: str) -> Reader:
  """Returns a reader of the deploy form in a folder, which must be there if the folder is."""
  return lambda folder: _digest_of(folder / path, deploy=True)


def _training_form(path: str) -> Reader:
  """Returns a reader of the best checkpoint, which must be there if any checkpoint is."""

  def reader(folder: Path) -> Reading:
    has_some = runs.checkpoints(folder / path) if (folder / path).exists() else {}
    return _digest_of(folder / path, deploy=False) if has_some else None

  return reader


def _digest_of(folder: Path, deploy: bool) -> Reading:
  return digest(repjax.load(folder, deploy=deploy)[1]) if folder.exists() else None


def _train(folder: Path, **changes: object) -> list[str]:
  """Returns the arguments that train the tiny network in a workdir."""
  config = {
    **{f"model_overrides.{name}": value for name, value in _OVERRIDES.items()},
    "batch_size": 32,
    "num_steps": STEPS,
    "eval_every_epochs": EVAL_STEPS * 32 / 1437,
    "log_every_steps": 3,
    # The rate of every step is the same, so a shorter run takes the same steps as a longer one.
    "warmup_epochs": 0.0,
    "schedule": "step",
    "learning_rate": 0.4,
    **changes,
  }
  flags = [f"--config.{name}={value}" for name, value in config.items()]
  return ["train", "--config=digits", f"--workdir={folder}", *flags]


class Preparation:
  """Makes the folders that commands find, each when it is first needed.

  Attributes:
    case: the folder in which every command works.
  """

  def __init__(self, server: Server, base: Path):
    """Remembers where to make folders.

    Args:
      server: runs commands.
      base: folder of all folders.
    """
    self.case = base / "case"
    self._server, self._base = server, base / "prepared"

  def do(self, *arguments: object) -> None:
    """Runs a command without a fault.

    Raises:
      SystemExit: the command failed.
    """
    run = self._server.load([*map(str, arguments)])
    if run.status:
      raise SystemExit(f"error: without a fault, {arguments} ended with {run.status}\n{run.output}")

  def _copy(self, source: Path, name: str) -> Path:
    """Returns a new folder with a copy of `source` inside, which is called "run"."""
    folder = self._base / name
    shutil.copytree(source, folder / "run")
    return folder

  @functools.cached_property
  def nothing(self) -> Path:
    """An empty folder."""
    folder = self._base / "nothing"
    folder.mkdir(parents=True)
    return folder

  @functools.cached_property
  def run(self) -> Path:
    """The workdir of a finished run."""
    self.do(*_train(self._base / "run"))
    return self._base / "run"

  @functools.cached_property
  def stale(self) -> Path:
    """A folder with a finished run, whose deploy form is that of a run with a different seed."""
    self.do(*_train(self._base / "other", seed=1))
    folder = self._copy(self.run, "stale")
    shutil.rmtree(folder / "run" / "deploy")
    shutil.copytree(self._base / "other" / "deploy", folder / "run" / "deploy")
    return folder

  @functools.cached_property
  def recalibrated(self) -> Path:
    """A folder with a finished run, whose statistics were re-estimated."""
    folder = self._copy(self.run, "recalibrated")
    self.do("recalibrate", f"--workdir={folder / 'run'}", "--batches=1")
    return folder

  @functools.cached_property
  def stopped(self) -> Path:
    """A folder with a run that SIGTERM has stopped after its first checkpoint."""
    final = _training_form(self.run.name)(self.run.parent)
    folder = self._base / "stopped"
    calls = self._server.run(_train(self.case / "run"), self.case, FAULTS["signal"]).calls
    shutil.rmtree(self.case)
    for number in range(calls // 8, calls, calls // 8):
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      self._server.run(_train(folder / "run"), folder, FAULTS["signal"], number)
      if _training_form("run")(folder) not in (None, final):
        return folder
    raise SystemExit("error: no signal stopped a run between its first and its last checkpoint")

  @functools.cached_property
  def states(self) -> frozenset[Reading]:
    """The readings of the training form after each step of a run.

    Raises:
      SystemExit: the last checkpoint is not the best one, so that readers would not see it.
    """
    found = []
    for steps in range(1, STEPS + 1):
      folder = self._base / f"steps{steps}" / "run"
      self.do(*_train(folder, num_steps=steps, eval_every_epochs=1.0))
      found.append(_training_form("run")(folder.parent))
    if _training_form(self.run.name)(self.run.parent) != found[-1]:
      raise SystemExit("error: the tiny run is worse at its end; change its learning rate")
    return frozenset(found)

  @functools.cached_property
  def published(self) -> Path:
    """A checkpoint file with the weights of the run."""
    self.do("export-weights", f"--workdir={self.run}", f"--to={self._base / 'run.safetensors'}")
    return self._base / "run.safetensors"

  @functools.cached_property
  def images(self) -> Path:
    """A folder of images of two classes."""
    return self._images("images", seed=0)

  @functools.cached_property
  def sets(self) -> Path:
    """A folder of data sets with one set, which was made from images that are gone."""
    images = self._images("earlier", seed=1)
    self.do(*self._prepare(images, self._base / "sets"))
    return self._base / "sets"

  def _images(self, name: str, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    for label, images in zip(("cat", "dog"), pixels):
      folder = self._base / name / label
      folder.mkdir(parents=True)
      for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    return self._base / name

  def _prepare(self, images: Path, data_dir: Path) -> list[str]:
    flags = [f"--from-folder={images}", f"--data-dir={data_dir}", "--name=pets", "--replace"]
    return ["prepare-dataset", *flags]

  def prepare_dataset(self) -> Case:
    """Replaces a data set."""
    arguments = self._prepare(self.images, self.case)
    return Case(arguments, self.sets, {"set": _examples}, ["pets/1.0.0"], ["pets"])

  def train(self) -> Case:
    """Trains a network."""
    return self._training(self.nothing)

  def continue_(self) -> Case:
    """Continues a run."""
    return self._training(self.stopped)

  def _training(self, before: Path) -> Case:
    return Case(
      _train(self.case / "run"),
      before,
      {"train": _training_form("run"), "deploy": _deploy_form("run/deploy")},
      targets=["run/deploy"],
      beside=["run"],
      between={"train": self.states},
      growing=["run/metrics.jsonl"],
      in_steps=True,
    )

  def convert(self) -> Case:
    """Replaces a deploy form."""
    forms = {"train": _training_form("run"), "deploy": _deploy_form("run")}
    return Case(["convert", f"--workdir={self.case / 'run'}"], self.stale, forms, ["run/deploy"])

  def recalibrate(self) -> Case:
    """Replaces re-estimated statistics and a deploy form."""
    return self._recalibration("--batches=2")

  def undo(self) -> Case:
    """Removes re-estimated statistics, and replaces a deploy form."""
    return self._recalibration("--undo")

  def _recalibration(self, flag: str) -> Case:
    return Case(
      ["recalibrate", f"--workdir={self.case / 'run'}", flag],
      self.recalibrated,
      {"statistics": _training_form("run"), "deploy": _deploy_form("run")},
      ["run/recalibrated", "run/deploy"],
    )

  def import_(self) -> Case:
    """Imports a checkpoint file."""
    arguments = ["import", f"--from={self.published}", f"--workdir={self.case / 'run'}"]
    arguments += ["--model=repvgg_a0", f"--overrides={json.dumps(_OVERRIDES)}"]
    reader = {"train": _training_form("run")}
    return Case(arguments, self.nothing, reader, ["run"], refuses=True)

  def export(self) -> Case:
    """Writes StableHLO."""
    return self._new_folder({"deploy": _deploy_form("a0")}, "export")

  def export_onnx(self) -> Case:
    """Writes ONNX."""
    return self._new_folder({"deploy": _deploy_form("a0")}, "export", "--format=onnx")

  def quantize(self) -> Case:
    """Writes ONNX in 8 bits."""
    flags = ("--weights-only", "--images=16", "--timed-rounds=1")
    return self._new_folder({"file": _onnx}, "quantize", *flags)

  def export_weights(self) -> Case:
    """Writes a checkpoint file."""
    arguments = ["export-weights", f"--workdir={self.run}", f"--to={self.case}/a0.safetensors"]
    return Case(arguments, self.nothing, {"file": _weights}, ["a0.safetensors"], refuses=True)

  def _new_folder(self, readers: Mapping[str, Reader], command: str, *flags: str) -> Case:
    arguments = [command, f"--workdir={self.run}", f"--to={self.case / 'a0'}", *flags]
    return Case(arguments, self.nothing, readers, ["a0"], refuses=True)


def _examples(folder: Path) -> Reading:
  """Reads a data set, every image of both splits."""
  splits = [
    data.open_source("pets", split, data_dir=str(folder)).examples
    for split in ("train", "validation")
  ]
  return digest([examples[index] for examples in splits for index in range(len(examples))])


def _weights(folder: Path) -> Reading:
  """Reads a checkpoint file."""
  path = folder / "a0.safetensors"
  return digest(weights.read(path)) if path.exists() else None


def _onnx(folder: Path) -> Reading:
  """Reads the bytes of an ONNX file, which must be there if the folder is."""
  path = folder / "a0"
  return hashlib.sha256((path / "model.onnx").read_bytes()).hexdigest() if path.exists() else None


CASES: dict[str, Callable[[Preparation], Case]] = {
  "train": Preparation.train,
  "continue": Preparation.continue_,
  "convert": Preparation.convert,
  "recalibrate": Preparation.recalibrate,
  "undo": Preparation.undo,
  "import": Preparation.import_,
  "export": Preparation.export,
  "export-onnx": Preparation.export_onnx,
  "quantize": Preparation.quantize,
  "export-weights": Preparation.export_weights,
  "prepare-dataset": Preparation.prepare_dataset,
}
