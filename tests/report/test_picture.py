"""The picture: what is on it, where it goes, and what happens where it cannot be."""

import importlib.util
import io
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from repjax import ModelSpec
from repjax.data import open_source
from repjax.errors import InputError
from repjax.report import curves as curve_panels
from repjax.report import draw_at_end, write_report
from repjax.report import figure as figures
from repjax.report import kernels as kernel_panels
from repjax.report.branches import FoldedLayer, Kernels, KernelStats, choose, read_kernels
from repjax.report.history import Curve, History, read_history
from repjax.report.maps import Example, Maps, maps_of, read_maps
from tests.helpers import spread
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


def panels(figure):
  """The first words of each panel's title to the panel; others under what stands beside them."""
  return {axes.get_title().partition(":")[0].partition(",")[0]: axes for axes in figure.axes}


def texts(part):
  return [
    text.get_text() for text in part.findobj(match=lambda artist: hasattr(artist, "get_text"))
  ]


def drawn(axes, label):
  """The points of the line of a label."""
  (line,) = [line for line in axes.lines if line.get_label() == label]
  return list(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()))


def history(name="run", batch_size=64, **curves):
  found = {key: Curve(*map(np.asarray, zip(*points))) for key, points in curves.items()}
  best = None
  if "eval_accuracy" in curves:
    best = max(curves["eval_accuracy"], key=lambda point: (point[1], point[0]))[0]
  return History(name, "m on d", batch_size, found, best, ())


RUN = history(
  loss=[(10, 2.0), (20, 0.05)],
  accuracy=[(10, 0.25), (20, 0.5)],
  learning_rate=[(10, 0.1), (20, 0.3)],
  eval_loss=[(10, 2.5), (20, 0.5)],
  eval_accuracy=[(10, 0.75), (20, 0.5)],
  images_per_second=[(10, 100.0), (20, 300.0)],
  waiting=[(10, 0.5), (20, 0.1)],
  seconds=[(10, 1.0), (20, 3.0)],
)


def layer(path, **norms):
  parts = {name: KernelStats(np.full((3, 3), 0.5), norm) for name, norm in norms.items()}
  return FoldedLayer(path, 1280, KernelStats(np.arange(1.0, 10.0).reshape(3, 3), 5.0), parts)


KERNELS = Kernels(
  "folder",
  "net",
  20,
  [
    layer("stem/RepConv_0", conv3x3=3.0, conv1x1=1.0),
    layer("stage1/block0/RepConv_0", conv3x3=1.0, conv1x1=1.0, identity=2.0),
  ],
)


def test_curves_are_where_they_belong():
  figure = figures.draw([RUN], None)
  found = panels(figure)
  assert drawn(found["Loss"], "training") == [(10, 2.0), (20, 0.05)]
  assert drawn(found["Loss"], "evaluation") == [(10, 2.5), (20, 0.5)]
  assert drawn(found["Loss"], "best evaluation") == [(10, 2.5)]
  assert drawn(found["Accuracy"], "training") == [(10, 25.0), (20, 50.0)]
  assert drawn(found["Accuracy"], "evaluation") == [(10, 75.0), (20, 50.0)]
  assert drawn(found["Accuracy"], "best evaluation") == [(10, 75.0)]
  for name, expected in (
    ("Learning rate", [0.1, 0.3]),
    ("Throughput", [100.0, 300.0]),
    ("Waiting for data", [50.0, 10.0]),
  ):
    (line,) = found[name].lines
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert found[name].get_ylim()[0] == 0
    assert found[name].get_ylim()[1] > max(expected)
  assert [axes.get_xlabel() for axes in figure.axes] == ["step"] * 5


def test_titles_say_what_one_sees():
  figure = figures.draw([RUN], KERNELS)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles[:6] == [
    "Loss: at the end 0.05 in training, 0.5 in evaluation",
    "Accuracy: best evaluation 75.00%, at step 10",
    "Learning rate: up to 0.3",
    "Throughput: 200 images/s (median)",
    "Waiting for data: 20.0% of the time",
    "What fused kernels are made of, by the norms of the branches' kernels, first to last layer; "
    "on average 3x3 50%, 1x1 25%, identity 25%",
  ]
  assert "run: m on d, 20 steps of 64 images" in texts(figure)
  assert [axes.get_ylabel() for axes in figure.axes[:6]] == [
    *("cross-entropy, logarithmic", "accuracy, %", "learning rate", "images a second"),
    *("share of training time, %", "share of norms, %"),
  ]


