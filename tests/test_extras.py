"""Packages that are not installed, and the extras that bring them."""

import pytest

from repjax import extras


def _import(module):
  raise ModuleNotFoundError(name=module)


def test_a_block_with_extras_speaks_for_the_blocks_in_it(monkeypatch):
  monkeypatch.setattr(extras, "is_installed", lambda module: False)
  said = r"for `repjax quantize`, the package grain must be .*'repjax\[train,onnx\]'"
  with (
    pytest.raises(extras.MissingPackageError, match=said),
    extras.explained("`repjax quantize`", "train,onnx"),
    extras.explained("repjax.data.Source", "train"),
  ):
    _import("grain")
  # The block has ended, and one without extras leaves it to the block in it.
  with (
    pytest.raises(extras.MissingPackageError, match=r"^for images, the .*'repjax\[deploy\]'"),
    extras.explained("`repjax predict`"),
    extras.explained("images"),
  ):
    _import("PIL")
