"""Tests of `repjax predict`."""

import csv
import json
import os
import shutil
import socket

import numpy as np
import pytest
from PIL import Image

import repjax
from repjax.data import decode, masks
from repjax.data.pairs import laid_out
from tests.deploy.tiny import NAMES

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture
def images(tmp_path):
  """Makes a folder that holds a folder, five images and a text file."""
  folder = tmp_path / "images"
  (folder / "more").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ("b.png", "a.JPG", "more/c.webp", "more/d.bmp", "more/e.jpeg"):
    pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((30, 24))
    pixels.save(folder / name, {"JPG": "jpeg"}.get(name.split(".")[-1]))
  (folder / "note.md").write_text("not an image")
  return folder


@pytest.fixture
def predict(run_command, small_folder):
  """Runs `repjax predict` on a small model."""
  return lambda *arguments: run_command("predict", "--workdir", small_folder, *arguments)


@pytest.fixture
def predict_with_errors(predict):
  """Runs `repjax predict`; returns the lines on stdout, and the text on stderr."""

  def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
      said = []
      patch.setattr("sys.stderr.write", said.append)
      return predict(*arguments).splitlines(), "".join(said)

  return run


@pytest.fixture
def best(small_folder):
  """Returns the most probable labels of a file, by `Predictor.top`."""
  predictor = repjax.deploy.Predictor(small_folder, batch_sizes=(1,), tune=False)
  return lambda path, k: predictor.top(path, k)[0]


def line(path, labels):
  return f"{path}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in labels)


def test_a_line_for_each_image_in_order(predict, images, best):
  paths = [images / "more" / "e.jpeg", images / "a.JPG"]
  printed = predict(*paths, "--top", 3)
  assert printed.splitlines() == [line(path, best(path, 3)) for path in paths]
  assert len(predict(paths[0], "--top", 99).split(", ")) == len(NAMES)
  assert len(predict(paths[0]).split(", ")) == 5


def test_a_runtime_can_be_chosen(predict, images, best):
  pytest.importorskip("onnxruntime")
  path = images / "a.JPG"
  assert predict(path, "--runtime", "onnxruntime") == line(path, best(path, 5)) + "\n"
  with pytest.raises(SystemExit, match="unknown runtime 'onnx'; did you mean onnxruntime"):
    predict(path, "--runtime", "onnx")


def test_folders_and_lists_are_files(predict, images, best, tmp_path):
  names = ["a.JPG", "b.png", "more/c.webp", "more/d.bmp", "more/e.jpeg"]
  expected = [line(images / name, best(images / name, 1)) for name in names]
  assert predict(images, "--top", 1).splitlines() == expected
  listed = tmp_path / "list.txt"
  listed.write_text(f"{images}/b.png\n\n  {images}/a.JPG\n")
  assert predict(listed, "--top", 1).splitlines() == [expected[1], expected[0]]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_csv_holds_a_row_for_each_image(predict, images, best, tmp_path, size):
  path = tmp_path / "labels.csv"
  printed = predict(images, "--csv", path, "--top", 2, "--batch-size", size)
  assert printed == f"5 images\nsaved: {path}\n"
  header, *rows = csv.reader(path.open(newline=""))
  assert header == ["image", "label1", "probability1", "label2", "probability2"]
  assert len(rows) == 5
  for name, *cells in rows:
    expected = best(name, 2)
    assert cells[::2] == [label for label, _ in expected]
    assert list(map(float, cells[1::2])) == pytest.approx([p for _, p in expected], abs=2e-6)
  assert list(tmp_path.glob("*.part")) == []


