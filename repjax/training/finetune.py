"""Starts a run from the weights of a run or an import, and fills in what a config leaves open."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from repjax import names, runs
from repjax.config import Config, check_fields
from repjax.data import open_source
from repjax.errors import InputError
from repjax.expansion import expand
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.training import continuing, optimizer

_PREPROCESSING = tuple(field.name for field in dataclasses.fields(Preprocessing))
_WEIGHTS = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz")
_DILATION = ("output_stride", "dilated_blocks")
# Attributes of a model that change neither its tree nor what a trained network computes.
_FREE_ATTRIBUTES = {"dropout", "drop_path", "remat", "num_classes", "parent", "name"}


def resolve(config: Config, workdir: str | Path | None = None) -> Config:
  """Fills in the fields that a config leaves open with None.

  Model, overrides and preprocessing come from the run in `workdir` if it has checkpoints, so that
  the run continues without the folder that it began from. Otherwise they come from
  `config.init_from`. If the folder holds a classifier and the task is segmentation, the classifier
  is the backbone. The number of classes is that of the data set. A value in the config wins. If the
  config gives an image size and no resize size, their ratio is kept.

  Args:
    config: a config with the fields of `repjax.config`.
    workdir: folder of the run.

  Returns:
    A new config without references. Only fields whose default is None may be None in it.

  Raises:
    InputError: no source gives a field, or the run cannot start from the folder.
  """
  check_fields(config)
  full = ml_collections.ConfigDict(config.to_dict())
  if full.image_size is None and full.eval_image_size is not None:
    raise InputError(
      f"config.eval_image_size = {full.eval_image_size} needs config.image_size, the size to train "
      "at; a folder to start from says only at which its model was evaluated"
    )
  held = _held_spec(config, workdir)
  with full.ignore_type():
    if held is not None:
      _fill(full, held)
    if full.model_overrides is None:
      full.model_overrides = ml_collections.ConfigDict()
    missing = [field for field in ("model", *_PREPROCESSING) if full[field] is None]
    if missing:
      raise InputError(
        f"config.{missing[0]} is not set, and config.init_from names no folder to take it from; "
        f"pass --config.init_from=FOLDER of a run or an import, or set {', '.join(missing)}"
      )
    if full.dataset is None:
      raise InputError(
        "config.dataset is not set; pass --config.dataset=NAME, a name from TFDS or of a folder of "
        "images prepared with repjax prepare-dataset"
      )
    if full.num_classes is None:
      full.num_classes = _count_classes(full, held)
  return full


def _held_spec(config: Config, workdir: str | Path | None) -> ModelSpec | None:
  """Returns the model of the workdir's run, or else of the folder to start from, if any."""
  if workdir is not None:
    own = names.folder(workdir)
    if config.init_from and Path(config.init_from).resolve() == own.resolve():
      raise InputError(
        f"config.init_from names the workdir itself, {own}; leave it out to continue that run, or "
        "give a different --workdir for a new run that starts from it"
      )
    if runs.checkpoints(own) and runs.model_file(own).exists():
      return ModelSpec.read(own)
  if not config.init_from:
    return None
  held = source_spec(config.init_from)
  if (held.task, config.task) == ("classification", "segmentation"):
    return held
  if held.task != config.task:
    raise InputError(
      f"config.init_from: {config.init_from} holds the model {held.name} for {held.task}, and "
      f"config.task is {config.task!r}. Set --config.task={held.task}, or give a different folder"
    )
  if config.model not in (None, held.name):
    raise InputError(
      f"config.init_from: {config.init_from} holds the model {held.name}, but the config builds "
      f"{config.model}. Pass --config.model={held.name}, or give the folder of a {config.model}. "
      "The config finetune names no model and takes that of the folder"
    )
  return held


def _fill(full: Config, held: ModelSpec) -> None:
  """Puts the facts of a model into a config where the config has None.

  Overrides belong to a model: they are taken over by a config of this model alone.
  """
  if held.task != full.task:
    _fill_backbone(full, held)
  elif full.model is None:
    full.model = held.name
  if full.model == held.name:
    full.model_overrides = ml_collections.ConfigDict(_merged(held.overrides, full.model_overrides))
  theirs = held.preprocessing
  size = full.image_size if full.eval_image_size is None else full.eval_image_size
  if full.resize_size is None and size is not None:
    full.resize_size = round(size * theirs.resize_size / theirs.image_size)
  for field in _PREPROCESSING:
    if full[field] is None:
      full[field] = getattr(theirs, field)


def _merged(held: Mapping[str, Any], given: ml_collections.ConfigDict | None) -> dict[str, Any]:
  """Returns the overrides of a model, in which those of the config win."""
  own = given.to_dict() if given is not None else {}
  chosen = {name: value for name, value in own.items() if value is not None}
  return {**own, **continuing.plain(held), **chosen}


