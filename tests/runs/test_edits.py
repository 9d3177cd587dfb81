"""Every JSON file that repjax reads, after every kind of edit: accepted, or refused in words."""

import copy
import dataclasses
import json
import math
import os

import ml_collections
import numpy as np
import pytest

import repjax
from repjax import cache, config, disk, json_files, runs, schema
from repjax.data import storage, tfrecords
from repjax.errors import InputError
from repjax.quantization.roundings import Roundings
from repjax.report import history
from repjax.runs import contents, folders, paths
from repjax.spec import Preprocessing
from repjax.training import continuing, planning, quantization
from repjax.weights import hub
from tests.helpers import assert_one_paragraph
from tests.training import tiny

NAN, INFINITY = float("nan"), float("inf")
DEEP = json.loads("[" * 40 + "]" * 40)
EVIL = (
  *(None, True, "x", "", "a\0b", "\x1b[2J\n", "\ud800", "1", "y" * 5000),
  *(-1, 0, 0.5, -0.0, 10**7, 10**19, 10**400, 1e308, NAN, INFINITY),
  *([], {}, [1, 2], ["x"], [None] * 3, {"x": 1}, {"a.b": {"__class__": 1}}, DEEP),
)
WRONG = json.loads('{"x": ' * 12 + "1" + "}" * 12)
ODD_NAMES = ("x", "", "a.b", "__class__", "\x1b[2J", "\ud800")


def edits(value):
  """Yields copies of a value in which one place was replaced, removed, added to or wrapped."""
  yield from EVIL
  yield [value]
  if not isinstance(value, dict | list):
    return
  members = list(value if isinstance(value, dict) else range(len(value)))
  for member in members:
    less = copy.copy(value)
    del less[member]
    yield less
    for inner in edits(value[member]):
      more = copy.copy(value)
      more[member] = inner
      yield more
    if isinstance(member, str):
      yield {name + "x" * (name == member): item for name, item in value.items()}  # misspelt
  if isinstance(value, dict):
    yield from ({**value, name: 1} for name in ODD_NAMES)
  else:
    yield from ([*value, more] for more in (value[:1] or [1]))


OVERRIDES = {
  **tiny.OVERRIDES,
  "groups": {2: 2},
  "se": "post",
  "se_reduction": 4,
  "act": "silu",
  "aux_heads": False,
}
SPEC = repjax.ModelSpec(
  "repvgg_a0", 2, OVERRIDES, Preprocessing(16, 18, "bicubic", (0.1,) * 3, (0.2,) * 3), ("a", "b")
)
FACTS = {"name": "digits", "version": "1.0.0", "split": "train", "images": 9, "classes": "0f"}
CONFIG = config.default().to_dict()
ROUNDINGS = {
  "activations": "uint8",
  "weight_bits": 7,
  "tensors": {"images": [0.5, 3]},
  "weights": {"kernel": True},
  "biases": ["bias"],
}
PRETRAINED = {
  "input_size": [3, 16, 16],
  "interpolation": "bicubic",
  "mean": [0.1, 0.2, 0.3],
  "std": [0.1, 0.2, 0.3],
  "crop_pct": 0.9,
  "crop_mode": "center",
}


def read_config(folder):
  held = planning.read_config(folder)
  assert isinstance(held, ml_collections.ConfigDict)
  config.check_evaluation(held)
  config.check_config(held)


def read_model(folder):
  spec = repjax.ModelSpec.read(folder)
  assert repjax.ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))).name == spec.name
  spec.create_model(deploy=True)
  spec.variable_shapes()


def read_data(folder):
  paths.checkpoint_folder(folder, 4).mkdir(parents=True, exist_ok=True)
  continuing.check_data(folder, {"train": FACTS, "eval": FACTS})


def read_bookmark(folder):
  bookmark = runs.read_bookmark(folder, 4)
  assert all(isinstance(float(row["loss"] + row["accuracy"]), float) for row in bookmark.pending)
  assert bookmark.records is None or bookmark.records >= 0
  runs.RecordsFile(folder / "new.jsonl", 4, bookmark.records).close()


