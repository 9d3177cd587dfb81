"""Times RepVGG and the networks that its paper compares it with, all in one runtime.

Every network is in the form in which it is shipped, with random weights, and compiled by
`repjax.deploy.compile`. So the ratios are those of architectures. A RepVGG and its rivals take
turns; a ratio is the median over the rounds. Published are the accuracies and speeds of the paper:
examples per second on a GTX 1080Ti, batch 128, float32.

The program prints a table in Markdown; --json writes the measurements, and --plot draws accuracy
over speed. On a machine that other programs use, measure CPU time on one core.

Examples:
  python benchmarks/headline.py --json headline.json --plot headline.png
  taskset -c 0 python benchmarks/headline.py --cpu-time --batch-sizes 1
  python benchmarks/headline.py --from headline.json --plot headline.png

References:
  Ding et al., RepVGG: Making VGG-style ConvNets Great Again, CVPR 2021, Table 4.
  https://arxiv.org/abs/2101.03697
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import inference
import jax
import numpy as np
import other_networks
import timing
from plot import PUBLISHED as PUBLISHED_OF_OURS

import repjax
from repjax.errors import InputError, one_paragraph

GROUPS = {
  "repvgg_a0": ("resnet18",),
  "repvgg_a1": ("resnet34",),
  "repvgg_a2": ("resnet50", "efficientnet_b0"),
  "repvgg_b1g4": ("resnet101",),
  "repvgg_b1": ("regnetx_032",),
  "repvgg_b2": ("vgg16",),
}
"""A RepVGG to its rivals."""

PUBLISHED = {**PUBLISHED_OF_OURS, "efficientnet_b0": 75.11, "regnetx_032": 77.98}
"""Published top-1 on ImageNet in %, by the name of the network."""

SPEEDS = {
  "repvgg_a0": 3256,
  "resnet18": 2442,
  "repvgg_a1": 2339,
  "resnet34": 1419,
  "repvgg_a2": 1322,
  "resnet50": 719,
  "efficientnet_b0": 829,
  "repvgg_b1g4": 868,
  "resnet101": 430,
  "repvgg_b1": 685,
  "regnetx_032": 671,
  "repvgg_b2": 460,
  "vgg16": 415,
}
"""Published examples per second, by the name of the network."""

TITLES = {
  "repvgg_a0": "RepVGG-A0",
  "repvgg_a1": "RepVGG-A1",
  "repvgg_a2": "RepVGG-A2",
  "repvgg_b1": "RepVGG-B1",
  "repvgg_b1g4": "RepVGG-B1g4",
  "repvgg_b2": "RepVGG-B2",
  "resnet18": "ResNet-18",
  "resnet34": "ResNet-34",
  "resnet50": "ResNet-50",
  "resnet101": "ResNet-101",
  "efficientnet_b0": "EfficientNet-B0",
  "regnetx_032": "RegNetX-3.2GF",
  "vgg16": "VGG-16",
}

GREY, OWN, RIVAL = "#808080", "#e8590c", "#2f81f7"
"""Colours that can be read on white and on black, since the picture has no background."""

Row = dict[str, Any]


def network(name: str, image_size: int) -> tuple[Any, Any]:
  """Returns a network in the form in which it is shipped, and random variables."""
  if name in other_networks.NETWORKS:
    return other_networks.create(name, image_size)
  model = repjax.create_model(name, deploy=True)
  return model, repjax.init(model, jax.random.key(0), image_size)


def subject(name: str, image_size: int, runtime: str) -> timing.Subject:
  """Returns a network, compiled for a runtime, from images to logits on the host."""

  def start(images: Any) -> timing.Running:
    compiled = repjax.deploy.compile(
      *network(name, image_size),
      image_size=image_size,
      batch_sizes=(len(images),),
      runtime=runtime,
      fuse=False,
    )
    program = compiled.programs[len(images)]
    return timing.Running(
      lambda images: program.finish(program.start(images), len(images)), lambda: program.memory
    )

  return timing.Subject(start, prepare=np.asarray)


def measure(
  own: str, batch_size: int, image_size: int, runtime: str, **race: Any
) -> tuple[list[Row], list[Row]]:
  """Times a RepVGG and its rivals in turns, and returns their rows and the ratios."""
  names = (own, *GROUPS[own])
  subjects = {name: subject(name, image_size, runtime) for name in names}
  images = timing.random_images(batch_size, image_size, 4)
  results = timing.race(subjects, images, **race)
  rows = [row_of(name, batch_size, result) for name, result in results.items()]
  seconds = results[own].all_seconds
  ratios = [
    {
      "model": own,
      "rival": rival,
      "batch_size": batch_size,
      "published_ratio": SPEEDS[own] / SPEEDS[rival],
      **timing.spread_of_ratios(results[rival].all_seconds, seconds),
    }
    for rival in GROUPS[own]
  ]
  return rows, ratios


def row_of(name: str, batch_size: int, result: timing.Result) -> Row:
  """Returns the row of a network in the file of results."""
  return {
    "model": name,
    "batch_size": batch_size,
    "ms": 1e3 * statistics.median(result.all_seconds),
    "ms_min": 1e3 * min(result.all_seconds),
    "images_per_s": batch_size / result.median,
    "published_top1": PUBLISHED[name],
    "published_images_per_s": SPEEDS[name],
    "memory_mib": None if result.memory is None else result.memory / 2**20,
    "ms_of_each_round": [1e3 * value for value in result.all_seconds],
  }


def markdown(rows: Sequence[Row], ratios: Sequence[Row]) -> str:
  """Returns the table of the documentation."""
  sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
  speeds = {(row["model"], row["batch_size"]): row["images_per_s"] for row in rows}
  found = {(each["model"], each["rival"], each["batch_size"]): each["ratio"] for each in ratios}
  heads = ["network", "rival", "top-1, %", "published ratio of speeds"]
  heads += [text for size in sizes for text in (f"images/s, batch {size}", "ratio")]
  lines = [heads, ["---"] * len(heads)]
  for own, rival in dict.fromkeys((each["model"], each["rival"]) for each in ratios):
    cells = [
      TITLES[own],
      TITLES[rival],
      f"{PUBLISHED[own]:.2f} / {PUBLISHED[rival]:.2f}",
      f"{SPEEDS[own] / SPEEDS[rival]:.2f}",
    ]
    for size in sizes:
      known = (own, rival, size) in found
      both = [speeds[name, size] for name in (own, rival)] if known else []
      cells += [
        " / ".join(f"{speed:.1f}" for speed in both),
        f"{found[own, rival, size]:.2f}" if known else "",
      ]
    lines.append(cells)
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
  """Draws published accuracy over measured speed: a panel for each batch size."""
  from matplotlib.figure import Figure

  sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
  figure = Figure((5.4 * len(sizes), 4.4), dpi=120, layout="constrained")
  axes: Any = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
  for axis, size in zip(axes, sizes):
    _panel(axis, [row for row in rows if row["batch_size"] == size])
    axis.set_title(f"batch {size}", color=GREY)
  axes[0].set_ylabel("published ImageNet top-1, %", color=GREY)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png", transparent=True, metadata={"Software": None})


def _panel(axis: Any, rows: Sequence[Row]) -> None:
  """Draws the networks of one batch size; a line joins the RepVGGs."""
  from matplotlib.ticker import LogLocator

  rows = sorted(rows, key=lambda row: row["published_top1"])
  for is_own, colour, style in ((True, OWN, "o-"), (False, RIVAL, "s")):
    chosen = [row for row in rows if (row["model"] in GROUPS) == is_own]
    places = [row["images_per_s"] for row in chosen], [row["published_top1"] for row in chosen]
    axis.plot(*places, style, color=colour, markersize=6)
    for row, x, y in zip(chosen, *places):
      # Names of networks that no RepVGG beats go away from the line, to the right.
      right = is_own or not any(beats(other, row) for other in rows if other["model"] in GROUPS)
      how = {"xytext": (6, 4), "ha": "left"} if right else {"xytext": (-6, -11), "ha": "right"}
      axis.annotate(
        TITLES[row["model"]], (x, y), textcoords="offset points", fontsize=8, color=colour, **how
      )
  axis.set_xscale("log")
  axis.margins(x=0.22, y=0.1)
  axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.xaxis.set_major_formatter("{x:g}")
  axis.xaxis.set_minor_formatter("")
  axis.set_xlabel("images/s", color=GREY)
  axis.tick_params(which="both", colors=GREY)
  axis.grid(alpha=0.25, which="both", color=GREY)
  for spine in axis.spines.values():
    spine.set_color(GREY)


def beats(one: Row, other: Row) -> bool:
  """Tells if a network is both faster and more accurate than another network."""
  return all(one[name] > other[name] for name in ("images_per_s", "published_top1"))


def parse() -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", choices=GROUPS, default=list(GROUPS))
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="default: 1 8")
  parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
  parser.add_argument("--runtime", default="xla", help="as in compile (default: xla)")
  parser.add_argument("--rounds", type=int, default=10, help="default: 10")
  parser.add_argument(
    "--cpu-time",
    action="store_true",
    help="measure CPU time instead, on one core; other programs do not disturb it",
  )
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  parser.add_argument("--plot", type=Path, help="draw accuracy over speed; needs matplotlib")
  parser.add_argument(
    "--from", dest="file", type=Path, help="take the results of this file, and measure nothing"
  )
  return parser.parse_args()


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
  """Measures all groups and returns the content of the file of results."""
  machine = timing.machine()
  race: dict[str, Any] = {"rounds": arguments.rounds}
  if arguments.cpu_time:
    inference.check_one_core(machine)
    race["clock"] = timing.cpu_time
  names = ("image_size", "runtime", "rounds", "cpu_time")
  facts = {**inference.versions(), **{name: getattr(arguments, name) for name in names}}
  found: dict[str, list[Row]] = {"results": [], "ratios": []}
  for batch_size in arguments.batch_sizes:
    for own in arguments.models:
      rows, ratios = measure(own, batch_size, arguments.image_size, arguments.runtime, **race)
      found["results"] += rows
      found["ratios"] += ratios
      for row in rows:
        print(f"batch {batch_size} {row['model']:<16}{row['ms']:9.1f} ms", flush=True)
      if arguments.json:  # after each group, so that a stopped run keeps its results
        timing.write_json(arguments.json, machine | facts, **found)
  return found


def read(path: Path) -> Mapping[str, Any]:
  """Reads a file of --json.

  Raises:
    InputError: the file cannot be read, or is a different one.
  """
  try:
    found = json.loads(path.read_text())
    return {name: found[name] for name in ("results", "ratios")}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path} is no file of headline.py --json: {error}") from error


def main() -> None:
  arguments = parse()
  with one_paragraph():
    found = read(arguments.file) if arguments.file else run(arguments)
    print(markdown(found["results"], found["ratios"]))
    if arguments.plot:
      draw(found["results"], arguments.plot)


if __name__ == "__main__":
  main()
