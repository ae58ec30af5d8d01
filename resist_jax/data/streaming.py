"""Images and labels that are read from their files when they are indexed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
import math
import os
from typing import Any, Self

import numpy as np
from PIL import Image

from resist_jax.data import headers
from resist_jax.data.prepared import PREPARE_AGAIN, Source, known_label
from resist_jax.errors import ConfigError, one_line

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's mode by number of channels.
# The usual ranges of random resized crops (Inception, ResNet on ImageNet).
CROP_AREA = (0.08, 1.0)  # Share of the image.
CROP_RATIO = (3 / 4, 4 / 3)  # Width over height.
ATTEMPTS = 10  # Crops drawn, of which the first that fits is used.
THREADS = min(32, 2 * (os.cpu_count() or 1))  # Pillow decodes without the GIL.

# What TFDS sets call the name of an image's file.
_FILE_NAMES = ('file_name', 'filename', 'image/filename')

Box = tuple[float, float, float, float]  # Left, top, right, bottom.


class Records:
  """Encoded images with labels, each read when it is indexed.

  Attributes:
    name: Name of the data set and split, for messages.
    num_classes: Number of classes; labels run from 0 to `num_classes - 1`.
    remedy: What to do about an image that cannot be used.
  """

  def __init__(self, name: str, source: Source, num_classes: int):
    """Wraps a random-access source of examples.

    Args:
      name: Name of the data set and split, for messages.
      source: Examples as dictionaries with the keys `label` and `image`, see
        `as_image`.
      num_classes: Number of classes; labels run from 0 to `num_classes - 1`.
    """
    self.name, self.num_classes = name, num_classes
    self._source = source
    self.remedy = getattr(source, 'remedy', PREPARE_AGAIN)
    self._labels = np.full(len(source), -1, np.int32)  # -1: not read yet.

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, number: int) -> dict[str, Any]:
    """Reads an example and remembers its label.

    Args:
      number: Its position in the source.

    Returns:
      The example as the source gives it.

    Raises:
      ConfigError: If it has no label, or its label is out of range.
    """
    example = self._source[number]
    label = example['label']
    if not isinstance(label, int | np.integer):
      raise ConfigError(
        f'image {number} of {self.name} has {label!r} in the place of a label: '
        f'{self.remedy}.'
      )
    if label == -1:
      raise ConfigError(
        f'image {number} of {self.name} has no label (-1), but others have: '
        'name a part of the split that has labels, such as train[:80%], in '
        'data.train_split or data.test_split.'
      )
    if not 0 <= label < self.num_classes:
      raise ConfigError(
        f'image {number} of {self.name} has the label {label}, but the set '
        f'declares {self.num_classes} classes, 0 to {self.num_classes - 1}: '
        f'{self.remedy}.'
      )
    self._labels[number] = label
    return example

  def label(self, number: int) -> int:
    """Returns the label of an example, which is read once at most."""
    if self.known_label(number) < 0:
      self[number]
    return int(self._labels[number])

  def known_label(self, number: int) -> int:
    """Returns the label of an example without reading it; -1 if it must be."""
    if self._labels[number] < 0:
      self._labels[number] = known_label(self._source, number)
    return int(self._labels[number])


@dataclasses.dataclass(frozen=True)
class _Streamed:
  """A part of N examples, which are read when they are indexed.

  Attributes:
    records: The records that hold them.
    numbers: Their positions among the records, `int32[N]`.
  """

  records: Records
  numbers: np.ndarray

  def __len__(self) -> int:
    return len(self.numbers)

  def take(self, index: np.ndarray, axis: int = 0) -> Self:
    """Returns this part of some examples, without reading it.

    Args:
      index: Their numbers, `int[n]`.
      axis: As for NumPy; only 0.
    """
    assert axis == 0
    return dataclasses.replace(self, numbers=self.numbers[index])


@dataclasses.dataclass(frozen=True)
class StreamedImages(_Streamed):
  """Behaves as an array `uint8[N, H, W, C]` that reads images when indexed.

  Attributes:
    image_shape: `(H, W, C)`.
    resized: Whether images are cropped at the centre and resized to H x W. If
      not, all images must have the size H x W already.
    kept: What the central crop keeps of each side: a shorter side of `8/7 H`
      pixels is cropped to H (256 and 224 on ImageNet).
    needs_fourth: Whether an image file without a fourth channel is refused
      where there are four. Otherwise it gets an opaque one, as from TFDS. In
      arrays, a fourth channel may be anything, such as near infrared: it is
      neither made up nor dropped.
  """

  image_shape: tuple[int, int, int]
  resized: bool
  kept: float = 7 / 8
  needs_fourth: bool = False

  dtype = np.dtype(np.uint8)

  @property
  def shape(self) -> tuple[int, ...]:
    """`(N, H, W, C)`."""
    return (len(self.numbers), *self.image_shape)

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """Reads images.

    Args:
      index: A slice, or `int32[...]`, where -1 asks for a black image.

    Returns:
      `uint8[..., H, W, C]`.
    """
    if isinstance(index, slice) or np.asarray(index).dtype == bool:
      index = np.arange(len(self))[index]
    index = np.asarray(index)
    images = np.zeros((index.size, *self.image_shape), np.uint8)

    def read(position: int) -> None:
      i = int(index.flat[position])
      if i >= 0:
        images[position] = self.example(i)[0]

    _in_threads(read, index.size)
    return images.reshape(*index.shape, *self.image_shape)

  def example(
    self, i: int, rng: np.random.Generator | None = None
  ) -> tuple[np.ndarray, np.int32]:
    """Reads one image and its label.

    Args:
      i: Index of the image, 0 to N - 1.
      rng: Generator of a random crop; None for a crop at the centre.

    Returns:
      The image, `uint8[H, W, C]`, and its label.

    Raises:
      ConfigError: If the image cannot be decoded, or has another size and is
        not to be resized.
    """
    number = int(self.numbers[i])
    record = self.records[number]
    height, width, _ = self.image_shape
    image = self._decode(number, record)
    if self.resized:
      if rng:
        box = random_box(rng, *image.size)
      else:
        box = centre_box(*image.size, width / height, self.kept)
      image = _resize(image, (width, height), box)
    elif image.size != (width, height):
      raise ConfigError(
        f'{self._called(number, record)} has {image.height}x{image.width} '
        f'pixels, not {height}x{width}: mend or remove it, and '
        f'{self.records.remedy}.'
      )
    pixels = np.asarray(image).reshape(self.image_shape)
    return pixels, np.int32(record['label'])

  def _decode(self, number: int, record: dict[str, Any]) -> Image.Image:
    mode = MODES[self.image_shape[2]]
    try:
      with as_image(record['image']) as image:
        array = isinstance(record['image'], np.ndarray)
        if array and image.mode == 'RGBA' and mode != 'RGBA':
          raise ValueError(f'it has four channels, and {len(mode)} are used')
        if (array or self.needs_fourth) and mode == 'RGBA' != image.mode:
          raise ValueError('it has no fourth channel, and four are used')
        image.load()
        how = headers.turn(image)
        pixels = _eight_bits(image).convert(mode)
        return pixels if how is None else pixels.transpose(how)
    except Exception as error:  # Each format raises types of its own.
      raise ConfigError(
        f'{self._called(number, record)} cannot be decoded ({one_line(error)}):'
        f' mend or remove it, and {self.records.remedy}.'
      ) from error

  def _called(self, number: int, record: dict[str, Any]) -> str:
    """Returns which image it is, and its file where that is known."""
    file = next(filter(None, map(record.get, _FILE_NAMES)), '')
    if isinstance(file, bytes):
      file = file.decode(errors='replace')
    return f'image {number} of {self.records.name}{file and f" ({file})"}'


def _resize(image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
  how = Image.Resampling.BILINEAR
  if image.mode != 'RGBA':
    return image.resize(size, how, box)
  # Pillow would darken colours by the fourth channel, which may be anything.
  bands = [band.resize(size, how, box) for band in image.split()]
  return Image.merge('RGBA', bands)


def as_image(given: Any) -> Image.Image:
  """Opens an image.

  Args:
    given: The content of an image file, `uint8[H, W]`, `uint8[H, W, C]`, or an
      image of Pillow, of which an upright copy is made.
  """
  if isinstance(given, Image.Image):
    return headers.upright(given)
  if isinstance(given, np.ndarray):
    grey = given.ndim == 3 and given.shape[-1] == 1
    return Image.fromarray(given.squeeze(-1) if grey else given)
  return Image.open(io.BytesIO(given))


def _eight_bits(image: Image.Image) -> Image.Image:
  """Returns an image whose channels have at most 8 bits.

  The upper 8 of 16 bits are kept, as Pillow itself does for colours.

  Args:
    image: An image as Pillow opens it.

  Raises:
    ValueError: If nothing says which of its values is white.
  """
  headers.check_mode(image)
  if image.mode in headers.EIGHT_BITS:
    return image
  return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class StreamedLabels(_Streamed):
  """Behaves as an array `int32[N]` that reads labels when indexed."""

  dtype = np.dtype(np.int32)

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """Reads labels.

    Args:
      index: A slice, or `int32[...]`, where -1 gives an arbitrary label.

    Returns:
      `int32[...]`.
    """
    numbers = np.asarray(self.numbers[index])
    labels = np.zeros(numbers.size, np.int32)

    def read(position: int) -> None:
      labels[position] = self.records.label(int(numbers.flat[position]))

    _in_threads(read, numbers.size)
    return labels.reshape(numbers.shape)


def _in_threads(function: Callable[[int], None], count: int) -> None:
  """Calls `function` on 0 to `count - 1`, in threads."""
  parts = np.array_split(np.arange(count), min(count, 8 * THREADS) or 1)
  with ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(lambda part: [function(i) for i in part] and None, parts))


def centre_box(
  width: int, height: int, ratio: float = 1.0, kept: float = 7 / 8
) -> Box:
  """Returns the middle of an image.

  By default it is a square whose side is 7/8 of the shorter side. Resized to
  224 pixels, this is the usual central crop of an image whose shorter side has
  256 pixels.

  Args:
    width: Width of the image in pixels.
    height: Height of the image in pixels.
    ratio: Width of the middle over its height.
    kept: Share of the limiting side of the image that the middle covers.

  Returns:
    Left, top, right and bottom of the middle, in pixels.

  >>> centre_box(400, 320)
  (60.0, 20.0, 340.0, 300.0)
  >>> centre_box(400, 320, ratio=0.5, kept=1.0)
  (120.0, 0.0, 280.0, 320.0)
  """
  high = min(width / ratio, height) * kept
  wide = high * ratio
  left, top = (width - wide) / 2, (height - high) / 2
  return left, top, left + wide, top + high


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
  """Draws the box of a random resized crop.

  Args:
    rng: The random generator.
    width: Width of the image in pixels.
    height: Height of the image in pixels.

  Returns:
    Left, top, right and bottom in whole pixels, within the image. The box has 8
    to 100 % of the image's area and is 3/4 to 4/3 times as wide as high, up to
    rounding. If no drawn box fits, as in a very elongated image, it is the
    central one of the nearest aspect ratio.
  """
  area = width * height * rng.uniform(*CROP_AREA, ATTEMPTS)
  low, high = map(math.log, CROP_RATIO)
  ratio = np.exp(rng.uniform(low, high, ATTEMPTS))
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
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h
