"""Whose a workdir is: what a run writes about itself, and what may not change when it continues."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from repjax import disk, runs
from repjax.errors import InputError, unknown
from repjax.spec import ModelSpec
from repjax.training.planning import Config, read_config

FREE = {
  "data_dir",  # the images are known by their fingerprint
  "eval_every_epochs",
  "init_from",  # a run that has begun does not read it again
  "log_every_steps",
  "num_workers",
  "recalibrate_batches",
  "save_every_minutes",
  "tensorboard",
  "tolerance",
}
"""The config's fields that no parameter depends on: they may change when a run continues."""

RESUME = ("auto", "must", "never")
_OF_A_RUN = (
  runs.config_file,
  runs.model_file,
  runs.import_file,
  runs.metrics_file,
  runs.checkpoints_folder,
  runs.deploy_folder,
)
_BEFORE = {
  "backbone_rate": 1.0,
  "cooldown_epochs": 0.0,
  "ema_decay": 0.0,
  "qat": False,
}  # what runs did that are older than the field


def check_data(workdir: Path, fingerprints: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises InputError where a run would continue on other images than it began with.

  Only facts that both sides know are compared; a workdir without data.json is an older one.

  Args:
    workdir: of the run.
    fingerprints: "train" and "eval" to the `Source.fingerprint` of that split.
  """
  path = runs.data_file(workdir)
  if not runs.checkpoints(workdir) or not path.exists():
    return
  held = disk.read_json(path)
  if not isinstance(held, dict) or not all(isinstance(facts, dict) for facts in held.values()):
    raise InputError(f"{path} is damaged: it does not hold facts about the data; restore it")
  new = plain(fingerprints)
  shared = {part: held[part].keys() & new[part].keys() for part in held.keys() & new.keys()}
  theirs, ours = (
    {part: {name: facts[part][name] for name in names} for part, names in shared.items()}
    for facts in (held, new)
  )
  changed = difference(theirs, ours)
  names = {
    part: [facts[part].get(key) for facts in (theirs, ours) for key in ("name", "split")]
    for part in ours
  }
  if any(name[:2] != name[2:] for name in names.values()):
    raise InputError(
      f"the run in {workdir} began with other data: {changed}. Name the data that it began with, "
      "or train on these in a new folder from where this run is: another --workdir with "
      f"--config.init_from={workdir}"
    )
  if changed:
    raise InputError(
      f"the data set has changed since the run in {workdir} began: {changed}. A run continues on "
      "the same images only: restore the set, or train on the new one in a new folder from where "
      f"this run is: another --workdir with --config.init_from={workdir}"
    )


def check_workdir(workdir: Path, spec: ModelSpec) -> None:
  """Raises InputError where a workdir holds, or may hold, a run of another model, or an import."""
  if runs.import_file(workdir).exists():
    raise InputError(
      f"{workdir} holds imported weights, not a run; give another --workdir, "
      f"with --config.init_from={workdir} to start from them"
    )
  if runs.checkpoints(workdir) and not runs.model_file(workdir).exists():
    raise InputError(
      f"{workdir} has checkpoints but no model.json that says of which model; restore that file, "
      "or give another --workdir"
    )
  if runs.model_file(workdir).exists():
    held = ModelSpec.read(workdir)
    ours, theirs = ({**s.to_json(), "class_names": ()} for s in (spec, held))
    # Through JSON, so that tuples and lists compare equal.
    if plain(ours) != plain(theirs):
      raise InputError(
        f"{workdir} belongs to another model: {difference(plain(theirs), plain(ours))}. "
        "Nothing was changed; give another --workdir, or the config that this run began with"
      )


def check_resume(workdir: Path, resume: str) -> None:
  """Raises InputError where a workdir holds a run and must not, or none that could be continued.

  Args:
    workdir: of the run.
    resume: "auto", "must" or "never".
  """
  if resume not in RESUME:
    raise unknown("value of resume", resume, RESUME)
  if resume == "must" and not runs.checkpoints(workdir):
    raise InputError(
      f"{workdir} holds no checkpoint to continue from; is it the right folder? --resume=auto "
      "begins a run where there is none"
    )
  held = [path(workdir).name for path in _OF_A_RUN if path(workdir).exists()]
  if resume == "never" and held:
    raise InputError(
      f"{workdir} already holds {', '.join(held)}, of a run that --resume=never must not touch; "
      "give another --workdir, or --resume=auto to continue that run"
    )


def check_continuing(workdir: Path, config: Config) -> None:
  """Raises InputError where a run with checkpoints would learn in another way than it began.

  Fields of FREE may change. One that the run's config.json does not know is newer than that run,
  and is taken for what it was before it could be set.
  """
  path = runs.config_file(workdir)
  if not runs.checkpoints(workdir) or not path.exists():
    return
  held = plain({**_BEFORE, **read_config(workdir).to_dict()})
  new = plain(config.to_dict())
  fixed = (held.keys() & new.keys()) - FREE
  changed = difference(*({name: facts[name] for name in fixed} for facts in (held, new)))
  if changed:
    raise InputError(
      f"the run in {workdir} began with another config: {changed}. A run is continued as it began, "
      "so that it ends as if it had never stopped; set this back, or begin another run from it: "
      f"another --workdir with --config.init_from={workdir} (from nothing: without that, and "
      f"--resume=never to be sure). What may change is {', '.join(sorted(FREE))}"
    )


def claim_workdir(
  workdir: Path, config: Config, spec: ModelSpec, fingerprints: Mapping[str, Mapping[str, Any]]
) -> None:
  """Writes config.json, model.json and data.json, and says which config fields have changed."""
  new = config.to_dict()
  if runs.config_file(workdir).exists():
    changed = difference(disk.read_json(runs.config_file(workdir)), plain(new))
    if changed:
      print(f"config changed since this run began: {changed}", flush=True)
  disk.write_json(runs.config_file(workdir), new)
  disk.write_json(runs.data_file(workdir), plain(fingerprints))
  spec.write(workdir)


def plain(value: Any) -> Any:
  """Tuples as lists and all keys as strings, as JSON gives them back."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def difference(old: dict, new: dict) -> str:
  """The fields in which two plain trees differ, as "field old -> new"."""
  flat_old, flat_new = (
    {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    for leaves in (
      jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
      for tree in (old, new)
    )
  )
  return ", ".join(
    f"{key} {flat_old.get(key)} -> {flat_new.get(key)}"
    for key in sorted({*flat_old, *flat_new})
    if flat_old.get(key) != flat_new.get(key)
  )
