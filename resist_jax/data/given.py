"""Data sets that a program makes itself, from arrays or from objects.

dataset = from_arrays(images, labels, class_names=['ant', 'bee'])
train(config, 'runs/insects', dataset=dataset)
"""

from collections.abc import Mapping, Sequence
import dataclasses
import operator
from typing import Any

import numpy as np
from PIL import Image

from resist_jax.data import headers
from resist_jax.data.array_source import checked, named, names_of
from resist_jax.data.order import evenly_spaced
from resist_jax.data.prepared import Prepared, Source, opener
from resist_jax.data.sets import Dataset, Reading, assemble, check_reading
from resist_jax.data.streaming import MODES, as_image
from resist_jax.errors import one_line

_AGAIN = 'correct the program that makes it'
_LOOKED_AT = 32  # Examples of a split that show the shape of all.


def from_arrays(
  images: Any,
  labels: Any,
  *,
  test_images: Any = None,
  test_labels: Any = None,
  class_names: Sequence[str] | None = None,
  name: str = 'arrays',
) -> Dataset:
  """Makes a data set of arrays.

  Args:
    images: Training images, `uint8[N, H, W, C]`, or `uint8[N, H, W]` if they
      are grey.
    labels: Their labels, `int[N]`, from 0.
    test_images: Images to test on, of the same shape. Without them a fixed
      fifth of the others is held out; see `hold_out`.
    test_labels: Their labels.
    class_names: The name of each class; their numbers if None.
    name: What records call the data set.

  Returns:
    The data set, which `run.train` takes.

  Raises:
    ValueError: If an array has a wrong shape, dtype or label; the message says
      which one, and what to change.

  >>> pixels = np.zeros((10, 4, 4), np.uint8)
  >>> made = from_arrays(pixels, np.arange(10) % 2, class_names=['ant', 'bee'])
  >>> made.train.images.shape, len(made.tests['test']), made.num_classes
  ((8, 4, 4, 1), 2, 2)
  """
  if (test_images is None) != (test_labels is None):
    raise ValueError('give test_images and test_labels, or neither.')
  splits = {'train': checked(images, labels)}
  if test_images is not None:
    splits['test'] = checked(test_images, test_labels, 'test_')
  shape, *others = (part.images.shape[1:] for part in splits.values())
  if others and others[0] != shape:
    raise ValueError(
      f'images have the shape {shape}, and test_images {others[0]}: give both '
      'one shape.'
    )
  names = named(splits, class_names)
  return _made(name, splits, shape, names, Reading())


