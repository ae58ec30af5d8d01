"""Rounds that grow longer as the learning rate falls.

With `local_steps_alpha`, a round is to have (alpha / rate)^2 local steps, at
least `local_steps` (Gu et al. 2024, the quadratic synchronisation rule). The
unit stays the round of `local_steps`: in all they are `num_rounds`, and 2, 4,
8, ... of them are trained as one, without the exchanges between them. So the
rate, the examples and the warm-up stay where they were, and few programs are
compiled.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import ml_collections
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How many rounds are trained as one.

  Attributes:
    config: Config of the run.
    rates: For each round the largest rate from its start on, so that no warm-up
      makes rounds long; empty where all rounds are equal.
  """

  config: ml_collections.ConfigDict
  rates: Sequence[float] = ()

  def at(self, done: int) -> int:
    """Returns how many rounds are trained as one.

    Args:
      done: How many are done, less than there are.

    Returns:
      A power of two, so that these rounds end no later than their phase.
    """
    if not self.rates:
      return 1
    left, count = self._end(done) - done, 1
    while 2 * count <= left and self._allows(2 * count, self.rates[done]):
      count *= 2
    return count

  def _allows(self, count: int, rate: float) -> bool:
    # For a rate of 0, every length is short enough.
    steps = count * self.config.local_steps
    return math.sqrt(steps) * rate <= self.config.local_steps_alpha

  def _end(self, done: int) -> int:
    """Returns how many rounds are done at the end of the phase of the next."""
    phases, last = self.config.phases, self.config.num_rounds
    ends = (phases.full_before, last - phases.full_after, last)
    return min((end for end in ends if end > done), default=done)

  def of_phase(self, done: int) -> set[int]:
    """Returns all counts that `at` gives from here to the end of the phase.

    Args:
      done: How many rounds are done.
    """
    counts, end = set(), self._end(done)
    while done < end:
      counts.add(self.at(done))
      done += self.at(done)
    return counts


def make(
  config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> Lengths:
  """Returns the lengths of the rounds of a run.

  Args:
    config: Config of the run.
    schedule: Its learning rate at a step.

  >>> config = ml_collections.ConfigDict(
  ...   {'num_rounds': 11, 'local_steps': 10, 'local_steps_alpha': 1.0}
  ... )
  >>> config.phases = {'full_before': 0, 'full_after': 0}
  >>> falling = optax.piecewise_constant_schedule(0.3, {20: 1 / 3})
  >>> lengths = make(config, falling)
  >>> [lengths.at(done) for done in (0, 1, 2, 10)]
  [1, 1, 8, 1]
  """
  if not config.local_steps_alpha:
    return Lengths(config)
  rate = jax.jit(schedule)
  steps = config.local_steps
  found = [float(rate(r * steps)) for r in range(config.num_rounds)]
  largest = np.maximum.accumulate(found[::-1])[::-1]  # From each round on.
  return Lengths(config, tuple(largest.tolist()))
