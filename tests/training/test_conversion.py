"""The conversion that ends a run: both forms compared on every image, or nothing written."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

import repjax
from repjax import disk, runs, training
from repjax.disk import trees
from repjax.errors import InputError
from repjax.training import conversion
from tests.helpers import leaves
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of a finished run."""
  return shutil.copytree(finished[0], tmp_path / "run")


def deployed(workdir):
  """Returns the files of the deploy folder, and checks that no draft or old folder is left."""
  assert [path.name for path in workdir.iterdir() if "deploy" in path.name] == ["deploy"]
  return tiny.contents(workdir / "deploy")


def spoiled(kernel_of, by):
  """Returns the result of `reparameterize` with one wrong kernel."""

  def reparameterize(params, batch_stats):
    def spoil(path, leaf):
      name = "/".join(entry.key for entry in path)
      return leaf * by if name == f"{kernel_of}/conv/kernel" else leaf

    right = repjax.reparameterize(params, batch_stats)
    return jax.tree_util.tree_map_with_path(spoil, right)

  return reparameterize


def test_the_report_says_what_was_compared(finished):
  workdir, report, _ = finished
  best = runs.read_checkpoint(
    workdir, {"variables": repjax.ModelSpec.read(workdir).variable_shapes()}, best=True
  )
  assert report.keys() == {
    "step",
    "recalibrated",
    "ema_decay",
    "dataset",
    "images",
    "accuracy",
    "agreement",
    "logits_difference",
    "tolerance",
    "layers",
    "parameters",
  }
  assert report["step"] == best[0]
  assert report["recalibrated"] is None
  assert report["tolerance"] == 1e-5
  assert report["parameters"] == {
    "train": sum(leaf.size for leaf in jax.tree.leaves(best[1]["variables"]["params"])),
    "deploy": sum(leaf.size for leaf in jax.tree.leaves(repjax.load(workdir)[1])),
  }


def test_the_report_compares_every_layer_that_was_folded(finished):
  _, report, _ = finished
  blocks = ("stem", *(f"stage{number}/block0" for number in (1, 2, 3, 4)))
  assert report["layers"].keys() == {f"{block}/RepConv_0" for block in blocks}
  assert all(0 < difference <= 1e-5 for difference in report["layers"].values())


def test_the_deploy_folder_holds_the_folded_best_checkpoint_the_model_and_the_report(finished):
  workdir, report, _ = finished
  assert json.loads((workdir / "deploy" / "report.json").read_text()) == report
  assert repjax.ModelSpec.read(workdir / "deploy") == repjax.ModelSpec.read(workdir)
  _, trained, spec = repjax.load(workdir, deploy=False)
  folded = jax.jit(repjax.reparameterize)(trained["params"], trained["batch_stats"])
  expected = leaves(folded)
  held = leaves(
    trees.read_tree(workdir / "deploy" / "params", spec.variable_shapes(deploy=True)["params"])
  )
  assert held.keys() == expected.keys()
  for path, value in held.items():
    np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_converting_again_gives_the_same(finished, workdir, digits_dir):
  shutil.rmtree(workdir / "deploy")
  assert training.convert(tiny.config(digits_dir), workdir) == finished[1]
  deployed(workdir)


def test_the_best_checkpoint_is_converted_not_the_newest(finished, overtrained, digits_dir):
  assert training.convert(tiny.config(digits_dir), overtrained) == finished[1]


def test_forms_that_differ_by_more_than_the_tolerance_leave_the_deploy_folder(workdir, digits_dir):
  before = deployed(workdir)
  with pytest.raises(InputError, match=r"more than the tolerance of 1\.0e-12") as caught:
    training.convert(tiny.config(digits_dir, tolerance=1e-12), workdir)
  assert f"{workdir}/deploy was left as it was. worst of 5 layers:" in str(caught.value)
  assert deployed(workdir) == before


@pytest.mark.parametrize("by", [1.001, float("nan")])
def test_a_wrong_fold_is_found_and_located(workdir, digits_dir, monkeypatch, by):
  before = deployed(workdir)
  monkeypatch.setattr(conversion, "reparameterize", spoiled("stage3/block0/RepConv_0", by))
  with pytest.raises(InputError, match="the deploy form differs from the training form by"):
    training.convert(tiny.config(digits_dir), workdir)
  assert deployed(workdir) == before


def test_a_wrong_fold_in_the_last_layer_is_blamed_on_it(workdir, digits_dir, monkeypatch):
  monkeypatch.setattr(conversion, "reparameterize", spoiled("stage4/block0/RepConv_0", 1.001))
  with pytest.raises(InputError, match=r"worst of 5 layers: +\S+ at stage4/block0/RepConv_0$"):
    training.convert(tiny.config(digits_dir), workdir)


