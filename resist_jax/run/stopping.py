"""Which test of a run is the best so far, and whether it stops before its end.

The memory of this is a mapping that each checkpoint holds, so that a run that
goes on decides as one that never stopped. All processes test alike, and so they
decide alike.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from resist_jax.errors import ConfigError, did_you_mean
from resist_jax.run.setup import Setup


def judged_by(setup: Setup) -> str:
  """Returns the measure that says which test is the best.

  Args:
    setup: Setup of the run.

  Returns:
    A name in `metrics.jsonl`.

  Raises:
    ConfigError: If the config names none that this run measures.
  """
  tests, name = setup.dataset.tests, setup.config.best_by
  measures = setup.task.measures
  if name == 'auto':
    test = 'validation' if 'validation' in tests else 'test'
    return f'{test}_{"accuracy" if "accuracy" in measures else "loss"}'
  names = [f'{test}_{measure}' for test in tests for measure in measures]
  if name not in names:
    if name.startswith('validation_') and 'validation' not in tests:
      raise ConfigError(
        f'best_by is {name!r}, but nothing is held out to validate on: set '
        'data.validation to a share of the training set, such as 0.1, or use '
        f'one of {", ".join(names)}, or auto.'
      )
    raise ConfigError(
      f'best_by is {name!r}. {did_you_mean(name, names)}Use one of '
      f'{", ".join(names)}, or auto.'
    )
  return name


def updated(
  best: Mapping[str, Any], by: str, row: Mapping[str, Any], min_gain: float
) -> dict[str, Any]:
  """Returns the memory after a test.

  Args:
    best: That before; empty before the first test.
    by: See `judged_by`.
    row: The row of the round that was tested.
    min_gain: What counts as a gain: more than this above the last gain.

  Returns:
    `by`; the best `value`, and its `round`; the value of the last gain,
    `gained`; and the number of tests since, `tests_since`. For losses and
    perplexities, the lowest value is the best. A test whose value is not finite
    has no gain.

  >>> best = updated({}, 'x', {'round': 5, 'x': 0.5}, min_gain=0.1)
  >>> best = updated(best, 'x', {'round': 9, 'x': 0.55}, min_gain=0.1)
  >>> best['round'], best['gained'], best['tests_since']
  (9, 0.5, 1)
  """
  now, done = row[by], row['round']
  sign = -1 if by.endswith(('_loss', '_perplexity')) else 1
  if now is None:
    return {**best, 'tests_since': best['tests_since'] + 1} if best else {}
  if not best:
    return {
      'by': by, 'value': now, 'round': done, 'gained': now, 'tests_since': 0,
    }  # fmt: skip
  found = dict(best)
  if sign * now > sign * found['value']:
    found |= {'value': now, 'round': done}
  found['tests_since'] += 1
  if sign * (now - found['gained']) > min_gain:
    found |= {'gained': now, 'tests_since': 0}
  return found


def reason(config: ml_collections.ConfigDict, best: Mapping[str, Any]) -> str:
  """Returns why a run stops before its last round; empty if it does not.

  Args:
    config: Its config.
    best: See `updated`.
  """
  patience, least = (
    config.early_stopping.patience,
    config.early_stopping.min_gain,
  )
  if not patience or best.get('tests_since', 0) < patience:
    return ''
  return (
    f'{best["tests_since"]} tests in a row had no gain of more than {least:g} '
    f'in {best["by"]}, which was {best["gained"]:.4f} before, and at best '
    f'{best["value"]:.4f} after round {best["round"]}'
  )
