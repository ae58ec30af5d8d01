"""A finished run: the network that it left, and its config."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

from absl import logging
import ml_collections

from resist_jax import folders
from resist_jax.errors import ConfigError, message, one_line
from resist_jax.run import checks, export
from resist_jax.run import workdir as workdir_lib
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

  data: str
  data_dir: str | None
  depths: str
  draws: int
  depth_examples: int

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

  Returns:
    Its folder, network and config.

  Raises:
    ConfigError: If there is no finished run, or it is damaged, or the folder
      holds several runs.
  """
  folder, model = _model(workdir)
  return Trained(folder, model, _config(folder / 'config.json'))


def _model(
  workdir: str | os.PathLike[str],
) -> tuple[pathlib.Path, export.Predictor | export.Parameters]:
  """Returns the folder of a run, and the network that it left."""
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
  except FileNotFoundError as error:
    raise ConfigError(
      f'{folder} holds no finished run, whose network would lie in '
      f'{folder / export.FOLDER}: name the workdir of one.'
    ) from error
  except (OSError, ValueError) as error:
    raise ConfigError(message(error)) from error
  if (folder / 'metrics.jsonl').exists() and not (
    folder / 'summary.json'
  ).exists():
    logging.warning(
      '%s has trained on since it wrote this network, and has not ended: the '
      'same command as that of its run goes on, and then writes it again',
      folder,
    )
  return folder, model


def _config(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the config of a run; fields that are gone count for nothing."""
  config, known = get_config(), get_config().to_dict()
  read = workdir_lib.read_config(path)
  try:
    with config.unlocked():
      config.update(ml_collections.ConfigDict(_among(read, known)))
    checked = config.copy_and_resolve_references()
    # Nothing is trained here: a file with a schedule may be gone, and a
    # version before this one took any timeout.
    checked.optimizer.schedule = 'constant'
    checked.faults = get_config().faults
    # A module may not be found from here, which `assess_module` says.
    checks.validate(checked, imports=False)
  except Exception as error:  # A damaged one raises anything.
    raise ConfigError(
      f'{path} is not as a run wrote it ({one_line(error)}): repair it.'
    ) from error
  return config


def _among(fields: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that are known; `model.options` has any."""
  return {
    name: _among(fields[name], inner)
    if isinstance(inner, dict) and inner
    else fields[name]
    for name, inner in known.items()
    if name in fields
  }


def network(
  workdir: str | os.PathLike[str],
) -> export.Predictor | export.Parameters:
  """Reads the network of a finished run; see `load`."""
  _, model = _model(workdir)
  return model


def classifier(workdir: str | os.PathLike[str]) -> export.Predictor:
  """Reads the network of a finished run that classifies images.

  Args:
    workdir: Its workdir.

  Raises:
    ConfigError: See `load`; or if its network does something else.
  """
  model = network(workdir)
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
