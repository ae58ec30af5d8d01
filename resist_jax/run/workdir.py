"""The workdir of a run: whether the run may use it, and writing its files."""

from collections.abc import Mapping
import json
import os
import pathlib
import tempfile
from typing import Any

from resist_jax.errors import ConfigError
from resist_jax.run.config import ELASTIC, differences


def check(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Checks that a run of this config may use the folder; writes nothing.

  Args:
    workdir: The folder, which need not exist.
    config: The config as a nested dictionary.

  Raises:
    ConfigError: If the folder holds a run of another config, or cannot be
      written to.
  """
  check_writable(workdir, 'workdir')
  if not (workdir / 'config.json').exists():
    # A run that was killed in its first seconds leaves `checkpoints` empty.
    if any(workdir.glob('checkpoints/*')):
      raise ConfigError(
        f'workdir {workdir} holds checkpoints but no config.json: choose '
        'another workdir.'
      )
    return
  try:
    before = json.loads((workdir / 'config.json').read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(
      f'{workdir / "config.json"} cannot be read ({error}): choose another '
      'workdir.'
    ) from error
  # JSON turns tuples into lists: compare both configs as they are written.
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
  """Checks that a folder can be created and written to; creates nothing.

  Args:
    folder: The folder, which need not exist.
    what: What the error message calls the folder.

  Raises:
    ConfigError: If it cannot.
  """
  existing = folder
  while not os.path.exists(existing) and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir():
    raise ConfigError(
      f'{what} {folder} cannot be created: {existing} is not a folder; choose '
      'another.'
    )
  try:
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ConfigError(
      f'{what} {folder} cannot be written ({error.strerror}): choose another.'
    ) from error


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Replaces a file atomically by JSON.

  Args:
    path: Path of the file.
    value: JSON values by name.
  """
  replace_text(path, json.dumps(value, indent=2) + '\n')


def replace_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file atomically: at any time it has its old or new content.

  Args:
    path: Path of the file.
    text: Its new content.
  """
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  part.replace(path)
