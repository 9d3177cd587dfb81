"""The command lines that make data sets and example folders."""

import collections
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from repjax.data import open_source
from tests.data.test_folder import files_below, write_image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_script(monkeypatch, capsys):
  """Runs a script in this process; what it printed."""

  def run(name, *arguments):
    path = str(ROOT / "scripts" / f"{name}.py")
    monkeypatch.setattr("sys.argv", [path, *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's process keeps its own
    capsys.readouterr()
    runpy.run_path(path, run_name="__main__")
    return capsys.readouterr().out

  return run


def stop_of(run, *arguments):
  """The text that a script ended with."""
  with pytest.raises(SystemExit) as stop:
    run(*arguments)
  return stop.value.code


@pytest.fixture
def photos(tmp_path):
  for name, count in (("ant", 10), ("bee", 5)):
    for number in range(count):
      write_image(tmp_path / "photos" / name / f"{number}.jpg")
  return tmp_path / "photos"


def test_a_folder_is_prepared_and_described(run_script, photos, tmp_path):
  sets = tmp_path / "my sets"
  prepare = ("prepare_dataset", "--from-folder", photos, "--name", "pets", "--data-dir", sets)
  lines = run_script(*prepare, "--validation-ratio", "0.4", "--seed", "3").splitlines()
  assert lines[:3] == [
    "classes: 2 (ant, bee)",
    "images: 9 train, 6 validation",
    "training images a class: 3 (bee) to 6 (ant)",
  ]
  assert re.fullmatch(rf"saved: {sets}/pets/1\.0\.0, 0\.\d MB", lines[3])
  assert lines[4] == (
    f"next: python main.py --config configs/finetune.py --config.dataset=pets "
    f"--config.data_dir='{sets}' --config.init_from=PATH --workdir runs/pets"
  )
  assert re.fullmatch(r"took \d+\.\d s", lines[5])
  assert len(lines) == 6
  assert len(open_source("pets", "train", data_dir=str(sets)).examples) == 9
  assert stop_of(run_script, *prepare).startswith("error: a set called pets exists already, in")
  (photos / "ant" / "0.jpg").write_bytes(b"")
  (photos / "bee" / "9.jpg").write_bytes((photos / "bee" / "0.jpg").read_bytes())
  assert stop_of(run_script, *prepare, "--replace", "--strict") == (
    "error: nothing was written, since 1 of the files cannot be read; without --strict they are "
    "left out: ant/0.jpg: empty file"
  )
  printed = run_script(*prepare, "--replace", "--num-workers", "1", "--validation-ratio", "0.5")
  assert "skipped, as they cannot be read: 1, such as ant/0.jpg (empty file); all are " in printed
  assert f"listed in {sets}/pets/1.0.0/skipped.txt\n" in printed


def test_the_default_folder_is_not_in_the_next_command(run_script, photos, tmp_path, monkeypatch):
  monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
  printed = run_script("prepare-dataset", "--from-folder", photos, "--name", "pets")
  assert f"saved: {tmp_path}/default/pets/1.0.0, " in printed
  assert "--config.dataset=pets --config.init_from=PATH --workdir runs/pets\n" in printed


def test_images_in_both_splits_are_warned_of(run_script, photos, tmp_path):
  for path in (photos / "ant").iterdir():
    path.write_bytes((photos / "bee" / "0.jpg").read_bytes())
  printed = run_script(
    "prepare-dataset", "--from-folder", photos, "--name", "pets", "--data-dir", tmp_path
  )
  assert re.search(
    "warning: images that are in the validation split and outside it.*: (8|9)", printed
  )


def test_names_of_files_need_not_be_utf8(run_script, photos, tmp_path):
  write_image(photos / "ant" / os.fsdecode(b"caf\xe9.jpg"))
  (photos / "ant" / os.fsdecode(b"broken \xff.jpg")).write_bytes(b"")
  printed = run_script(
    "prepare-dataset", "--from-folder", photos, "--name", "pets", "--data-dir", tmp_path
  )
  assert r"such as ant/broken \udcff.jpg (empty file)" in printed
  assert b"broken \xff.jpg\t" in (tmp_path / "pets/1.0.0/skipped.txt").read_bytes()
  names = set()
  for split in ("train", "validation"):
    examples = open_source("pets", split, data_dir=str(tmp_path)).examples
    names |= {examples[index]["file_name"] for index in range(len(examples))}
  assert "ant/caf\ufffd.jpg" in names


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--from-folder", "nowhere"), "error: --from-folder needs --name"),
    (("--from-folder", "nowhere", "--name", "pets"), "error: nowhere does not exist"),
    (("--tfds", "cifr10"), "error: unknown data set 'cifr10'; did you mean cifar10"),
    (("--from-tfrecord", "cifr10"), "error: unknown data set 'cifr10'; did you mean cifar10"),
    (("--tfds", "mnist", "--num-workers", "0"), "error: --num-workers counts threads, at least 1"),
    (("--tfds", "mnist", "--to", "x"), "error: --to goes with --from-tfrecord; use --data-dir"),
    (("--tfds", "mnist", "--from-tfrecord", "mnist"), 2),
    ((), 2),
  ],
)
def test_mistakes_on_the_command_line(run_script, tmp_path, arguments, said):
  stop = stop_of(run_script, "prepare-dataset", *arguments, "--data-dir", tmp_path)
  assert stop == said or str(stop).startswith(str(said))


