"""A finished run: the network that it left, and its config."""

import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import ml_collections

from resist_jax import folders
from resist_jax.errors import ConfigError, message
from resist_jax.run import export
from resist_jax.run.config import get_config


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished run.

  Attributes:
    folder: Its workdir.
    model: The network that it left.
    config: Its config; fields that are younger than the run have defaults.
  """

  folder: pathlib.Path
  model: export.Predictor | export.Parameters
  config: ml_collections.ConfigDict


class Asked(NamedTuple):
  """What a command asks about a run.

  Attributes:
    data: The set to test on, named as `data.name` does; '' for those of the
      run.
    data_dir: The folder of prepared TFDS sets; None for that of the run.
    depths: See `depth.asked`.
    draws: Random choices of blocks for each depth.
    depth_examples: Examples of each test for shallower networks.
  """

  data: str = ''
  data_dir: str | None = None
  depths: str = 'some'
  draws: int = 3
  depth_examples: int = 2000

  def reading(
    self, config: ml_collections.ConfigDict
  ) -> ml_collections.ConfigDict:
    """Returns the config of the run as its data are read here."""
    found = config.copy_and_resolve_references()
    if self.data_dir is not None:
      found.data.dir = self.data_dir
    return found


def load(workdir: str | os.PathLike[str]) -> Trained:
  """Reads a finished run.

  Args:
    workdir: Its workdir.

  Raises:
    ConfigError: If there is no finished run, or it is damaged, or the folder
      holds several runs.
  """
  folder = folders.resolve(workdir, 'the run')
  runs = folders_of(folder)
  if runs != [folder]:
    listed = ', '.join(run.name for run in runs[:5])
    raise ConfigError(
      f'{folder} holds {len(runs)} finished run{"s" if runs[1:] else ""} '
      f'({listed}{", ..." if runs[5:] else ""}), and this takes one: name one, '
      f'such as {runs[0]}.'
    )
  try:
    model = export.read(folder)
    fields = json.loads((folder / 'config.json').read_text('utf-8'))
    config = get_config()
    with config.unlocked():
      config.update(ml_collections.ConfigDict(fields))
  except FileNotFoundError as error:
    raise ConfigError(
      f'{folder} holds no finished run ({error.filename or error}): name the '
      'workdir of one.'
    ) from error
  except (OSError, ValueError, TypeError) as error:
    raise ConfigError(message(error)) from error
  return Trained(folder, model, config)


def classifier(workdir: str | os.PathLike[str]) -> export.Predictor:
  """Reads the network of a finished run that classifies images.

  Args:
    workdir: Its workdir.

  Raises:
    ConfigError: See `load`; or if its network does something else.
  """
  model = load(workdir).model
  if isinstance(model, export.Predictor):
    return model
  raise ConfigError(
    f'the network of {workdir} is that of the module {model.module}, whose '
    'loss names no classes: test it by python -m resist_jax.evaluate, or read '
    'its parameters with resist_jax.run.export.load_parameters.'
  )


def folders_of(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Returns the workdirs of finished runs that a folder holds.

  Args:
    workdir: That of a run, or a folder of several, such as one run a seed.

  Returns:
    The folder itself, unless it is no run and others lie in it, sorted by name.
  """
  folder = folders.resolve(workdir, 'the run')
  inside = sorted(path.parent for path in folder.glob(f'*/{export.FOLDER}'))
  return [folder] if (folder / export.FOLDER).exists() else inside or [folder]
