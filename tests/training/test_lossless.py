"""Whatever ends a run, the same command goes on as if nothing had happened, or says what to do."""

import contextlib
import os
import random
import resource
import shutil
import signal
import threading
import time

import grain
import pytest

from repjax import runs, training
from repjax.errors import InputError
from repjax.runs import CheckpointWriter, RecordsFile, read_bookmark
from repjax.training import evaluation, loop, run
from repjax.training.interruption import Preempted, Stopped
from scripts import torture
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def assert_as_undisturbed(finished):
  """Compares all that a run has left with what an undisturbed one leaves, bit for bit."""

  def compare(workdir, undisturbed=finished[0]):
    ours, theirs = torture.contents(workdir), torture.contents(undisturbed)
    for held in (ours, theirs):
      del held["config.json"]  # says how often to save
    assert ours.keys() == theirs.keys()
    assert torture.count_differing(ours, theirs) == 0

  return compare


def send_when(monkeypatch, module, name, at, *numbers):
  """Sends signals to this process when the item `at` of a stream of batches is asked for."""
  batches_of = getattr(module, name)

  def sending(*arguments, **settings):
    for number, batch in enumerate(batches_of(*arguments, **settings)):
      if number == at:
        for each in numbers:
          os.kill(os.getpid(), each)
      yield batch

  monkeypatch.setattr(module, name, sending)


def half_saved(workdir):
  return list(workdir.glob("checkpoints/.*.repjax-*"))


def wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


