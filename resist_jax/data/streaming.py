"""Images that stay in their files until somebody indexes them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
import math
import os
from typing import Any

import numpy as np
from PIL import Image

from resist_jax.errors import ConfigError

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's, by channels.
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # Of random crops, as is customary.
ATTEMPTS = 10
THREADS = min(32, 2 * (os.cpu_count() or 1))  # Pillow decodes without the GIL.

Box = tuple[float, float, float, float]  # Left, top, right, bottom.


class Records:
  """Encoded images with labels, read when they are asked for.

  Attributes:
    name: Of the set and split, for messages.
    num_classes: Labels are 0 to this, exclusive.
  """

  def __init__(self, name: str, source: Sequence[Any], num_classes: int):
    """Wraps a source.

    Args:
      name: Of the set and split, for messages.
      source: Examples as dictionaries: `label`, and `image` as the bytes of a
        file or as `uint8[H, W, C]`.
      num_classes: Labels are 0 to this, exclusive.
    """
    self.name, self.num_classes = name, num_classes
    self._source = source
    self._labels = np.full(len(source), -1, np.int32)  # Those seen so far.

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, number: int) -> dict[str, Any]:
    """Reads an example.

    Raises:
      ConfigError: If its label is out of range.
    """
    example = self._source[number]
    label = int(example['label'])
    if not 0 <= label < self.num_classes:
      raise ConfigError(
        f'image {number} of {self.name} has the label {label}, but the set '
        f'declares {self.num_classes} classes, 0 to {self.num_classes - 1}: '
        'prepare it again.'
      )
    self._labels[number] = label
    return example

  def label(self, number: int) -> int:
    """Returns the label of an example; one that was read is remembered."""
    if self._labels[number] < 0:
      self[number]
    return int(self._labels[number])


@dataclasses.dataclass(frozen=True)
class StreamedImages:
  """Stands in for `uint8[N, H, W, C]`: indexing reads and decodes.

  Attributes:
    records: Where the images come from.
    numbers: `int32[N]`, which of them.
    image_shape: `(H, W, C)`.
    resized: Show the centre of an image at this size: what a side of `8/7 H`
      for the shorter side leaves inside `H`. Otherwise images have this size.
  """

  records: Records
  numbers: np.ndarray
  image_shape: tuple[int, int, int]
  resized: bool

  dtype = np.dtype(np.uint8)

  @property
  def shape(self) -> tuple[int, ...]:
    """`(N, H, W, C)`."""
    return (len(self.numbers), *self.image_shape)

  def __len__(self) -> int:
    return len(self.numbers)

  def take(self, index: np.ndarray, axis: int = 0) -> 'StreamedImages':
    """Returns the images at `index`, unread."""
    assert axis == 0
    return dataclasses.replace(self, numbers=self.numbers[index])

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """Reads images.

    Args:
      index: `int32[...]`; black images fill the places of -1. Or a slice.

    Returns:
      `uint8[..., H, W, C]`.
    """
    if isinstance(index, slice):
      index = np.arange(len(self))[index]
    images = np.zeros((index.size, *self.image_shape), np.uint8)

    def read(place: int) -> None:
      i = int(index.flat[place])
      if i >= 0:
        images[place] = self.example(i)[0]

    _in_threads(read, index.size)
    return images.reshape(*index.shape, *self.image_shape)

  def example(
    self, i: int, rng: np.random.Generator | None = None
  ) -> tuple[np.ndarray, np.int32]:
    """Reads one image and its label.

    Args:
      i: Which one.
      rng: Crops the image at random instead of showing its centre.

    Returns:
      `uint8[H, W, C]` and the label.

    Raises:
      ConfigError: If it is no image, or not one of the size it should have.
    """
    number = int(self.numbers[i])
    record = self.records[number]
    height, width, _ = self.image_shape
    image = self._decode(number, record)
    if self.resized:
      box = random_box(rng, *image.size) if rng else centre_box(*image.size)
      image = image.resize((width, height), Image.Resampling.BILINEAR, box)
    elif image.size != (width, height):
      raise ConfigError(
        f'image {number} of {self.records.name} has {image.height}x'
        f'{image.width} pixels, not {height}x{width}: prepare the set again.'
      )
    pixels = np.asarray(image).reshape(self.image_shape)
    return pixels, np.int32(record['label'])

  def _decode(self, number: int, record: dict[str, Any]) -> Image.Image:
    raw, mode = record['image'], MODES[self.image_shape[2]]
    if isinstance(raw, np.ndarray):
      return Image.fromarray(raw.squeeze(-1) if raw.shape[-1] == 1 else raw)
    try:
      with Image.open(io.BytesIO(raw)) as image:
        return image.convert(mode)
    # Pillow's file formats raise each of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
      file = record.get('file_name', b'').decode(errors='replace')
      raise ConfigError(
        f'image {number} of {self.records.name}{file and f" ({file})"} cannot '
        f'be decoded ({type(error).__name__}): prepare the set again.'
      ) from error


@dataclasses.dataclass(frozen=True)
class StreamedLabels:
  """Stands in for `int32[N]`: indexing reads what has not been read before.

  Attributes:
    records: Where the labels come from.
    numbers: `int32[N]`, which of them.
  """

  records: Records
  numbers: np.ndarray

  dtype = np.dtype(np.int32)

  def __len__(self) -> int:
    return len(self.numbers)

  def take(self, index: np.ndarray, axis: int = 0) -> 'StreamedLabels':
    """Returns the labels at `index`, unread."""
    assert axis == 0
    return dataclasses.replace(self, numbers=self.numbers[index])

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """Returns `int32[...]` for `int32[...]`; places of -1 hold anything."""
    numbers = np.asarray(self.numbers[index])
    labels = np.zeros(numbers.size, np.int32)

    def read(place: int) -> None:
      labels[place] = self.records.label(int(numbers.flat[place]))

    _in_threads(read, numbers.size)
    return labels.reshape(numbers.shape)


def _in_threads(function: Callable[[int], None], count: int) -> None:
  parts = np.array_split(np.arange(count), min(count, 8 * THREADS) or 1)
  with ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(lambda part: [function(i) for i in part] and None, parts))


def centre_box(width: int, height: int) -> Box:
  """Returns the centre of an image, a square of 7/8 of its shorter side.

  At 224 pixels that is the centre of the image with a shorter side of 256.

  Args:
    width: In pixels.
    height: Likewise.

  Returns:
    The square.

  >>> centre_box(400, 320)
  (60.0, 20.0, 340.0, 300.0)
  """
  side = min(width, height) * 7 / 8
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
  """Draws a part of an image of random area, shape and place.

  Args:
    rng: What to draw from.
    width: In pixels.
    height: Likewise.

  Returns:
    Whole pixels within the image, 8 to 100 % of its area and 3/4 to 4/3 as wide
    as high, up to rounding. An image too long for that gives its centre, at the
    nearest of these shapes.
  """
  area = width * height * rng.uniform(*AREA, ATTEMPTS)
  ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), ATTEMPTS))
  corner = rng.uniform(size=2)
  widths = np.rint(np.sqrt(area * ratio)).astype(int)
  heights = np.rint(np.sqrt(area / ratio)).astype(int)
  fits = (widths >= 1) & (widths <= width)
  fits &= (heights >= 1) & (heights <= height)
  if fits.any():
    w, h = int(widths[fits.argmax()]), int(heights[fits.argmax()])
    left = math.floor(corner[0] * (width - w + 1))
    top = math.floor(corner[1] * (height - h + 1))
  else:
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h
