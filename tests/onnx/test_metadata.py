"""What ONNX files say about their images and classes, and the program beside them."""

import dataclasses
import json
import runpy

import numpy as np
import pytest
from PIL import Image

import repjax
from repjax.data import read_image
from repjax.onnx import metadata
from repjax.quantization import quantize_weights
from repjax.spec import Preprocessing
from tests.deploy.tiny import NAMES, SPEC
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


def facts_of(proto):
  """Returns what the metadata of a model says."""
  return {entry.key: json.loads(entry.value) for entry in proto.metadata_props}


@pytest.fixture(scope="module")
def proto(small, quickly):
  """The small model as ONNX, which no test may change."""
  how = SPEC.preprocessing
  return repjax.onnx.to_onnx(*small, image_size=16, preprocessing=how, class_names=NAMES)


def test_a_file_says_how_images_are_prepared_and_what_classes_are_called(proto):
  facts = facts_of(proto)
  assert facts == {
    "preprocessing": json.loads(json.dumps(dataclasses.asdict(SPEC.preprocessing))),
    "class_names": list(NAMES),
  }
  assert Preprocessing(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in facts["preprocessing"].items()
    }
  ) == (SPEC.preprocessing)


def test_8_bits_keep_what_the_file_says(proto):
  assert facts_of(quantize_weights(proto)) == facts_of(proto)


def program_of(folder, proto, preprocessing, names=NAMES):
  """Writes the files of a model into a folder, and returns the path of the program."""
  folder.mkdir()
  copy = type(proto)()
  copy.CopyFrom(proto)
  for name, content in metadata.files("model.onnx", copy, preprocessing, names).items():
    (folder / name).write_bytes(content)
  return folder / metadata.PROGRAM


def photograph(width, height, mode="RGB"):
  """Returns an image with shapes in it, so that resizing matters."""
  channels = {"L": 0, "RGB": 3, "RGBA": 4, "P": 3, "CMYK": 4}[mode]
  shape = (7, 5, channels) if channels else (7, 5)
  coarse = np.random.default_rng(width).integers(0, 256, shape, np.uint8)
  image = Image.fromarray(coarse, mode="CMYK" if mode == "CMYK" else None)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  return image.quantize(16) if mode == "P" else image


def images(folder):
  """Writes images of several kinds and sizes, and returns their paths."""
  turned = Image.Exif()
  turned[0x0112] = 6
  kinds = {
    "wide.png": photograph(61, 40),
    "high.png": photograph(33, 97),
    "odd.jpg": photograph(41, 27),
    "square.png": photograph(30, 30),
    "grey.png": photograph(50, 31, "L"),
    "clear.png": photograph(37, 44, "RGBA"),
    "few.gif": photograph(35, 29, "P"),
    "print.jpg": photograph(40, 33, "CMYK"),
    "deep.png": Image.fromarray(np.asarray(photograph(38, 52, "L")).astype(np.uint16) * 257),
  }
  for name, image in kinds.items():
    image.save(folder / name)
  photograph(45, 28).save(folder / "turned.jpg", exif=turned)
  return sorted(folder.iterdir())


@pytest.mark.parametrize(
  "steps",
  [
    SPEC.preprocessing,
    Preprocessing(16, 16, "bicubic"),
    Preprocessing(16, 19, "nearest"),
    Preprocessing(16, 21, "bilinear"),
  ],
)
def test_the_pixels_of_the_program_are_ours(proto, steps, tmp_path, monkeypatch):
  program = program_of(tmp_path / "out", proto, steps)
  monkeypatch.setattr("sys.argv", [str(program)])
  pixels = runpy.run_path(str(program))["pixels"]
  (tmp_path / "images").mkdir()
  for path in images(tmp_path / "images"):
    np.testing.assert_array_equal(pixels(path), read_image(path, steps), path.name)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_program_gives_the_labels_of_the_predictor(
  small, small_folder, normalized, tmp_path, monkeypatch, capsys
):
  spec = dataclasses.replace(SPEC, class_names=NAMES)
  target = tmp_path / "out"
  repjax.deploy.export(*small, spec, target, format="onnx", normalize=not normalized)
  path = tmp_path / "a.png"
  photograph(61, 40).save(path)
  monkeypatch.setattr("sys.argv", ["run_onnx.py", str(path)])
  found = runpy.run_path(str(target / metadata.PROGRAM))
  labels = [f"{NAMES[index]} {found['row'][index]:.1%}" for index in found["best"]]
  assert capsys.readouterr().out == f"{path}: {', '.join(labels)}\n"
  image = read_image(path, SPEC.preprocessing)[None]
  logits = small[0].apply(small[1], SPEC.preprocessing.normalize(image))
  expected = np.exp(logits[0] - logits[0].max())
  assert_close(found["row"], expected / expected.sum(), 1e-5)


def test_program_beside_the_file_names_what_it_cannot_read(small, tmp_path, monkeypatch, capsys):
  target = tmp_path / "out"
  repjax.deploy.export(*small, SPEC, target, format="onnx")
  good, bad, missing = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
  photograph(61, 40).save(good)
  bad.write_bytes(b"no image")
  paths = [str(path) for path in (bad, missing, tmp_path, good)]
  monkeypatch.setattr("sys.argv", ["run_onnx.py", *paths])
  with pytest.raises(SystemExit, match="3 of 4 images could not be read"):
    runpy.run_path(str(target / metadata.PROGRAM))
  out, err = capsys.readouterr()
  assert out.startswith(f"{good}: ")
  assert out.count("\n") == 1
  assert [line.split(" cannot")[0] for line in err.splitlines()] == [
    f"skipped: {path}" for path in paths[:3]
  ]
  monkeypatch.setattr("sys.argv", ["run_onnx.py"])
  runpy.run_path(str(target / metadata.PROGRAM))
  usage = f"usage: python {target / metadata.PROGRAM} IMAGE [IMAGE ...]\n"
  assert capsys.readouterr().err == usage


def test_feature_maps_have_no_program(small, tmp_path, quickly):
  maps = repjax.onnx.to_onnx(small[0].clone(features_only=True), small[1], image_size=16)
  assert metadata.files("model.onnx", maps, SPEC.preprocessing).keys() == {"model.onnx"}
