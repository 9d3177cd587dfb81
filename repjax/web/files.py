"""The files of a folder whose page runs a network in the browser."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from repjax.spec import ModelSpec
from repjax.web.runtime import runtime_files

PAGE = Path(__file__).parent / "page"
SETTINGS = "page.json"


def folder_files(
  spec: ModelSpec,
  forms: Mapping[str, tuple[str, bytes]],
  *,
  probabilities: bool = False,
  runtime: str | os.PathLike[str] | None = None,
) -> dict[str, bytes]:
  """Returns the files of the folder by name: the page, its settings, the forms, and the runtime.

  Args:
    spec: describes the model.
    forms: name of each form of the network to the name and content of its ONNX file. A file takes
      uint8 images (1, 3, S, S). It returns logits (1, K), or (1, K, S, S) for classes of pixels.
      The page shows the results of the first form, and compares the others with it.
    probabilities: the files return probabilities instead of logits.
    runtime: as `source` in `runtime_files`.

  Raises:
    InputError: as in `runtime_files`.
  """
  return {
    **page_files(),
    SETTINGS: settings(spec, forms, probabilities),
    **dict(forms.values()),
    **runtime_files(runtime),
  }


def page_files() -> dict[str, bytes]:
  """Returns the files of the page by name, which are the same for every network."""
  return {path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.is_file()}


def settings(spec: ModelSpec, forms: Mapping[str, tuple[str, bytes]], probabilities: bool) -> bytes:
  """Returns the settings of the page: the names it shows, and how it prepares pictures."""
  content = {
    "title": spec.name,
    "task": spec.task,
    "preprocessing": dataclasses.asdict(spec.preprocessing),
    "class_names": spec.class_names,
    "class_colors": spec.class_colors,
    "output": "probabilities" if probabilities else "logits",
    "forms": [
      {"name": form, "file": file, "size": len(program)} for form, (file, program) in forms.items()
    ],
  }
  return json.dumps(content, indent=2).encode()