def read_rounding(folder):
  roundings = quantization._read(folder)
  assert all(scale + zero < INFINITY for scale, zero in roundings.tensors.values())


def read_hub_config(folder):
  hub.preprocessing(json_files.read(folder / "config.json", hub._CONFIG))


def read_roundtrip_info(folder):
  info = tfrecords._read_info(folder)
  assert [*info.get("alternativeFileFormats", ()), "array_record"]


# Name to path in the folder, content, and the reader with the next code that uses the content.
STRICT = {
  "config": (paths.config_file, continuing.plain(CONFIG), read_config),
  "import": (paths.config_file, config.for_import("repvgg_a0", 10), read_config),
  "model": (paths.model_file, continuing.plain(SPEC.to_json()), read_model),
  "data": (paths.data_file, {"train": FACTS, "eval": FACTS}, read_data),
  "report": (
    lambda folder: paths.conversion_file(paths.deploy_folder(folder)),
    {"step": 4, "images": 9, "accuracy": {"train": 0.5, "deploy": 0.5}, "layers": {"stem": 1e-7}},
    lambda folder: runs.read_conversion_report(folder)["accuracy"]["deploy"] + 1,
  ),
  "export": (
    paths.export_file,
    {"format": "stablehlo", "image_size": 16, "platforms": ["cpu"]},
    lambda folder: np.add(runs.read_export(disk.Snapshot(folder))["image_size"], 1),
  ),
  "recalibration": (
    paths.recalibration_file,
    {"step": 4, "checkpoint": 7, "batches": 2, "loss": {"before": 1.5, "after": 1.25}},
    lambda folder: folders._read_record(disk.Snapshot(folder))["step"] + 1,
  ),
  "manifest": (
    paths.manifest_file,
    {"algorithm": "crc32c", "files": {}},
    lambda folder: disk.Snapshot(folder).check(),
  ),
  "rounding": (paths.rounding_file, ROUNDINGS, read_rounding),
  "bookmark": (
    lambda folder: paths.bookmark_file(folder, 4),
    {"records": 3, "pending": [{"loss": 1.5, "accuracy": 0.1}], "evaluated": True, "devices": 4},
    read_bookmark,
  ),
  "hub": (
    paths.config_file,
    {"pretrained_cfg": PRETRAINED, "label_names": ["a"]},
    read_hub_config,
  ),
  "data set": (
    lambda folder: folder / storage.INFO,
    {"fileFormat": "tfrecord", "alternativeFileFormats": ["riegeli"], "splits": [{"name": "a"}]},
    read_roundtrip_info,
  ),
}


