"""`load`: returns a model with its variables, from a folder or by the name of published weights.

A model of Flax holds no weights. So `create_model` keeps returning a model alone, and `load` is the
one way to both, wherever the weights lie.
"""

import os
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from repjax import disk, names, runs
from repjax import spec as specs
from repjax.devices import need_devices
from repjax.errors import InputError
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec

_HUB = "hf:"


def load(
  source: str | os.PathLike[str], *, deploy: bool = True, verify: bool = True
) -> tuple[nn.Module, dict[str, Any], ModelSpec]:
  """Loads a model and its variables from a folder, or by the name of published weights.

  `repjax.list_pretrained` lists published weights with their licences. The Hugging Face hub sends a
  file once, and keeps the file in its cache. Later calls ask the hub only if there is a newer
  version, and read the cache where the hub cannot be reached.

  The training form of a run is that of the best checkpoint, with re-estimated batch statistics if
  the run has some. The deploy form comes from the deploy folder. Before there is a deploy folder,
  the training form is re-parameterized here. A process may write the folder at the same time. What
  is loaded is then what was there before or afterwards, never a mixture.

  Args:
    source: folder of a run, an import or an export, or a deploy folder; or
      "hf:OWNER/NAME[@REVISION][:FILE]", a repository of the hub.
    deploy: load the deploy form, not the training form.
    verify: compare every file of a folder with its checksum, and refuse parameters that are not
      finite. A folder that was written without checksums is loaded with a warning.

  Returns:
    The model, its variables, and its ModelSpec. `model.apply(variables, images)` gives logits.
    `spec.preprocessing.normalize` makes images for the model from uint8 images.

  Raises:
    InputError: the folder or repository does not hold the form that was asked for, or is damaged;
      the hub cannot be reached and its cache lacks the file; or JAX finds no devices.

  Example:
    model, variables, spec = repjax.load("hf:timm/repvgg_a0.rvgg_in1k")
    logits = model.apply(variables, spec.preprocessing.normalize(images))
  """
  if isinstance(source, str) and source.startswith(_HUB):
    return _of_hub(source, deploy)
  _refuse_function(names.folder(source))
  return specs.load(source, deploy=deploy, verify=verify)


def task_of(source: str | os.PathLike[str], *, verify: bool = True) -> str:
  """Returns the task of the model that `load` would load, and reads no weights.

  All repositories of the hub that can be read hold classifiers.

  Args:
    source: as in `load`.
    verify: compare the description of the model with its checksum.

  Raises:
    InputError: the folder holds no model.
  """
  if isinstance(source, str) and source.startswith(_HUB):
    return "classification"
  folder = names.folder(source)
  _refuse_function(folder)
  return ModelSpec.read(folder, verify=verify).task


def _refuse_function(folder: Path) -> None:
  """Raises InputError if a folder is the export of a function, from which no model can be built."""
  file = runs.export_file(folder)
  if runs.model_file(folder).exists() or not file.exists():
    return
  # Only exports without a ModelSpec have their preprocessing in this file. Without it, model.json
  # was lost.
  facts = disk.read_json(file)
  if not isinstance(facts, dict) or "preprocessing" not in facts:
    return
  way_out = (
    f"Run it in ONNX Runtime: {runs.onnx_file(folder)}"
    if runs.onnx_file(folder).exists()
    else f"Run it by repjax.deploy.load_exported({str(folder)!r})"
  )
  raise InputError(
    f"{folder} is the export of a function or of a network that is no model of repjax, so that no "
    f"model can be built from it. {way_out}"
  )


def _of_hub(source: str, deploy: bool) -> tuple[nn.Module, dict[str, Any], ModelSpec]:
  """Loads a model from a repository of the hub."""
  # Imported late: the tables of names of all families, which a folder does not need.
  from repjax.weights import published, workdirs

  need_devices()
  variables, spec, record = workdirs.read_weights(source, model_name=published.model_of(source))
  if deploy and record["kind"] == "train":
    variables = {"params": jax.jit(reparameterize)(variables["params"], variables["batch_stats"])}
  elif not deploy and record["kind"] == "deploy":
    raise InputError(
      f"{source} holds the deploy form alone, and deploy=False asks for the training form. Load "
      "the deploy form, and make a training form that computes the same by repjax.expand"
    )
  return spec.create_model(deploy=deploy), jax.tree.map(jax.numpy.asarray, variables), spec
