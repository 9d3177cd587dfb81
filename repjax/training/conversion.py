"""The end of a run: best checkpoint to plain parameters, checked on every evaluation image."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax import disk, runs
from repjax.cache import use_compilation_cache
from repjax.config import Config, check_evaluation
from repjax.errors import InputError
from repjax.reparam import layer_name, reparameterize
from repjax.spec import ModelSpec
from repjax.training import evaluation, parallel, planning, processes


def convert(config: Config, workdir: str | Path) -> dict[str, Any]:
  """Re-parameterizes a workdir's best checkpoint into `workdir/deploy`, if both forms agree.

  Both forms run over the whole evaluation split at the highest matrix-product precision. The
  folder, with `params`, `model.json` and `report.json`, is replaced only when the logits' largest
  relative difference is within `config.tolerance`.

  Args:
    config: names the data set and the tolerance.
    workdir: of a run.

  Returns:
    The report: `step`, `recalibrated` (None, or how its statistics were re-estimated), `ema_decay`
    (of the average that was converted; 0: none), `dataset`, `images`, `accuracy` of both forms,
    `agreement` of their predictions, `logits_difference`, `layers` (scope to largest relative
    difference of its output), and `parameters` of both forms.

  Raises:
    InputError: the forms differ by more than the tolerance (nothing is overwritten), or there is no
      whole checkpoint.
  """
  config = processes.first(lambda: config)
  check_evaluation(config)
  use_compilation_cache()
  workdir = Path(workdir)
  spec = processes.first(ModelSpec.read, workdir)
  source = processes.together(planning.open_split, config, config.eval_split, spec)
  step, variables, recalibrated = processes.first(runs.read_best, workdir, spec.variable_shapes())
  with jax.default_matmul_precision("highest"):
    params = jax.jit(reparameterize)(variables["params"], variables["batch_stats"])
    compare = parallel.data_parallel(_make_compare_step(spec))
    placed = parallel.place((variables, {"params": params}))
    sums, largest = {}, {}
    for batch in evaluation.batches(config, source, spec.preprocessing):
      new_sums, new_largest = jax.device_get(compare(placed, batch))
      sums = {name: sums.get(name, 0) + int(value) for name, value in new_sums.items()}
      largest = {
        name: np.maximum(largest.get(name, 0.0), pair) for name, pair in new_largest.items()
      }
  relative = {
    name: float(difference / size) if difference else 0.0
    for name, (difference, size) in largest.items()
  }
  images = sums["count"]
  report = {
    "step": step,
    "recalibrated": recalibrated,
    "ema_decay": config.get("ema_decay", 0.0),
    "dataset": config.dataset,
    "images": images,
    "accuracy": {form: sums[f"{form}_correct"] / images for form in ("train", "deploy")},
    "agreement": sums["agree"] / images,
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
      f"{workdir / 'deploy'} was left as it was. {_worst_layer(relative)}"
    )
  processes.first(_write, workdir, spec, params, report)
  return report


def format_report(report: dict[str, Any]) -> str:
  """The report as a short table for people."""
  accuracy, parameters = report["accuracy"], report["parameters"]
  images = "noise images" if report["dataset"] == "synthetic" else "images"
  agreeing = round(report["agreement"] * report["images"])
  rows = [
    ("", "training form", "deploy form"),
    ("parameters", f"{parameters['train']:,}", f"{parameters['deploy']:,}"),
  ]
  if report["dataset"] != "synthetic":  # the labels of noise mean nothing
    rows.append(("accuracy", f"{accuracy['train']:.2%}", f"{accuracy['deploy']:.2%}"))
  recalibrated = report["recalibrated"]
  return "\n".join(
    [
      *(f"{name:<24}{train:>16}{deploy:>16}" for name, train, deploy in rows),
      f"{'predictions agree on':<24}{agreeing:>16,} of {report['images']:,} {images}",
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
  if not layers:
    return "no layer to compare"
  worst = max(layers, key=lambda name: layers[name])
  return f"worst of {len(layers)} layers:   {layers[worst]:>16.1e} at {worst}"


def _make_compare_step(spec: ModelSpec) -> Callable[[Any, Any], Any]:
  """Builds a step that runs both forms on a batch and compares outputs, layer by layer."""
  forms = spec.create_model(), spec.create_model(deploy=True)

  def is_folded(module: Any, method: str) -> bool:
    return method == "__call__" and bool(module.path) and layer_name(module.path[-1]) is not None

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
    images, mask = spec.preprocessing.normalize(batch["image"]), batch["mask"]
    trained, deployed = (outputs(*pair, images) for pair in zip(forms, variables))

    def largest(x: jax.Array) -> jax.Array:
      unmasked = jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), jnp.abs(x), 0.0)
      # Unlike pmax, this keeps a NaN.
      return jax.lax.all_gather(unmasked.max(), parallel.AXIS).max()

    # Auxiliary heads have no counterpart in the deploy form.
    differences = {
      name: (largest(trained[name] - deployed[name]), largest(trained[name])) for name in deployed
    }
    predictions = [logits.argmax(-1) for logits in (trained["logits"], deployed["logits"])]
    flags = {
      "train_correct": predictions[0] == batch["label"],
      "deploy_correct": predictions[1] == batch["label"],
      "agree": predictions[0] == predictions[1],
      "count": mask,
    }
    sums = {name: jnp.sum(flag & mask) for name, flag in flags.items()}
    return jax.lax.psum(sums, parallel.AXIS), differences

  return compare


def _write(workdir: Path, spec: ModelSpec, params: Any, report: dict[str, Any]) -> None:
  """Writes the deploy folder beside the old one and puts it in its place when it is whole."""
  draft = workdir / "deploy.draft"
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir(parents=True)
  disk.write_tree(draft / "params", params)
  spec.write(draft)
  disk.write_json(draft / "report.json", report)
  disk.replace_folder(draft, workdir / "deploy")
