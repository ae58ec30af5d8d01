"""The workdir of a run: whether the run may use it, and writing its files."""

from collections.abc import Mapping
import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import time
from typing import IO, Any

from resist_jax import data, folders
from resist_jax.errors import ConfigError, message
from resist_jax.rounds import storage
from resist_jax.run.config import ELASTIC, TRAINED_BY, differences
from resist_jax.run.fields import each

DATA = 'data.json'  # See `same_data`.
# Its field that holds the name of a data set of a person's own files.
OWN_FILES = 'own files'


def check(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Checks that a run of this config may use the folder; writes nothing.

  Args:
    workdir: The folder, which need not exist.
    config: The config as a nested dictionary.

  Raises:
    ConfigError: If the folder holds a run of another config, or cannot be
      written to.
  """
  folders.check_writable(workdir, 'workdir')
  storage.check_place(workdir, 'workdir')
  now = _as_json(config)
  if not (workdir / 'config.json').exists():
    if saved_rounds(workdir / 'checkpoints'):
      raise ConfigError(
        f'workdir {workdir} holds checkpoints but no config.json: choose '
        'another workdir.'
      )
    _check_free(workdir)
    return
  changed = _changed(read_config(workdir / 'config.json'), now)
  moved = set()
  # The file of a schedule may lie elsewhere, or be named by another path.
  schedules = changed.get('optimizer.schedule', ())
  files = {pathlib.PurePath(str(path)).name for path in schedules}
  if len(files) == 1 and '.py:' in files.pop():
    moved |= {'optimizer.schedule'}
  # A folder or a file, too; `data.json` says what it held.
  if (workdir / DATA).exists():
    own = json_object(workdir / DATA).get(OWN_FILES) or []
    names = changed.get('data.name', ())
    if all(isinstance(n, str) and (n in own or data.is_own(n)) for n in names):
      moved |= {'data.name'}
  fixed = {
    name: (old, new)
    for name, (old, new) in changed.items()
    if not {name, name.split('.')[0]} & (ELASTIC | moved)
  }
  if fixed:
    raise ConfigError(
      f'workdir {workdir} belongs to a run of another config '
      f'({_listed(fixed)}): choose another workdir, or set these back.'
    )


def _check_free(workdir: pathlib.Path) -> None:
  """Refuses a folder in which a run would replace what is not a run's."""
  for name in ('model', DATA, 'summary.json'):
    if os.path.lexists(workdir / name):
      raise ConfigError(
        f'workdir {workdir} holds {name} but no config.json, so no run has '
        'written it, and this one would replace it: choose another workdir.'
      )


def check_ended(
  workdir: pathlib.Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
  """Checks that the config of a run that has ended still tells how it trained.

  Args:
    workdir: The folder of the run.
    config: The config as a nested dictionary.
    settings: The fields of `TRAINED_BY` in the last rounds; empty if the
      checkpoint is older than they are, when `config.json` must tell them.

  Raises:
    ConfigError: If results of one setting would get the name of another.
  """
  before = {**read_config(workdir / 'config.json'), **_as_json(settings)}
  changed = _changed(before, _as_json(config))
  judged = TRAINED_BY | {'phases'}
  if config.get('workers_per_process'):  # Hosts may change at the very end.
    judged -= {'num_workers'}
  then, now = changed.get('num_rounds', (0, 0))
  if then and now < then:  # The last phase may be left out.
    judged -= {'phases'}
  told = {
    name: pair
    for name, pair in changed.items()
    if {name, name.split('.')[0]} & judged
  }
  if told:
    raise ConfigError(
      f'the run in {workdir} has ended, so no round can follow these changes '
      f'({_listed(told)}): choose another workdir, set them back, or train '
      'more rounds (num_rounds, or early_stopping where it stopped early).'
    )


def _changed(
  before: dict[str, Any], now: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns the old and the new value of each field that has changed."""
  # A field that is younger than the run had what is now its default.
  groups = {name: {} for name, value in now.items() if isinstance(value, dict)}
  defaults = _as_json({field.name: field.default for field in each()})
  return {
    name: (old, new)
    for name, (old, new) in differences({**groups, **before}, now).items()
    if old is not None or new != defaults.get(name)
  }


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
  return ', '.join(
    f'{k} {old!r} -> {new!r}' for k, (old, new) in changed.items()
  )


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config as it is written: JSON turns tuples into lists."""
  try:
    return json.loads(json.dumps(config))
  except (TypeError, ValueError, RecursionError) as error:
    raise ConfigError(
      f'the config cannot be written as JSON ({message(error)}): use numbers, '
      'strings, booleans, lists and dictionaries, also in model.options.'
    ) from error


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads the config that a run wrote.

  Args:
    path: Its file.

  Returns:
    Nested JSON values.

  Raises:
    ConfigError: If there is none.
  """
  problem = 'it is not a JSON object'
  try:
    config = json.loads(path.read_text('utf-8'))
    if isinstance(config, dict):
      return config
  except (OSError, ValueError, RecursionError) as error:
    problem = message(error)[:100]
  raise ConfigError(
    f'{path} is not the config of a run ({problem}): repair it, or choose '
    'another workdir.'
  )


def json_object(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; an empty one if there is none, or it is damaged.

  Args:
    path: Its file.
  """
  try:
    found = json.loads(path.read_text('utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def saved_rounds(folder: pathlib.Path) -> list[int]:
  """Returns the rounds that have a checkpoint, ascending.

  Args:
    folder: Where checkpoints are. Whatever else lies there, such as a copy
      under another name, a link, or a numbered folder without the file that
      orbax writes last, is none.
  """
  paths = (path.parent for path in folder.glob('[0-9]*/_CHECKPOINT_METADATA'))
  return sorted(
    int(path.name)
    for path in paths
    if re.fullmatch('0|[1-9][0-9]*', path.name) and not path.is_symlink()
  )


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
  # Names of classes may be names of folders that are no text.
  with folders.replacing(path) as part:
    part.write_text(text, 'utf-8', 'surrogateescape')


def is_at(path: pathlib.Path, file: IO) -> bool:
  """Returns whether a path still leads to a file that is open.

  Args:
    path: Where the file was when it was opened.
    file: The file. One that was put in its place since is another file.
  """
  try:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
      return False
    raise


def mark(folder: pathlib.Path) -> str:
  """Marks a folder, so that other processes can tell whether they see it.

  Args:
    folder: A folder that exists.

  Returns:
    A token that no other folder has, which the file `run_id` holds.
  """
  token = secrets.token_hex(16)
  replace_text(folder / 'run_id', token)
  return token


def await_mark(
  folder: pathlib.Path, token: str, patience: float = 60
) -> str | None:
  """Waits until a folder has a token that another host has given it.

  A host may remember for up to a minute that a file of NFS is not there.

  Args:
    folder: Any path.
    token: See `mark`.
    patience: Seconds.

  Returns:
    The token that the folder has at last; None if it has none.
  """
  deadline = time.monotonic() + patience
  while marked(folder) != token and time.monotonic() < deadline:
    # Listing a folder asks the server again.
    for place in (folder.parent, folder):
      with contextlib.suppress(OSError):
        os.listdir(place)
    time.sleep(0.5)
  return marked(folder)


def marked(folder: pathlib.Path) -> str | None:
  """Returns the token of a folder; None if it has none.

  Args:
    folder: Any path.
  """
  try:
    return (folder / 'run_id').read_text('utf-8', 'replace')
  except (FileNotFoundError, NotADirectoryError):
    return None