def test_loss_is_logarithmic_only_where_that_shows_more():
  near = history(loss=[(1, 2.0), (2, 1.0)])
  assert panels(figures.draw([near], None))["Loss"].get_yscale() == "linear"
  none = history(loss=[(1, 2.0), (2, 0.0)])
  assert panels(figures.draw([none], None))["Loss"].get_yscale() == "linear"


def test_other_evaluations_have_lines_of_their_own():
  run = RUN._replace(curves={**RUN.curves, "eval_ema_loss": Curve(np.array([20]), np.array([0.4]))})
  assert drawn(panels(figures.draw([run], None))["Loss"], "evaluation, ema") == [(20, 0.4)]


def test_a_run_of_one_line_is_drawn():
  figure = figures.draw([history(loss=[(5, 2.0)])], None)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles[:2] == ["Loss: at the end 2 in training", "Accuracy: not evaluated yet"]
  assert texts(figure).count("not recorded") == 4
  (line,) = panels(figure)["Loss"].lines
  assert line.get_marker() == "o"  # a line through one point cannot be seen
  assert line.get_markersize() > 0


@pytest.mark.parametrize(
  ("name", "shown"),
  [
    ("conv3x3_1", "3x3_1"),
    ("conv3x3_d2", "3x3 dilated 2"),
    ("conv1x1_conv3x3", "1x1 + 3x3"),
    ("conv1x1_avg3x3", "1x1 + average 3x3"),
    ("avg3x3", "average 3x3"),
    ("avg2x2_conv1x1", "pooled 1x1"),
    ("skip", "skip"),
  ],
)
def test_branches_have_short_names(name, shown):
  assert kernel_panels._shown(name) == shown


def test_bars_are_the_shares_and_fill_each_layer():
  bars = panels(figures.draw([RUN], KERNELS))["What fused kernels are made of"]
  heights = [[patch.get_height() for patch in container] for container in bars.containers]
  assert heights == [[75.0, 25.0], [25.0, 25.0], [0.0, 50.0]]
  tops = [patch.get_y() + patch.get_height() for patch in bars.containers[-1]]
  assert tops == [100.0, 100.0]
  assert [text.get_text() for text in bars.get_xticklabels()] == ["stem", "stage1.block0"]
  colors = {container.patches[0].get_facecolor() for container in bars.containers}
  assert len(colors) == 3


def test_heat_maps_show_percents_of_the_fused_kernel_on_one_scale():
  figure = figures.draw([history()], KERNELS)
  maps = [axes.images[0] for axes in figure.axes if axes.images]
  assert len(maps) == 2 + 2 + 2 + 1  # fused, 3x3, 1x1, and one identity
  assert len({(image.norm.vmin, image.norm.vmax) for image in maps}) == 1
  np.testing.assert_allclose(maps[0].get_array(), 100 * np.arange(1, 10).reshape(3, 3) / 45)
  np.testing.assert_allclose(maps[-1].get_array(), np.full((3, 3), 100 * 0.5 / 45))
  assert maps[0].norm.vmax == pytest.approx(20.0)
  labels = [axes.get_xlabel() for axes in figure.axes if axes.images]
  assert labels == [
    "",
    "",
    *("75% of norms", "25% of norms"),
    *("25% of norms",) * 2,
    "50% of norms",
  ]
  found = texts(figure)
  assert {"stem\n1,280 channels", "fused kernel", "identity", "none", "20"} <= set(found)
  assert any("folder, best checkpoint, step 20" in text for text in found)


@pytest.mark.parametrize(
  ("step", "said"), [(None, "folder, a deploy form: its branches"), (0, "folder, as imported")]
)
def test_imports_are_called_so(step, said):
  bare = KERNELS._replace(step=step, layers=[layer("stem/RepConv_0")])
  figure = figures.draw([history()._replace(title="", batch_size=None)], bare)
  assert len([axes for axes in figure.axes if axes.images]) == 1
  assert any(said in text for text in texts(figure))
  assert "run: net, weights only" in texts(figure)


