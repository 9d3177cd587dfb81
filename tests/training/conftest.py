"""Every test of this folder compiles fast and keeps its programs in a folder of the session's."""

import pytest


@pytest.fixture(autouse=True)
def _quickly(quick_programs, monkeypatch):
  """Switches `quick_programs` on, and the picture at the end of each run off."""
  monkeypatch.setattr("repjax.training.run.draw_at_end", lambda workdir: None)
