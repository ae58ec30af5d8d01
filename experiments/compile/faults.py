"""What would break a program on an accelerator, or waste its memory."""

from collections.abc import Iterable
import re
from typing import Any

import jax

from resist_jax.accounting import hlo


def _of_round(args: tuple[Any, ...]) -> Any:
  (shared, chain, carried), exchanged = args[:2]
  # The number of the round says what a schedule counts: nothing reads that.
  return shared, chain, carried and carried.moments, exchanged


# The arguments that a program of a round replaces by new ones. `finish` gets
# the state of local training, but its moments restart.
_REPLACED = {
  'round': _of_round,
  'step': lambda args: args[0],
  'finish': lambda args: (args[0].params, args[2]),
}


def faults(
  name: str,
  args: tuple[Any, ...],
  written: str,
  text: str,
  scopes: Iterable[str] | None,
) -> list[str]:
  """Finds what is wrong with a program of a round.

  Args:
    name: Its name in `Round.programs`.
    args: What it is called with.
    written: The program before the compiler changed it; StableHLO. The TPU
      compiler replaces numbers of 64 bits by pairs.
    text: Its compiled HLO.
    scopes: Where all devices choose the same branch, see
      `accounting.branches`; None where the text has lost their names.

  Returns:
    A line for each fault: numbers of 64 bits, which a TPU emulates; a
    collective that not all devices reach; arrays of the state that are not
    donated, so that there are two of them.
  """
  found = []
  wide = sorted(set(re.findall(r'tensor<(?:\d+x)*f64>', written)))
  if wide:
    found.append(f'{name} computes in float64: {", ".join(wide[:3])}')
  if scopes is not None:
    found += [
      f'{name} has a {collective.kind} in a branch: {collective.op_name}'
      for collective in hlo.collectives_in_branches(text, scopes)
    ]
  if name in _REPLACED:
    want = len(jax.tree.leaves(_REPLACED[name](args)))
    donated = hlo.num_donated(text)
    if donated < want:
      found.append(f'{name} takes {donated} of {want} arrays over')
  return found