def test_images_that_cannot_be_compared_fail_whichever_batch_they_are_in(
  workdir, digits_dir, monkeypatch
):
  batches_of = conversion.evaluation.batches

  def last_batch_not_finite(*arguments):
    batches = [
      batch | {"image": np.array(batch["image"], np.float32)} for batch in batches_of(*arguments)
    ]
    batches[-1]["image"][:] = np.nan
    return iter(batches)

  monkeypatch.setattr(conversion.evaluation, "batches", last_batch_not_finite)
  before = deployed(workdir)
  with pytest.raises(InputError, match=r"differs from the training form by (nan|inf)"):
    training.convert(tiny.config(digits_dir), workdir)
  assert deployed(workdir) == before


@pytest.mark.parametrize("name", ["write_tree", "write_json"])
def test_a_crash_while_writing_leaves_the_old_deploy_folder(
  workdir, digits_dir, finished, monkeypatch, name
):
  before = tiny.contents(workdir / "deploy")

  def crash(*arguments):
    raise OSError("the disk is full")

  with monkeypatch.context() as patch:
    patch.setattr(trees if name == "write_tree" else disk, name, crash)
    with pytest.raises(InputError, match="deploy could not be written: the disk is full"):
      training.convert(tiny.config(digits_dir), workdir)
  assert tiny.contents(workdir / "deploy") == before
  assert training.convert(tiny.config(digits_dir), workdir) == finished[1]
  deployed(workdir)


@pytest.mark.parametrize("verify", [False, True])
def test_parameters_that_are_not_finite_are_refused_and_named(workdir, digits_dir, verify):
  (step,) = runs.checkpoints(workdir)
  _, variables, _ = repjax.load(workdir, deploy=False)
  bn = variables["params"]["stem"]["RepConv_0"]["conv3x3"]["bn"]
  bn["bias"] = bn["bias"].at[0].set(-math.inf)  # no logit shows it, since a ReLU follows
  folder = runs.checkpoint_folder(workdir, step)
  shutil.rmtree(folder / "variables")
  trees.write_tree(folder / "variables", variables)
  disk.write_manifest(folder)
  before = tiny.contents(workdir / "deploy")
  named = "conv3x3/bn/bias" if verify else "the deploy form .* in stem/RepConv_0/conv/bias"
  with pytest.raises(InputError, match=f"not finite .*{named}" if verify else named):
    training.convert(tiny.config(digits_dir), workdir, verify=verify)
  assert tiny.contents(workdir / "deploy") == before


def test_a_run_without_a_checkpoint_cannot_be_converted(workdir, digits_dir):
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(InputError, match="holds a deploy form only"):
    training.convert(tiny.config(digits_dir), workdir)
  shutil.rmtree(workdir / "deploy")
  with pytest.raises(InputError, match="holds no whole checkpoint; has this run saved one yet"):
    training.convert(tiny.config(digits_dir), workdir)


REPORT = {
  "step": 1200,
  "recalibrated": None,
  "ema_decay": 0.0,
  "dataset": "imagenet2012",
  "images": 50000,
  "accuracy": {"train": 0.72406, "deploy": 0.72404},
  "agreement": 0.99998,
  "logits_difference": 2.34e-6,
  "tolerance": 1e-5,
  "layers": {"stem/RepConv_0": 1e-7, "stage1/block0/RepConv_0": 3.4e-6},
  "parameters": {"train": 9108984, "deploy": 8309384},
}


def test_a_report_reads_as_a_table():
  lines = [re.sub(" +", " ", line).strip() for line in conversion.format_report(REPORT).split("\n")]
  assert lines == [
    "training form deploy form",
    "parameters 9,108,984 8,309,384",
    "accuracy 72.41% 72.40%",
    "predictions agree on 49,999 of 50,000 images",
    "logits differ by 2.3e-06 of the largest (tolerance 1e-05)",
    "worst of 2 layers: 3.4e-06 at stage1/block0/RepConv_0",
  ]


def test_a_report_says_that_statistics_were_re_estimated():
  report = {**REPORT, "recalibrated": {"batches": 100}}
  *table, last = conversion.format_report(report).split("\n")
  assert "\n".join(table) == conversion.format_report(REPORT)
  assert last == "statistics re-estimated over 100 batches"


def test_a_report_says_that_an_average_was_converted():
  *table, last = conversion.format_report({**REPORT, "ema_decay": 0.9999}).split("\n")
  assert table == conversion.format_report(REPORT).split("\n")
  assert last == "parameters and statistics averaged over the steps, decay 0.9999"


def test_a_reports_columns_line_up():
  header, *rows = conversion.format_report(REPORT).split("\n")
  ends = [header.index("form") + 4, len(header)]
  for row in rows[:2]:
    assert len(row) == ends[1]
    assert row[: ends[0]][-1] != " "
    assert row[ends[0]] == " "
