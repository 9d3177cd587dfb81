"""Checks whether a run may continue in a workdir, and records what the run was started with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from repjax import disk, runs
from repjax.config import BEFORE, FREE, RESUME, RUNNING_VARIANCES, Config
from repjax.errors import InputError, printable, unknown
from repjax.spec import ModelSpec
from repjax.training.planning import read_config

_PATHS_OF_A_RUN = (
  *(runs.config_file, runs.model_file, runs.import_file, runs.metrics_file),
  *(runs.checkpoints_folder, runs.deploy_folder),
)

_FOLLOWS = (runs.recalibrated_folder, runs.deploy_folder, runs.int8_folder)
_FOLDERS_OF_A_RUN = (runs.checkpoints_folder, *_FOLLOWS)


def check_resume(workdir: Path, resume: str) -> None:
  """Raises InputError if a workdir holds a run that it must not hold, or lacks what it must hold.

  Args:
    workdir: folder of the run.
    resume: "auto" takes both, "must" requires a checkpoint, "never" forbids a run.

  Raises:
    InputError: as said, or the checkpoints of the workdir's run are lost.
  """
  if resume not in RESUME:
    raise unknown("value of resume", resume, RESUME)
  for path in _FOLDERS_OF_A_RUN:
    disk.real(path(workdir))  # Raises for a link to nothing, such as a disk that is not mounted.
  if resume == "must" and not runs.checkpoints(workdir):
    raise InputError(
      f"{workdir} holds no checkpoint to continue from; is it the right folder? --resume=auto "
      "begins a run where there is none"
    )
  held = [path(workdir).name for path in _PATHS_OF_A_RUN if path(workdir).exists()]
  if resume == "never" and held:
    raise InputError(
      f"{workdir} already holds {', '.join(held)} of a run that --resume=never must not touch; "
      "give a different --workdir, or --resume=auto to continue that run"
    )
  _check_not_lost(workdir)


def _check_not_lost(workdir: Path) -> None:
  """Raises InputError if a run's newest checkpoint is gone, such as after an incomplete copy.

  The run would otherwise begin again, and cut off its records. A run that was killed before its
  first checkpoint may begin again: its folder of checkpoints is there, and nothing was made of one.
  """
  newest, found = runs.newest_finished(workdir), runs.checkpoints(workdir)
  if runs.import_file(workdir).exists() or (found and max(found) >= (newest or 0)):
    return
  folder = runs.checkpoints_folder(workdir)
  if newest is not None:
    lost = f"its newest checkpoint, of step {newest:,}, is not in {folder}"
  elif not folder.exists() and runs.read_records(runs.metrics_file(workdir))[0]:
    lost = f"{folder} does not exist, though {runs.metrics_file(workdir).name} has records"
  elif made := [path(workdir).name for path in _FOLLOWS if path(workdir).exists()]:
    lost = f"{folder} holds no checkpoint, though {' and '.join(made)} was made from one"
  else:
    return
  restart = "continue from an older checkpoint" if found else "begin again"
  raise InputError(
    f"{workdir} holds a run that cannot continue: {lost}. Copy the checkpoints to their place "
    f"again, or give a different --workdir. To {restart} on purpose, move "
    f"{_named(workdir, found)} away first"
  )


def _named(workdir: Path, found: Mapping[int, float]) -> str:
  """Returns the names of what shows that a checkpoint is lost."""
  paths = [runs.newest_file] if found else [runs.newest_file, runs.metrics_file, *_FOLLOWS]
  return ", ".join(path(workdir).name for path in paths if path(workdir).exists())


def check_data(workdir: Path, fingerprints: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises InputError if a run would continue with images other than those it began with.

  Only facts that both sides know are compared. A workdir without data.json is older than the file,
  and passes.

  Args:
    workdir: folder of the run.
    fingerprints: "train" and "eval" to the `Source.fingerprint` of each split.
  """
  held = runs.read_data(workdir) if runs.checkpoints(workdir) else None
  if held is None:
    return
  before, now = _common_facts(held, plain(fingerprints))
  changed = difference(before, now)
  if any(_source_of(before[part]) != _source_of(now[part]) for part in now):
    raise InputError(
      f"the run in {workdir} began with different data: {changed}. Name the data that it began "
      "with, or start a new run from this one: a different --workdir with "
      f"--config.init_from={workdir}"
    )
  if changed:
    raise InputError(
      f"the data set has changed since the run in {workdir} began: {changed}. A run continues on "
      "the same images only. Restore the set, or start a new run from this one: a different "
      f"--workdir with --config.init_from={workdir}"
    )


