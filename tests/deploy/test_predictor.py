"""Tests of probabilities and labels of files and pixels."""

import dataclasses
import io
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import repjax
from repjax.data import read_image
from repjax.deploy import predictor as predictors
from repjax.errors import InputError
from tests.deploy.tiny import NAMES, SPEC
from tests.helpers import assert_close, error_in_child

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


@pytest.fixture(scope="module")
def predictor(small_folder, quickly):
  return repjax.deploy.Predictor(
    small_folder, batch_sizes=(2, 4), devices=jax.devices()[:1], tune=False
  )


def picture(seed, height=40, width=30):
  """Pixels with shapes in them, so that resizing matters."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def png(pixels):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "png")
  return stream.getvalue()


class OddPath:
  """Somebody's path, which cannot be named."""

  def __fspath__(self):
    raise OverflowError("too long")


@pytest.fixture
def files(tmp_path):
  """Seven images of different sizes in files, and the third is none."""
  paths = [tmp_path / f"{index}.png" for index in range(7)]
  for index, path in enumerate(paths):
    path.write_bytes(png(picture(index, 20 + index, 33 - index)) if index != 2 else b"no image")
  return paths


def expected(small, images):
  """Returns probabilities by the training form, as the documentation of `repjax.load` has it."""
  squares = np.stack([read_image(png(image), SPEC.preprocessing) for image in images])
  normalized = SPEC.preprocessing.normalize(jnp.asarray(squares))
  return jax.nn.softmax(jax.jit(small[0].apply)(small[1], normalized))


def test_probabilities_are_those_of_the_stored_preprocessing(predictor, small):
  images = [picture(seed, 16 + 3 * seed, 30 - seed) for seed in range(7)]
  rows = predictor(images)
  assert (rows.shape, rows.dtype) == ((7, 10), np.float32)
  assert_close(rows, expected(small, images), 1e-5)
  assert np.ptp(rows, 0).max() > 0.02  # images matter


def test_a_path_bytes_and_pixels_are_the_same_image(predictor, tmp_path):
  pixels = picture(1)
  path = tmp_path / "image.png"
  path.write_bytes(png(pixels))
  rows = predictor([pixels, str(path), path, path.read_bytes()])
  assert_close(rows, np.tile(rows[:1], (4, 1)), 1e-6)
  for lone in (pixels, path, str(path), path.read_bytes()):
    assert_close(predictor(lone), rows[:1], 1e-6)
  assert_close(predictor(np.stack([pixels, pixels])), rows[:2], 1e-6)
  assert predictor([]).shape == (0, 10)


def test_top_gives_labels_from_the_most_probable_down(predictor):
  rows = predictor([picture(1), picture(2)])
  for row, best in zip(rows, predictor.top([picture(1), picture(2)], 3), strict=True):
    assert best[0] == (NAMES[row.argmax()], float(row.max()))
    assert [probability for _, probability in best] == sorted(row, reverse=True)[:3]
  assert [label for label, _ in predictor.top(picture(1), 99)[0]][:10] == [
    NAMES[index] for index in np.argsort(-rows[0])
  ]
  with pytest.raises(InputError, match=r"number of labels .* got 0"):
    predictor.top(picture(1), 0)


def test_a_model_without_names_gives_numbers(small_folder, tmp_path):
  folder = shutil.copytree(small_folder, tmp_path / "nameless")
  dataclasses.replace(SPEC, class_names=()).write(folder)
  nameless = repjax.deploy.Predictor(
    folder, batch_sizes=(2,), devices=jax.devices()[:1], tune=False
  )
  assert nameless.labels == tuple("0123456789")


def test_a_stream_keeps_the_order_and_goes_on_behind_what_cannot_be_read(predictor, files):
  results = list(predictor.stream(iter(files)))
  assert [file for file, _ in results] == files
  assert isinstance(results[2][1], InputError)
  assert "2.png" in str(results[2][1])
  good = [index for index in range(7) if index != 2]
  rows = predictor([files[index] for index in good])
  for index, row in zip(good, rows):
    assert_close(results[index][1], row, 1e-6)
  with pytest.raises(InputError, match=r"2\.png cannot be decoded"):
    predictor(files)
  assert list(predictor.stream([])) == []


