"""Which devices a collective connects, in the notations of HLO text."""

import collections
import math
import re

import numpy as np


def replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Reads the devices of each replica group, whatever the notation.

  Args:
    attributes: Of the collective, as text.
    num_devices: Of the program.

  Returns:
    Groups of device numbers; one of all where the text names none.

  >>> replica_groups('replica_groups={{0,2},{1,3}}', 4)
  [[0, 2], [1, 3]]
  >>> replica_groups('replica_groups=[2,2]<=[2,2]T(1,0)', 4)
  [[0, 2], [1, 3]]
  >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
  [[0, 2], [1, 3]]
  """
  iota = r'replica_groups=\[([\d,]+)\]<=(\S+)'
  if found := re.search(iota, attributes):
    return _laid_out(found[2]).reshape(_numbers(found[1])).tolist()
  mesh = r'replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}'
  if found := re.search(mesh, attributes):
    return _along_axes(*found.groups())
  listed = re.search(r'replica_groups=\{([\d,{}]*)\}', attributes)
  groups = re.findall(r'\{([\d,]+)\}', listed[1]) if listed else []
  return [_numbers(group) for group in groups] or [list(range(num_devices))]


def _along_axes(mesh: str, order: str, axes: str) -> list[list[int]]:
  """Reads `'a'=2,'b'=8` with `'a','b':(1)4`: along a, and along a part of b."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  digits = []  # Of a device's place in the mesh: stride and size.
  for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    inner = list(sizes.values())[list(sizes).index(axis) + 1 :]
    size = int(part or sizes[axis])
    stride = math.prod(inner) * sizes[axis] // (int(before or 1) * size)
    digits.append((stride, size))
  groups = collections.defaultdict(list)
  devices = _laid_out(order.strip() or f'[{math.prod(sizes.values())}]')
  for place, device in enumerate(devices.tolist()):
    along = sum(place // stride % size * stride for stride, size in digits)
    groups[place - along].append(device)
  return list(groups.values())


def _laid_out(text: str) -> np.ndarray:
  """Reads device numbers in order: `[2,4]T(1,0)`, or each by itself."""
  found = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if not found:
    return np.array(_numbers(text))
  shape, order = map(_numbers, found.groups(default=''))
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose(order or range(len(shape))).flatten()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]