def _common_facts(*both: Mapping[str, Mapping[str, Any]]) -> list[dict[str, dict[str, Any]]]:
  """Returns two trees of facts without the facts that only one of the two trees holds."""
  first, second = both
  shared = {part: first[part].keys() & second[part].keys() for part in first.keys() & second.keys()}
  return [
    {part: {name: facts[part][name] for name in names} for part, names in shared.items()}
    for facts in both
  ]


def _source_of(facts: Mapping[str, Any]) -> tuple[Any, Any]:
  return facts.get("name"), facts.get("split")


def check_workdir(workdir: Path, spec: ModelSpec) -> None:
  """Raises InputError if a workdir holds a run of a different model, or an import.

  Checkpoints without model.json are refused too, since their model is unknown.
  """
  if runs.import_file(workdir).exists():
    raise InputError(
      f"{workdir} holds imported weights, not a run; give a different --workdir, "
      f"with --config.init_from={workdir} to start from them"
    )
  if not runs.model_file(workdir).exists():
    if runs.checkpoints(workdir):
      raise InputError(
        f"{workdir} has checkpoints but no model.json that names their model; restore that file, "
        "or give a different --workdir"
      )
    return
  # Classes are left out: the data set is compared in `check_data`. Through `plain`, tuples of the
  # config equal lists of the file.
  held, new = (
    plain(dataclasses.replace(each, class_names=(), class_colors=()).to_json())
    for each in (ModelSpec.read(workdir), spec)
  )
  if held != new:
    raise InputError(
      f"{workdir} belongs to a different model: {difference(held, new)}. Nothing was changed; "
      "give a different --workdir, or the config that this run began with"
    )


def keep_variance(config: Config, workdir: Path) -> Config:
  """Returns the config with its `running_variance`: if it is None, that of the run in a workdir.

  A running variance that changed its kind in the middle of a run would be of no kind. A new run
  gets the unbiased one.
  """
  if config.running_variance is not None:
    return config
  full = config.copy_and_resolve_references()
  kind = RUNNING_VARIANCES[0]
  if runs.checkpoints(workdir) and runs.config_file(workdir).exists():
    kind = read_config(workdir).get("running_variance") or BEFORE["running_variance"]
  with full.ignore_type():
    full.running_variance = kind
  return full


def check_continuing(workdir: Path, config: Config) -> None:
  """Raises InputError if a run with checkpoints would learn differently from how it began.

  Fields in `repjax.config.FREE` may change. A field that the run's config.json lacks is newer than
  the run. It must have its value in `repjax.config.BEFORE`, or may have any value if it is not
  there.
  """
  path = runs.config_file(workdir)
  if not runs.checkpoints(workdir) or not path.exists():
    return
  held = plain({**BEFORE, **read_config(workdir).to_dict()})
  new = plain(keep_variance(config, workdir).to_dict())
  fixed = (held.keys() & new.keys()) - FREE
  changed = difference(*({name: facts[name] for name in fixed} for facts in (held, new)))
  if changed:
    raise InputError(
      f"the run in {workdir} began with a different config: {changed}. Set this back, since a run "
      "continues only as it began, or start a new run in a different --workdir: with "
      f"--config.init_from={workdir} from this one, without it from nothing (add --resume=never "
      f"to be sure). These may change: {', '.join(sorted(FREE))}"
    )


def write_start_files(
  workdir: Path, config: Config, spec: ModelSpec, fingerprints: Mapping[str, Mapping[str, Any]]
) -> None:
  """Writes config.json, model.json and data.json, and prints which config fields have changed."""
  new = config.to_dict()
  if runs.config_file(workdir).exists():
    changed = difference(runs.read_config_json(workdir), plain(new))
    if changed:
      print(f"config changed since this run began: {changed}", flush=True)
  runs.write_start(workdir, config=new, data=plain(fingerprints), spec=spec.to_json())


def plain(value: Any) -> Any:
  """Returns a value as JSON would read it back: tuples become lists, and all keys strings."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def difference(old: dict, new: dict) -> str:
  """Lists the leaves in which two plain trees differ, as "field old -> new"."""
  flat_old, flat_new = (
    {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    for leaves in (
      jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
      for tree in (old, new)
    )
  )
  return ", ".join(
    f"{_word(key)} {_word(flat_old.get(key))} -> {_word(flat_new.get(key))}"
    for key in sorted({*flat_old, *flat_new})
    if flat_old.get(key) != flat_new.get(key)
  )


def _word(value: Any) -> str:
  """Writes a value on one line and in few characters; the values of a file may be anything."""
  text = printable(str(value))
  return text if len(text) <= 200 else f"{text[:200]}..."