def test_several_layers_of_a_block_are_told_apart():
  paths = ["stem/RepConv_0", "stage1/block0/RepConv_conv1", "stage1/block0/RepConv", "RepConv_0"]
  assert list(map(kernel_panels._short, paths)) == [
    *("stem", "stage1.block0.conv1", "stage1.block0", "RepConv_0")
  ]


def test_large_kernels_have_no_numbers_and_many_bars_fewer_labels():
  part = KernelStats(np.ones((7, 7)), 1.0)
  branches = {"conv7x7": part, "conv1x1": part}
  layers = [FoldedLayer(f"s{i // 30}/b{i}/RepConv_0", 8, part, branches) for i in range(130)]
  figure = figures.draw([history()], Kernels("f", "m", 1, layers))
  maps = [axes for axes in figure.axes if axes.images]
  assert len(maps) == 3 * len(choose(layers))
  assert not any(axes.texts for axes in maps)
  ticks = panels(figure)["What fused kernels are made of"].get_xticklabels()
  assert len(ticks) == 44


def test_runs_are_laid_over_one_another_in_colours_that_differ():
  other = history("other", **{k: list(zip(*v)) for k, v in RUN.curves.items()})
  figure = figures.draw([RUN, other._replace(best=20)], KERNELS)
  assert {"2 runs compared", "run", "other"} <= set(texts(figure))
  found = panels(figure)
  assert found["Accuracy"].get_title() == "Accuracy: best evaluation 75.00%, by run"
  assert [len(found[name].lines) for name in ("Learning rate", "Throughput")] == [2, 2]
  assert len({line.get_color() for line in found["Throughput"].lines}) == 2
  stars = [line for line in found["Accuracy"].lines if line.get_marker() == "*"]
  assert [line.get_xdata().tolist() for line in stars[:2]] == [[10], [20]]
  legend = [text.get_text() for text in found["Loss"].get_legend().get_texts()]
  assert legend == ["training", "evaluation", "best evaluation"]


@pytest.mark.parametrize("name", spread(["a$b^{$", "$x$"], ["a$b^{$"]))
def test_a_dollar_in_a_name_begins_no_formula(name):
  def picture(first):
    runs = [RUN._replace(name=first, notes=(f"{first}: a note",)), RUN._replace(name="other")]
    found = io.BytesIO()
    kernels = KERNELS._replace(name=first)
    figures.save(figures.draw(runs, kernels, [f"{first}: a note"]), found)
    return found.getvalue()

  assert picture(name) != picture(name.replace("$", ""))  # the character itself is drawn


def test_runs_of_other_batch_sizes_are_compared_by_images():
  other = RUN._replace(name="other", batch_size=128)
  loss = panels(figures.draw([RUN, other], None))["Loss"]
  lines = [line.get_xdata().tolist() for line in loss.lines if len(line.get_xdata()) == 2]
  assert lines == [[640, 1280], [640, 1280], [1280, 2560], [1280, 2560]]
  assert loss.get_xlabel() == "images seen in training"


@pytest.mark.parametrize("count", [2, 7, 25])
def test_every_run_of_a_comparison_has_a_look_of_its_own(count):
  looks = {tuple(curve_panels._style(number).values()) for number in range(count)}
  assert len(looks) == min(count, 24)


@pytest.mark.parametrize(
  ("number", "text"),
  [(0, "0"), (1500, "1,500"), (150000, "150k"), (12500, "12.5k"), (3e7, "30M"), (9999, "9,999")],
)
def test_large_numbers_are_short(number, text):
  assert curve_panels._count(number) == text


def test_branches_that_have_no_colour_get_one_each():
  names = ["conv5x5", "conv3x3", "conv1x3", "conv3x1", "conv1x1", "identity"]
  colors = kernel_panels._branch_colors(names)
  assert list(colors) == names
  assert len(set(colors.values())) == len(names)


def picture(path):
  """An array (H, W, 3); its ink is what is not white."""
  image = cv2.imread(str(path))
  assert image is not None
  return image


def test_the_picture_of_a_run_is_full(finished):
  image = picture(finished[0] / "report.png")
  assert image.shape[1] == 1200
  assert image.shape[0] > 1300
  rows, columns = (image < 200).any(-1).any(1), (image < 200).any(-1).any(0)
  for part in np.array_split(rows, 10):  # no stretch of the page is empty
    assert part.mean() > 0.5
  assert columns.mean() > 0.9
  assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100
  # Nothing is cut off at the edges.
  for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
    assert (edge > 250).all()


