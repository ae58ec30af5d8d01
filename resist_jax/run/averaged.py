"""Tests of the average over rounds, with the last network beside it."""

from typing import Any

from resist_jax.rounds import State, averaged
from resist_jax.run.task import Evaluation

SUFFIX = '_unaveraged'  # Ends the names of what the last network measures.


class AveragedTest:
  """Tests the average over rounds, and the network as it is now."""

  def __init__(self, test: Any):
    """Takes what tests a network; see `task.Test`."""
    self._test = test

  def statistics(self, state: State) -> Any:
    """Returns the fixed statistics of the average, see `Evaluator`."""
    return self._test.statistics(averaged(state))

  def __call__(self, state: State) -> Evaluation:
    """Tests both.

    Args:
      state: What the workers hold.

    Returns:
      What the average measures, under the usual names, and what the network as
      it is now measures, under these names with `_unaveraged`.
    """
    average, plain = self._test(averaged(state)), self._test(state)
    return Evaluation(
      {**average.measures, **_named(plain.measures)},
      {**average.broken, **_named(plain.broken)},
      average.wire_bytes + plain.wire_bytes,
    )


def _named(found: dict[str, Any]) -> dict[str, Any]:
  return {name + SUFFIX: value for name, value in found.items()}
