"""The log of a run: a JSON line per round, and a progress bar."""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

from absl import logging
import tqdm

from resist_jax import folders, report
from resist_jax.errors import WorkdirLostError
from resist_jax.run.streams import Forgiving
from resist_jax.run.workdir import is_at


class Log:
  """The log in a process that does not write it: nothing is done."""

  def begin(self) -> None:
    """See `MetricsLog.begin`."""

  def before(self, row: Mapping[str, Any]) -> None:
    """See `MetricsLog.before`."""

  def write(self, row: Mapping[str, Any]) -> None:
    """See `MetricsLog.write`."""

  def check(self) -> None:
    """See `MetricsLog.check`."""


class MetricsLog(Log):
  """Appends one row for each round to `metrics.jsonl`."""

  def __init__(
    self,
    workdir: pathlib.Path,
    start_round: int,
    num_rounds: int,
    unit: str = 'images',
  ):
    """Opens the log, and drops the rows of rounds that will be repeated.

    Args:
      workdir: Workdir of the run.
      start_round: Number of rounds completed.
      num_rounds: Number of rounds in the whole run.
      unit: What the examples are called.

    Raises:
      ConfigError: If `metrics.jsonl` is damaged.
    """
    self._path = path = workdir / 'metrics.jsonl'
    self._config = workdir / 'config.json'
    self._kept, self._unit = start_round, unit
    logged: dict[int, int] = {}  # How many rounds each row stands for.
    self._shown_test = '-'
    # A long log does not fit in memory.
    with folders.replacing(path) as part, part.open('w') as kept:
      for row in report.each_row(path):
        # A run that begins anew logs round 0, a test before the first one,
        # again.
        if row['round'] <= start_round > 0:
          kept.write(json.dumps(row) + '\n')
          logged[row['round']] = row.get('rounds', 1)
          if 'test_accuracy' in row:
            self._shown_test = _percent(row['test_accuracy'])
    missing = start_round - sum(n for done, n in logged.items() if done)
    if missing > 0:
      logging.warning(
        '%s has no row of %d of the %d rounds that are done: it was damaged or '
        'deleted, and goes on without them',
        path,
        missing,
        start_round,
      )
    self._file = path.open('a')
    # Rounds that follow fast ones may be slow, and each is to be shown.
    self._bar = tqdm.tqdm(
      total=num_rounds, initial=start_round, unit='round', dynamic_ncols=True,
      miniters=1, disable=sys.stderr is None, file=Forgiving(sys.stderr),
    )  # fmt: skip

  def begin(self) -> None:
    """Starts the clock of the progress bar, when all is compiled."""
    self._bar.unpause()

  def before(self, row: Mapping[str, Any]) -> None:
    """Logs a row without counting a round: a test before the first one.

    Args:
      row: JSON values by name.

    Raises:
      WorkdirLostError: See `check`.
    """
    self.check()
    self._file.write(json.dumps(dict(row)) + '\n')
    self._file.flush()

  def write(self, row: Mapping[str, Any]) -> None:
    """Logs a round.

    Args:
      row: JSON values by name.

    Raises:
      WorkdirLostError: See `check`.
    """
    self.before(row)
    shown = {'loss': f'{row["train_loss"]:.3f}'}
    if 'train_accuracy' in row:
      shown['train'] = _percent(row['train_accuracy'])
    if 'test_accuracy' in row:
      self._shown_test = _percent(row['test_accuracy'])
    elif 'test_loss' in row:  # It does not classify.
      self._shown_test = f'{row["test_loss"]:.3f}'
    shown['test'] = self._shown_test
    shown['sent'] = report.byte_text(row['wire_bytes_total'])
    shown[f'{self._unit}/s'] = f'{row["images_per_second"]:.0f}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(row.get('rounds', 1))
    self._kept = row['round']

  def check(self) -> None:
    """Checks that the workdir is still that of this run.

    Raises:
      WorkdirLostError: If its files were deleted, moved or replaced.
    """
    lost = self._path
    if is_at(self._path, self._file):
      if self._config.is_file():
        return
      lost = self._config
    raise WorkdirLostError(
      f'{lost} was deleted, moved or replaced while the run trained, perhaps '
      f'with its folder: nothing is kept since round {self._kept}. Put it '
      'back, and the same command goes on from the newest checkpoint there; '
      'where none was saved yet, it begins anew.'
    )

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()
    self._file.close()


def _percent(share: float | None) -> str:
  """Returns a share in per cent; '-' for one that is not finite."""
  return '-' if share is None else f'{share:.1%}'
