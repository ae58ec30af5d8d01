"""What the beginning of an image file says, without decoding its pixels."""

from collections.abc import Iterable
import os
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image

# Pillow's modes of at most 8 bits a channel, which it converts to each other.
EIGHT_BITS = frozenset(
  ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK',
   'YCbCr', 'HSV')
)  # fmt: skip
# Files whose mode I, of 32 bits, holds 16: Pillow has scaled them to that.
_SIXTEEN_IN_I = ('PNG', 'PPM')
# Where Pillow looks for the orientation of an image.
_EXIF = ('exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp')
# What makes an image upright, by its orientation in EXIF.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]
_GREY = frozenset(('1', 'L', 'LA', 'La', 'I', 'I;16', 'I;16B', 'I;16L'))


class Header(NamedTuple):
  """The form of an image.

  Attributes:
    size: Width and height of the upright image, in pixels.
    grey: Whether it has no colours.
  """

  size: tuple[int, int]
  grey: bool


def read(file: Any | IO[bytes]) -> Header:
  """Reads the form of an image.

  Args:
    file: The path of a file, or an open one.

  Raises:
    Exception: If it is no image. The decoders raise many types.
  """
  if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
    # One that is there, such as a pipe, might never end.
    there = os.path.lexists(file)
    raise OSError('it is no file' if there else 'there is no such file')
  with Image.open(file) as image:
    return of(image)


def of(image: Image.Image) -> Header:
  """Returns the form of an image, which need not be decoded."""
  check_mode(image)
  return Header(_upright_size(image), image.mode in _GREY)


def check_mode(image: Image.Image) -> None:
  """Checks that the channels of an image have at most 16 bits.

  Args:
    image: An image as Pillow opens it.

  Raises:
    ValueError: If nothing says which of its values is white.
  """
  sixteen = image.mode == 'I' and image.format in _SIXTEEN_IN_I
  if not (image.mode in EIGHT_BITS or sixteen or image.mode.startswith('I;16')):
    raise ValueError(
      f'its pixels are of mode {image.mode}, and only channels of 8 or 16 bits '
      'are read'
    )


def _upright_size(image: Image.Image) -> tuple[int, int]:
  # To look behind the pixels of a PNG, Pillow would decode them; a TIFF it
  # turns itself.
  if image.format == 'TIFF':
    return image.size
  if image.format == 'PNG' and not image.info.keys() & {*_EXIF}:
    return image.size
  return image.size[::-1] if turn(image) in _SIDEWAYS else image.size


def turn(image: Image.Image) -> Image.Transpose | None:
  """Returns what makes an image upright; None if it is.

  Args:
    image: An image as Pillow opens it. Malformed EXIF says nothing, as for the
      programs that show images.
  """
  try:
    return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # Pillow raises many types.
    return None


def upright(image: Image.Image) -> Image.Image:
  """Returns an upright copy of an image, which says nothing of orientation."""
  image.load()
  how = turn(image)
  made = image.copy() if how is None else image.transpose(how)
  made.info = {k: v for k, v in image.info.items() if k not in _EXIF}
  return made


def common_shape(headers: Iterable[Header]) -> tuple[int | None, ...]:
  """Returns the shape of all images.

  Args:
    headers: Their forms. If they are made while they are read, no more are
      made than the answer needs.

  Returns:
    `(H, W, C)`. H and W are None if images differ in size; C is 1 if all are
    grey, and 3 otherwise.

  >>> common_shape([Header((4, 3), True), Header((4, 3), False)])
  (3, 4, 3)
  """
  first, differ, colour = None, False, False
  for header in headers:
    first = first or header.size
    differ |= header.size != first
    colour |= not header.grey
    if differ and colour:
      break
  width, height = (None, None) if differ or not first else first
  return height, width, 3 if colour else 1
