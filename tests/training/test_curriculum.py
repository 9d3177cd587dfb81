"""A curriculum: sizes and augmentations that change at a step, also where a run continues."""

import itertools
import types
from typing import Any

import jax
import numpy as np
import pytest

from repjax import runs, training
from repjax.training import loop, planning
from tests.training import tiny
from tests.training.test_run import newest, records

pytest_plugins = ["tests.training.fixtures"]

STEPS, EPOCH = 6, 1437 / 32
PARTS = ((3 / EPOCH, 8, "none"), (4 / EPOCH, 12, "pad_and_crop"))  # until step 3 and step 4


def curriculum(digits_dir):
  config = tiny.config(digits_dir, curriculum=PARTS, num_steps=STEPS, log_every_steps=1)
  config.update({"eval_every_epochs": 2 / EPOCH, "augment_repeats": 2})
  return config


def batches_of(config, plan, start):
  batches = loop.training_batches(config, plan, start_step=start)
  result = list(itertools.islice(batches, STEPS - start))
  batches.close()
  return result


def test_every_step_has_its_batch_wherever_a_run_begins(digits_dir):
  config = curriculum(digits_dir)
  plan = planning.make_plan(config)
  assert plan.spec.preprocessing.image_size == 16  # of the evaluation
  whole = batches_of(config, plan, 0)
  assert [batch["image"].shape[1] for batch in whole] == [8, 8, 8, 12, 16, 16]
  assert len({image.tobytes() for image in whole[0]["image"]}) == 16  # each one twice
  for start in range(1, STEPS):
    jax.tree.map(np.testing.assert_array_equal, batches_of(config, plan, start), whole[start:])
  # The examples of a step do not depend on the parts of the training.
  config.curriculum = ()
  plain = batches_of(config, planning.make_plan(config), 0)
  for one, other in zip(whole, plain, strict=True):
    np.testing.assert_array_equal(one["label"], other["label"])
  np.testing.assert_array_equal(whole[-1]["image"], plain[-1]["image"])


def test_each_new_size_is_announced_once():
  said, seen, paused = [], [], []
  journal: Any = types.SimpleNamespace(note=said.append, pause=paused.append)
  step = loop._announced(lambda state, batch: seen.append((state, len(said))), journal)
  for number, size in enumerate((8, 8, 12, 12, 16, 8)):
    step(number, {"image": np.zeros((4, 2, size, size, 3))})
  assert [text.split()[-2] for text in said] == ["12", "16"]
  assert seen == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]  # said before it happens
  assert len(paused) == 2


@pytest.mark.proof
def test_a_run_continues_across_a_change_of_size_with_the_same_bits(
  digits_dir, quick_programs, tmp_path, monkeypatch, capsys
):
  config, first = curriculum(digits_dir), loop.train_batches
  training.train(config, tmp_path / "whole")
  printed = capsys.readouterr().out
  assert "8, 12, 16 px (16 in evaluation)" in printed
  assert [printed.count(f"compiling the step for images of {size} px") for size in (8, 12, 16)] == [
    *(0, 1, 1)
  ]

  def until_interrupted(*arguments, start_step, stop_step, **settings):
    yield from first(*arguments, start_step=start_step, stop_step=stop_step, **settings)
    raise KeyboardInterrupt  # after step 3, the last of the first part

  monkeypatch.setattr(loop, "train_batches", until_interrupted)
  with pytest.raises(KeyboardInterrupt):
    training.train(config, tmp_path / "continued")
  monkeypatch.undo()
  assert runs.checkpoints(tmp_path / "continued").keys() == {2}
  training.train(config, tmp_path / "continued")
  whole, continued = (newest(tmp_path / name) for name in ("whole", "continued"))
  assert whole[0] == continued[0] == STEPS
  jax.tree.map(np.testing.assert_array_equal, continued[1], whole[1])
  assert records(tmp_path / "continued") == records(tmp_path / "whole")