def _fill_backbone(full: Config, held: ModelSpec) -> None:
  """Makes the classifier of a folder the backbone of a config for segmentation.

  Raises:
    InputError: the config names no model, or a different backbone.
  """
  if full.model is None:
    raise InputError(
      f"config.model is not set, and config.init_from holds the classifier {held.name}, which can "
      "be the backbone of a model for segmentation; pass --config.model=pspnet or fcn"
    )
  overrides = full.model_overrides.to_dict() if full.model_overrides is not None else {}
  backbone = overrides.get("backbone") or held.name
  if backbone != held.name:
    raise InputError(
      f"config.init_from: {full.init_from} holds the model {held.name}, but the backbone of the "
      f"config is {backbone}. Give the folder of a {backbone}, or set "
      f"--config.model_overrides.backbone={held.name}"
    )
  overrides["backbone"] = backbone
  if held.overrides:
    own = overrides.get("backbone_overrides") or {}
    overrides["backbone_overrides"] = {**continuing.plain(held.overrides), **own}
  full.model_overrides = ml_collections.ConfigDict(overrides)


def _count_classes(config: Config, held: ModelSpec | None) -> int:
  """Returns the number of classes of the data set, or of the model if the data set is noise."""
  if config.dataset == "synthetic":
    if held is None:
      raise InputError(
        "config.num_classes is not set, and a synthetic data set has any number of classes; set it"
      )
    return held.num_classes
  source = open_source(
    config.dataset, config.train_split, data_dir=config.data_dir, task=config.task
  )
  return len(source.class_names)


def source_spec(folder: str | Path) -> ModelSpec:
  """Reads model.json of a folder to start from.

  Raises:
    InputError: the path is a file of weights, or not the folder of a run or an import; the folder
      holds no form of the model, or is damaged.
  """
  text, path = str(folder), names.folder(folder)
  if text.startswith("hf:") or path.is_file() or (not path.exists() and text.endswith(_WEIGHTS)):
    name = text.rpartition("/")[2].partition(".")[0] or "imported"
    raise InputError(
      f"config.init_from takes a folder, and {text} is a file of weights. Import it first: "
      f"repjax import --from {text} --workdir runs/{name}, and then "
      f"--config.init_from=runs/{name}"
    )
  if not path.exists():
    raise InputError(f"config.init_from: {path} does not exist; give the folder of a run or import")
  if not runs.model_file(path).exists():
    raise InputError(
      f"config.init_from: {path} has no model.json, so it is not the folder of a run or an import; "
      "is it the right folder?"
    )
  if not (runs.checkpoints(path) or _is_plain(path)):
    raise InputError(
      f"config.init_from: {path} has no checkpoint and no deploy form; give the folder of a run or "
      "import"
    )
  return ModelSpec.read(path)


def _is_plain(path: Path) -> bool:
  """Tells if a folder holds a deploy form and no training form."""
  return not runs.checkpoints(path) and runs.find_deploy(path) is not None


def first_variables(
  folder: str | Path,
  spec: ModelSpec,
  fresh: dict[str, Any],
  *,
  key: jax.Array,
  images: Callable[[], jax.Array],
) -> tuple[dict[str, Any], str]:
  """Reads the variables to start from out of the folder of a run or an import.

  Classifiers keep their fresh values if the number of classes differs, or if both sides know the
  names of their classes and the names differ. Everything else is taken over bit for bit, with
  re-estimated statistics if the folder has any. A folder that holds a deploy form alone is
  expanded, see `repjax.expand`. From a classifier, a model for segmentation takes its backbone.

  Args:
    folder: folder of a run or an import.
    spec: spec of the model to train.
    fresh: newly initialised variables of that model.
    key: random key for branches that a deploy form lacks.
    images: reads the images of the first step, normalised; called if a deploy form is expanded.

  Returns:
    The variables, and a sentence that says what was taken over.

  Raises:
    InputError: the run cannot start from the folder, or the folder holds a different model.
  """
  held = source_spec(folder)
  if held.task != spec.task:
    backbone = _backbone_of(spec, held)
    variables, source = _read(folder, held, backbone, key, images)
    started = {half: {**fresh[half]} for half in ("params", "batch_stats")}
    for half, tree in started.items():
      # A classifier without its head has the scopes of the backbone.
      tree["backbone"] = {name: variables[half][name] for name in tree["backbone"]}
    return started, f"starting from {folder}, {source}; its classifier is dropped, the head is new"
  variables, source = _read(folder, held, spec, key, images)
  renamed = bool(held.class_names and spec.class_names) and held.class_names != spec.class_names
  anew = held.num_classes != spec.num_classes or renamed
  params = jax.tree.map(
    lambda is_classifier, own, theirs: own if anew and is_classifier else theirs,
    optimizer.classifier_mask(fresh["params"]),
    fresh["params"],
    variables["params"],
  )
  if held.num_classes != spec.num_classes:
    classifier = f"new classifier: {held.num_classes} -> {spec.num_classes} classes"
  elif renamed:
    classifier = f"new classifier: {spec.num_classes} classes of other names"
  else:
    classifier = "classifier kept"
  text = f"starting from {folder}, {source}; {classifier}"
  return {"params": params, "batch_stats": variables["batch_stats"]}, text


