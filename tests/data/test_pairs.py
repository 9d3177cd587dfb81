"""Sets of images and masks open, and become batches whose pixels keep their classes."""

import itertools
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from repjax.data import Source, eval_batches, open_source, storage, train_batches
from repjax.data.mask_sets import MASK_SETS
from repjax.data.masks import IGNORED, encoded
from repjax.data.pairs import pair_of
from repjax.errors import InputError
from tests.data.images import encoded as file_of
from tests.data.images import noise
from tests.data.pairs import classes_of
from tests.data.test_pipeline import assert_equal, joined

pytest_plugins = ["tests.training.fixtures"]

BLACK = (0, 0, 0)
IMAGE, TEXT = tfds.features.Image, tfds.features.Text
PETS = {
  "image": IMAGE(encoding_format="jpeg"),
  "label": tfds.features.ClassLabel(names=["beagle", "pug"]),
  "file_name": TEXT(),
  "segmentation_mask": IMAGE(shape=(None, None, 1), use_colormap=True),
}
CITY = {
  "image_id": TEXT(),
  "image_left": IMAGE(shape=(16, 32, 3), encoding_format="png"),
  "segmentation_label": IMAGE(shape=(16, 32, 1), encoding_format="png", use_colormap=True),
}
OWN = {
  "image": IMAGE(),
  "seen": tfds.features.LabeledImage(labels=["sky", "cat", "dog"], encoding_format="png"),
}


def write_set(data_dir, name, version, features, examples, **metadata):
  """Writes a set with one split, "train", as TFDS stores it; returns the folder of all sets."""
  folder = data_dir / name / version
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(features)
  serializer = ExampleSerializer(features.get_serialized_info())
  writer = storage.ShardWriter(folder, name.partition("/")[0], "train")
  for example in examples:
    writer.write(serializer.serialize_example(features.encode_example(example)))
  storage.write_info(
    folder,
    name.partition("/")[0],
    version,
    features=features,
    splits={"train": writer.finish()},
    description="",
    metadata=metadata,
  )
  return str(data_dir)


def pets(tmp_path, masks, sizes=None):
  """Writes masks as a set called oxford_iiit_pet."""
  examples = [
    {
      "image": file_of(noise(*(sizes or {}).get(number, mask.shape[::-1]), number)),
      "label": number % 2,
      "file_name": f"{number}.jpg",
      "segmentation_mask": encoded(mask),
    }
    for number, mask in enumerate(masks)
  ]
  return write_set(tmp_path, "oxford_iiit_pet", "4.0.0", PETS, examples)


def test_a_set_with_labels_and_masks_is_opened_for_either_task(tmp_path):
  mask = np.array([[1, 2], [3, 1], [2, 2]], np.uint8)
  folder = pets(tmp_path, [mask])
  labels = open_source("oxford_iiit_pet", "train", data_dir=folder)
  assert (labels.task, len(labels.class_names), labels.colors) == ("classification", 37, ())
  assert labels.canvas() is None
  assert "task" not in labels.fingerprint
  source = open_source("oxford_iiit_pet", "train", data_dir=folder, task="segmentation")
  assert (source.task, source.class_names) == ("segmentation", ("pet", "background", "border"))
  assert len(source.colors) == 3
  assert source.fingerprint["task"] == "segmentation"
  assert source.fingerprint["classes"] != labels.fingerprint["classes"]
  example = source.examples[0]
  assert example["name"] == "image 0 of the train split of oxford_iiit_pet (0.jpg)"
  pair = pair_of(example, BLACK)
  np.testing.assert_array_equal(pair.classes, mask - 1)
  np.testing.assert_array_equal(pair.pixels, noise(2, 3, 0))


def test_the_ids_of_cityscapes_become_its_19_classes(tmp_path):
  mask = (np.arange(512).reshape(16, 32) % 34).astype(np.uint8)
  mask[0, 0] = 255
  example = {
    "image_id": "ulm_0",
    "image_left": file_of(noise(32, 16)),
    "segmentation_label": encoded(mask),
  }
  folder = write_set(tmp_path, "cityscapes/semantic_segmentation", "1.0.0", CITY, [example])
  source = open_source("cityscapes/semantic_segmentation", "train", data_dir=folder)
  assert (source.task, len(source.class_names)) == ("segmentation", 19)
  assert source.canvas() == (1024, 2048)  # TFDS knows the size of all images
  assert source.examples[0]["name"].endswith("(ulm_0)")
  classes = pair_of(source.examples[0], BLACK).classes
  assert classes[0, 0] == IGNORED
  for value, name in ((7, "road"), (23, "sky"), (26, "car"), (33, "bicycle")):
    assert {source.class_names[each] for each in classes[mask == value]} == {name}
  for value in (0, 6, 14, 18, 29, 30):
    assert (classes[mask == value] == IGNORED).all()
  assert source.colors[source.class_names.index("car")] == (0, 0, 142)


