"""Conversion of the best checkpoint into the deploy form, checked on every evaluation image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax import names, runs
from repjax.cache import use_compilation_cache
from repjax.config import BEFORE, SCORES, Config, check_evaluation
from repjax.data import Source
from repjax.disk.trees import check_finite
from repjax.errors import InputError
from repjax.recognition import LAYERS
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec
from repjax.training import evaluation, parallel, planning, processes, tasks
from repjax.training.display import title
from repjax.training.tasks import Task


def convert(config: Config, workdir: str | Path, *, verify: bool = True) -> dict[str, Any]:
  """Re-parameterizes a workdir's best checkpoint into `workdir/deploy`, if both forms agree.

  Both forms run over the whole evaluation split at the highest precision of matrix products. They
  are judged as by `evaluate`: a segmentation in windows and with mirror images, if the config asks
  for them. The deploy folder is replaced only if the logits agree within `config.tolerance`:

    max |deploy - train| / max |train| <= tolerance,  over all images and classes.

  Args:
    config: config that names the data set and the tolerance.
    workdir: folder of a run or an import.
    verify: compare every file that is read with its checksum.

  Returns:
    The report, which report.json holds too:
    `step`: step of the checkpoint.
    `recalibrated`: how its statistics were re-estimated; None: they were not.
    `ema_decay`: decay of the average that was converted; 0: there is no average.
    `dataset`, `images`: what both forms ran on. A segmentation also has `pixels`, those with a
    label.
    `accuracy`, `parameters`: of the forms `train` and `deploy`. A segmentation also has `miou`,
      and `iou`, which lists the IoU of each class.
    `agreement`: share of images, or of pixels, to which both forms give the same class.
    `logits_difference`, `tolerance`: as above.
    `layers`: scope of each layer to the largest relative difference of its output.

  Raises:
    InputError: the forms differ by more than the tolerance, a parameter is not finite (nothing is
      overwritten), or no checkpoint is whole.
  """
  use_compilation_cache()
  workdir = names.folder(workdir)
  config, spec, step, variables, recalibrated = processes.first(_read, config, workdir, verify)
  source = processes.together(planning.open_split, config, config.eval_split, spec)
  with jax.default_matmul_precision("highest"):
    params = jax.jit(reparameterize)(variables["params"], variables["batch_stats"])
    sums, relative = _compare(config, source, spec, variables, params)
  task = tasks.create(spec.task, config)
  results = {form: task.summary(sums[form]) for form in ("train", "deploy")}
  images, agreement = results["train"]["count"], sums["agreement"]
  details = [name for name in results["train"] if name not in (*task.scores, "loss", "count")]
  report = {
    "step": step,
    "recalibrated": recalibrated,
    "ema_decay": config.get("ema_decay", BEFORE["ema_decay"]),
    "dataset": config.dataset,
    "images": images,
    task.unit: int(agreement["units"]),
    **{score: {form: found[score] for form, found in results.items()} for score in task.scores},
    **{name: {form: found[name] for form, found in results.items()} for name in details},
    "agreement": int(agreement["agree"]) / int(agreement["units"]),
    "logits_difference": relative.pop("logits"),
    "tolerance": config.tolerance,
    "layers": relative,
    "parameters": {
      "train": evaluation.count_parameters(variables["params"]),
      "deploy": evaluation.count_parameters(params),
    },
  }
  # Written so that a NaN fails too.
  if not report["logits_difference"] <= config.tolerance:
    raise InputError(
      f"the deploy form differs from the training form by {report['logits_difference']:.1e} of the "
      f"largest logit over {images} images, more than the tolerance of {config.tolerance:.1e}; "
      f"{runs.deploy_folder(workdir)} was left as it was. {_worst_layer(relative)}"
    )
  check_finite(params, "the deploy form")
  processes.first(runs.write_deploy, workdir, params, spec.to_json(), report)
  return report


def _read(
  config: Config, workdir: Path, verify: bool
) -> tuple[Config, ModelSpec, int, Any, dict[str, Any] | None]:
  """Checks a config, and reads the spec and the best checkpoint; in the first process.

  Returns:
    The config, the spec, and the step, variables and record from `runs.read_best`.
  """
  check_evaluation(config)
  spec = ModelSpec.read(workdir, verify=verify)
  return config, spec, *runs.read_best(workdir, spec.variable_shapes(), verify=verify)


def _compare(
  config: Config, source: Source, spec: ModelSpec, variables: Any, params: Any
) -> tuple[dict[str, Any], dict[str, float]]:
  """Runs both forms over a split.

  Returns:
    The sums of each form, `train` and `deploy`, and their `agreement`, both as the task counts
    them; and the largest relative difference of the logits and of each layer's output.
  """
  task = tasks.create(spec.task, config)
  compare = parallel.data_parallel(_make_compare_step(spec, task))
  placed = parallel.place((variables, {"params": params}))
  sums, largest = {}, {}
  for batch in evaluation.batches(config, source, spec):
    new_sums, new_largest = jax.device_get(compare(placed, batch))
    sums = {name: evaluation.add(sums.get(name, {}), new) for name, new in new_sums.items()}
    largest = {name: np.maximum(largest.get(name, 0.0), pair) for name, pair in new_largest.items()}
  # Two outputs that are zero everywhere are equal, though 0 / 0 is no number.
  relative = {
    name: float(difference / size) if difference else 0.0
    for name, (difference, size) in largest.items()
  }
  return sums, relative


def format_report(report: dict[str, Any]) -> str:
  """Returns the report as a short table for people."""
  parameters, noise = report["parameters"], report["dataset"] == "synthetic"
  unit = "pixels" if "pixels" in report else "images"
  agreeing = round(report["agreement"] * report[unit])
  rows = [
    ("", "training form", "deploy form"),
    ("parameters", f"{parameters['train']:,}", f"{parameters['deploy']:,}"),
  ]
  if not noise:  # the labels of noise mean nothing
    rows += [
      (title(score), *(f"{report[score][form]:.2%}" for form in ("train", "deploy")))
      for score in SCORES
      if score in report
    ]
  recalibrated = report["recalibrated"]
  return "\n".join(
    [
      *(f"{name:<24}{train:>16}{deploy:>16}" for name, train, deploy in rows),
      f"{'predictions agree on':<24}{agreeing:>16,} of {report[unit]:,} {'noise ' * noise}{unit}",
      f"{'logits differ by':<24}{report['logits_difference']:>16.1e} of the largest "
      f"(tolerance {report['tolerance']:.0e})",
      _worst_layer(report["layers"]),
      *(
        [f"statistics re-estimated over {recalibrated['batches']} batches"] if recalibrated else []
      ),
      *(
        [f"parameters and statistics averaged over the steps, decay {report['ema_decay']:g}"]
        if report["ema_decay"]
        else []
      ),
    ]
  )


def _worst_layer(layers: dict[str, float]) -> str:
  """Returns a line that names the layer whose outputs differ most."""
  if not layers:
    return "no layer to compare"
  worst = max(layers, key=lambda name: layers[name])
  return f"worst of {len(layers)} layers:   {layers[worst]:>16.1e} at {worst}"


def _make_compare_step(spec: ModelSpec, task: Task) -> Callable[[Any, Any], Any]:
  """Builds a step that runs both forms on a batch and compares their outputs layer by layer.

  Returns:
    A function of the variables of both forms and a batch, for `parallel.data_parallel`. It returns
    sums as `_compare` does, and for each output the pair of max |train - deploy| and max |train|.
  """
  forms = spec.create_model(), spec.create_model(deploy=True)

  def is_folded(module: Any, method: str) -> bool:
    return method == "__call__" and bool(module.path) and isinstance(module, LAYERS)

  def outputs(model: Any, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    logits, state = model.apply(
      variables, images, capture_intermediates=is_folded, mutable=["intermediates"]
    )
    layers = {
      "/".join(entry.key for entry in path[:-2]): value
      for path, value in jax.tree_util.tree_flatten_with_path(state.get("intermediates", {}))[0]
    }
    return {**layers, "logits": logits}

  def compare(variables: Any, batch: Any) -> Any:
    mask = batch["mask"]

    def largest(x: jax.Array) -> jax.Array:
      unmasked = jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), jnp.abs(x), 0.0)
      return unmasked.max()

    def compared(view: jax.Array) -> tuple[Any, Any]:
      images = spec.preprocessing.normalize(view)
      trained, deployed = (outputs(*pair, images) for pair in zip(forms, variables))
      # Names are those of the deploy form, where auxiliary heads have no counterpart.
      differences = {
        name: (largest(trained[name] - deployed[name]), largest(trained[name])) for name in deployed
      }
      return differences, (trained["logits"], deployed["logits"])

    def judged(model: Any, variables: Any, whole: Any) -> jax.Array:
      def forward(images: jax.Array) -> jax.Array:
        # Where the network sees the batch as a whole, its logits are there already.
        if whole is not None and images is batch["image"]:
          return whole
        return model.apply(variables, spec.preprocessing.normalize(images))

      return task.predict(forward, batch["image"])

    views = task.views(batch["image"])
    whole = None, None
    if len(views) == 1:
      differences, whole = compared(batch["image"])
    else:
      # A scan compiles both forms once, however many views there are.
      each = jax.lax.map(lambda view: compared(view)[0], views)
      differences = jax.tree.map(jnp.max, each)
    # Unlike pmax, max over a gathered array keeps a NaN, so that a NaN fails the comparison.
    differences = jax.tree.map(lambda x: jax.lax.all_gather(x, parallel.AXIS).max(), differences)
    first, second = (judged(*each) for each in zip(forms, variables, whole))
    sums = {"train": task.sums(first, batch), "deploy": task.sums(second, batch)}
    sums["agreement"] = task.agreement((first, second), batch)
    return jax.lax.psum(sums, parallel.AXIS), differences

  return compare
