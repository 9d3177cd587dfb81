"""Tests of `repjax prepare-dataset`."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import requests
import tensorflow_datasets as tfds

from repjax.cli import train
from repjax.data import open_source
from repjax.training import planning
from tests.cli.helpers import stop_of
from tests.data import test_tfrecords
from tests.data.pairs import pairs_folder, write_table
from tests.data.test_folder import files_below, write_image
from tests.training.tiny import ROOT

pytest_plugins = ["tests.training.fixtures"]
tfrecord_set = test_tfrecords.tfrecord_set


@pytest.fixture(autouse=True)
def _signals_of_pytest(monkeypatch):
  """Keeps the signal handlers of this process, which the command would replace."""
  monkeypatch.setattr("signal.signal", lambda *_: None)


@pytest.fixture
def photos(tmp_path):
  for name, count in (("ant", 10), ("bee", 5)):
    for number in range(count):
      write_image(tmp_path / "photos" / name / f"{number}.jpg")
  return tmp_path / "photos"


def test_a_folder_is_prepared_and_described(run_command, photos, tmp_path):
  sets = tmp_path / "my sets"
  prepare = ("prepare-dataset", "--from-folder", photos, "--name", "pets", "--data-dir", sets)
  lines = run_command(*prepare, "--validation-ratio", "0.4", "--seed", "3").splitlines()
  assert lines[:3] == [
    "classes: 2 (ant, bee)",
    "images: 9 train, 6 validation",
    "training images a class: 3 (bee) to 6 (ant)",
  ]
  assert re.fullmatch(rf"saved: {sets}/pets/1\.0\.0, 0\.\d MB", lines[3])
  assert lines[4] == (
    f"next: repjax train --config finetune --config.dataset=pets "
    f"--config.data_dir='{sets}' --config.init_from=PATH --workdir runs/pets"
  )
  assert re.fullmatch(r"took \d+\.\d s", lines[5])
  assert len(lines) == 6
  assert len(open_source("pets", "train", data_dir=str(sets)).examples) == 9
  assert stop_of(run_command, *prepare).startswith("error: a set called pets exists already, in")
  (photos / "ant" / "0.jpg").write_bytes(b"")
  (photos / "bee" / "9.jpg").write_bytes((photos / "bee" / "0.jpg").read_bytes())
  assert stop_of(run_command, *prepare, "--replace", "--strict") == (
    "error: nothing was written, since 1 of the files cannot be used; without --strict they are "
    "left out, and skipped.txt lists them all: ant/0.jpg: empty file"
  )
  printed = run_command(*prepare, "--replace", "--num-workers", "1", "--validation-ratio", "0.5")
  assert "skipped, as they cannot be used: 1, such as ant/0.jpg (empty file); all are " in printed
  assert f"listed in {sets}/pets/1.0.0/skipped.txt\n" in printed


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_a_folder_of_masks_is_prepared_and_described(run_command, tmp_path):
  folder, sets = tmp_path / "streets", tmp_path / "sets"
  pairs_folder(folder, train=4, val=2)
  prepare = ("prepare-dataset", "--from-mask-folder", folder, "--name", "streets")
  prepare += ("--data-dir", sets)
  lines = run_command(*prepare).splitlines()
  assert lines[:2] == ["classes: 3 (0, 1, 2)", "images: 4 train, 2 validation"]
  shares = r"training pixels a class: \d\d\.\d\d% \(\d\) to \d\d\.\d\d% \(\d\)"
  assert re.fullmatch(shares, lines[2])
  command = shlex.split(lines[4].removeprefix("next: "))
  assert command[:4] == ["repjax", "train", "--config", "scenes"]
  arguments, changes = train.parse([*command[2:], "--config.batch_size=4"])
  config = train.load_config(train.config_file(arguments.config), changes)
  plan = planning.make_plan(config)  # opens both splits, and checks every field
  assert (plan.spec.class_names, len(plan.eval.examples)) == (("0", "1", "2"), 2)
  write_table(folder, names=["sky", "cat", "dog", "newt"])
  (folder / "train" / "masks" / "1.png").unlink()
  said = stop_of(run_command, *prepare, "--strict", "--replace")
  assert said.endswith("train/images/1.jpg: it has no mask train/masks/1.png")
  printed = run_command(*prepare, "--replace")
  assert "warning: classes without a pixel in the validation split: newt" in printed
  assert "skipped, as they cannot be used: 1, such as train/images/1.jpg (it has no mask" in printed


def test_a_folder_full_of_other_things_is_described_in_short(run_command, tmp_path):
  for name in range(50):
    (tmp_path / "home" / f"folder{name:02}").mkdir(parents=True)
    for ending in range(50):
      (tmp_path / "home" / f"folder{name:02}" / f"file.{ending}").touch()
  said = stop_of(run_command, "prepare-dataset", "--from-folder", tmp_path / "home", "--name", "x1")
  assert "folder00 (1 x .0, 1 x .1, 1 x .10 and 47 more); folder01" in said
  assert "folder04" in said
  assert "and 45 more" in said
  assert len(said) < 1000


def test_the_default_folder_is_not_in_the_next_command(run_command, photos, tmp_path, monkeypatch):
  monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
  printed = run_command("prepare-dataset", "--from-folder", photos, "--name", "pets")
  assert f"saved: {tmp_path}/default/pets/1.0.0, " in printed
  assert "--config.dataset=pets --config.init_from=PATH --workdir runs/pets\n" in printed


def test_images_in_both_splits_are_warned_of(run_command, photos, tmp_path):
  for path in (photos / "ant").iterdir():
    path.write_bytes((photos / "bee" / "0.jpg").read_bytes())
  printed = run_command(
    "prepare-dataset", "--from-folder", photos, "--name", "pets", "--data-dir", tmp_path
  )
  assert re.search(
    "warning: images that are in the validation split and outside it.*: (8|9)", printed
  )


def test_names_of_files_need_not_be_utf8(run_command, photos, tmp_path):
  write_image(photos / "ant" / os.fsdecode(b"caf\xe9.jpg"))
  (photos / "ant" / os.fsdecode(b"broken \xff.jpg")).write_bytes(b"")
  printed = run_command(
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
    (("--from-mask-folder", "nowhere"), "error: --from-mask-folder needs --name"),
    (("--tfds", "cifr10"), "error: unknown data set 'cifr10'; did you mean cifar10"),
    (("--from-tfrecord", "cifr10"), "error: unknown data set 'cifr10'; did you mean cifar10"),
    (("--tfds", "mnist", "--num-workers", "0"), "error: --num-workers counts threads, at least 1"),
    (("--tfds", "mnist", "--to", "x"), "error: --to goes with --from-tfrecord; use --data-dir"),
    (
      ("--tfds", "mnist", "--from-tfrecord", "mnist"),
      "error: argument --from-tfrecord: not allowed",
    ),
    ((), "error: one of the arguments --from-folder --from-mask-folder --from-tfrecord --tfds is"),
  ],
)
def test_mistakes_on_the_command_line(run_command, tmp_path, arguments, said):
  stop = stop_of(run_command, "prepare-dataset", *arguments, "--data-dir", tmp_path)
  assert stop.startswith(said)


def test_a_tfrecord_set_is_converted_by_the_command_in_the_error(run_command, tfrecord_set):
  with pytest.raises(ValueError, match="--from-tfrecord pets") as caught:
    open_source("pets", "train", data_dir=str(tfrecord_set))
  command = str(caught.value).split("repjax prepare-dataset ")[1].split()
  other = tfrecord_set / "other"
  printed = run_command("prepare-dataset", *command, "--to", other, "--num-workers", "1")
  assert f"copied: {other}/pets/1.0.0 holds" in printed
  printed = run_command("prepare-dataset", *command)
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
def test_what_tfds_cannot_prepare_is_one_paragraph(run_command, tmp_path, monkeypatch, error, said):
  def fail(builder, file_format):
    assert file_format == "array_record"
    raise error

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  text = stop_of(run_command, "prepare-dataset", "--tfds", "mnist", "--data-dir", tmp_path)
  assert text.startswith("error: TFDS cannot prepare mnist: ")
  assert re.search(said, text)
  assert "\n" not in text


def test_tfds_prepares_a_set_as_array_record_once(run_command, tmp_path):
  command = ("prepare-dataset", "--tfds", "digits", "--data-dir", tmp_path)
  assert f"prepared: {tmp_path}/digits/1.0.0\n" in run_command(*command)
  before = files_below(tmp_path)
  assert len(open_source("digits", "test", data_dir=str(tmp_path)).examples) == 360
  assert run_command(*command).startswith(f"prepared: {tmp_path}/digits/1.0.0\n")
  assert files_below(tmp_path) == before


def test_tfds_does_not_prepare_what_is_there_as_tfrecord(run_command, tfrecord_set):
  text = stop_of(run_command, "prepare-dataset", "--tfds", "pets", "--data-dir", tfrecord_set)
  assert text.endswith(f"--from-tfrecord pets --data-dir {tfrecord_set}")


def test_names_of_classes_and_files_are_printed_on_one_line(run_command, photos, tmp_path):
  write_image(photos / "ant" / "a\x1b[31m\nb.jpg")
  (photos / "ant" / "c\x1b[0m\nd.jpg").write_bytes(b"")
  printed = run_command(
    "prepare-dataset", "--from-folder", photos, "--name", "pets", "--data-dir", tmp_path
  )
  assert "\x1b" not in printed
  assert r"such as ant/c\x1b[0m\nd.jpg (empty file)" in printed


SIGNALLED = """
import os, sys
from repjax import cli
from repjax.data import folder
read, calls, number = folder.read_image_file, [], int(sys.argv.pop())
def signalling(*arguments):
  calls.append(arguments)
  if len(calls) == 6:
    os.kill(os.getpid(), number)
  return read(*arguments)
folder.read_image_file = signalling
cli.main(["prepare-dataset", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
  ("number", "said", "status"),
  [(signal.SIGTERM, "stopped; nothing is half-written", 143), (signal.SIGINT, "stopped;", 130)],
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
  assert not sets.exists()