def test_a_tfrecord_set_is_converted_by_the_command_in_the_error(run_script, tfrecord_set):
  with pytest.raises(ValueError, match="--from-tfrecord pets") as caught:
    open_source("pets", "train", data_dir=str(tfrecord_set))
  command = str(caught.value).split("repjax prepare-dataset ")[1].split()
  other = tfrecord_set / "other"
  printed = run_script("prepare-dataset", *command, "--to", other, "--num-workers", "1")
  assert f"copied: {other}/pets/1.0.0 holds" in printed
  printed = run_script("prepare-dataset", *command)
  assert printed.startswith(f"copied: {tfrecord_set}/pets/1.0.0 holds the set as array_record; its")
  assert len(open_source("pets", "train", data_dir=str(tfrecord_set)).examples) == 18


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (ModuleNotFoundError("No module named 'tensorflow'"), "needs a package that is not installed"),
    (
      requests.exceptions.ConnectionError("no route"),
      r"download failed \(no route\). Look at the n",
    ),
    (
      AssertionError("Manual directory\n  is empty."),
      "empty. Then run .* again. TFDS makes sets a",
    ),
    (OSError(28, "No space left on device"), "OSError: .*No space left on device"),
  ],
)
def test_what_tfds_cannot_prepare_is_one_paragraph(run_script, tmp_path, monkeypatch, error, said):
  def fail(builder, file_format):
    assert file_format == "array_record"
    raise error

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  text = stop_of(run_script, "prepare-dataset", "--tfds", "mnist", "--data-dir", tmp_path)
  assert text.startswith("error: TFDS cannot prepare mnist: ")
  assert re.search(said, text)
  assert "\n" not in text


def test_tfds_prepares_a_set_as_array_record_once(run_script, tmp_path):
  command = ("prepare_dataset", "--tfds", "digits", "--data-dir", tmp_path)
  assert f"prepared: {tmp_path}/digits/1.0.0\n" in run_script(*command)
  before = files_below(tmp_path)
  assert len(open_source("digits", "test", data_dir=str(tmp_path)).examples) == 360
  assert run_script(*command).startswith(f"prepared: {tmp_path}/digits/1.0.0\n")
  assert files_below(tmp_path) == before


def test_tfds_does_not_prepare_what_is_there_as_tfrecord(run_script, tfrecord_set):
  text = stop_of(run_script, "prepare-dataset", "--tfds", "pets", "--data-dir", tfrecord_set)
  assert text.endswith(f"--from-tfrecord pets --data-dir {tfrecord_set}")


