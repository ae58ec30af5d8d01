"""Numbers of bytes for readers."""


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


def byte_text(num_bytes: float) -> str:
  """Returns a number of bytes for readers.

  Args:
    num_bytes: At least 0.

  Returns:
    The number in B, kB, MB, GB or more, each 1000 times the one before.

  >>> byte_text(12_345_678)
  '12.35 MB'
  """
  unit, name = byte_unit(num_bytes)
  return f'{num_bytes / unit:.4g} {name}'
