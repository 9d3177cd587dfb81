"""Reads files of `torch.save`, without torch and without running anything from the file.

The file is mapped into memory. `pickles` reads the pickle in it, which describes tensors and names
the bytes that they share; `names` decides what the pickle may name. Then `files` turns each
description into a NumPy view of these bytes. Every number in the file is checked against the size
of the file before it is used.

  tensors   descriptions of tensors
  names     what a name in a pickle stands for
  pickles   the unpickler
  files     the two formats of `torch.save`
"""

from repjax.weights.torch_files.files import load

__all__ = ["load"]
