"""Writes into ONNX files how images are prepared and what classes are called.

The graph alone tells neither. The metadata of the file hold both as JSON, for programs in any
language. There are two keys:

  preprocessing   the fields of `repjax.spec.Preprocessing`
  class_names     the name of each class in the order of the outputs; [] if there are none
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repjax.spec import Preprocessing

PROGRAM = "run_onnx.py"
"""Name of the program that is written beside a classifier. It labels image files."""


def describe(proto: Any, preprocessing: Preprocessing, class_names: Sequence[str] = ()) -> None:
  """Writes the preprocessing and the names of classes into the metadata of an `onnx.ModelProto`.

  Args:
    proto: the model, which is changed.
    preprocessing: steps from images to inputs. The graph may do the normalization itself: then its
      input is uint8.
    class_names: the name of each class; empty: classes have numbers.
  """
  facts = {"preprocessing": dataclasses.asdict(preprocessing), "class_names": list(class_names)}
  others = [entry for entry in proto.metadata_props if entry.key not in facts]
  del proto.metadata_props[:]
  proto.metadata_props.extend(others)
  for key, value in facts.items():
    proto.metadata_props.add(key=key, value=json.dumps(value))


def files(
  name: str, proto: Any, preprocessing: Preprocessing, class_names: Sequence[str] = ()
) -> dict[str, bytes]:
  """Returns the files of an exported folder: the described model, and for a classifier a program.

  Args:
    name: name of the model's file.
    proto, preprocessing, class_names: as for `describe`.
  """
  describe(proto, preprocessing, class_names)
  found = {name: proto.SerializeToString()}
  outputs = proto.graph.output
  if len(outputs) == 1 and len(outputs[0].type.tensor_type.shape.dim) == 2:
    found[PROGRAM] = Path(__file__).with_name(PROGRAM).read_bytes()
  return found