def test_every_set_in_the_table_is_a_set_of_tfds_with_these_features():
  for name, known in MASK_SETS.items():
    features = tfds.builder(name, try_gcs=False).info.features
    assert {known.image, known.mask} <= set(features)
    assert any(key in features for key in known.file_names)
    assert {*known.classes.values()} - {IGNORED} == set(range(len(known.class_names)))
    assert len(set(known.colors)) == len(known.class_names)


def own(tmp_path, masks, **metadata):
  examples = [
    {"image": file_of(noise(*mask.shape[::-1], number)), "seen": encoded(mask)}
    for number, mask in enumerate(masks)
  ]
  return write_set(tmp_path, "own", "1.0.0", OWN, examples, **metadata)


def test_any_set_with_a_labelled_image_has_masks(tmp_path):
  folder = own(tmp_path, [classes_of(9, 5), classes_of(6, 8)])
  source = open_source("own", "train", data_dir=folder)
  assert (source.task, source.class_names) == ("segmentation", ("sky", "cat", "dog"))
  assert source.colors[:2] == ((0, 0, 0), (128, 0, 0))
  np.testing.assert_array_equal(pair_of(source.examples[1], BLACK).classes, classes_of(6, 8))
  assert source.canvas() == (8, 9)  # read from both images
  assert source.canvas(lambda size: tuple(2 * side for side in size)) == (16, 18)


def test_colours_and_sizes_in_the_metadata_are_used(tmp_path):
  colors = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
  folder = own(tmp_path, [classes_of(9, 5)], class_colors=colors, largest_images={"train": [7, 30]})
  source = open_source("own", "train", data_dir=folder)
  assert source.colors == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
  assert source.canvas() == (7, 30)


@pytest.mark.parametrize(
  ("metadata", "said"),
  [
    ({"largest_images": {"train": [2**30, 1]}}, "largest_images.train"),
    ({"largest_images": {"train": [5]}}, "largest_images.train must be"),
    ({"class_colors": [[1, 2]]}, "colors"),
    ({"class_colors": [[1, 2, 256]]}, "colors"),
  ],
)
def test_metadata_of_strangers_are_checked(tmp_path, metadata, said):
  folder = own(tmp_path, [classes_of(9, 5)])
  path = tmp_path / "own" / "1.0.0" / "metadata.json"
  path.write_text(json.dumps(metadata))
  with pytest.raises(InputError, match=said):
    open_source("own", "train", data_dir=folder)


def test_a_canvas_of_too_many_pixels_is_refused(tmp_path):
  folder = own(tmp_path, [classes_of(9, 5)], largest_images={"train": [2**15, 2**14]})
  with pytest.raises(InputError, match="up to 32768 pixels high and up to 16384 wide"):
    open_source("own", "train", data_dir=folder).canvas()


def test_the_canvas_of_a_part_of_a_split_fits_its_images():
  examples = [{"image": noise(9, 5)}, {"image": file_of(noise(6, 8))}]
  assert Source(examples, (), {}, "segmentation").canvas() == (8, 9)


def test_the_wrong_task_is_refused_with_the_way_out(tmp_path, digits_dir):
  folder = own(tmp_path, [classes_of(9, 5)])
  with pytest.raises(InputError, match="It has masks in place of labels"):
    open_source("own", "train", data_dir=folder, task="classification")
  with pytest.raises(InputError, match="digits is not an image segmentation set"):
    open_source("digits", "train", data_dir=str(digits_dir), task="segmentation")
  with pytest.raises(InputError, match="unknown task 'segmentaton'; did you mean segmentation"):
    open_source("synthetic", "train", task="segmentaton")


@pytest.mark.parametrize(
  ("masks", "sizes", "said"),
  [
    ([np.full((2, 3), 4, np.uint8)], {}, r"the mask of image 0 .*\(0.jpg\).* value 4"),
    ([np.ones((2, 3), np.uint8)], {0: (3, 3)}, "it has 3 x 2 pixels, and its image has 3 x 3"),
  ],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path, masks, sizes, said):
  folder = pets(tmp_path, masks, sizes)
  source = open_source("oxford_iiit_pet", "train", data_dir=folder, task="segmentation")
  with pytest.raises(InputError, match=said):
    next(batches_of(source))


