"""Which test of a run is the best so far, and whether it stops before its end.

The memory of this is a mapping that each checkpoint holds, so that a run that
goes on decides as one that never stopped. All processes test alike, and so they
decide alike.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from resist_jax.errors import ConfigError, did_you_mean
from resist_jax.run.setup import Setup


def judged_by(setup: Setup) -> str:
  """Returns the measure that says which test is the best.

  Args:
    setup: Setup of the run.

  Returns:
    A name in `metrics.jsonl`, perhaps with a sign, see `_direction`.

  Raises:
    ConfigError: If the config names none that this run measures, or one that
      may be better high or low.
  """
  tests, name = setup.dataset.tests, setup.config.best_by
  measures = setup.task.measures
  if name == 'auto':
    test = 'validation' if 'validation' in tests else 'test'
    return f'{test}_{"accuracy" if "accuracy" in measures else "loss"}'
  names = [f'{test}_{measure}' for test in tests for measure in measures]
  if _measure(name) not in names:
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
  if not _direction(name):
    raise ConfigError(
      f'best_by is {name!r}, and a name says for accuracies, losses and '
      f'perplexities alone which value is better: write -{name} if low ones '
      f'are, or +{name} if high ones are.'
    )
  return name


def _measure(by: str) -> str:
  return by.removeprefix('-').removeprefix('+')


def _direction(by: str) -> int:
  """Returns 1 if high values are better, -1 if low ones are, 0 if unknown.

  A sign before the name decides, and for some names their ending does.
  """
  if by[0] in '+-' or by.endswith(('_loss', '_perplexity')):
    return 1 if by[0] == '+' else -1
  return int(by.endswith(('_accuracy', '_accuracy_paper')))


def replayed(
  rows: Iterable[Mapping[str, Any]], by: str, min_gain: float
) -> dict[str, Any]:
  """Returns the memory after all tests of a log.

  Args:
    rows: Its rows.
    by: See `judged_by`.
    min_gain: See `updated`.
  """
  best: dict[str, Any] = {}
  for row in rows:
    if _measure(by) in row:
      best = updated(best, by, row, min_gain)
  return best


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
    `by` and `min_gain`; the best `value`, and its `round`; the value of the
    last gain, `gained`; and the number of tests since, `tests_since`. A test
    whose value is not finite has no gain.

  >>> best = updated({}, '+x', {'round': 5, 'x': 0.5}, min_gain=0.1)
  >>> best = updated(best, '+x', {'round': 9, 'x': 0.55}, min_gain=0.1)
  >>> best['round'], best['gained'], best['tests_since']
  (9, 0.5, 1)
  """
  now, done, sign = row[_measure(by)], row['round'], _direction(by)
  if now is None:
    return {**best, 'tests_since': best['tests_since'] + 1} if best else {}
  if not best:
    return {
      'by': by, 'min_gain': min_gain, 'value': now, 'round': done,
      'gained': now, 'tests_since': 0,
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
    f'in {_measure(best["by"])}, which was {best["gained"]:.4f} before, and at '
    f'best {best["value"]:.4f} after round {best["round"]}'
  )