def put(path, data):
  """Writes a file, and makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
  return path


@pytest.mark.parametrize("kind", STRICT)
def test_every_edit_is_accepted_or_refused_in_one_paragraph(tmp_path, kind):
  path_of, value, use = STRICT[kind]
  path = put(path_of(tmp_path), value)
  if kind not in ("import", "config"):
    use(tmp_path)
  refused = 0
  for edited in edits(value):
    path.write_text(json.dumps(edited))
    try:
      use(tmp_path)
    except InputError as error:
      refused += 1
      assert_one_paragraph(error)
  assert refused >= 2 * len(EVIL)


@pytest.mark.parametrize("kind", STRICT)
def test_the_file_and_the_field_of_a_wrong_value_are_named(tmp_path, kind):
  path_of, value, use = STRICT[kind]
  path = path_of(tmp_path)
  for name in value:
    put(path, {**value, name: WRONG})
    with pytest.raises(InputError) as caught:
      use(tmp_path)
    assert path.name in str(caught.value)
    assert name in str(caught.value)


NO_JSON = {
  "empty": b"",
  "blank": b" \n",
  "cut off": b'{"a": 1',
  "no UTF-8": b'{"a": "\xff"}',
  "a byte order mark": b"\xef\xbb\xbf{}",
  "UTF-16": "{}".encode("utf-16"),
  "UTF-16 without a mark": "{}".encode("utf-16-le"),
  "deep": b"[" * 100_000 + b"]" * 100_000,
  "deep tables": b'{"a":' * 100_000,
  "twice": b'{"step": 1, "step": 2}',
  "twice below": b'{"x": [{"a": 1, "b": 2, "a": 3}]}',
  "long": b'{"step": ' + b"1" * (json_files.LARGEST + 1) + b"}",
  "digits": b'{"step": ' + b"1" * 100_000 + b"}",
  "minus": b'{"step": -}',
  "text": b'"x"',
  "list": b"[1]",
  "null": b"null",
}


@pytest.mark.parametrize("damage", [*NO_JSON, "folder", "pipe", "device"])
def test_whatever_takes_the_place_of_a_file_is_refused_at_once(tmp_path, damage):
  path = spoil(tmp_path / "config.json", damage)
  with pytest.raises(InputError) as caught:
    planning.read_config(tmp_path)
  assert str(path) in str(caught.value)
  assert_one_paragraph(caught.value)


def spoil(path, damage):
  """Puts something else in the place of a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.unlink(missing_ok=True)
  if damage == "folder":
    path.mkdir()
  elif damage == "pipe":
    os.mkfifo(path)
  elif damage == "device":
    path.symlink_to("/dev/zero")
  else:
    path.write_bytes(NO_JSON[damage])
  return path


LINE = {"step": 4, "loss": 0.5, "accuracy": 0.25}


def test_edited_records_are_left_out_and_counted_and_never_stop_a_run(tmp_path):
  path = paths.metrics_file(tmp_path)
  for edited in edits(LINE):
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(edited)}\n")
    found, damaged = runs.read_records(path)
    assert len(found) + damaged == 2
    history.read_history(tmp_path)
    runs.RecordsFile(path, 4).close()
    assert path.read_text().startswith(json.dumps(LINE))


@pytest.mark.parametrize("damage", NO_JSON)
def test_a_line_that_is_no_record_is_counted(tmp_path, damage):
  path = put(paths.metrics_file(tmp_path), NO_JSON[damage] + b"\n" + json.dumps(LINE).encode())
  found, damaged = runs.read_records(path)
  assert found == [LINE]
  assert damaged >= 1


@pytest.mark.parametrize("damage", ["folder", "pipe"])
def test_no_file_of_records_is_read_from_a_folder_or_a_pipe(tmp_path, damage):
  spoil(paths.metrics_file(tmp_path), damage)
  with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
    history.read_history(tmp_path)


def test_a_checkpoint_with_an_edited_accuracy_is_one_of_unknown_accuracy(tmp_path):
  path = put(paths.score_file(tmp_path, 4), {"accuracy": 0.5})
  assert runs.checkpoints(tmp_path) == {4: 0.5}
  for edited in edits({"accuracy": 0.5}):
    path.write_text(json.dumps(edited))
    accuracy = runs.checkpoints(tmp_path)[4]
    assert math.isnan(accuracy) or -1 <= accuracy <= 1
  for damage in (*NO_JSON, "pipe"):
    spoil(path, damage)
    assert runs.checkpoints(tmp_path) == {4: math.nan}


def test_the_holder_of_a_lock_is_named_without_control_characters(tmp_path):
  holder = {"pid": 7, "host": "here", "since": "today", "command": "repjax train"}
  path = put(tmp_path / "lock", holder)
  assert disk.holder_text(path) == "process 7 on here since today (repjax train)"
  for edited in edits(holder):
    path.write_text(json.dumps(edited))
    assert disk.holder_text(path).isprintable()
    assert len(disk.holder_text(path)) < 1000
  for damage in (*NO_JSON, "pipe"):
    assert disk.holder_text(spoil(path, damage)) == "another process"