def test_the_picture_is_reproducible_and_nothing_else_is_written(finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "finished")
  before = tiny.contents(workdir)
  path, notes = write_report(workdir)
  assert (path, notes) == (workdir / "report.png", [])
  assert tiny.contents(workdir) == before


def test_another_file_and_its_folder_are_made(finished, tmp_path):
  before = tiny.contents(finished[0])
  path, _ = write_report(str(finished[0]), output=str(tmp_path / "new" / "picture.PNG"))
  assert path == tmp_path / "new" / "picture.PNG"
  assert picture(path).shape[1] == 1200
  assert tiny.contents(finished[0]) == before


def seen_by_draw(monkeypatch):
  """What is handed to the drawing, without drawing it."""
  seen = []
  monkeypatch.setattr(figures, "draw", lambda *arguments: seen.append(arguments))
  monkeypatch.setattr(figures, "save", lambda figure, path: path.write_bytes(b""))
  return seen


def test_what_is_drawn_is_what_the_folder_holds(finished, tmp_path, monkeypatch):
  seen = seen_by_draw(monkeypatch)
  other = shutil.copytree(finished[0], tmp_path / "finished")
  write_report(finished[0], compare=[other], output=tmp_path / "x.png")
  ((histories, kernels, notes, maps),) = seen
  assert maps is None
  expected = read_history(finished[0])
  names = [f"{folder.parent.name}/finished" for folder in (finished[0], other)]
  assert [each.name for each in histories] == names
  for name, curve in histories[0].curves.items():
    np.testing.assert_array_equal(curve, expected.curves[name])
  assert [each.path for each in kernels.layers] == [
    each.path for each in read_kernels(finished[0]).layers
  ]
  assert notes == []


