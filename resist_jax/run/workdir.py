"""The folder of a run: whether it may be used, its config and its summary."""

from collections.abc import Mapping
import json
import os
import pathlib
import tempfile
from typing import Any

from resist_jax.errors import ConfigError
from resist_jax.run.config import ELASTIC, differences
from resist_jax.run.metrics import replace_text


def check(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Finds out whether a run of this config may use the folder; writes nothing.

  Args:
    workdir: Need not exist.
    config: As a nested dictionary.

  Raises:
    ConfigError: If it holds another run, or cannot be written.
  """
  check_writable(workdir, 'workdir')
  if not (workdir / 'config.json').exists():
    # An empty one is what a run leaves that was killed in its first seconds.
    if any(workdir.glob('checkpoints/*')):
      raise ConfigError(
        f'workdir {workdir} holds checkpoints but no config.json: choose '
        'another.'
      )
    return
  try:
    before = json.loads((workdir / 'config.json').read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(
      f'{workdir / "config.json"} cannot be read ({error}): choose another '
      'workdir.'
    ) from error
  # JSON has no tuples: compare as both would be written.
  changed = differences(before, json.loads(json.dumps(config)))
  fixed = {
    name: values
    for name, values in changed.items()
    if not {name, name.split('.')[0]} & ELASTIC
  }
  if fixed:
    listed = ', '.join(
      f'{k} {old!r} -> {new!r}' for k, (old, new) in fixed.items()
    )
    raise ConfigError(
      f'workdir {workdir} belongs to a run of another config ({listed}): '
      'choose another workdir, or set these back.'
    )


def check_writable(folder: pathlib.Path, what: str) -> None:
  """Finds out whether a folder can be made and written; makes nothing.

  Args:
    folder: Need not exist.
    what: For readers of the error.

  Raises:
    ConfigError: If not.
  """
  existing = folder
  while not os.path.exists(existing) and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir():
    raise ConfigError(
      f'{what} {folder} cannot be made: {existing} is not a folder.'
    )
  try:
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ConfigError(
      f'{what} {folder} cannot be written ({error.strerror}): choose another.'
    ) from error


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a file of JSON, whole or not at all.

  Args:
    path: Of the file.
    value: JSON values.
  """
  replace_text(path, json.dumps(value, indent=2) + '\n')
