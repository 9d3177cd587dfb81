"""Tests of benchmarks/headline.py: its tables, and the networks that are written for it."""

import importlib

import jax
import pytest

from tests.training import tiny


@pytest.fixture
def load(monkeypatch):
  """Imports a file of benchmarks/ by its name."""
  monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
  return importlib.import_module


@pytest.fixture
def results(load):
  """Rows and ratios of two groups at two batch sizes, as `measure` makes them."""
  headline, timing = load("headline"), load("timing")
  rows, ratios = [], []
  for size in (1, 8):
    for own, rival in (("repvgg_a2", "resnet50"), ("repvgg_a2", "efficientnet_b0")):
      times = {own: [0.02 * size], rival: [0.03 * size]}
      rows += [
        headline.row_of(name, size, timing.Result([row], [1.0], None))
        for name, row in times.items()
      ]
      ratios.append({"model": own, "rival": rival, "batch_size": size, "ratio": 1.5})
  return rows, ratios


def test_every_network_has_a_title_and_published_numbers(load):
  headline = load("headline")
  names = {name for own, rivals in headline.GROUPS.items() for name in (own, *rivals)}
  assert names == headline.SPEEDS.keys() == headline.TITLES.keys()
  assert names <= headline.PUBLISHED.keys()


def test_the_table_has_a_row_for_each_rival(load, results):
  head, _, first, second = load("headline").markdown(*results).splitlines()
  assert head.count("ratio") == 3
  assert first == (
    "| RepVGG-A2 | ResNet-50 | 76.48 / 76.31 | 1.84 | 50.0 / 33.3 | 1.50 | 50.0 / 33.3 | 1.50 |"
  )
  assert second.startswith("| RepVGG-A2 | EfficientNet-B0 | 76.48 / 75.11 | 1.59 |")


def test_the_picture_is_drawn(load, results, tmp_path):
  pytest.importorskip("matplotlib")
  load("headline").draw(results[0], tmp_path / "new" / "headline.png")
  assert (tmp_path / "new" / "headline.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("name", "count"), [("efficientnet_b0", 5_267_540), ("regnetx_032", 15_265_272)]
)
def test_networks_have_the_parameters_of_timms_after_folding(load, name, count):
  variables = jax.eval_shape(lambda: load("other_networks").create(name, 32)[1])
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
