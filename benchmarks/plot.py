"""Draws published accuracy against measured speed, from a file of benchmarks/inference.py.

The picture needs matplotlib.

Example:
  python benchmarks/plot.py benchmarks/results/inference_cpu_2cores.json --to picture.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repjax.errors import InputError, one_paragraph
from repjax.extras import need

PUBLISHED = {
  "repvgg_a0": 72.41,
  "repvgg_a1": 74.46,
  "repvgg_a2": 76.48,
  "repvgg_b0": 75.14,
  "repvgg_b1": 78.37,
  "repvgg_b1g2": 77.78,
  "repvgg_b1g4": 77.58,
  "repvgg_b2": 78.78,
  "repvgg_b2g4": 78.50,
  "repvgg_b3": 80.52,
  "repvgg_b3g4": 80.21,
  "resnet18": 71.16,
  "resnet34": 74.17,
  "resnet50": 76.31,
  "resnet101": 77.21,
  "resnet152": 77.78,
  "vgg16": 72.21,
}
"""ImageNet top-1 at 224 px in %: Ding et al., RepVGG, CVPR 2021, Tables 4 and 5 (B3, B3g4)."""

STYLES = {
  "repjax-deploy": ("#c0392b", "o", "-"),
  "repjax-untuned": ("#c0392b", "o", "--"),
  "repjax-graphs": ("#c0392b", "x", ":"),
  "repjax-train-form": ("#e59866", "o", "--"),
  "repjax-onnxruntime": ("#1e8449", "^", ":"),
  "repjax-openvino": ("#7d3c98", "D", ":"),
  "torch-eager": ("#2471a3", "s", "--"),
  "torch-compile": ("#2471a3", "s", "-"),
  "onnxruntime": ("#1e8449", "^", "-"),
  "openvino": ("#7d3c98", "D", "-"),
}
"""Colour, marker and line style of each subject."""


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
  """Draws rows of benchmarks/inference.py into a file: a panel for each batch size and dtype.

  Raises:
    InputError: matplotlib is not installed, or no model has a published accuracy.
  """
  need("matplotlib", "--plot")
  from matplotlib.figure import Figure

  known = [row for row in rows if row["model"] in PUBLISHED]
  if not known:
    raise InputError("there is nothing to draw: none of these models has a published accuracy here")
  panels = list(dict.fromkeys((row["batch_size"], row["dtype"]) for row in known))
  figure = Figure((5.2 * len(panels), 4.6), dpi=120, layout="constrained")
  axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axis, (batch_size, dtype) in zip(axes, panels):
    own = [row for row in known if (row["batch_size"], row["dtype"]) == (batch_size, dtype)]
    _draw(axis, own)
    axis.set_title(f"batch {batch_size}, {dtype}")
  axes[0].set_ylabel("published ImageNet top-1, %")
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png", metadata={"Software": None})


def _draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
  """Draws one panel, with a line for each subject through its models."""
  from matplotlib.ticker import LogLocator

  for subject in dict.fromkeys(row["subject"] for row in rows):
    own = sorted((row for row in rows if row["subject"] == subject), key=_accuracy)
    colour, marker, style = STYLES[subject]
    speeds, heights = [row["images_per_s"] for row in own], [_accuracy(row) for row in own]
    look = {"color": colour, "marker": marker, "linestyle": style, "markersize": 5}
    axis.plot(speeds, heights, label=subject, **look)
  for model in dict.fromkeys(row["model"] for row in rows):
    fastest = max(row["images_per_s"] for row in rows if row["model"] == model)
    place = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 8}
    axis.annotate(model, (fastest, PUBLISHED[model]), **place)
  axis.set_xscale("log")
  axis.margins(x=0.2, y=0.12)
  axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.xaxis.set_major_formatter("{x:g}")
  axis.xaxis.set_minor_formatter("")
  axis.set_xlabel("images/s")
  axis.grid(alpha=0.25, which="both")


def _accuracy(row: dict[str, Any]) -> float:
  """Returns the published accuracy of a row's model in %."""
  return PUBLISHED[row["model"]]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", type=Path, help="file that inference.py --json has written")
  parser.add_argument("--to", type=Path, required=True, help=".png to write")
  arguments = parser.parse_args()
  with one_paragraph():
    save(json.loads(arguments.file.read_text())["results"], arguments.to)


if __name__ == "__main__":
  main()