def test_what_cannot_be_read_is_named_and_counted(predict_with_errors, images):
  (images / "broken.png").write_bytes(b"no image")
  (images / "more" / "cut.jpg").write_bytes((images / "a.JPG").read_bytes()[:300])
  lines, text = predict_with_errors(images, "--top", 1)
  assert len(lines) == 5
  assert f"skipped: {images / 'broken.png'} cannot be decoded: not an image" in text
  assert "data set" not in text  # only images of data sets are prepared again
  assert f"skipped: {images / 'more' / 'cut.jpg'} cannot be decoded" in text
  assert text.endswith("2 of 7 images could not be read, see above\n")


@pytest.mark.parametrize("to_csv", [False, True])
def test_the_status_is_1_where_nothing_can_be_read(predict, tmp_path, to_csv):
  paths = [tmp_path / "none.png", tmp_path / "broken.png"]
  paths[1].write_bytes(b"no image")
  arguments = ("--csv", tmp_path / "labels.csv") if to_csv else ()
  with pytest.raises(SystemExit) as stop:
    predict(*paths, *arguments)
  assert stop.value.code == "error: none of the 2 images could be read, see above"
  assert not (tmp_path / "labels.csv").exists()


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("empty", r"empty holds no images; their endings are \.bmp"),
    ("empty.txt", r"empty\.txt holds no images"),
    ("missing.txt", r"missing\.txt cannot be read as a list of paths"),
  ],
)
def test_inputs_without_images_are_one_paragraph(predict, tmp_path, name, said):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty.txt").touch()
  with pytest.raises(SystemExit, match=f"^error: .*{said}"):
    predict(tmp_path / name)


def test_a_csv_that_cannot_be_written_and_no_labels_are_one_paragraph(predict, images, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit, match=r"^error: .*/file cannot be a folder"):
    predict(images / "a.JPG", "--csv", tmp_path / "file" / "labels.csv")
  with pytest.raises(SystemExit, match=r"^error: the number of labels must be 1 or more, got 0"):
    predict(images / "a.JPG", "--top", 0)
  with pytest.raises(SystemExit, match=r"^error: batch_sizes must be whole numbers above 0"):
    predict(images / "a.JPG", "--batch-size", -1)


def test_folders_are_searched_as_by_prepare_dataset(predict, images, best, tmp_path):
  for name in ("._b.png", ".hidden.png", "__MACOSX"):
    (images / name).write_bytes(b"no image")
  (images / "more").rename(tmp_path / "more")
  (images / "more").symlink_to(tmp_path / "more")
  (tmp_path / "more" / "loop").symlink_to(images)
  (images / "folder.png").mkdir()
  names = ["a.JPG", "b.png", "more/c.webp", "more/d.bmp", "more/e.jpeg"]
  assert predict(images, "--top", 1).splitlines() == [
    line(images / name, best(images / name, 1)) for name in names
  ]


def test_what_is_no_file_is_named_and_left_out(predict_with_errors, images):
  os.mkfifo(images / "pipe.png")
  with socket.socket(socket.AF_UNIX) as unix:
    unix.bind(str(images / "unix.png"))
  (images / "device.png").symlink_to("/dev/zero")
  listed = images.parent / "list.txt"
  listed.write_text("\0.png\n")
  lines, text = predict_with_errors(images, listed, "--top", 1)
  assert len(lines) == 5
  assert text.count("skipped: ") == 4
  assert text.endswith("4 of 9 images could not be read, see above\n")
  assert "pipe.png cannot be read: it is no file but a pipe" in text


def test_names_that_are_not_utf8_are_printed_and_written(predict_with_errors, images, tmp_path):
  name = os.fsdecode(b"caf\xe9 \x1b[31m\n.png")
  (images / "a.JPG").rename(images / name)
  shown = rf"{images}/caf\udce9 \x1b[31m\n.png: "
  assert predict_with_errors(images / name, "--top", 1)[0][0].startswith(shown)
  (images / os.fsdecode(b"\xff\r.png")).write_bytes(b"")
  _, text = predict_with_errors(images, "--top", 1, "--csv", tmp_path / "t.csv")
  assert rf"skipped: {images}/\udcff\r.png cannot be decoded" in text
  rows = list(csv.reader((tmp_path / "t.csv").open(encoding="utf-8", newline="")))
  assert f"{images}/caf\\udce9 \x1b[31m\n.png" in [row[0] for row in rows]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.csv"]


