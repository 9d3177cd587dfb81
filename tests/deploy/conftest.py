"""Every test of this folder compiles fast and keeps its programs in a folder of the session's."""

import pytest


@pytest.fixture(autouse=True)
def _quickly(quick_programs):
  """Switches `quick_programs` on."""