def test_a_damaged_measurement_is_none(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  cache.remember("how fast?", ["direct", 4])
  assert cache.recall("how fast?") == ["direct", 4]
  for damage in (*NO_JSON, "pipe"):
    spoil(cache._file("how fast?"), damage)
    assert cache.recall("how fast?") is None


def test_a_config_of_ones_own_may_have_more_fields(tmp_path):
  put(paths.config_file(tmp_path), {**continuing.plain(CONFIG), "mine": {"a": [1, {"b": None}]}})
  assert planning.read_config(tmp_path).mine.to_dict() == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
  ("field", "value", "said"),
  [
    ("mean", [0.1, "0.2", 0.3], r'preprocessing\.mean\[1\] must be a number from .*, got "0\.2"'),
    ("mean", [0.1, 0.2], r"preprocessing\.mean must be a list of 3"),
    (
      "std",
      [0.1, 0, 0.3],
      r"preprocessing\.std\[1\] must be a number from 1e-06 to 1000000, got 0",
    ),
    (
      "image_size",
      True,
      "preprocessing.image_size must be a whole number from 1 to 8192, got true",
    ),
    ("image_size", 10**400, "got Infinity"),
    ("interpolation", "bilinaer", "did you mean bilinear"),
    ("meen", [1, 2, 3], "unknown field 'preprocessing.meen'; did you mean preprocessing.mean"),
  ],
  ids=str,
)
def test_what_is_wrong_in_model_json_is_told_by_its_path(tmp_path, field, value, said):
  content = continuing.plain(SPEC.to_json())
  content["preprocessing"] = {**content["preprocessing"], field: value}
  path = put(paths.model_file(tmp_path), content)
  with pytest.raises(InputError, match=f"^{path} is damaged: .*{said}"):
    repjax.ModelSpec.read(tmp_path)


@pytest.mark.parametrize(
  ("override", "value", "said"),
  [
    ("stage_sizes", [4000, 1, 1, 1], "ask for 4,003 blocks"),
    (
      "stage_sizes",
      [1, 1, 1, 1.5],
      r"overrides\.stage_sizes\[3\] must be a whole number, got 1\.5",
    ),
    ("groups", {"a": 1}, "overrides.groups must be"),
    ("aux_heads", 1, "overrides.aux_heads must be true or false, got 1"),
    ("widths", [1] * 4, "unknown override of repvgg_a0 'widths'; did you mean width_multipliers"),
    ("deploy", True, "unknown override of repvgg_a0 'deploy'"),
    ("width_multipliers", [1e9] * 4, "overrides.width_multipliers must be at most 1,000,000"),
  ],
  ids=str,
)
def test_a_wrong_override_in_model_json_is_told_by_its_path(tmp_path, override, value, said):
  content = continuing.plain(SPEC.to_json())
  content["overrides"] = {**content["overrides"], override: value}
  path = put(paths.model_file(tmp_path), content)
  with pytest.raises(InputError, match=f"^{path}.*{said}"):
    repjax.ModelSpec.read(tmp_path)


def test_no_spec_is_made_that_could_not_be_read_back():
  for wrong in ({"num_classes": 0}, {"class_names": ("a",)}, {"overrides": {"act": 3}}):
    with pytest.raises(InputError, match=next(iter(wrong))):
      dataclasses.replace(SPEC, **wrong)
  with pytest.raises(InputError, match=r"preprocessing\.mean\[2\]"):
    Preprocessing(mean=(0.1, 0.2, NAN))


def test_every_field_of_a_class_is_a_field_of_its_file():
  def unknown_field(rule, value):
    with pytest.raises(schema.MisfitError) as caught:
      rule.check(value, "")
    return str(caught.value)

  for rule, names in (
    (contents.MODEL, [field.name for field in dataclasses.fields(repjax.ModelSpec)]),
    (contents.PREPROCESSING, [field.name for field in dataclasses.fields(Preprocessing)]),
    (contents.ROUNDINGS, Roundings._fields),
    (contents.BOOKMARK, runs.Bookmark._fields),
  ):
    assert "unknown field 'other'" in unknown_field(rule, {"other": 1})
    assert "unknown field" not in unknown_field(rule, dict.fromkeys(names, object()))
