"""The path of every file in the folder of a run, one function each.

`workdir` is the folder of a run or an import. `folder` is any folder that holds a model: a workdir,
a deploy folder or an exported one.
"""

from pathlib import Path

from repjax import disk


def config_file(workdir: Path) -> Path:
  """Returns the path of the config that the run was last started with."""
  return workdir / "config.json"


def model_file(folder: Path) -> Path:
  """Returns the path of the ModelSpec, which says how to build the model."""
  return folder / "model.json"


def data_file(workdir: Path) -> Path:
  """Returns the path of the fingerprints of the two data splits."""
  return workdir / "data.json"


def import_file(workdir: Path) -> Path:
  """Returns the path of the record of an import, which no run has."""
  return workdir / "import.json"


def metrics_file(workdir: Path) -> Path:
  """Returns the path of losses and accuracies, which the same run would reproduce."""
  return workdir / "metrics.jsonl"


def timing_file(workdir: Path) -> Path:
  """Returns the path of training speeds, which differ from run to run."""
  return workdir / "timing.jsonl"


def tensorboard_folder(workdir: Path) -> Path:
  """Returns the folder of event files for TensorBoard."""
  return workdir / "tensorboard"


def picture_file(workdir: Path) -> Path:
  """Returns the path of the picture with curves and kernels."""
  return workdir / "report.png"


def newest_file(workdir: Path) -> Path:
  """Returns the path of the record of the newest checkpoint that was finished."""
  return workdir / "newest.json"


def manifest_file(folder: Path) -> Path:
  """Returns the path of the checksums of a folder's files."""
  return folder / disk.MANIFEST


def lock_file(workdir: Path) -> Path:
  """Returns the path of the lock, which exists while a process writes to the workdir."""
  return workdir / ".lock"


def checkpoints_folder(workdir: Path) -> Path:
  """Returns the folder of all checkpoints."""
  return workdir / "checkpoints"


def checkpoint_folder(workdir: Path, step: int) -> Path:
  """Returns the folder of the checkpoint of a step."""
  return checkpoints_folder(workdir) / str(step)


def variables_folder(workdir: Path, step: int) -> Path:
  """Returns the folder of the model's variables in a checkpoint."""
  return checkpoint_folder(workdir, step) / "variables"


def score_file(workdir: Path, step: int) -> Path:
  """Returns the path of the score of a checkpoint, at the place that Orbax gives to metrics."""
  return checkpoint_folder(workdir, step) / "metrics" / "metrics"


def bookmark_file(workdir: Path, step: int) -> Path:
  """Returns the path of a checkpoint's Bookmark, at the place that Orbax gives to JSON items."""
  return checkpoint_folder(workdir, step) / "bookmark" / "metadata"


def damaged_folder(workdir: Path) -> Path:
  """Returns the folder into which damaged checkpoints are moved."""
  return workdir / "damaged"


def recalibrated_folder(workdir: Path) -> Path:
  """Returns the folder of re-estimated batch-norm statistics."""
  return workdir / "recalibrated"


def recalibration_file(folder: Path) -> Path:
  """Returns the path of the record of a re-estimation, in a folder of re-estimated statistics."""
  return folder / "recalibration.json"


def batch_stats_folder(folder: Path) -> Path:
  """Returns the folder of the statistics, in a folder of re-estimated statistics."""
  return folder / "batch_stats"


def deploy_folder(workdir: Path) -> Path:
  """Returns the folder of the deploy form."""
  return workdir / "deploy"


def params_folder(folder: Path) -> Path:
  """Returns the folder of the parameters in a deploy folder or an exported folder."""
  return folder / "params"


def conversion_file(folder: Path) -> Path:
  """Returns the path of the comparison of both forms, in a deploy folder."""
  return folder / "report.json"


def rounding_file(workdir: Path) -> Path:
  """Returns the path of the roundings of quantization-aware training."""
  return workdir / "rounding.json"


def int8_folder(workdir: Path) -> Path:
  """Returns the folder of the ONNX file in 8 bits that quantization-aware training ends with."""
  return workdir / "int8"


def onnx_file(folder: Path) -> Path:
  """Returns the path of a network in ONNX format."""
  return folder / "model.onnx"


def stablehlo_file(folder: Path) -> Path:
  """Returns the path of a network in StableHLO format, without parameters."""
  return folder / "model.stablehlo"


def export_file(folder: Path) -> Path:
  """Returns the path of the facts about an exported network."""
  return folder / "export.json"


def find_deploy(folder: Path) -> Path | None:
  """Returns the folder that holds a deploy form, None where there is no deploy form.

  Args:
    folder: a workdir, or a deploy folder itself.
  """
  own = folder if params_folder(folder).exists() else deploy_folder(folder)
  found = disk.current_folder(own)
  return found if params_folder(found).exists() else None