def _backbone_of(spec: ModelSpec, held: ModelSpec) -> ModelSpec:
  """Returns the backbone of a model for segmentation as a classifier, with the classes of another.

  Args:
    spec: spec of the model for segmentation.
    held: spec of a classifier. Its image size and its dilation are kept too: no parameter depends
      on the dilation with which the backbone sees larger images.
  """
  model: Any = spec.create_model()
  overrides = continuing.plain(dict(model.backbone_overrides))
  for name in _DILATION:
    overrides.pop(name, None)
    if name in held.overrides:
      overrides[name] = continuing.plain(held.overrides[name])
  return ModelSpec(model.backbone, held.num_classes, overrides, held.preprocessing)


def _read(
  folder: str | Path,
  held: ModelSpec,
  spec: ModelSpec,
  key: jax.Array,
  images: Callable[[], jax.Array],
) -> tuple[dict[str, Any], str]:
  """Reads the variables of a folder for a model of the same kind; returns them, and what they are.

  Args: as in `first_variables`, and
    held: spec of the folder's model.
  """
  if _is_plain(names.folder(folder)):
    return _expanded(folder, held, spec, key, images)
  return _taken(folder, held, spec)


def _taken(folder: str | Path, held: ModelSpec, spec: ModelSpec) -> tuple[dict[str, Any], str]:
  """Reads the best checkpoint of a folder; returns its variables, and what they are."""
  _check_fit(folder, held, spec)
  step, variables, record = runs.read_best(names.folder(folder), held.variable_shapes())
  statistics = f", statistics re-estimated over {record['batches']} batches" if record else ""
  return variables, f"step {step}{statistics}"


def _expanded(
  folder: str | Path,
  held: ModelSpec,
  spec: ModelSpec,
  key: jax.Array,
  images: Callable[[], jax.Array],
) -> tuple[dict[str, Any], str]:
  """Expands the deploy form of a folder; returns the variables, and what they are.

  The two models may differ in what a deploy form does not show, such as branches.
  """
  ours = dataclasses.replace(spec, num_classes=held.num_classes, class_names=(), class_colors=())
  theirs = dataclasses.replace(held, preprocessing=spec.preprocessing)
  if _deploy_program(ours) != _deploy_program(theirs):
    _check_fit(folder, held, spec)
  _, variables, _ = load(folder)
  batch = images()
  variables = expand(ours.create_model(), variables["params"], key, images=batch)
  return variables, f"its deploy form expanded on {len(batch)} images of training"


def _deploy_program(spec: ModelSpec) -> str:
  """Returns the text of a deploy form's program."""
  shapes, size = spec.variable_shapes(deploy=True), spec.preprocessing.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.jit(spec.create_model(deploy=True).apply).lower(shapes, images).as_text()


def _check_fit(folder: str | Path, held: ModelSpec, spec: ModelSpec) -> None:
  """Raises InputError if two models differ in more than their classes."""
  differences = continuing.difference(_attributes(held), _attributes(spec))
  if not differences:
    theirs, ours = (_body_shapes(s) for s in (held, spec))
    differences = continuing.difference(theirs, ours)
  if differences:
    raise InputError(
      f"the model in {folder} differs from the config's: {differences}. Set these fields as in the "
      "folder, or leave them None as in repjax.configs.finetune"
    )


def _attributes(spec: ModelSpec) -> dict[str, Any]:
  """Returns every attribute that determines a model, including the defaults of its variant."""
  model = spec.create_model()
  return continuing.plain(
    {
      field.name: getattr(model, field.name)
      for field in dataclasses.fields(model)
      if field.name not in _FREE_ATTRIBUTES
    }
  )


def _body_shapes(spec: ModelSpec) -> dict[str, str]:
  """Returns the shape of each variable that does not depend on the number of classes, by path."""
  shapes = spec.variable_shapes()
  masks = {half: optimizer.classifier_mask(tree) for half, tree in shapes.items()}
  leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): str(leaf.shape)
    for (path, leaf), is_classifier in zip(leaves, jax.tree.leaves(masks))
    if not is_classifier
  }
