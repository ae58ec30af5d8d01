"""Numbers of bytes for readers, and the axes that show them."""

from collections.abc import Sequence

_FAR = 20  # Where one run sends so many times as much, bytes need a log axis.


def byte_unit(num_bytes: float) -> tuple[float, str]:
  """Returns the largest decimal unit that does not exceed a number of bytes.

  Args:
    num_bytes: The largest number of bytes to show.

  Returns:
    The size of the unit in bytes, and its name.

  >>> byte_unit(2.5e9), byte_unit(640)
  ((1000000000.0, 'GB'), (1.0, 'B'))
  """
  for size, name in ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if num_bytes >= size:
      return size, name
  return 1.0, 'B'


def byte_text(num_bytes: float, digits: int = 4) -> str:
  """Returns a number of bytes for readers.

  Args:
    num_bytes: At least 0.
    digits: How many significant ones are shown.

  Returns:
    The number in B, kB, MB, GB or more, each 1000 times the one before.

  >>> byte_text(12_345_678)
  '12.35 MB'
  """
  unit, name = byte_unit(num_bytes)
  return f'{num_bytes / unit:.{digits}g} {name}'


def byte_axis(ends: Sequence[float]) -> tuple[bool, float, str]:
  """Chooses an axis for curves of which some may send much more than others.

  Data parallel sends T times as much as local SGD. On a linear axis, the curve
  of local SGD would be a vertical line at the left edge.

  Args:
    ends: The number of bytes at which each curve ends.

  Returns:
    Whether the axis is logarithmic, the size of its unit in bytes, and the name
    of the unit.

  >>> byte_axis([5e6, 2e9]), byte_axis([5e8, 2e9])
  ((True, 1000000.0, 'MB'), (False, 1000000000.0, 'GB'))
  """
  log = bool(ends) and max(ends) > _FAR * min(ends) > 0
  return log, *byte_unit(min(ends) if log else max(ends, default=0))
