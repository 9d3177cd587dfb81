"""Imports weights into a folder that the rest of repjax reads, and exports them from one."""

import dataclasses
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax import config, disk, extras, names, runs
from repjax.errors import InputError
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.weights import hub, repmlpnet, repvgg
from repjax.weights.files import read_entry
from repjax.weights.misfits import is_half
from repjax.weights.recognition import Recognition, recognize, removed_from
from repjax.weights.sources import PREPROCESSING, RELEASED_WITH
from repjax.weights.translation import from_torch, to_torch


def import_weights(
  source: str,
  workdir: Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  drop_head: bool = False,
  allow_half: bool = False,
  entry: str | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Makes a workdir from a checkpoint file; writes nothing unless all tensors fit.

  A training-form checkpoint becomes a checkpoint of step 0. A deploy-form one becomes the deploy
  folder.

  Args:
    source: path of a file, or "hf:OWNER/NAME[@REVISION][:FILE]".
    workdir: the folder to make.
    model_name: as in `create_model`; None finds the model whose names and shapes fit.
    num_classes: number of classes of the model; None takes the number in the file.
    drop_head: draws a new classifier and does not read the file's.
    allow_half: widens half-precision weights to float32; otherwise they are refused.
    entry: name of the state dict to take if the file holds several.
    overrides: as in `create_model`.

  Returns:
    The content of import.json: `source`, `file`, `bytes`, `sha256`, `revision` and `license` (as
    the hub states them), `entry` and `other_entries` (state dicts in the file), `removed` (what was
    taken off the names), `dtypes`, `model`, `naming`, `kind`, `num_classes`, `new_head`, `assumed`
    (overrides that the weights need and the caller has not given), and `parameters`.

  Raises:
    InputError: the folder is not empty, or the weights cannot be read or do not fit.
  """
  workdir = disk.check_new(names.folder(workdir))
  variables, spec, record = read_weights(
    source,
    model_name=model_name,
    num_classes=num_classes,
    drop_head=drop_head,
    allow_half=allow_half,
    entry=entry,
    overrides=overrides,
  )
  runs.write_import(
    workdir,
    variables,
    spec=spec.to_json(),
    record=record,
    config=config.for_import(spec.name, spec.num_classes),
  )
  return record


class Weights(NamedTuple):
  """The content of a checkpoint file as a model of repjax.

  Attributes:
    variables: {"params", "batch_stats"} of the training form, or {"params"} of the deploy form.
    spec: describes the model, with the preprocessing and the names of classes that are known.
    record: as `import_weights` returns it; `kind` is the form of the variables.
  """

  variables: dict[str, Any]
  spec: ModelSpec
  record: dict[str, Any]


def read_weights(
  source: str,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  drop_head: bool = False,
  allow_half: bool = False,
  entry: str | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> Weights:
  """Reads a checkpoint file or a repository of the hub, and writes nothing.

  Args and Raises: as in `import_weights`.
  """
  overrides = dict(overrides or {})
  if "features_only" in overrides:
    raise InputError("features_only is not part of an import; pass it to create_model afterwards")
  if num_classes is not None and num_classes < 1:
    raise InputError(f"--num-classes must be at least 1, got {num_classes}")
  fetched = hub.fetch(source) if source.startswith(hub.PREFIX) else None
  path = fetched.path if fetched else names.file(source)
  entry, others, state = read_entry(path, entry)
  dtypes = sorted({str(x.dtype) for x in state.values() if x.dtype.kind not in "iu"})
  # The checksum reads the whole file; a thread computes it while the weights are recognized.
  with ThreadPoolExecutor(1) as background:
    checksum = background.submit(_sha256, path)
    assumed = {n: v for n, v in _shown_by(state, model_name).items() if n not in overrides}
    overrides |= assumed
    found = recognize(state, model_name, hint=source, **overrides)
    removed = removed_from(state, found, overrides)
    released = RELEASED_WITH.get((found.model, found.naming), {})
    unshown = {name: value for name, (value, _) in released.items() if name not in overrides}
    assumed, overrides = {**assumed, **unshown}, {**overrides, **unshown}
    num_classes = num_classes or found.num_classes
    if num_classes is None and drop_head:
      raise InputError(f"{path} holds no classifier; give the number of classes, --num-classes N")
    # Without a classifier any number will do: from_torch refuses the file with an explanation.
    num_classes = num_classes or 1000
    if allow_half:
      state = {name: x.astype(np.float32) if is_half(x) else x for name, x in state.items()}
    variables = from_torch(
      found.model, state, num_classes=num_classes, drop_head=drop_head, **overrides
    )
    spec = ModelSpec(
      found.model,
      num_classes,
      overrides,
      _preprocessing(found, fetched, overrides),
      () if drop_head else _class_names(fetched, num_classes),
    )
    record = {
      "source": source,
      "file": path.name,
      "bytes": path.stat().st_size,
      "sha256": checksum.result(),
      "revision": fetched.revision if fetched else None,
      "license": fetched.license if fetched else None,
      "entry": entry,
      "other_entries": others,
      "removed": removed,
      "dtypes": dtypes,
      **found._asdict(),
      "num_classes": num_classes,
      "new_head": drop_head,
      "assumed": assumed,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    }
  return Weights(variables, spec, record)


def _shown_by(state: Mapping[str, Any], model_name: str | None) -> dict[str, Any]:
  """Returns overrides that the names of a state dict show, for a model that could take them."""
  return repvgg.repopt_overrides(state) if model_name in {None, *repvgg.NAMINGS} else {}


def export_weights(
  workdir: Path,
  target: Path,
  *,
  naming: str = "official",
  form: str | None = None,
  verify: bool = True,
) -> dict[str, np.ndarray]:
  """Writes a folder's model as a .safetensors file with the names of a different project.

  Args:
    workdir: the folder of a run or an import.
    target: the file to write, which must not exist yet.
    naming: source of the names, as in `to_torch`.
    form: "train" or "deploy"; None takes the training form if the folder has one.
    verify: as in `repjax.load`.

  Returns:
    The written state dict, name to array. Batch norms have the counter that PyTorch keeps, at zero.

  Raises:
    InputError: the folder does not hold this form, the naming does not cover the model, or the file
      exists.
  """
  extras.need("safetensors", "a .safetensors file")
  from safetensors.numpy import save_file

  target = names.file(target)
  if target.suffix != ".safetensors":
    raise InputError(f"{target} must end in .safetensors; call it {target.stem}.safetensors")
  disk.check_new(target)
  if form is None:
    form = "train" if runs.checkpoints(workdir) else "deploy"
  _, variables, spec = load(workdir, deploy=form == "deploy", verify=verify)
  state = to_torch(spec.name, variables, naming)
  for name in list(state):
    if name.endswith(".running_var"):
      counter = name.removesuffix("running_var") + "num_batches_tracked"
      state[counter] = np.zeros((), np.int64)
  # safetensors raises an error of its own, with the reason in its text.
  with disk.writing(target), disk.replacing_file(target, exists=False) as draft:
    save_file(state, draft, metadata={"format": "pt"})
  return state


def _sha256(path: Path) -> str:
  """Returns the SHA-256 checksum of a file in hexadecimal digits."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _preprocessing(
  found: Recognition, fetched: hub.HubFile | None, overrides: Mapping[str, Any]
) -> Preprocessing:
  """Returns the preprocessing that the repository states, or that of the published weights."""
  stated = hub.preprocessing(fetched.config) if fetched else None
  usual = ModelSpec.usual(found.model, overrides=overrides).preprocessing
  key = (found.model, found.naming)
  if key in repmlpnet.WITHOUT_MARGIN:
    usual = dataclasses.replace(usual, resize_size=usual.image_size)
  return stated or PREPROCESSING.get(key, usual)


def _class_names(fetched: hub.HubFile | None, num_classes: int) -> tuple[str, ...]:
  """Returns the names of the classes that the repository states, if there is one for each class."""
  names = (fetched.config.get("label_names") or ()) if fetched else ()
  return tuple(names) if len(names) == num_classes else ()
