"""The log of a run: a JSON line per round, TensorBoard and a progress bar."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

import tensorboardX
import tqdm

from resist_jax import report
from resist_jax.run.workdir import replace_text

# A function that logs the row of a round; see `MetricsLog.write`.
Log = Callable[[Mapping[str, Any]], None]


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
    A function that logs a round, or does nothing if this process does not
    write.
  """
  if not writes:
    yield lambda row: None
    return
  with MetricsLog(workdir, start_round, num_rounds) as log:
    yield log.write


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
    path = workdir / 'metrics.jsonl'
    rows = report.read_rows(path)
    rows = [row for row in rows if row['round'] <= start_round]
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
    """
    self._file.write(json.dumps(dict(row)) + '\n')
    self._file.flush()
    for name, value in row.items():
      if isinstance(value, int | float) and name != 'round':
        self._board.add_scalar(name, value, row['round'])
    shown = {'loss': f'{row["train_loss"]:.3f}'}
    shown['train'] = f'{row["train_accuracy"]:.1%}'
    if 'test_accuracy' in row:
      self._shown_test = f'{row["test_accuracy"]:.1%}'
    shown['test'] = self._shown_test
    shown['sent'] = f'{row["wire_bytes_total"] / 1e6:.4g}MB'
    shown['img/s'] = f'{row["images_per_second"]:.0f}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()
    self._board.close()
    self._file.close()
