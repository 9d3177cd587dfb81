"""`report.png`: what people look at when a run is over, or while it goes on."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from repjax import disk, runs
from repjax.errors import InputError
from repjax.report.contributions import Kernels, read_kernels
from repjax.report.curves import History, distinct_names, read_history


def write_report(
  workdir: str | Path, *, compare: Sequence[str | Path] = (), output: str | Path | None = None
) -> tuple[Path, list[str]]:
  """Draws a folder's curves and kernels into one picture.

  Args:
    workdir: of a run, finished or not, or of an import, which has kernels only.
    compare: of other runs, whose curves are laid over those of the first.
    output: the .png file; None: `report.png` in the workdir.

  Returns:
    The path of the picture, and what could not be drawn, a line each; the picture says it too.

  Raises:
    InputError: a folder is none of a run, it has nothing to draw, or matplotlib is missing.
  """
  if importlib.util.find_spec("matplotlib") is None:
    raise InputError("the picture needs matplotlib: pip install matplotlib (or 'repjax[report]')")
  workdir = Path(workdir)
  target = Path(output) if output else runs.picture_file(workdir)
  if target.suffix.lower() != ".png":
    raise InputError(f"{target} is written as PNG; call it {target.stem}.png")
  histories = read_histories([workdir, *map(Path, compare)])
  kernels, note = _kernels_or_note(workdir)
  if kernels is None and not histories[0].curves:
    raise InputError(f"{workdir} has no curves and no kernels to draw yet: {note}")
  notes = [text for history in histories for text in history.notes] + ([note] if note else [])
  from repjax.report import drawing

  figure = drawing.draw(histories, kernels, notes)
  target.parent.mkdir(parents=True, exist_ok=True)
  draft = target.with_name(f"{target.name}.{os.getpid()}.draft")
  try:
    drawing.save(figure, draft)
    draft.replace(target)
  finally:
    draft.unlink(missing_ok=True)
  return target, notes


def read_histories(workdirs: Sequence[Path]) -> list[History]:
  """The curves of runs, under names that differ.

  Raises:
    InputError: a folder is none of a run or is given twice, or one behind the first has no curves.
  """
  for number, workdir in enumerate(workdirs):
    if not runs.model_file(workdir).exists():
      disk.read_json(runs.model_file(workdir))
    if workdir.resolve() in [other.resolve() for other in workdirs[:number]]:
      raise InputError(f"{workdir} is given twice; compare it with another run")
  histories = [
    read_history(workdir, name) for workdir, name in zip(workdirs, distinct_names(workdirs))
  ]
  for workdir, history in zip(workdirs[1:] and workdirs, histories):
    if not history.curves:
      raise InputError(f"{workdir} has no curves to compare: no usable line in metrics.jsonl")
  return histories


def draw_at_end(workdir: Path) -> None:
  """Writes the picture of a run that has ended and says where; a missing one stops nothing."""
  try:
    path, notes = write_report(workdir)
  except (InputError, OSError) as error:
    later = f"repjax report --workdir {workdir}"
    print(f"no picture of the run: {error}; to draw it later: {later}", flush=True)
  else:
    print("\n".join([*notes, f"picture: {path}"]), flush=True)


def _kernels_or_note(workdir: Path) -> tuple[Kernels | None, str | None]:
  """A folder's kernels, or why there are none."""
  if not runs.checkpoints(workdir) and runs.find_deploy(workdir) is None:
    return None, f"{workdir} holds no checkpoint yet, so no kernels are shown"
  try:
    return read_kernels(workdir), None
  except InputError as error:
    return None, f"no kernels are shown: {error}"
