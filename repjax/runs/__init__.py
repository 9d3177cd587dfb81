"""The folder of a run, called workdir: this package writes and reads the files in it.

Two kinds of files are exceptions, of which only the paths are here: `repjax.report` draws the
picture, and tensorboardX writes the event files.

runs/digits/
config.json               the config that the run was last started with
model.json                how to build the model, a ModelSpec
data.json                 fingerprints of the training and evaluation splits
metrics.jsonl             losses and accuracies, which the same run would reproduce
timing.jsonl              training speeds
tensorboard/              event files, on request
checkpoints/<step>/       variables and training state: the newest and the best
newest.json               the newest checkpoint that was finished
damaged/                  checkpoints that could not be read
recalibrated/             re-estimated batch_stats/ of one checkpoint, recalibration.json
deploy/                   model.json, params/, report.json: the deploy form
rounding.json  int8/      quantization-aware training: roundings, and the final ONNX file
import.json               imports only: where the weights came from
report.png                curves and kernels
manifest.json             checksums of model.json, import.json and rounding.json; each folder has
                          its own
.lock                     while a process writes: which process

paths.py names the files, and contents.py says what they may hold. checkpoint.py writes and reads
checkpoints, files.py the .json files, records.py the two .jsonl files, folders.py the deploy form,
re-estimated statistics, imports and exported networks. lock.py keeps a second writer away.
"""

# ruff: noqa: F401  (everything imported here is offered to other packages)

from repjax.runs.checkpoint import (
  Bookmark,
  CheckpointWriter,
  all_finite,
  checkpoints,
  newest_finished,
  note_newest,
  read_bookmark,
  read_checkpoint,
  remove_superseded,
  set_aside,
)
from repjax.runs.files import (
  read_config_json,
  read_conversion_report,
  read_data,
  read_export,
  read_roundings,
  read_spec,
  read_spec_of,
  write_roundings,
  write_spec,
  write_start,
)
from repjax.runs.folders import (
  read_best,
  read_deploy,
  read_exported,
  read_params,
  remove_recalibrated,
  sweep,
  write_deploy,
  write_export,
  write_import,
  write_recalibrated,
)
from repjax.runs.paths import (
  batch_stats_folder,
  bookmark_file,
  checkpoint_folder,
  checkpoints_folder,
  config_file,
  conversion_file,
  damaged_folder,
  data_file,
  deploy_folder,
  export_file,
  find_deploy,
  import_file,
  int8_folder,
  lock_file,
  manifest_file,
  metrics_file,
  model_file,
  newest_file,
  onnx_file,
  params_folder,
  picture_file,
  recalibrated_folder,
  recalibration_file,
  rounding_file,
  score_file,
  stablehlo_file,
  tensorboard_folder,
  timing_file,
  variables_folder,
)
from repjax.runs.records import RecordsFile, judged, read_records
