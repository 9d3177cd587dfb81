"""Tests of scripts/inject_faults.py."""

import importlib
import shutil

import pytest

from tests.training.tiny import ROOT

pytest_plugins = ["tests.training.fixtures"]

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture
def faults(monkeypatch):
  """Imports a module of scripts/faults by its name."""
  monkeypatch.syspath_prepend(ROOT / "scripts")
  return lambda name: importlib.import_module(f"faults.{name}")


@needs_cc
def test_a_fault_happens_at_the_chosen_call(faults, tmp_path):
  known, folder = faults("server").FAULTS, tmp_path / "case"
  with faults("server").Server(tmp_path, {"JAX_PLATFORMS": "cpu"}) as server:
    images = faults("cases").Preparation(server, tmp_path).images
    arguments = ["prepare-dataset", f"--from-folder={images}", f"--data-dir={folder}"]

    def run(fault, at=0):
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir()
      return server.run([*arguments, "--name=pets"], folder, fault, at)

    def written():
      return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert server.load([*arguments, "--name=pets"]).status == 0
    whole = run(known["kill"])
    assert (whole.status, run(known["kill"], whole.calls + 1).status) == (0, 0)
    for at in (1, whole.calls):
      killed = run(known["kill"], at)
      assert (killed.status, killed.calls) == (-9, at)
    full = run(known["full"], run(known["full"]).calls // 2)
    assert full.status == 1
    assert "No space left on device" in full.output
    # The first write is done by a half, or not at all.
    assert run(known["torn"], 1).status == -9
    assert written() > 0
    assert run(known["torn"]._replace(half=False), 1).status == -9
    assert written() == 0


@needs_cc
def test_the_table_counts_runs(run_script, tmp_path, capsys):
  flags = ("--commands", "prepare-dataset", "--faults", "kill", "--every", "1000")
  with pytest.raises(SystemExit) as stop:
    run_script("scripts/inject_faults.py", *flags, "--folder", tmp_path)
  row = capsys.readouterr().out.splitlines()[-1].split()
  assert (row[0], row[1], row[8:]) == ("all", "1", ["1", "killed"])
  assert stop.value.code == (1 if any(map(int, row[2:8])) else 0)


A, B, KEPT = "target/a", "target/b", "target/kept"
OLD, NEW = {A: "old a", B: "old b", KEPT: "same"}, {A: "new a", B: "new b", KEPT: "same"}


@pytest.fixture
def problems(faults, tmp_path):
  """Returns the problems of a folder with certain files after a fault, or at the end."""
  contents = faults("contents")

  def write(files):
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    for name, text in files.items():
      path = tmp_path / "case" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return tmp_path / "case"

  def reader(folder):
    path = folder / "target" / "a"
    return path.read_text() if path.parent.exists() else None

  expected = contents.Expected(
    before=contents.files_in(write(OLD)),
    final=contents.files_in(write(NEW)),
    volatile=frozenset(),
    planted=contents.files_in(write({"mine": "mine"})),
    old={"a": "old a"},
    new={"a": "new a"},
    between={},
    targets=["target"],
    growing={},
    in_steps=False,
  )

  def found(files, succeeded=False, at_end=False):
    folder = write({"mine": "mine", **files})
    if at_end:
      return {problem.kind for problem in contents.problems_at_end(expected, {"a": reader}, folder)}
    result = contents.problems_after_fault(expected, {"a": reader}, folder, succeeded)
    return {problem.kind for problem in result}

  return found


@pytest.mark.parametrize(
  ("files", "kinds"),
  [
    (OLD, set()),
    (NEW, set()),
    ({**NEW, "draft": "unfinished"}, set()),
    ({**OLD, B: "new b"}, {"wrong"}),
    ({**OLD, B: "new"}, {"wrong"}),
    ({**OLD, A: "torn"}, {"wrong"}),
    ({A: "old a", B: "old b"}, {"lost"}),
    ({}, {"lost"}),
    ({**OLD, "mine": "yours"}, {"foreign"}),
  ],
)
def test_a_folder_after_a_fault_is_old_or_new(problems, files, kinds):
  assert problems(files) == kinds


def test_a_success_leaves_the_new_content_and_nothing_else(problems):
  assert problems(OLD, succeeded=True) == {"wrong"}
  assert problems(NEW, succeeded=True) == set()
  assert problems(NEW, at_end=True) == set()
  assert problems(OLD, at_end=True) == {"wrong"}
  assert problems({**NEW, "draft": "unfinished"}, at_end=True) == {"left over"}