THREE = [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


@pytest.mark.parametrize(
  ("module", "name", "at", "numbers", "error", "begun"),
  [
    (loop, "train_batches", 0, THREE, Stopped, "finished"),
    pytest.param(
      *(evaluation, "eval_batches", 1, [signal.SIGTERM], Preempted, "finished"),
      marks=pytest.mark.proof,
    ),
    (loop, "train_batches", 5, [signal.SIGTERM], Preempted, "segmented"),
  ],
  ids=["the first step", "an evaluation", "segmentation"],
)
def test_a_signal_saves_the_step_in_hand_and_nothing_is_lost(
  digits_dir,
  tmp_path,
  monkeypatch,
  capsys,
  request,
  assert_as_undisturbed,
  module,
  name,
  at,
  numbers,
  error,
  begun,
):
  undisturbed = request.getfixturevalue(begun)[0]
  config = tiny.config(digits_dir) if begun == "finished" else tiny.segmentation()
  with monkeypatch.context() as patch:
    send_when(patch, module, name, at, *numbers)
    with pytest.raises(KeyboardInterrupt) as caught:
      training.train(config, tmp_path)
  assert type(caught.value) is error
  printed = capsys.readouterr().out
  assert "re-parameterizing" not in printed
  newest = max(runs.checkpoints(tmp_path))
  assert caught.value.saved == f"step {newest}/{tiny.STEPS}"
  assert f"step {newest}/{tiny.STEPS} is saved\n" in printed
  assert runs.checkpoints(tmp_path)[newest] == -1
  assert not read_bookmark(tmp_path, newest).evaluated
  assert not (tmp_path / ".lock").exists()
  if module is evaluation:
    assert newest == tiny.EVAL_STEPS
  else:
    assert 0 < newest < tiny.STEPS
  training.train(config, tmp_path, resume="must")
  assert f"continuing from the checkpoint of step {newest}\n" in capsys.readouterr().out
  assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.proof
def test_a_second_ctrl_c_during_a_save_stops_at_once_and_spoils_nothing(
  digits_dir, tmp_path, monkeypatch, assert_as_undisturbed
):
  config = tiny.config(digits_dir)
  settle = CheckpointWriter.settle

  def settle_and_send(self):
    if self._saving:
      os.kill(os.getpid(), signal.SIGINT)
    settle(self)

  with monkeypatch.context() as patch:
    send_when(patch, loop, "train_batches", 5, signal.SIGTERM)
    patch.setattr(CheckpointWriter, "settle", settle_and_send)
    with pytest.raises(KeyboardInterrupt):
      training.train(config, tmp_path)
  wait_until(lambda: not half_saved(tmp_path))  # as a process does before it ends
  training.train(config, tmp_path)
  assert_as_undisturbed(tmp_path)


@pytest.mark.proof
def test_an_evaluation_after_the_last_step_that_was_put_off_twice_is_made_up_for(
  digits_dir, tmp_path, monkeypatch, assert_as_undisturbed
):
  config = tiny.config(digits_dir)
  evaluate_split, evaluations = evaluation.run, []

  def interrupted(*arguments):
    evaluations.append(arguments)
    if len(evaluations) in (3, 4):
      os.kill(os.getpid(), signal.SIGTERM)
    return evaluate_split(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "run", interrupted)
    for _ in range(2):
      with pytest.raises(Preempted):
        training.train(config, tmp_path)
      assert not read_bookmark(tmp_path, tiny.STEPS).evaluated
      assert runs.checkpoints(tmp_path)[tiny.STEPS] == -1
    patch.setattr(run, "convert", None)  # recorded and then stopped: not recorded twice
    with pytest.raises(TypeError):
      training.train(config, tmp_path)
  training.train(config, tmp_path)
  assert len(evaluations) == 5
  assert_as_undisturbed(tmp_path)


@contextlib.contextmanager
def files_of_at_most(size):
  """Lets no file of this process grow beyond a size, as on a disk that is full."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_ends_the_run_soon_and_leaves_the_one_before(
  digits_dir, tmp_path, monkeypatch, capsys, assert_as_undisturbed
):
  config = tiny.config(digits_dir)
  save = CheckpointWriter.save

  def save_to_a_full_disk(self, step, items, score, **more):
    self.settle()  # or the disk would be full for the checkpoint before, too
    with files_of_at_most(10_000) if step > 4 else contextlib.nullcontext():
      save(self, step, items, score, **more)
      if step > 4:
        wait_until(self._saving.done)

  with monkeypatch.context() as patch:
    patch.setattr(CheckpointWriter, "save", save_to_a_full_disk)
    with pytest.raises(InputError, match=r"checkpoints/8 could not be written: File too large\. W"):
      training.train(config, tmp_path)
  assert "step 12/12" not in capsys.readouterr().out  # where the next save would be
  assert runs.checkpoints(tmp_path).keys() == {4}
  training.train(config, tmp_path)
  assert_as_undisturbed(tmp_path)


@pytest.mark.proof
def test_metrics_that_cannot_be_written_end_a_run_that_saves_at_every_step(
  digits_dir, tmp_path, monkeypatch, assert_as_undisturbed
):
  config = tiny.config(digits_dir, save_every_minutes=1e-9)
  write, save, savers = RecordsFile.write, CheckpointWriter.save, []

  def save_and_tell(self, *arguments, **more):
    savers.append(self)
    save(self, *arguments, **more)

  def write_to_a_full_disk(self, **values):
    for saver in savers[-1:]:
      wait_until(saver._saving.done)  # or the disk would be full for the checkpoint too
    with files_of_at_most(250):
      write(self, **values)

  with monkeypatch.context() as patch:
    patch.setattr(CheckpointWriter, "save", save_and_tell)
    patch.setattr(RecordsFile, "write", write_to_a_full_disk)
    with pytest.raises(InputError, match=r"metrics\.jsonl could not be written: "):
      training.train(config, tmp_path)
  assert 250 - len((tmp_path / "metrics.jsonl").read_text()) == 0  # the last line is cut
  training.train(config, tmp_path)
  assert_as_undisturbed(tmp_path)


def test_a_deploy_form_that_cannot_be_written_leaves_the_one_before(
  digits_dir, finished, tmp_path, assert_as_undisturbed
):
  workdir, config = shutil.copytree(finished[0], tmp_path / "run"), tiny.config(digits_dir)
  with (
    files_of_at_most(10_000),
    pytest.raises(InputError, match=r"run/deploy could not be written: File too large\. "),
  ):
    training.convert(config, workdir)
  assert_as_undisturbed(workdir)


class OneDamaged:
  """Examples of which one is cut short."""

  def __init__(self, examples, index):
    self._examples, self._index = examples, index

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    example = self._examples[index]
    return example if index != self._index else {**example, "image": example["image"][:40]}


def test_an_image_that_cannot_be_read_ends_the_run_at_once_and_is_named(
  digits_dir, tmp_path, monkeypatch, assert_as_undisturbed
):
  config = tiny.config(digits_dir, num_workers=1)
  batches_of = loop.train_batches
  seventh = int(grain.MapDataset.source(range(1437)).seed(config.seed).shuffle()[32 * 6])

  def damaged(examples, **settings):
    return batches_of(OneDamaged(examples, seventh), **settings)

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_batches", damaged)
    with pytest.raises(InputError, match=f"image {seventh} .* cannot be decoded"):
      training.train(config, tmp_path)
  assert runs.checkpoints(tmp_path).keys() == {4}
  assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
  training.train(tiny.config(digits_dir), tmp_path)
  assert_as_undisturbed(tmp_path)


@pytest.fixture
def run_main(tmp_path, digits_dir, cache_home):
  """Starts main.py on the tiny run with an average, in a process of its own."""
  (tmp_path / "tiny_config.py").write_text(
    "from tests.training import tiny\n"
    f"get_config = lambda: tiny.averaging({str(digits_dir)!r}, save_every_minutes=1e-9)\n"
  )

  def start(*arguments):
    return tiny.start_python(
      str(tiny.ROOT / "main.py"),
      f"--config={tmp_path}/tiny_config.py",
      f"--workdir={tmp_path}/run",
      *arguments,
      cwd=tmp_path,
      cache=cache_home,
    )

  return start


def wait_for_line(process, beginning):
  while not (process.stdout.readline() or pytest.fail("ended")).startswith(beginning):
    pass


@pytest.mark.proof  # which takes half a minute; scripts/torture.py does more of it
def test_killed_at_random_moments_and_stopped_the_same_command_ends_with_the_same_bits(
  run_main, averaged, digits_dir, tmp_path
):
  workdir, rng = tmp_path / "run", random.Random(0)
  for _ in range(5):  # a save may just have ended when the signal arrives
    saving = run_main()
    wait_until(lambda: half_saved(workdir))
    saving.kill()
    saving.communicate()
    if half_saved(workdir):
      break
  assert half_saved(workdir)

  stopped = run_main()
  wait_for_line(stopped, "step ")
  with pytest.raises(InputError, match=f"is in use by process {stopped.pid} on"):
    training.train(tiny.config(digits_dir), workdir)
  stopped.terminate()
  text, errors = stopped.communicate()
  assert stopped.returncode == 0, errors
  newest = max(runs.checkpoints(workdir))
  saved = f"step {newest}/{tiny.STEPS}"
  assert text.endswith(f"{saved} is saved\nstopped; the same command continues from {saved}\n")
  assert not half_saved(workdir)

  for _ in range(2):
    killed = run_main("--resume=must")
    wait_for_line(killed, "continuing ")
    time.sleep(rng.uniform(0, 4))
    killed.kill()
    killed.communicate()

  last = run_main("--resume=must")
  _, errors = last.communicate()
  assert last.returncode == 0, errors
  ours, theirs = torture.contents(workdir), torture.contents(averaged[0])
  for held in (ours, theirs):
    del held["config.json"]  # says how often to save
  assert ours.keys() == theirs.keys()
  assert torture.count_differing(ours, theirs) == 0
