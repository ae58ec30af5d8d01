"""Writes small TFDS sets of images, as `download_and_prepare` would."""

import importlib.util
import io
import pathlib

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

# As this TFDS knows them: it reads no other version of its own sets.
VERSIONS = {
  'cifar10': '3.0.2',
  'cifar100': '3.0.2',
  'cifar10_1': '1.1.0',
  'fashion_mnist': '3.0.1',
  'imagenet2012': '5.1.0',
  'imagenet_v2': '3.0.0',
}


def write(folder, name, shape=(32, 32, 3), classes=10, counts=(40, 12), seed=0):
  """Writes a set of random images, and returns those and their labels.

  Args:
    folder: Folder of TFDS sets.
    name: Name of the set, or NAME/CONFIG.
    shape: Shape of its images.
    classes: How many.
    counts: Images of the splits train and test.
  """
  rng = np.random.default_rng(seed)
  splits = {
    split: (
      rng.integers(0, 256, (count, *shape)).astype(np.uint8),
      rng.permutation(np.arange(count) % classes),
    )
    for split, count in zip(('train', 'test'), counts, strict=True)
  }
  examples = {
    split: [
      {'image': encode(image.squeeze(), 'PNG'), 'label': int(label)}
      for image, label in zip(*pairs, strict=True)
    ]
    for split, pairs in splits.items()
  }
  features = {
    'image': tfds.features.Image(shape=shape),
    'label': tfds.features.ClassLabel(num_classes=classes),
  }
  prepare(folder, name, features, examples)
  return splits


def photos_of_sklearn():
  """The two photographs that it ships, without an import of it: it is slow."""
  (package,) = importlib.util.find_spec('sklearn').submodule_search_locations
  folder = pathlib.Path(package) / 'datasets' / 'images'
  return [
    np.asarray(Image.open(folder / f'{name}.jpg'))
    for name in ('china', 'flower')
  ]


def photographs(count, seed=0):
  """Cuts parts of many sizes out of two photographs: the two classes."""
  rng = np.random.default_rng(seed)
  photos = photos_of_sklearn()
  parts = []
  for label in np.arange(count) % len(photos):
    photo = photos[label]
    height, width = rng.integers(40, 120, 2)
    top = rng.integers(photo.shape[0] - height + 1)
    left = rng.integers(photo.shape[1] - width + 1)
    parts.append((photo[top : top + height, left : left + width], int(label)))
  return parts


def write_photographs(folder, name='imagenet2012', damaged=False, **splits):
  """Writes a set with ImageNet's features, and returns its images by name.

  Args:
    folder: Folder of TFDS sets.
    name: Name of the set, or NAME/CONFIG.
    damaged: Make the last image of each split unreadable.
    **splits: Images of each.
  """
  images, examples = {}, {}
  for seed, (split, count) in enumerate(splits.items()):
    examples[split] = []
    for i, (image, label) in enumerate(photographs(count, seed)):
      name_of_file = f'{split}_{i}.JPEG'
      file = encode(image, 'JPEG')
      images[name_of_file] = np.asarray(Image.open(file))
      file.seek(0)
      if damaged and i == count - 1:
        file = io.BytesIO(file.read()[:300])
      # As in the real one, labels of the test set are kept back.
      label = -1 if (name, split) == ('imagenet2012', 'test') else label
      examples[split].append(
        {'image': file, 'label': label, 'file_name': name_of_file}
      )
  features = {
    'image': tfds.features.Image(encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(num_classes=1000),
    'file_name': tfds.features.Text(),
  }
  prepare(folder, name, features, examples)
  return images


def encode(image, kind):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind)
  file.seek(0)
  return file


def prepare(folder, name, features, examples):
  """Writes `folder/name`, a list of examples by split."""
  name, _, config = name.partition('/')
  version = tfds.core.Version(VERSIONS.get(name, '1.0.0'))

  class SmallImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = version
    BUILDER_CONFIGS = (
      [tfds.core.BuilderConfig(name=config, version=version)] if config else []
    )

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {split: enumerate(rows) for split, rows in examples.items()}

    def _generate_examples(self):
      raise NotImplementedError

  SmallImages.name = name
  SmallImages(
    data_dir=folder, file_format='array_record'
  ).download_and_prepare()