def test_a_stream_reads_one_batch_ahead_and_no_more(predictor, files):
  taken = []

  def source():
    for path in files[3:] * 4:
      taken.append(path)
      yield path

  stream = predictor.stream(source())
  assert taken == []
  next(stream)
  assert len(taken) == 2 * 4  # of the largest batch size


def test_the_dtype_is_the_programs(small_folder, small):
  half = repjax.deploy.Predictor(
    small_folder, dtype="bfloat16", batch_sizes=(2,), devices=jax.devices()[:1], tune=False
  )
  images = [picture(1), picture(2)]
  rows, exact = half(images), expected(small, images)
  assert_close(rows, exact, 5e-2)
  assert np.abs(rows - exact).max() > 1e-5


def test_the_options_of_compile_are_passed_on(small_folder, small, monkeypatch):
  given = []

  def noting(*_, **options):
    given.append(options)
    return lambda images: np.ones((1, 10))

  monkeypatch.setattr(predictors, "compile", noting)
  options = {"cuda_graphs": True, "runtime": "auto", "tune": False, "dtype": "float16"}
  repjax.deploy.Predictor(small_folder, **options)
  repjax.deploy.Predictor.of(*small, SPEC.preprocessing, **options)
  assert all(options.items() <= each.items() for each in given)
  assert len(given) == 2


@pytest.mark.parametrize(
  ("image", "said"),
  [
    (np.zeros(8, np.uint8), r"pixels .* uint8 \(H, W, 3\).* got uint8 \(8,\)"),
    (np.zeros((8, 8, 5), np.uint8), r"got uint8 \(8, 8, 5\)"),
    (np.zeros((8, 8, 3), np.float32), r"got float32 \(8, 8, 3\)"),
    (np.zeros((0, 8, 3), np.uint8), r"got uint8 \(0, 8, 3\)"),
    ([7], "path, bytes or a uint8 array, got int"),
    (io.StringIO("text"), r"must be opened to read bytes"),
    (types.SimpleNamespace(read=lambda _: 1 / 0, name="a.png"), "a.png cannot be decoded: .*zero"),
    ("a\0b.png", "holds a NUL character"),
    ("/dev/zero", "no file but a pipe"),
    ("none.png", "none.png cannot be read: No such file"),
    (b"GIF", "the image cannot be decoded"),
    (io.BytesIO(), "gives no bytes.*seek"),
    (np.broadcast_to(np.uint8(1), (10**5, 10**5, 3)), "100000 x 100000 pixels"),
    (7, "one image or several, got 7"),
    (None, "one image or several, got None"),
  ],
  ids=[
    *("row", "channels", "float", "empty", "number", "text file", "broken file", "NUL", "device"),
    *("path", "bytes", "read before", "repeated", "no image", "None"),
  ],
)
def test_what_is_no_image_is_refused(predictor, image, said):
  with pytest.raises(InputError, match=said):
    predictor(image)