def test_synthetic_pairs_are_always_the_same():
  first, second = (
    open_source("synthetic", "train", num_classes=7, image_size=5, task="segmentation")
    for _ in range(2)
  )
  assert (first.task, first.canvas(), len(first.colors)) == ("segmentation", (5, 5), 7)
  for index in (0, 1023):
    one, other = first.examples[index], second.examples[index]
    np.testing.assert_array_equal(one["mask"], other["mask"])
    np.testing.assert_array_equal(one["image"], other["image"])
    assert "label" not in one
  assert set(np.unique([first.examples[index]["mask"] for index in range(50)])) == set(range(7))
  with pytest.raises(InputError, match="at most 255 classes"):
    open_source("synthetic", "train", task="segmentation")


def batches_of(source, **changes):
  arguments = {
    "batch_size": 4,
    "image_size": 8,
    "augment": "scale_and_crop | flip | color_jitter",
    "interpolation": "bilinear",
    "seed": 0,
    "mean": (0.5, 0.25, 0),
  }
  return train_batches(source.examples, **arguments | changes)


@pytest.fixture(scope="module")
def source():
  return open_source("synthetic", "sample", num_classes=5, image_size=6, task="segmentation")


def test_seed_and_step_alone_fix_a_batch_of_pairs(source):
  whole = list(itertools.islice(batches_of(source), 6))
  assert {name: (x.shape, x.dtype) for name, x in whole[0].items()} == {
    "image": ((4, 8, 8, 3), np.uint8),
    "label": ((4, 8, 8), np.uint8),
  }
  assert_equal(list(itertools.islice(batches_of(source, start_step=2), 4)), whole[2:])
  assert_equal(list(itertools.islice(batches_of(source, num_workers=1), 3)), whole[:3])
  halves = [next(batches_of(source, shard=(index, 2))) for index in (0, 1)]
  np.testing.assert_array_equal(joined(halves, "label"), whole[0]["label"])
  assert set(np.unique(joined(whole, "label"))) == {*range(5), IGNORED}


def test_the_colour_around_small_images_is_the_mean(source):
  batch = next(batches_of(source, augment="scale_and_crop((0.5, 0.6))"))
  outside = batch["label"] == IGNORED
  assert (batch["image"][outside] == (128, 64, 0)).all()
  assert outside.mean() > 0.5


def test_evaluation_lays_every_image_on_one_canvas(tmp_path):
  sizes = [(9, 5), (6, 8), (4, 4)]
  folder = own(tmp_path, [classes_of(*size, seed=seed) for seed, size in enumerate(sizes)])
  source = open_source("own", "train", data_dir=folder)
  arguments = {"image_size": 1, "resize_size": 1, "interpolation": "bilinear"}
  arguments |= {"canvas": source.canvas(lambda size: (8, 12)), "mean": (0.5, 0.25, 0)}
  batches = list(eval_batches(source.examples, batch_size=2, **arguments))
  assert {name: (x.shape, x.dtype) for name, x in batches[1].items()} == {
    "image": ((2, 8, 12, 3), np.uint8),
    "label": ((2, 8, 12), np.uint8),
    "mask": ((2,), np.bool_),
  }
  assert joined(batches, "mask").tolist() == [True, True, True, False]
  labels, images = joined(batches, "label"), joined(batches, "image")
  for seed, (width, height) in enumerate(sizes):
    np.testing.assert_array_equal(
      labels[seed, :height, :width], classes_of(width, height, seed=seed)
    )
    np.testing.assert_array_equal(images[seed, :height, :width], noise(width, height, seed))
    assert (labels[seed] != IGNORED).sum() == width * height
    assert (images[seed][labels[seed] == IGNORED] == (128, 64, 0)).all()
  assert (labels[3] == IGNORED).all()
  shards = [
    list(eval_batches(source.examples, batch_size=2, shard=(i, 2), **arguments)) for i in (0, 1)
  ]
  assert_equal([{name: x[:1] for name, x in batch.items()} for batch in batches], shards[0])
  with pytest.raises(InputError, match="ten crops are for classification"):
    next(eval_batches(source.examples, batch_size=2, ten_crop=True, **arguments))


def test_an_image_larger_than_the_metadata_say_is_named(tmp_path):
  folder = own(tmp_path, [classes_of(9, 5)], largest_images={"train": [5, 8]})
  source = open_source("own", "train", data_dir=folder)
  batches = eval_batches(
    source.examples,
    batch_size=1,
    image_size=1,
    resize_size=1,
    interpolation="bilinear",
    canvas=source.canvas(),
  )
  with pytest.raises(InputError, match=r"image 0 .* 9 x 5 pixels, .* largest .* 8 x 5"):
    next(batches)