SIGNALLED = """
import os, runpy, sys
from repjax.data import folder
read, calls, number = folder.read_image_file, [], int(sys.argv.pop())
def signalling(*arguments):
  calls.append(arguments)
  if len(calls) == 6:
    os.kill(os.getpid(), number)
  return read(*arguments)
folder.read_image_file = signalling
sys.argv[0] = "repjax prepare-dataset"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
  ("number", "said", "status"),
  [(signal.SIGTERM, "stopped; nothing was", 1), (signal.SIGINT, "interrupted; nothing was", 130)],
)
def test_what_is_stopped_leaves_nothing(photos, tmp_path, number, said, status):
  sets = tmp_path / "sets"
  options = ("--from-folder", photos, "--name", "pets", "--data-dir", sets, "--num-workers", "1")
  ended = subprocess.run(
    [sys.executable, "-c", SIGNALLED, *map(str, options), str(int(number))],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": "."},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == status
  assert said in ended.stdout + ended.stderr
  assert "Traceback" not in ended.stderr
  assert not list(sets.iterdir())


def test_photographs_are_cropped_apart(run_script, tmp_path):
  options = ("--per-class", "5", "--classes", "brick", "cat", "page")
  folders = [tmp_path / name for name in ("one", "again", "other")]
  for folder, seed in zip(folders, (0, 0, 1)):
    run_script("scripts/example_folder.py", "photographs", "--to", folder, *options, "--seed", seed)
  one, again, other = map(files_below, folders)
  assert one == again
  assert one.keys() == other.keys()
  assert not set(one.values()) & set(other.values())
  counts = collections.Counter(str(Path(name).parent) for name in one)
  assert counts == {
    f"{split}/{name}": count
    for split, count in (("train", 5), ("val", 1))
    for name in ("brick", "cat", "page")
  }
  for name in one:
    with Image.open(folders[0] / name) as image:
      assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 160)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (150, 150)])
def test_parts_of_a_photograph_do_not_overlap(size):
  halves = runpy.run_path(str(ROOT / "scripts" / "example_folder.py"))["halves"]
  places = np.arange(size[0] * size[1], dtype=np.int32).reshape(size[::-1])
  train, validation = (set(np.asarray(part).ravel()) for part in halves(Image.fromarray(places)))
  assert not train & validation
  assert train | validation == set(places.ravel())
  assert len(validation) == pytest.approx(0.3 * places.size)


def test_every_photograph_is_inside_scikit_image(run_script, tmp_path):
  printed = run_script(
    "scripts/example_folder.py", "photographs", "--to", tmp_path, "--per-class", "1"
  )
  count = len(list((tmp_path / "train").iterdir()))
  assert count >= 10
  assert printed == f"{tmp_path}\ntrain: {count} images of {count} classes\n" + (
    f"val: {count} images of {count} classes\n"
  )


def test_digits_have_the_projects_own_test_images(run_script, tmp_path):
  options = ("--classes", "1", "0", "3", "--per-class", "7")
  run_script("scripts/example_folder.py", "digits", "--to", tmp_path / "few", *options)
  run_script(
    "prepare-dataset", "--from-folder", tmp_path / "few", "--name", "few", "--data-dir", tmp_path
  )
  known = load_digits()
  pixels = np.rint(known.images * 255 / 16).astype(np.uint8)
  split = np.arange(1797) % 5 == 0
  expected = {"train": [], "validation": []}
  for digit in (0, 1, 3):
    mine = known.target == digit
    expected["train"] += [(str(digit), each.tobytes()) for each in pixels[mine & ~split][:7]]
    expected["validation"] += [(str(digit), each.tobytes()) for each in pixels[mine & split]]
  for name, rows in expected.items():
    source = open_source("few", name, data_dir=str(tmp_path))
    found = [source.examples[index] for index in range(len(source.examples))]
    assert sorted(rows) == sorted(
      (source.class_names[row["label"]], Image.open(io.BytesIO(row["image"])).tobytes())
      for row in found
    )


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("digits", "--classes", "10"), "unknown class of the digits '10'; did you mean"),
    (("photographs", "--classes", "dog"), "unknown class of the photographs 'dog'"),
    (("digits", "--per-class", "0"), "--per-class is at least 1; got 0"),
  ],
)
def test_example_folders_that_cannot_be(run_script, tmp_path, arguments, said):
  text = stop_of(run_script, "scripts/example_folder.py", *arguments, "--to", tmp_path / "new")
  assert text.startswith(f"error: {said}")
  assert not (tmp_path / "new").exists()


def test_only_an_empty_folder_is_filled(run_script, tmp_path):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path, tmp_path / "file"):
    text = stop_of(run_script, "scripts/example_folder.py", "digits", "--to", path)
    assert text == f"error: {path} is not an empty folder; give another path, or remove it first"
  assert files_below(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
  ("kind", "name"), [("photographs", "scikit-image"), ("digits", "scikit-learn")]
)
def test_a_missing_package_is_named(run_script, tmp_path, monkeypatch, kind, name):
  def fail(module):
    raise ModuleNotFoundError(module)

  monkeypatch.setattr("importlib.resources.files", fail)
  text = stop_of(run_script, "scripts/example_folder.py", kind, "--to", tmp_path / "new")
  assert text.endswith(f"inside {name}, which is not installed; run `pip install {name}`")
  assert not (tmp_path / "new").exists()