@pytest.mark.parametrize(
  "image",
  [
    np.linspace(0, 1, 64).reshape(8, 8),
    np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8, 1),
    np.arange(64, dtype=np.int64).reshape(8, 8),
    np.zeros((3, 8, 8), np.float16),
  ],
  ids=["grey floats", "one channel", "integers", "channels first"],
)
def test_what_the_message_says_makes_an_image(predictor, image):
  with pytest.raises(InputError) as told:
    predictor(image)
  for way in re.findall(r"image = (.+?)\.(?: |$)", str(told.value)):
    image = eval(way, {"np": np, "image": image})
  assert predictor(image).shape == (1, len(predictor.labels))


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"model\.json does not exist"):
    repjax.deploy.Predictor(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_pixels_are_those_of_the_file(predictor, mode):
  image = Image.fromarray(picture(1)).convert(mode)
  if mode == "RGBA":
    image.putalpha(Image.fromarray(picture(2)[..., 0]))
  stream = io.BytesIO()
  image.save(stream, "png")
  wanted = predictor.read(stream.getvalue())
  pixels = np.asarray(image)
  np.testing.assert_array_equal(predictor.read(pixels), wanted)
  if mode == "L":
    np.testing.assert_array_equal(predictor.read(pixels[..., None]), wanted)
  np.testing.assert_array_equal(predictor.read(image), wanted)
  assert len(np.unique(wanted)) > 9


def test_a_start_says_on_terminals_what_it_does(small_folder, capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  repjax.deploy.Predictor(small_folder, batch_sizes=(2,), devices=jax.devices()[:1], tune=False)
  shown = capsys.readouterr().err
  assert f"loading {small_folder} ...\r" in shown
  assert "compiling for batches of 2 ...\r" in shown
  assert shown.endswith("\x1b[2K\r")
  monkeypatch.setattr("sys.stderr.isatty", lambda: False)
  repjax.deploy.Predictor(small_folder, batch_sizes=(2,), devices=jax.devices()[:1], tune=False)
  assert capsys.readouterr().err == ""


def test_open_files_and_images_of_pillow_are_taken(predictor, tmp_path):
  pixels = picture(1)
  path = tmp_path / "image.png"
  path.write_bytes(png(pixels))
  rows = predictor(pixels)
  with path.open("rb") as file:
    assert_close(predictor(file), rows, 1e-6)
  for image in (Image.open(path), Image.fromarray(pixels), bytearray(png(pixels))):
    assert_close(predictor(image), rows, 1e-6)
  both = list(predictor.stream([io.BytesIO(png(pixels)), Image.open(path)]))
  assert_close(np.stack([row for _, row in both]), np.tile(rows, (2, 1)), 1e-6)
  tags = Image.Exif()
  tags[0x0112] = 6
  turned = io.BytesIO()
  Image.fromarray(np.rot90(pixels)).save(turned, "png", exif=tags)
  assert_close(predictor(Image.open(turned)), rows, 1e-6)


@pytest.mark.parametrize("sizes", [0, -1, 1.5, "2", (), [0], [True]], ids=repr)
def test_batch_sizes_are_whole_numbers_above_0(small_folder, sizes):
  with pytest.raises(InputError, match="batch_sizes must be whole numbers above 0"):
    repjax.deploy.Predictor(small_folder, batch_sizes=sizes, tune=False)


@pytest.mark.parametrize("k", [0, -1, 1.5, "1"], ids=repr)
def test_the_number_of_labels_is_a_whole_number_above_0(predictor, k):
  with pytest.raises(InputError, match=f"number of labels must be 1 or more, got {k!r}"):
    predictor.top(picture(1), k)


def test_a_stream_of_one_image_is_one_result(predictor, files):
  for image in (files[0], str(files[0]), Image.open(files[0]), picture(1), png(picture(1))):
    ((_, row),) = predictor.stream(image)
    assert row.shape == (len(predictor.labels),)


def test_any_error_ends_one_image_of_a_stream_only(predictor, files, monkeypatch):
  odd = ["a\0b", "x" * 5000, object(), types.SimpleNamespace(read=lambda _: 1 / 0), b"", files[0]]
  odd[0:0] = [OddPath()]
  results = list(predictor.stream(odd))
  assert [image for image, _ in results] == odd
  assert [isinstance(result, InputError) for _, result in results] == [True] * 6 + [False]


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize(
  "use",
  [
    lambda predictor: predictor([picture(1)]),
    lambda predictor: predictor.program(np.zeros((1, 16, 16, 3), np.uint8)),
    lambda predictor: next(predictor.stream([picture(1)])),
    lambda _: repjax.init(repjax.create_model("repvgg_a0"), None, 32),
    lambda _: repjax.deploy.compile(repjax.create_model("repvgg_a0"), {}, image_size=32),
    lambda _: repjax.load("a folder"),
  ],
  ids=["predictor", "program", "stream", "init", "compile", "load"],
)
def test_a_forked_process_says_that_it_would_wait_for_ever(predictor, use):
  assert "forked from one that had used JAX" in error_in_child(lambda: use(predictor))
