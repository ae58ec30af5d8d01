"""TensorBoard as a callback: scalars, the config, pictures, final metrics."""

from collections.abc import Mapping, Sequence
import io
import json
import pathlib
import shutil
import threading
from typing import Any

from absl import logging
import numpy as np
from PIL import Image
import tensorboardX

from resist_jax import data, report
from resist_jax.run import callbacks
from resist_jax.run.config import flat

# The folder of hyper-parameters, which TensorBoard shows as a run of its own.
FINAL = 'final'
_SHOWN = 32  # Training images; tensorboardX lays them out in rows of eight.
_LEAST_PIXELS = 32  # A side of each; smaller images are enlarged.


class TensorBoard(callbacks.Callback):
  """Writes into the folder `tensorboard` of a run."""

  reads_state = False
  _lost = False

  def begin(self, run: callbacks.Began) -> None:
    """Writes the config, and some images before the first round."""
    self._run = run
    self._folder = run.workdir / 'tensorboard'
    before = set(threading.enumerate())
    # With a queue that has an end, a writer that fails would hold the run up.
    self._writer = tensorboardX.SummaryWriter(
      str(self._folder),
      purge_step=run.round + 1 if run.round else 0,
      max_queue=0,
    )
    # What writes the file; it ends where that fails, such as on a full disk.
    self._threads = set(threading.enumerate()) - before
    lines = json.dumps(run.config.to_dict(), indent=2).splitlines()
    # Markdown takes lines that are indented by four for code.
    text = '\n'.join(f'    {line}' for line in lines)
    self._writer.add_text('config', text, run.round)
    if run.round == 0 and isinstance(run.dataset, data.Dataset):
      images = shown(run.dataset.train)
      self._writer.add_images('training_images', images, 0, dataformats='NHWC')

  def __call__(self, row: Mapping[str, Any], state: Any) -> None:
    """Writes each number of a row."""
    del state
    if not self._writes():
      return
    for name, value in callbacks.numbers(row).items():
      if name != 'round':
        self._writer.add_scalar(name, value, row['round'])

  def _writes(self) -> bool:
    """Returns whether the file is still written; if not, warns once."""
    if not self._lost and not all(t.is_alive() for t in self._threads):
      self._lose()
    return not self._lost

  def _lose(self) -> None:
    logging.warning(
      'TensorBoard cannot write to %s: the run goes on without it', self._folder
    )
    self._lost = True

  def end(self, summary: Mapping[str, Any] | None) -> None:
    """Writes what a whole run led to, and closes the files."""
    if not self._writes():
      return
    try:
      with self._writer:
        if summary is not None:
          self._write_end(summary)
    except OSError:
      self._lose()

  def _write_end(self, summary: Mapping[str, Any]) -> None:
    self._writer.flush()  # Before another file is begun on a full disk.
    rows = report.read_rows(self._run.workdir / 'metrics.jsonl')
    if any('test_accuracy' in row for row in rows):
      self._draw(rows, summary['rounds'])
    _write_final(self._folder, self._run.config, summary)

  def _draw(self, rows: Sequence[Mapping[str, Any]], done: int) -> None:
    from resist_jax.report import plots  # Slow to import.

    figure = plots.accuracy_figure({'': rows}, 'round')
    picture = np.asarray(Image.open(io.BytesIO(plots.render_png(figure))))
    self._writer.add_image(
      'accuracy_by_round', picture, done, dataformats='HWC'
    )


def shown(split: data.Split) -> np.ndarray:
  """Returns some training images as they are stored, the small ones enlarged.

  Args:
    split: The training images.

  Returns:
    `uint8[n, H, W, C]`, at most 32 images.
  """
  some = split.take(data.sample(len(split), _SHOWN))
  images = np.asarray(some.in_memory().images)
  larger = max(1, _LEAST_PIXELS // min(images.shape[1:3]))
  return images.repeat(larger, axis=1).repeat(larger, axis=2)


def _write_final(
  folder: pathlib.Path, config: Any, summary: Mapping[str, Any]
) -> None:
  """Writes hyper-parameters and final metrics for the plugin HParams.

  TensorBoard keeps the first ones that it reads in a folder, so those of an
  earlier end of the run are deleted.
  """
  shutil.rmtree(folder / FINAL, ignore_errors=True)
  settings = {
    name: value if isinstance(value, bool | int | float | str) else str(value)
    for name, value in flat(config).items()
  }
  metrics = {
    f'{FINAL}/{name}': value
    for name, value in callbacks.numbers(summary).items()
    if name not in settings
  }
  with tensorboardX.SummaryWriter(str(folder)) as writer:
    writer.add_hparams(settings, metrics, FINAL, summary['rounds'])
