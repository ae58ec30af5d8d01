"""Weights & Biases as a callback; its package is an extra."""

from collections.abc import Mapping
import pathlib
import secrets
import sys
from typing import Any

from resist_jax import extras
from resist_jax.errors import ConfigError, message
from resist_jax.run import callbacks, workdir

ID = 'wandb_run_id'  # The file of a run that names its run there.


class WeightsAndBiases(callbacks.Callback):
  """Logs a run; one that goes on appends to the same run there."""

  reads_state = False

  def __init__(self, project: str):
    """Imports the package.

    Args:
      project: Name of the project there.

    Raises:
      ConfigError: If the package is not installed.
    """
    try:
      self._wandb: Any = extras.package('wandb')
    except ImportError as error:
      raise ConfigError(
        'log.wandb_project needs the package wandb, which cannot be imported '
        f'here ({error}): pip install wandb, or leave log.wandb_project empty.'
      ) from error
    self._project = project

  def begin(self, run: callbacks.Began) -> None:
    """Begins the run there, or goes on with it.

    Raises:
      ConfigError: If nobody is logged in, or the service refuses.
    """
    try:
      self._run = self._wandb.init(
        project=self._project,
        name=run.workdir.name,
        id=_id(run.workdir),
        resume='allow',
        dir=str(run.workdir),
        config=run.config.to_dict(),
        allow_val_change=True,  # Some settings may change between parts.
        # It would print between the lines of the progress bar.
        settings=self._wandb.Settings(console='off', silent=True),
      )
    except Exception as error:  # Wrong variables have errors of pydantic.
      raise ConfigError(
        f'Weights & Biases cannot begin ({message(error)[:200]}): run wandb '
        'login, or set WANDB_MODE=offline, or leave log.wandb_project empty.'
      ) from error
    if self._run.url:  # None in offline mode.
      print(f'Weights & Biases: {self._run.url}', file=sys.stderr)

  def __call__(self, row: Mapping[str, Any], state: Any) -> None:
    """Logs each number of a row."""
    del state
    values = callbacks.numbers(row)
    self._run.log(values, step=int(values.pop('round')))

  def end(self, summary: Mapping[str, Any] | None) -> None:
    """Writes the summary, and waits until all is sent."""
    if summary is not None:
      self._run.summary.update(dict(summary))
    self._run.finish(exit_code=0 if summary is not None else 1)


def _id(folder: pathlib.Path) -> str:
  """Returns what names the run there, from now on."""
  path = folder / ID
  if not path.exists():
    workdir.replace_text(path, secrets.token_hex(4))
  return path.read_text('utf-8').strip()
