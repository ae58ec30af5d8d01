"""The rows of a run: a JSON line, TensorBoard scalars and a progress bar."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

import tensorboardX
import tqdm

from resist_jax.errors import ConfigError

# Takes a row; see `MetricsLog.write`.
Log = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def open_log(
  workdir: pathlib.Path, start_round: int, num_rounds: int, writes: bool
) -> Iterator[Log]:
  """Opens the logs in the process that writes them.

  Args:
    workdir: Of the run.
    start_round: Rounds completed.
    num_rounds: Of the whole run.
    writes: Whether this process does.

  Yields:
    What logs a round, or does nothing.
  """
  if not writes:
    yield lambda row: None
    return
  with MetricsLog(workdir, start_round, num_rounds) as log:
    yield log.write


class MetricsLog:
  """Appends one row a round to `metrics.jsonl` and `tensorboard/`."""

  def __init__(self, workdir: pathlib.Path, start_round: int, num_rounds: int):
    """Opens the logs, and drops rows of rounds that will be done again.

    Args:
      workdir: Of the run.
      start_round: Rounds completed.
      num_rounds: Of the whole run.
    """
    self._shown_test = '-'
    path = workdir / 'metrics.jsonl'
    rows = [row for row in read_rows(path) if row['round'] <= start_round]
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
      row: JSON values; numbers also go to TensorBoard.
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


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a run.

  Args:
    path: A `metrics.jsonl`, which need not exist.

  Returns:
    Its rows; a last line that a kill cut short is left out.

  Raises:
    ConfigError: If another line is no JSON.
  """
  if not path.exists():
    return []
  *lines, unfinished = path.read_text().split('\n')
  del unfinished  # Empty, unless a kill cut it short.
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise ConfigError(
      f'{path} is damaged ({error}): move it away to go on without it.'
    ) from error


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader, or a kill, sees the old one or the new.

  Args:
    path: Of the file.
    text: Its new content.
  """
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  part.replace(path)