def test_a_list_of_windows_is_read(predict, images, best, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = '"images\\b.png"\r\nimages\\more\\e.jpeg\r\n'
  (tmp_path / "list.TXT").write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
  printed = predict("list.TXT", "--top", 1)
  assert [each.partition(":")[0] for each in printed.splitlines()] == [
    "images/b.png",
    "images/more/e.jpeg",
  ]


def test_an_error_of_any_class_ends_one_image_only(predict_with_errors, images, monkeypatch):
  errors = iter([MemoryError(), OverflowError("large"), RuntimeError("x\ny\x1b[2J")])
  original = decode._rgb

  def failing(image):
    for error in errors:
      raise error
    return original(image)

  monkeypatch.setattr(decode, "_rgb", failing)
  monkeypatch.setattr(decode.cv2, "imdecode", lambda *_: None)
  lines, text = predict_with_errors(images, "--top", 1, "--batch-size", 2)
  assert len(lines) == 2
  assert text.endswith("3 of 5 images could not be read, see above\n")
  assert text.count("cannot be decoded: ") == 3
  assert r"x y\x1b[2J" in text


@pytest.mark.parametrize(
  "name",
  ["=cmd.png", "+1.png", "-x.png", "@sum.png", "\tt.png", " =x.png", "\uff1dx.png", "plain.png"],
)
def test_no_cell_of_a_table_is_a_formula(predict, images, tmp_path, monkeypatch, name):
  monkeypatch.chdir(images)
  (images / "b.png").rename(images / name)
  predict("--top", 1, "--csv", tmp_path / "t.csv", "--", name)
  _, row = csv.reader((tmp_path / "t.csv").open(newline=""))
  assert row[0] == (name if name == "plain.png" else f"'{name}")


def test_mistakes_are_found_before_the_model_is_loaded(run_command, images, tmp_path):
  command = ("predict", "--workdir", tmp_path / "no model", images / "a.JPG")
  os.mkfifo(tmp_path / "pipe.csv")
  for arguments, said in (
    (("--batch-size", 0), "above 0, got --batch-size 0"),
    (("--top", -1), "the number of labels must be 1 or more, got -1"),
    (("--csv", images / "a.JPG" / "more" / "t.csv"), "a.JPG cannot be a folder"),
    (("--csv", tmp_path / "pipe.csv"), "it is no file"),
    (("--csv", images), "it is no file"),
    (("--csv", images / "a.JPG"), "is read as an image or a list, and --csv would replace it"),
  ):
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
      run_command(*command, *arguments)


def test_an_image_is_not_replaced_by_the_table(predict, images):
  before = (images / "more" / "c.webp").read_bytes()
  (images / "link").symlink_to("more")
  with pytest.raises(SystemExit, match="would replace it"):
    predict(images, "--csv", images / "link" / "c.webp")
  assert (images / "more" / "c.webp").read_bytes() == before


def test_a_batch_is_no_larger_than_all_images(predict, images):
  assert len(predict(images, "--batch-size", 10**12, "--top", 1).splitlines()) == 5


def test_a_stopped_command_leaves_no_part_of_a_table(predict, images, tmp_path, monkeypatch):
  def stopped(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(repjax.deploy.Predictor, "best", stopped)
  with pytest.raises((KeyboardInterrupt, SystemExit)):
    predict(images, "--csv", tmp_path / "t.csv")
  assert [path.name for path in tmp_path.iterdir()] == ["images"]


class TestSegmentation:
  @pytest.fixture
  def maps(self, run_command, segmented, tmp_path):
    """Runs `repjax predict` on a segmentation; returns what it prints, and the folder it makes."""

    def run(*arguments):
      target = tmp_path / "maps"
      printed = run_command("predict", "--workdir", segmented[0], *arguments, "--to", target)
      return printed, target

    return run

  @pytest.mark.parametrize("window", [0, 12])
  def test_class_maps_and_overlays_have_the_places_and_sizes_of_images(
    self, maps, images, segmented, window
  ):
    (images / "broken.png").write_bytes(b"no image")
    printed, target = maps(images, *(["--window", window] if window else []))
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    stems = ("a", "b", "more/c", "more/d", "more/e")
    both = {f"{kind}/{stem}.png" for kind in ("masks", "overlays") for stem in stems}
    assert files == {"classes.json", *both}
    mask = Image.open(target / "masks" / "b.png")
    classes = np.asarray(mask)
    assert mask.mode == "P"
    assert classes.shape == (24, 30)
    pixels = np.asarray(Image.open(images / "b.png"))
    overlay = np.asarray(Image.open(target / "overlays" / "b.png"))
    np.testing.assert_array_equal(overlay, masks.overlay(pixels, classes, masks.palette(3)))
    if not window:
      model, variables, spec = repjax.load(segmented[0])
      fill = tuple(round(255 * mean) for mean in spec.preprocessing.mean)
      canvas = spec.preprocessing.normalize(laid_out(pixels, (33, 33), fill)[None])
      wanted = np.asarray(model.apply(variables, canvas))[0, :24, :30].argmax(-1)
      assert (classes == wanted).mean() > 0.99
    shares = np.sort(np.bincount(classes.ravel(), minlength=3) / classes.size)[::-1]
    line = printed.splitlines()[1]
    assert line.startswith(f"{images / 'b.png'}: ")
    assert [float(word.rstrip("%,")) for word in line.split(": ")[1].split()[1::2]] == (
      pytest.approx(100 * shares, abs=0.06)
    )
    assert printed.endswith(f"5 images\nsaved: {target}\n")

  def test_overlays_have_the_colours_of_the_run(self, run_command, images, segmented, tmp_path):
    folder = shutil.copytree(segmented[0] / "deploy", tmp_path / "deploy")
    spec = json.loads((folder / "model.json").read_text())
    assert spec["class_colors"] == [list(color) for color in masks.palette(3)]
    spec["class_colors"] = colors = [[9, 8, 7], [200, 100, 0], [0, 1, 2]]
    (folder / "model.json").write_text(json.dumps(spec))
    target = tmp_path / "maps"
    arguments = ["--workdir", folder, "--no-verify", "--to", target, "--window", 12, "--flip"]
    run_command("predict", images / "b.png", *arguments)
    assert json.loads((target / "classes.json").read_text())["colors"] == colors
    classes = np.asarray(Image.open(target / "masks" / "b.png"))
    overlay = np.asarray(Image.open(target / "overlays" / "b.png"))
    pixels = np.asarray(Image.open(images / "b.png"))
    np.testing.assert_array_equal(overlay, masks.overlay(pixels, classes, colors))

  def test_a_folder_that_exists_and_names_that_clash_are_refused(self, maps, images, tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine").touch()
    with pytest.raises(SystemExit, match="exists already"):
      maps(images)
    (tmp_path / "maps" / "mine").unlink()
    (images / "b.jpg").write_bytes((images / "b.png").read_bytes())
    with pytest.raises(SystemExit, match=r"b\.png would both be written as b\.png|Rename one"):
      maps(images)
    assert not any((tmp_path / "maps").iterdir())

  def test_a_classifier_has_no_maps_and_no_windows(self, predict, images, tmp_path):
    with pytest.raises(SystemExit, match="is for classification"):
      predict(images, "--to", tmp_path / "maps")
    with pytest.raises(SystemExit, match=r"windows .* for segmentation.*Leave window out"):
      predict(images, "--window", 8)
