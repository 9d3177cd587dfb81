"""Sets that TFDS downloads, or makes from files that were downloaded by hand, as array_record."""

import importlib.util
from pathlib import Path

from repjax.data.builders import builder_of, command, file_formats
from repjax.errors import InputError

LARGE_SETS = (
  "TFDS makes sets above 1 GB with TensorFlow only: either install it for this one step, or unpack "
  "the images into folders, one a class, and use --from-folder, which needs no TensorFlow at any "
  "size"
)


def download_set(name: str, *, data_dir: str | None = None) -> Path:
  """Has TFDS download and prepare a set as array_record; one that is there is left alone.

  Args:
    name: as TFDS calls the set, with its variant where it has several.
    data_dir: where TFDS keeps its sets; None is TFDS's own default.

  Returns:
    The folder of the set's files.

  Raises:
    InputError: TFDS does not know the set, cannot reach it, misses files that have to be downloaded
      by hand, needs TensorFlow, or the set is there in another format.
  """
  builder = builder_of(name, data_dir)
  folder = Path(builder.data_path)
  if not folder.exists():
    try:
      builder.download_and_prepare(file_format="array_record")
    except InputError:
      raise
    except Exception as error:  # of TFDS's hundreds of builders each has its own
      raise InputError(f"TFDS cannot prepare {name}: {_explained(error)}") from error
  if "array_record" not in (formats := file_formats(builder)):
    raise InputError(
      f"{name} is in {folder} already, stored as {formats[0]}; make an array_record copy of it "
      f"with: {command('--from-tfrecord', name, data_dir)}"
    )
  return folder


def _explained(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  kinds = {kind.__name__ for kind in type(error).__mro__}
  if isinstance(error, ImportError):
    return f"it needs a package that is not installed ({text}). {LARGE_SETS}"
  if kinds & {"ConnectionError", "DownloadError", "Timeout", "HTTPError", "URLError"}:
    return (
      f"the download failed ({text}). Look at the network and run the same command again, or "
      "prepare the set on another machine and copy its folder here"
    )
  if isinstance(error, AssertionError):  # files to be downloaded by hand are missing
    here = importlib.util.find_spec("tensorflow")
    return f"{text} Then run the same command again. {'' if here else LARGE_SETS}".rstrip()
  return f"{type(error).__name__}: {text}"
