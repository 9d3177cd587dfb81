"""The page in a real browser: pictures are prepared as ours are, and labels are those of JAX."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

import repjax
from repjax import cli
from repjax.data.decode import Picture
from repjax.data.transforms import resize_and_crop
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.web import page_files, runtime_files
from tests.cli.helpers import stop_of
from tests.deploy.tiny import SPEC
from tests.helpers import random_variables
from tests.web.browser import browser, needs_chromium, served

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

in_a_browser = [pytest.mark.proof, needs_chromium]  # starts a browser, and fetches the runtime once
READY = "document.getElementById('status').textContent === 'Ready.'"
SHOWN = "document.getElementById('results').children.length"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
  """A folder with ONNX Runtime Web, which is in the cache or can be fetched."""
  try:
    files = runtime_files()
  except InputError as error:
    pytest.skip(str(error))
  folder = tmp_path_factory.mktemp("runtime")
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
  with browser(tmp_path_factory.mktemp("profile")) as opened:
    yield opened


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


class TestInABrowser:
  pytestmark = in_a_browser

  def test_pixels_are_those_of_pillow(self, chromium, tmp_path):
    for name, content in page_files().items():
      (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.html").write_text("<!doctype html>")
    shapes = [(37, 53), (90, 41), (16, 20), (8, 8), (64, 120), (300, 64), (18, 18), (18, 25)]
    for number, shape in enumerate(shapes):
      (tmp_path / f"{number}.png").write_bytes(png(noise(*shape, number)))
    with served(tmp_path) as address:
      chromium.open(f"{address}/empty.html")
      chromium.wait("location.pathname === '/empty.html'")
      for interpolation in ("bilinear", "bicubic", "nearest"):
        how = {"image_size": 16, "resize_size": 18, "interpolation": interpolation}
        for number, shape in enumerate(shapes):
          found = chromium.run(
            f"""(async () => {{
              const {{ square }} = await import("./pixels.js");
              const bitmap = await createImageBitmap(await (await fetch("{number}.png")).blob(),
                {{ colorSpaceConversion: "none" }});
              const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
              canvas.drawImage(bitmap, 0, 0);
              const image = canvas.getImageData(0, 0, bitmap.width, bitmap.height);
              return Array.from(square(image, {how}));
            }})()"""
          )
          picture = Picture((tmp_path / f"{number}.png").read_bytes(), "")
          wanted = resize_and_crop(picture, 16, 18, interpolation)
          np.testing.assert_array_equal(
            np.reshape(found, (16, 16, 3)), wanted, f"{interpolation} {shape}"
          )

  def test_labels_are_those_of_the_predictor(self, chromium, small, runtime, tmp_path):
    folder = tmp_path / "page"
    repjax.deploy.export(*small, SPEC, folder, format="web", web_runtime=runtime)
    (folder / "noise.png").write_bytes(png(noise(40, 60)))
    model, variables = small
    image = resize_and_crop(Picture((folder / "noise.png").read_bytes(), ""), 16, 18, "bicubic")
    logits = model.apply(variables, SPEC.preprocessing.normalize(image[None]))
    shares = np.asarray(jax.nn.softmax(logits)[0])
    with served(folder) as address:
      chromium.open(f"{address}/?picture=noise.png")
      chromium.wait(f"{SHOWN} && {READY}")
      rows = chromium.run("[...document.querySelectorAll('.label')].map((row) => row.innerText)")
      for row, place in zip(rows, np.argsort(-shares)[:5], strict=True):
        name, share = row.split("\n")
        assert name == SPEC.class_names[place]
        assert abs(float(share.split()[0]) - 100 * shares[place]) <= 0.06
      forms = chromium.run("[...times.tBodies[0].rows].map((row) => row.innerText.split('\\t'))")
    assert [name for name, *_ in forms] == ["deploy form", "training form"]
    assert all(float(time.removesuffix(" ms")) > 0 for _, time, _ in forms)

  def test_drawn_and_dropped_pictures_are_looked_at(self, chromium, small, runtime, tmp_path):
    folder = tmp_path / "page"
    repjax.deploy.export(*small, SPEC, folder, format="web", web_runtime=runtime)
    with served(folder) as address:
      chromium.open(address)
      chromium.wait(READY)
      chromium.draw([[(0.2, 0.2), (0.8, 0.2), (0.4, 0.9)]])
      chromium.wait(f"{SHOWN} === 5 && comparison.textContent.includes('%')")
      light = chromium.run(
        "seen.getContext('2d').getImageData(0, 0, 16, 16).data.filter((x) => x === 255).length"
      )
      assert 256 < light < 4 * 256  # the ink is white, like alpha; the paper is not
      chromium.run(
        f"""(() => {{
          const given = new DataTransfer(), bytes = Uint8Array.from({list(png(noise(18, 18)))});
          given.items.add(new File([bytes], "noise.png", {{ type: "image/png" }}));
          document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: given }}));
        }})()"""
      )
      middle = noise(18, 18)[1:17, 1:17]
      first = "seen.getContext('2d').getImageData(0, 0, 1, 1).data"
      chromium.wait(f"[...{first}].slice(0, 3).join() === '{','.join(map(str, middle[0, 0]))}'")

  def test_classes_of_pixels_lie_over_the_picture(self, chromium, runtime, tmp_path):
    narrow = {"stage_sizes": [1, 1, 1, 1], "width_multipliers": [0.125] * 4}
    overrides = {"backbone": "repvgg_a0", "backbone_overrides": narrow, "head_features": 8}
    names = ("sky", "<b>road</b>", "tree")
    spec = repjax.ModelSpec("fcn", 3, overrides, Preprocessing(32, 32), names)
    model = spec.create_model()
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    folder = tmp_path / "page"
    repjax.deploy.export(model, variables, spec, folder, format="web", web_runtime=runtime)
    (folder / "noise.png").write_bytes(png(noise(50, 60)))
    image = resize_and_crop(Picture((folder / "noise.png").read_bytes(), ""), 32, 32, "bilinear")
    logits = model.apply(variables, spec.preprocessing.normalize(image[None]))
    counts = np.bincount(np.asarray(logits[0].argmax(-1)).ravel(), minlength=3)
    with served(folder) as address:
      chromium.open(f"{address}/?picture=noise.png")
      chromium.wait(f"{SHOWN} && {READY}")
      rows = chromium.run("[...document.querySelectorAll('.label')].map((row) => row.innerText)")
    found = dict(row.split("\n") for row in rows)
    wanted = {name: f"{100 * n / 1024:.1f}\u00a0%" for name, n in zip(names, counts) if n}
    assert found == wanted

  def test_a_file_that_is_no_picture_is_named(self, chromium, small, runtime, tmp_path):
    folder = tmp_path / "page"
    repjax.deploy.export(*small, SPEC, folder, format="web", web_runtime=runtime)
    with served(folder) as address:
      chromium.open(f"{address}/?picture=page.css")
      chromium.wait("document.getElementById('status').textContent.includes('no picture')")
      chromium.open(f"{address}/?picture=nowhere.png")
      chromium.wait("document.getElementById('status').textContent.includes('nowhere.png')")


@pytest.fixture
def no_runtime(monkeypatch):
  """A runtime of one byte, since the page is not opened."""
  monkeypatch.setattr("repjax.web.files.runtime_files", lambda source: {"ort.mjs": b"1"})


@pytest.mark.usefixtures("no_runtime")
def test_the_folder_has_both_forms_of_a_training_form(small, tmp_path):
  pytest.importorskip("onnx")
  folder = tmp_path / "page"
  facts = repjax.deploy.export(*small, SPEC, folder, format="web")
  assert facts["checked_training"].get("relative_error", 0) < 1e-5
  assert {"index.html", "page.json", "model.onnx", "training.onnx"} <= {
    path.name for path in folder.iterdir()
  }
  with pytest.raises(InputError, match="ONNX file alone"):
    repjax.load(folder)
  with pytest.raises(InputError, match="ONNX file"):
    repjax.deploy.load_exported(folder)


@pytest.mark.usefixtures("no_runtime")
def test_the_command_says_how_to_see_the_page(small_folder, tmp_path, capsys):
  pytest.importorskip("onnx")
  arguments = ["export", "--workdir", str(small_folder), "--format", "web"]
  cli.main([*arguments, "--to", str(tmp_path / "a page")])
  assert f"http.server --directory '{tmp_path}/a page'" in capsys.readouterr().out
  assert not (tmp_path / "a page" / "training.onnx").exists()
  message = stop_of(cli.main, [*arguments, "--both-forms", "--to", str(tmp_path / "other")])
  assert "training form" in message


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"spec": SPEC.preprocessing}, "needs a ModelSpec"),
    ({"normalize": False}, "--normalized"),
    ({"features_only": True}, "features_only"),
  ],
)
def test_what_no_page_can_show_is_refused(change, reason, small, tmp_path):
  pytest.importorskip("onnx")
  model, variables = small
  if change.pop("features_only", False):
    model = dataclasses.replace(model, features_only=True)
  arguments = {"spec": SPEC, "folder": tmp_path / "page", "format": "web", **change}
  with pytest.raises(InputError, match=reason):
    repjax.deploy.export(model, variables, **arguments)
