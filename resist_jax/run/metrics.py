"""The log of a run: a JSON line per round, TensorBoard and a progress bar."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any, NamedTuple

from absl import logging
import tensorboardX
import tqdm

from resist_jax import report
from resist_jax.errors import WorkdirLostError
from resist_jax.run.workdir import is_at, replace_text


class Log(NamedTuple):
  """How a run logs; a process that does not write does nothing.

  Attributes:
    write: Logs the row of a round; see `MetricsLog.write`.
    begin: Logs a test before the first round; see `MetricsLog.begin`.
    check: Checks that the log is still there; see `MetricsLog.check`.
  """

  write: Callable[[Mapping[str, Any]], None]
  begin: Callable[[Mapping[str, Any]], None]
  check: Callable[[], None]


@contextlib.contextmanager
def open_log(
  workdir: pathlib.Path, start_round: int, num_rounds: int, writes: bool
) -> Iterator[Log]:
  """Opens the log in the process that writes it.

  Args:
    workdir: Workdir of the run.
    start_round: Number of rounds completed.
    num_rounds: Number of rounds in the whole run.
    writes: Whether this process writes the log.

  Yields:
    The log.
  """
  if not writes:
    yield Log(lambda row: None, lambda row: None, lambda: None)
    return
  with MetricsLog(workdir, start_round, num_rounds) as log:
    yield Log(log.write, log.begin, log.check)


class MetricsLog:
  """Appends one row for each round to `metrics.jsonl` and `tensorboard/`."""

  def __init__(self, workdir: pathlib.Path, start_round: int, num_rounds: int):
    """Opens the log, and drops the rows of rounds that will be repeated.

    Args:
      workdir: Workdir of the run.
      start_round: Number of rounds completed.
      num_rounds: Number of rounds in the whole run.

    Raises:
      ConfigError: If `metrics.jsonl` is damaged.
    """
    self._shown_test = '-'
    self._path = path = workdir / 'metrics.jsonl'
    self._config = workdir / 'config.json'
    self._kept = start_round
    rows = report.read_rows(path)
    # A run that begins anew logs round 0, a test before the first one, again.
    rows = [row for row in rows if row['round'] <= start_round > 0]
    missing = start_round - len({row['round'] for row in rows} - {0})
    if missing > 0:
      logging.warning(
        '%s has no row of %d of the %d rounds that are done: it was damaged or '
        'deleted, and goes on without them',
        path,
        missing,
        start_round,
      )
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    replace_text(path, lines)
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start_round + 1
    )
    self._bar = tqdm.tqdm(
      total=num_rounds, initial=start_round, unit='round', dynamic_ncols=True
    )

  def write(self, row: Mapping[str, Any]) -> None:
    """Logs a round.

    Args:
      row: JSON values by name; numbers also go to TensorBoard.

    Raises:
      WorkdirLostError: See `check`.
    """
    self.begin(row)
    shown = {'loss': f'{row["train_loss"]:.3f}'}
    shown['train'] = f'{row["train_accuracy"]:.1%}'
    if 'test_accuracy' in row:
      self._shown_test = f'{row["test_accuracy"]:.1%}'
    shown['test'] = self._shown_test
    shown['sent'] = f'{row["wire_bytes_total"] / 1e6:.4g}MB'
    shown['img/s'] = f'{row["images_per_second"]:.0f}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()
    self._kept = row['round']

  def begin(self, row: Mapping[str, Any]) -> None:
    """Logs a row without counting a round, such as a test before the first.

    Args:
      row: JSON values by name; numbers also go to TensorBoard.

    Raises:
      WorkdirLostError: See `check`.
    """
    self.check()
    self._file.write(json.dumps(dict(row)) + '\n')
    self._file.flush()
    for name, value in row.items():
      if isinstance(value, int | float) and name != 'round':
        self._board.add_scalar(name, value, row['round'])

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
      'without a checkpoint it begins anew.'
    )

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()
    self._board.close()
    self._file.close()
