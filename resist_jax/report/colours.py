"""The one table of colours: a protocol has the same one in every picture.

All of them are among the colours of Okabe and Ito, which colour-blind readers
can tell apart. Those of protocols stand out from white three times or more.
Markers differ, too, for prints without colours.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.colors import to_hex
import numpy as np

# Each protocol's name for readers, its colour and its marker.
PROTOCOLS = {
  'resist': ('ResIST', '#0072b2', 'o'),
  'local_sgd': ('local SGD', '#d55e00', 's'),
  'data_parallel': ('data parallel', '#009e73', '^'),
}
OTHER = ('#555555', 'D')  # What is of no protocol, or of an unknown one.
ENSEMBLE = ('#a8578c', 'D')
# Workers and other parts of a run. No protocol has the colours of the first
# five; yellow comes late, because it is hard to see on white.
PALETTE = (
  '#56b4e9',
  '#e69f00',
  '#cc79a7',
  '#f0e442',
  '#222222',
  '#0072b2',
  '#d55e00',
  '#009e73',
)
# Lines of one protocol differ by their dashes, in units of a line's width.
DASHES = ((), (4, 1.6), (1.3, 1.3), (7, 1.5, 1.3, 1.5), (2.5, 1, 1, 1, 1, 1))


class Style(NamedTuple):
  """How a line looks.

  Attributes:
    colour: In hexadecimal.
    marker: A circle `o`, a square `s`, a triangle `^` or a diamond `D`.
    dashes: Lengths of dashes and gaps in turn; none for a solid line.
  """

  colour: str
  marker: str
  dashes: tuple[float, ...] = ()

  @property
  def look(self) -> dict[str, Any]:
    """The same as arguments of a line in matplotlib."""
    dashes = (0, self.dashes) if self.dashes else '-'
    return {'color': self.colour, 'linestyle': dashes, 'marker': self.marker}


def protocol_name(protocol: str) -> str:
  """Returns a protocol's name for readers."""
  return PROTOCOLS.get(protocol, (protocol,))[0]


def styles(protocols: Iterable[str]) -> list[Style]:
  """Returns how the lines of runs look.

  Args:
    protocols: The protocol of each line; another text for another colour.

  Returns:
    A style for each. Lines of the same protocol share their colour.

  >>> [s.dashes for s in styles(['resist', 'local_sgd', 'resist'])]
  [(), (), (4, 1.6)]
  """
  found, before = [], []
  for protocol in protocols:
    colour, marker = PROTOCOLS.get(protocol, ('', *OTHER))[1:]
    dashes = DASHES[before.count(colour) % len(DASHES)]
    found.append(Style(colour, marker, dashes))
    before.append(colour)
  return found


def colours(count: int) -> list[str]:
  """Returns distinct colours for workers, or other parts of a picture.

  Args:
    count: Number of colours.

  Returns:
    The first colours of `PALETTE` if they suffice, else equal steps of a
    continuous colour map, in hexadecimal.
  """
  return list(PALETTE[:count]) if count <= len(PALETTE) else shades(count)


def shades(count: int) -> list[str]:
  """Returns equal steps of a continuous colour map, without its pale end.

  Args:
    count: Number of colours.

  Returns:
    Colours in hexadecimal, from dark to light.
  """
  return [to_hex(c) for c in colormaps['viridis'](np.linspace(0, 0.88, count))]