def test_a_run_without_a_checkpoint_yet_shows_its_curves(finished, tmp_path, monkeypatch):
  seen = seen_by_draw(monkeypatch)
  workdir = tmp_path / "run"
  workdir.mkdir()
  for name in ("config.json", "model.json"):
    shutil.copy(finished[0] / name, workdir)
  (workdir / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step"')
  _, notes = write_report(workdir)
  assert notes == [
    f"{workdir}/metrics.jsonl: 1 damaged line left out",
    f"{workdir} holds no checkpoint yet, so no kernels are shown",
  ]
  ((histories, kernels, told, _),) = seen
  assert histories[0].curves.keys() == {"loss"}
  assert (kernels, told) == (None, notes)


@pytest.mark.usefixtures("no_leftovers")
def test_a_damaged_checkpoint_costs_the_kernels_only(finished, tmp_path, monkeypatch):
  seen = seen_by_draw(monkeypatch)
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  for path in (workdir / "checkpoints").glob("*/variables"):
    shutil.rmtree(path)
  _, notes = write_report(workdir)
  assert len(notes) == 1
  assert notes[0].startswith("no kernels are shown:")
  assert "holds no whole checkpoint" in notes[0]
  assert seen[0][1] is None
  assert seen[0][0][0].curves


def test_a_deploy_folder_is_drawn(finished, tmp_path, monkeypatch):
  seen = seen_by_draw(monkeypatch)
  write_report(finished[0] / "deploy", output=tmp_path / "x.png")
  assert seen[0][1].step is None


def test_a_folder_with_nothing_to_draw_is_refused(finished, tmp_path):
  shutil.copy(finished[0] / "model.json", tmp_path)
  with pytest.raises(InputError, match="has no curves and no kernels to draw yet") as caught:
    write_report(tmp_path)
  assert "holds no checkpoint yet" in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_a_folder_that_is_no_run_is_refused(finished, tmp_path):
  for arguments in ({"workdir": tmp_path}, {"workdir": finished[0], "compare": [tmp_path]}):
    with pytest.raises(InputError, match=r"model\.json does not exist; is .* the right folder"):
      write_report(**arguments, output=tmp_path / "x.png")
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_compared_is_refused(finished, tmp_path):
  workdir = finished[0]
  with pytest.raises(InputError, match="is given twice"):
    write_report(workdir, compare=[workdir / ".." / workdir.name], output=tmp_path / "x.png")
  shutil.copy(workdir / "model.json", tmp_path)
  for first, second in ((workdir, tmp_path), (tmp_path, workdir)):
    with pytest.raises(InputError, match=f"{tmp_path} has no curves to compare"):
      write_report(first, compare=[second], output=tmp_path / "x.png")


def test_a_picture_that_is_no_png_is_refused(finished, tmp_path):
  with pytest.raises(InputError, match=r"picture\.jpg is written as PNG; call it picture\.png"):
    write_report(finished[0], output=tmp_path / "picture.jpg")


@pytest.fixture
def no_matplotlib(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
  )


def test_without_matplotlib_a_run_ends_with_the_way_to_its_picture(
  finished, tmp_path, capsys, no_matplotlib
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  (workdir / "report.png").unlink()
  draw_at_end(workdir)
  (line,) = capsys.readouterr().out.splitlines()
  assert "pip install 'repjax[report]'" in line
  assert line.endswith(f"repjax report --workdir {workdir}")
  assert not (workdir / "report.png").exists()


def test_without_matplotlib_a_picture_on_demand_is_an_error(finished, no_matplotlib):
  with pytest.raises(InputError, match="for the picture, the package matplotlib"):
    write_report(finished[0])


def test_a_disk_that_is_full_stops_no_run(finished, tmp_path, capsys, monkeypatch):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  before = tiny.contents(workdir)

  def full(figure, path):
    path.write_bytes(b"PNG")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(figures, "save", full)
  draw_at_end(workdir)
  assert "No space left on device" in capsys.readouterr().out
  assert tiny.contents(workdir) == before


def test_training_loads_no_drawing_before_it_draws():
  program = (
    "import sys; from repjax import report, training; from repjax.training import display;"
    "print(*[name for name in ('matplotlib', 'tensorboardX') if name in sys.modules])"
  )
  shown = subprocess.run(
    [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True, check=True
  )
  assert shown.stdout == "\n"


class TestMaps:
  def test_forms_and_truth_are_compared_pixel_by_pixel(self):
    truth = np.array([[0, 1, 255], [2, 2, 255]], np.uint8)
    train = np.array([[0, 1, 1], [1, 2, 0]], np.uint8)
    deploy = np.array([[0, 2, 1], [1, 2, 1]], np.uint8)
    example = Example(np.zeros((2, 3, 3), np.uint8), truth, train, deploy)
    maps = Maps([example], ("sky", "a $", "cat"), ((0, 0, 0), (9, 0, 0), (0, 9, 0)), (0.5, None, 1))
    figure = figures.draw([RUN], None, maps=maps)
    found = panels(figure)
    assert [found[name].get_xlabel() for name in ("deploy form wrong", "forms differ")] == [
      "50.0% of pixels",
      "2 of 6 pixels",
    ]
    (image,) = found["truth"].images
    assert image.get_array()[:, :, 1].tolist() == [[0, 0, 255], [9, 9, 255]]  # no class is white
    (image,) = found["forms differ"].images
    assert image.get_array()[..., 0].tolist() == [[255, 0, 255], [255, 255, 0]]
    bars = found["IoU of each class in deploy form"]
    assert [bar.get_height() for bar in bars.patches] == [50, 0, 100]
    assert {"50", "absent", "100"} <= set(texts(bars))
    assert "on average 75.00%" in bars.get_title()
    assert any("all but 2 pixels" in text for text in texts(figure))

  def test_a_run_shows_images_of_its_split_in_both_forms(self, segmented):
    workdir, report = segmented
    spec = ModelSpec.read(workdir)
    source = open_source("synthetic", "sample", num_classes=3, image_size=16, task="segmentation")
    maps = maps_of(workdir, spec, source, window=12, flip=True)
    assert len(maps.examples) == 4
    assert maps.iou == report["iou"]["deploy"]
    for example in maps.examples:
      assert example.deploy.shape == example.truth.shape == example.pixels.shape[:2] == (16, 16)
      assert example.differs().mean() < 0.02
    assert read_maps(workdir) is None  # the labels of noise mean nothing

  def test_a_classifier_has_none(self, finished):
    assert read_maps(finished[0]) is None
