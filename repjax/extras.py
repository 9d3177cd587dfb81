"""Packages that only parts of repjax need, and the extras of `pip install` that bring them.

`pip install repjax` brings what models, folds, `fuse` and `compile` need. Data sets, image files,
ONNX and pictures of runs need more packages. A function that lacks one of these packages says in
one line what to install.
"""

import contextlib
import contextvars
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

from repjax.errors import InputError


class Package(NamedTuple):
  """A package that `pip install repjax` does not bring.

  Attributes:
    name: name of the package for pip.
    extra: the smallest extra of repjax that brings the package.
  """

  name: str
  extra: str


PACKAGES = {
  "absl": Package("absl-py", "train"),
  "array_record": Package("array_record", "train"),
  "cv2": Package("opencv-python-headless", "deploy"),
  "flatbuffers": Package("flatbuffers", "deploy"),
  "grain": Package("grain", "train"),
  "huggingface_hub": Package("huggingface_hub", "hub"),
  "matplotlib": Package("matplotlib", "report"),
  "ml_collections": Package("ml_collections", "train"),
  "onnx": Package("onnx", "onnx"),
  "onnxruntime": Package("onnxruntime", "onnx"),
  "PIL": Package("pillow", "deploy"),
  "optax": Package("optax", "train"),
  "safetensors": Package("safetensors", "hub"),
  "skimage": Package("scikit-image", "photographs"),
  "sklearn": Package("scikit-learn", "digits"),
  "tensorboardX": Package("tensorboardX", "tensorboard"),
  "tensorflow_datasets": Package("tensorflow-datasets", "train"),
}
"""Name of a package for `import` to the package."""


_WHOLE = contextvars.ContextVar[tuple[str, str] | None]("_WHOLE", default=None)
"""What the outermost `explained` with extras needs as a whole: its purpose and these extras."""


class MissingPackageError(InputError):
  """A package is not installed that a part of repjax needs."""


def missing(module: str, purpose: str, extra: str | None = None) -> MissingPackageError:
  """Returns the error for a package that is not installed.

  Args:
    module: a name in PACKAGES.
    purpose: the thing that needs the package, such as "ONNX files".
    extra: extras to install, such as "train,onnx"; None: the smallest that brings the package.
  """
  package = PACKAGES[module]
  return MissingPackageError(
    f"for {purpose}, the package {package.name} must be installed: pip install "
    f"'repjax[{extra or package.extra}]'"
  )


def is_installed(module: str) -> bool:
  """Tells if a package can be imported, without importing it."""
  return importlib.util.find_spec(module) is not None


def need(module: str, purpose: str) -> Any:
  """Imports a package, or a module of a package, and returns it.

  Args:
    module: a name in PACKAGES, or a dotted name that begins with one.
    purpose: as in `missing`.

  Raises:
    MissingPackageError: the package is not installed.

  Example:
    onnx = need("onnx", "ONNX files")
  """
  package = module.partition(".")[0]
  if not is_installed(package):
    raise missing(package, purpose)
  return importlib.import_module(module)


@contextlib.contextmanager
def explained(purpose: str, extra: str | None = None) -> Iterator[None]:
  """Explains which package to install where an import in the block finds a package missing.

  Args:
    purpose, extra: as in `missing`. In a block that names extras, such as that of a command, an
      inner block explains what the outer one needs: one installation is enough then.

  Raises:
    MissingPackageError: a package of PACKAGES is not installed. Any other error stays as it is.
  """
  purpose, extra = _WHOLE.get() or (purpose, extra)
  outer = _WHOLE.set((purpose, extra) if extra else None)
  try:
    yield
  except ModuleNotFoundError as error:
    module = (error.name or "").partition(".")[0]
    # A package that is installed and lacks a file is broken, and its own error says so best.
    if module not in PACKAGES or is_installed(module):
      raise
    raise missing(module, purpose, extra) from error
  finally:
    _WHOLE.reset(outer)
