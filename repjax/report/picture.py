"""Writes `report.png`, the picture of a run that has ended or still goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repjax import disk, extras, names, runs
from repjax.errors import InputError
from repjax.report.branches import Kernels, read_kernels
from repjax.report.history import History, distinct_names, read_history

if TYPE_CHECKING:
  from repjax.report.maps import Maps


def write_report(
  workdir: str | Path,
  *,
  compare: Sequence[str | Path] = (),
  output: str | Path | None = None,
  verify: bool = True,
) -> tuple[Path, list[str]]:
  """Draws the curves and the kernels of a folder into one picture.

  A segmentation also has class maps: some images of the evaluation split with their truth, what
  both forms predict, and where the forms differ.

  Args:
    workdir: folder of a run, finished or not, or of an import, which has kernels only.
    compare: folders of further runs, whose curves are drawn into the same panels.
    output: the .png file; None: `report.png` in the workdir.
    verify: compare every file that is read with its checksum.

  Returns:
    The path of the picture, and a line for each thing that could not be drawn. The picture shows
    these lines too.

  Raises:
    InputError: a folder holds no run or nothing to draw, or matplotlib is missing.
  """
  extras.need("matplotlib", "the picture")
  workdir = names.folder(workdir)
  target = names.file(output) if output is not None else runs.picture_file(workdir)
  if target.suffix.lower() != ".png":
    raise InputError(f"{target} is written as PNG; call it {target.stem}.png")
  histories = read_histories([workdir, *map(names.folder, compare)])
  kernels, note = _kernels_or_note(workdir, verify)
  if kernels is None and not histories[0].curves:
    raise InputError(f"{workdir} has no curves and no kernels to draw yet: {note}")
  maps, missing = _maps_or_note(workdir, verify)
  notes = [text for history in histories for text in history.notes]
  notes += [text for text in (note, missing) if text]
  # Imported here, since matplotlib takes a second to load and not everybody has it.
  from repjax.report import figure

  drawn = figure.draw(histories, kernels, notes, maps)
  with disk.replacing_file(target) as draft:
    figure.save(drawn, draft)
  return target, notes


def read_histories(workdirs: Sequence[Path]) -> list[History]:
  """Reads the curves of runs and gives each run a distinct name.

  Raises:
    InputError: a folder holds no run or is given twice, or one to compare with has no curves.
  """
  for number, workdir in enumerate(workdirs):
    if not runs.model_file(workdir).exists():
      runs.read_spec(workdir)  # Raises the error for a missing file.
    if workdir.resolve() in [other.resolve() for other in workdirs[:number]]:
      raise InputError(f"{workdir} is given twice; compare it with a different run")
  histories = [
    read_history(workdir, name) for workdir, name in zip(workdirs, distinct_names(workdirs))
  ]
  for workdir, history in zip(workdirs[1:] and workdirs, histories):
    if not history.curves:
      raise InputError(f"{workdir} has no curves to compare: no usable line in metrics.jsonl")
  return histories


def draw_at_end(workdir: Path) -> None:
  """Writes the picture of a run that has ended, and prints its path or why there is none."""
  try:
    path, notes = write_report(workdir)
  except (InputError, OSError) as error:
    later = f"repjax report --workdir {workdir}"
    print(f"no picture of the run: {error}; to draw it later: {later}", flush=True)
  else:
    print("\n".join([*notes, f"picture: {path}"]), flush=True)


def _kernels_or_note(workdir: Path, verify: bool) -> tuple[Kernels | None, str | None]:
  """Returns the kernels of a folder, or a note that says why there are none."""
  if not runs.checkpoints(workdir) and runs.find_deploy(workdir) is None:
    return None, f"{workdir} holds no checkpoint yet, so no kernels are shown"
  try:
    return read_kernels(workdir, verify=verify), None
  except InputError as error:
    return None, f"no kernels are shown: {error}"


def _maps_or_note(workdir: Path, verify: bool) -> tuple["Maps | None", str | None]:
  """Returns the class maps of a segmentation, or a note that says why there are none."""
  # Imported here, since maps of images need the packages that read data sets.
  from repjax.report.maps import read_maps

  try:
    return read_maps(workdir, verify=verify), None
  except InputError as error:
    return None, f"no images are shown: {error}"