def from_source(
  train: Source,
  test: Source | None = None,
  *,
  class_names: Sequence[str] | None = None,
  image_size: int | None = None,
  streaming: str = 'auto',
  name: str = 'source',
) -> Dataset:
  """Makes a data set of anything with `len` and an index.

  Map-style data sets of PyTorch and torchvision, random-access sources of
  grain, and lists are such things. An example is `(image, label)`, or a
  dictionary of `image` and `label`. An image is one of Pillow's, an array
  `uint8[H, W]` or `uint8[H, W, C]`, or the content of an image file. Four
  channels are kept if all images are arrays that have them (an older version
  kept three: for its runs give `image[..., :3]`); transparency of other images
  is ignored. A label is a whole number from 0. Examples are read
  in threads.

  Args:
    train: Examples to train on.
    test: Examples to test on. Without them a fixed fifth of the others is held
      out, for which all labels are read; see `hold_out`.
    class_names: The name of each class; `train.classes`, as torchvision calls
      them, if None.
    image_size: Pixels a side to which images are cut and resized while they
      are read; None if all have one size.
    streaming: `always` reads images while workers train, `never` reads them
      once, and `auto` decides by their size.
    name: What records call the data set.

  Returns:
    The data set, which `run.train` takes.

  Raises:
    ValueError: If an example has another form; the message says which one, and
      what to change.
  """
  check_reading(streaming, 1 if image_size is None else image_size)
  for title, source in (('train', train), ('test', test)):
    usable = all(hasattr(source, n) for n in ('__len__', '__getitem__'))
    if source is not None and not usable:
      raise ValueError(
        f'{title} is a {type(source).__name__}; it must have a length and an '
        'index, as a list does: give the data set itself, not what iterates '
        'over it.'
      )
  ours, theirs = (getattr(source, 'classes', None) for source in (train, test))
  both = isinstance(ours, list | tuple) and isinstance(theirs, list | tuple)
  if both and [*ours] != [*theirs]:
    raise ValueError(
      'train.classes and test.classes differ, so that their labels have other '
      'meanings: make both with the same classes.'
    )
  class_names = ours if class_names is None else class_names
  names = () if class_names is None else names_of(class_names)
  if len(names) < 2:
    raise ValueError(
      'class_names is missing: name each class, in the order of the labels.'
    )
  splits = {'train': Pairs(train)}
  if test is not None:
    splits['test'] = Pairs(test)
  shape = _shape(splits, image_size)
  splits = {
    split: dataclasses.replace(pairs, channels=shape[2] or 0)
    for split, pairs in splits.items()
  }
  reading = Reading(streaming, int(image_size or 0))
  return _made(name, splits, shape, names, reading)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Examples of any source, as dictionaries.

  Attributes:
    source: The source, see `from_source`.
    channels: How many those images have that were looked at. If it is 1, none
      may have colours; if it is 4, all are arrays that have as many.
  """

  source: Source
  channels: int = 3

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, number):
    """Reads an example, and checks what it is."""
    example = self.source[int(number)]
    try:
      if isinstance(example, Mapping):
        image, label = example['image'], example['label']
      else:
        image, label = example
      label = operator.index(label)
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f'example {number} is {_described(example)}: give (image, label), or a '
        'dictionary of image and label, where label is a whole number.'
      ) from error
    form = image.shape[2:] if isinstance(image, np.ndarray) else None
    pixels = isinstance(image, np.ndarray) and (
      image.dtype == np.uint8
      and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in MODES))
    )
    if not pixels and not isinstance(image, Image.Image | bytes):
      raise ValueError(
        f'the image of example {number} is {_described(image)}: give uint8 '
        '[height, width, channels], an image of Pillow, or the content of an '
        'image file; leave out transforms such as ToTensor.'
      )
    if self.channels == 4 and form != (4,):
      raise ValueError(
        f'the image of example {number} is {_described(image)}, and others are '
        'arrays of four channels: give all of them as such arrays.'
      )
    if self.channels == 1:
      with as_image(image) as opened:
        if not headers.of(opened).grey:
          raise ValueError(
            f'the image of example {number} has colours, and others have none: '
            "convert all of them to one form, such as image.convert('RGB')."
          )
    return {'image': image, 'label': label}


def _described(value: Any) -> str:
  """Says what something is, in a few words."""
  kind = type(value).__name__
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    return f'{kind} {value.dtype} {tuple(value.shape)}'
  if isinstance(value, Mapping):
    return f'{kind} of {", ".join(map(str, value))}'
  if isinstance(value, tuple | list):
    return f'{kind} of {", ".join(type(part).__name__ for part in value)}'
  return kind


def _shape(
  splits: Mapping[str, Source], image_size: int | None
) -> tuple[int | None, ...]:
  """Finds the shape of images by some of them."""
  forms, fourth = [], []
  for split, examples in splits.items():
    if not len(examples):
      raise ValueError(f'{split} has no examples.')
    for number in evenly_spaced(len(examples), _LOOKED_AT):
      given = examples[number]['image']
      try:
        with as_image(given) as image:
          forms.append(headers.of(image))
          array = isinstance(given, np.ndarray)
          fourth.append(array and image.mode == 'RGBA')
      except Exception as error:  # Each format raises types of its own.
        raise ValueError(
          f'the image of example {number} of {split} cannot be used '
          f'({one_line(error)}): {_AGAIN}.'
        ) from error
  height, width, channels = headers.common_shape(forms)
  channels = 4 if all(fourth) else channels
  if image_size is not None:
    return None, None, channels
  if height is None:
    raise ValueError('images differ in size: give image_size.')
  return height, width, channels


def _made(
  name: str,
  splits: Mapping[str, Source],
  shape: tuple[int | None, ...],
  class_names: tuple[str, ...],
  reading: Reading,
) -> Dataset:
  source = Prepared(
    name, name, shape, class_names, tuple(splits), opener(name, splits, _AGAIN)
  )
  return assemble(source, source.train_and_test(), reading)
