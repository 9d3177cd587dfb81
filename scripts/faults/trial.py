"""Runs one command with faults, and judges how it ends and what it leaves."""

import re
import shutil
import signal
from pathlib import Path

from faults.cases import Case
from faults.contents import (
  Expected,
  Problem,
  files_in,
  plant,
  problems_after_fault,
  problems_at_end,
  read,
)
from faults.server import Fault, Run, Server

_NO_FAULT = Fault()
_CRASH = re.compile(
  r"Traceback \(most recent call last\)|Fatal Python error|Segmentation fault|terminate called"
  r"|Check failed|Exception ignored in"
)


class Trial:
  """One command, and what is expected of it.

  Attributes:
    outputs: what the command printed in the last run with a fault, and in the run after it.
  """

  def __init__(self, server: Server, folder: Path, case: Case):
    """Runs the command without a fault, to learn what is to be expected.

    Args:
      server: runs the command.
      folder: folder in which the command works.
      case: the command.

    Raises:
      SystemExit: the command fails without a fault, or its results differ from run to run.
    """
    self.outputs: list[str] = []
    self._server, self._folder, self._case = server, folder, case
    self._counts: dict[int, int] = {}
    self._known: dict[frozenset[tuple[str, str]], list[Problem]] = {}
    self._expected = self._expect()

  def count(self, fault: Fault) -> int:
    """Returns the number of calls at which a fault can happen."""
    if fault.kinds not in self._counts:
      self._set_up()
      self._counts[fault.kinds] = self._run(Fault(fault.kinds)).calls
    return self._counts[fault.kinds]

  def run(self, fault: Fault, at: int) -> tuple[str, list[Problem]]:
    """Runs the command with a fault, and then without one.

    Args:
      fault: the fault.
      at: number of the call with the fault.

    Returns:
      How the command ended, in words; and everything that is not as it should be.
    """
    self._set_up()
    run = self._run(fault, at)
    self.outputs = [run.output]
    ended, problems = _ending(run, fault)
    problems += problems_after_fault(
      self._expected,
      self._case.readers,
      self._folder,
      # A signal may end a training run with the status 0, although steps are left.
      succeeded=run.status == 0 and not fault.signal,
    )
    # A problem after the fault often remains until the end, and is then named once.
    return ended, list(dict.fromkeys(problems + self._run_again()))

  def _run_again(self) -> list[Problem]:
    """Runs the command without a fault in the folder that a fault left, and returns problems.

    Many faults leave the same folder. For all of them the command runs once.
    """
    expected, readers = self._expected, self._case.readers
    state = frozenset(
      (name, "" if name in expected.volatile else value)
      for name, value in files_in(self._folder).items()
    )
    if state not in self._known:
      was_done = self._case.refuses and read(readers, self._folder) == expected.new
      run = self._run(_NO_FAULT)
      self.outputs.append(run.output)
      ended, problems = _ending(run, _NO_FAULT)
      if ended == "done" or (ended == "error" and was_done):
        problems += problems_at_end(expected, readers, self._folder)
      else:
        problems = [Problem("stuck", f"without a fault, the command then ended so: {run.output}")]
      self._known[state] = problems
    return self._known[state]

  def _run(self, fault: Fault, at: int = 0) -> Run:
    return self._server.run(self._case.arguments, self._folder, fault, at)

  def _set_up(self, planted: bool = True) -> dict[str, str]:
    """Makes the folder that the command finds; returns the other people's files in it."""
    shutil.rmtree(self._folder, ignore_errors=True)
    shutil.copytree(self._case.before, self._folder, symlinks=True)
    beside = [*self._case.targets, *self._case.beside]
    return plant(self._folder, beside) if planted else {}

  def _expect(self) -> Expected:
    """Runs the command twice without a fault, and returns what is to be expected."""
    case, folder = self._case, self._folder
    planted = self._set_up()
    self._set_up(planted=False)
    before, old = files_in(folder), read(case.readers, folder)
    finals, news = [], []
    for _ in range(2):
      self._set_up(planted=False)
      self._server.load(case.arguments)
      finals.append(files_in(folder))
      news.append(read(case.readers, folder))
    first, final = finals
    if news[0] != news[1] or None in news[0].values() or first.keys() != final.keys():
      differing = sorted(first.keys() ^ final.keys())
      raise SystemExit(
        f"error: two runs of {case.arguments[0]} without a fault read as {news}, and these files "
        f"are in one of the two folders only: {differing}"
      )
    return Expected(
      before=before,
      final=final,
      volatile=frozenset(name for name in final if first[name] != final[name]),
      planted=planted,
      old=old,
      new=news[0],
      between=case.between,
      targets=case.targets,
      growing={name: (folder / name).read_bytes() for name in case.growing},
      in_steps=case.in_steps,
    )


def _ending(run: Run, fault: Fault) -> tuple[str, list[Problem]]:
  """Returns how a command ended, in a word, and a problem if it should not end so."""
  if run.status is None:
    return "hung", [Problem("ending", "the command did not end")]
  if crash := _CRASH.search(run.output):
    return "crashed", [Problem("ending", run.output[crash.start() :])]
  if run.status == 0:
    return "done", []
  if run.status == -fault.signal:
    return "killed", []
  if run.status < 0:
    name = signal.Signals(-run.status).name
    return name, [Problem("ending", f"{name} ended the command: {run.output}")]
  if re.search(r"^error: .", run.output, re.MULTILINE):
    return "error", []
  # A program may answer a signal with its own words.
  text = f"status {run.status} without an error message: {run.output}"
  return "stopped", [] if fault.signal else [Problem("ending", text)]
