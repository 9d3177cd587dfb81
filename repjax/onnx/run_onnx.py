"""Labels images with the file model.onnx beside this program: python run_onnx.py cat.jpg dog.jpg

Needs Pillow, NumPy and ONNX Runtime. The file itself says how images are prepared and what its
classes are called.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

file = str(Path(__file__).with_name("model.onnx"))
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
steps, names = json.loads(facts["preprocessing"]), json.loads(facts["class_names"])


def pixels(path):
  """Returns the central square of an image whose shorter side is resized, as uint8 (S, S, 3)."""
  image = ImageOps.exif_transpose(Image.open(path))
  if image.mode.startswith("I"):  # grey of 16 bits, of which the upper 8 count
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:  # transparent pixels lie on white
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image, size = image.convert("RGB"), steps["image_size"]
  # The longer side is rounded down. A corner between two pixels goes to the even one.
  shape = tuple(steps["resize_size"] * side // min(image.size) for side in image.size)
  image = image.resize(shape, Image.Resampling[steps["interpolation"].upper()])
  left, top = (round((side - size) / 2) for side in shape)
  return np.asarray(image.crop((left, top, left + size, top + size)))


if not sys.argv[1:]:
  print(f"usage: python {sys.argv[0]} IMAGE [IMAGE ...]", file=sys.stderr)
failed = 0
for path in sys.argv[1:]:
  try:
    images = pixels(path).transpose(2, 0, 1)[None]  # (1, 3, S, S)
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    failed += 1
    reason = getattr(error, "strerror", None) or error
    print(f"skipped: {path} cannot be read as an image: {reason}", file=sys.stderr)
    continue
  dtype = session.get_inputs()[0].type
  if dtype != "tensor(uint8)":  # else the file normalizes
    mean, std = (np.reshape(steps[name], (3, 1, 1)) for name in ("mean", "std"))
    images = ((images / 255 - mean) / std).astype("float16" if "float16" in dtype else "float32")
  row = np.asarray(session.run(None, {"images": images})[0])[0]
  if session.get_outputs()[0].name != "probabilities":
    row = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
  best = np.argsort(-row)[:5]
  print(f"{path}:", ", ".join(f"{names[i] if names else i} {row[i]:.1%}" for i in best))
if failed:
  sys.exit(f"{failed} of {len(sys.argv) - 1} images could not be read, see above")
