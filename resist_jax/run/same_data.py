"""Whether the data of a run are still what they were when it began.

A name of a data set says little: a folder of the same name may hold other
images by now. So a workdir has a file `data.json` beside the config. It holds
what can be read quickly and is the same on every machine: classes, shapes,
numbers of examples, and a digest of some labels, which depends on their order.
For a person's own files it also holds a digest of some images, as they are
stored: their pixels depend on the decoder.
"""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
import numpy as np

from resist_jax import data
from resist_jax.data.order import evenly_spaced
from resist_jax.errors import ConfigError
from resist_jax.rounds import storage
from resist_jax.run import workdir as workdir_lib
from resist_jax.run.task import Dataset
from resist_jax.run.trained import Trained

_SAMPLE = 256  # Examples of a split, evenly spaced.
# Further tests may change.
_LASTING = {
  'classes',
  'shape of an image',
  *(f'split {name}' for name in ('train', 'test', 'validation')),
}


def describe(dataset: Dataset, name: str) -> dict[str, Any]:
  """Describes a data set, whether it is in memory or streamed.

  Args:
    dataset: Any data set.
    name: How the config calls it, see `data.load`.

  Returns:
    JSON values by name, such as `split train`.
  """
  found: dict[str, Any] = {}
  if data.is_own(name):
    found[workdir_lib.OWN_FILES] = [name]
  arrays = name.endswith('.npz') or name.startswith(data.GIVEN)
  if isinstance(dataset, data.Dataset):
    found['classes'] = list(dataset.class_names)
    found['shape of an image'] = list(dataset.train.images.shape[1:])
  else:
    found['called'] = dataset.name
  for name, split in {'train': dataset.train, **dataset.tests}.items():
    index = np.array(evenly_spaced(len(split), _SAMPLE), int)
    sample = _sample(split, index, arrays)
    digests = {k: storage.digest_of_arrays(x)[:12] for k, x in sample.items()}
    if isinstance(split, data.Split) and split.content:
      digests['content'] = split.content
    found[f'split {name}'] = {'examples': len(split), **digests}
  return found


def _sample(
  split: data.Split | data.Table, index: np.ndarray, arrays: bool
) -> dict[str, list[Any]]:
  if isinstance(split, data.Table):
    return {'digest': [x[index] for x in jax.tree.leaves(split.arrays)]}
  found = {'digest': [np.asarray(split.labels[index])]}
  if arrays and isinstance(split.images, np.ndarray):
    found['images'] = [split.images[index]]
  return found


def check(folder: pathlib.Path, found: dict[str, Any]) -> None:
  """Refuses a workdir whose run began with other data.

  Args:
    folder: The workdir.
    found: See `describe`.

  Raises:
    ConfigError: If the data differ.
  """
  differ = _differences(folder, found)
  if differ:
    raise ConfigError(
      f'workdir {folder} belongs to a run on other data ({told(differ)}): '
      'bring back the data that it began with, or choose another workdir.'
    )


def agree(old: Any, new: Any) -> bool:
  """Returns whether two descriptions are those of the same examples or classes.

  Args:
    old: What was recorded, perhaps by an older version, which recorded less.
    new: What is there now. Images that are streamed are described by less.

  >>> agree({'examples': 3, 'images': 'a'}, {'examples': 3})
  True
  >>> agree({'examples': 3}, {'examples': 4}), agree({'examples': 3}, None)
  (False, False)
  """
  if isinstance(old, dict) and isinstance(new, dict):
    return all(old[key] == new[key] for key in old.keys() & new.keys())
  return old == new


def _differences(folder: pathlib.Path, found: dict[str, Any]) -> dict[str, str]:
  """Returns what differs from the beginning of a run, and how.

  An older run may have recorded nothing.
  """
  before, differ = _recorded(folder), {}
  for name in sorted(_LASTING & found.keys() & before.keys()):
    old, new = before[name], found[name]
    if agree(old, new):
      continue
    if isinstance(new, dict):
      then, now = old.get('examples'), new['examples']
      part = f'{then} examples then, {now} now'
      if then == now:
        part = 'other examples, or another order'
    else:
      part = f'{len(old)} then, {len(new)} now'
      pairs = zip(old, new, strict=False)
      unlike = next((pair for pair in pairs if pair[0] != pair[1]), None)
      if unlike:
        part = f'{unlike[0]} then, {unlike[1]} now'
    differ[name] = part
  return differ


def changes(run: Trained, dataset: Dataset) -> dict[str, str]:
  """Returns how the data of a finished run have changed since.

  Args:
    run: The run.
    dataset: Its data now.

  Returns:
    What was then and what is now, by what `describe` calls it.
  """
  return _differences(run.folder, describe(dataset, run.config.data.name))


def is_training_set(run: Trained, name: str) -> bool:
  """Returns whether a set is what a run trained on, which lies elsewhere now.

  Args:
    run: The run.
    name: Name of the set; see `data.load`.
  """
  config = run.config.data
  known = _recorded(run.folder).get('split train', {}).get('content')
  if not (known and data.is_own(name)):
    return False
  splits = config.train_split, config.test_split
  try:
    return data.content(name, config.dir, splits) == known
  except ConfigError:  # It has no such splits.
    return False


def told(differ: Mapping[str, str]) -> str:
  """Returns changes as one text; see `changes`."""
  return '; '.join(f'{name}: {how}' for name, how in differ.items())


def warning(differ: Mapping[str, str]) -> str:
  """Returns what an evaluation prints; see `changes`."""
  return (
    f'the data have changed since the training ({told(differ)}): a test may '
    'hold examples that were trained on.'
  )


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
  """Records data, beside what is recorded already.

  Args:
    folder: The workdir.
    found: See `describe`.
  """
  path = folder / workdir_lib.DATA
  workdir_lib.write_json(path, {**_recorded(folder), **found})


def _recorded(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / workdir_lib.DATA
  if path.exists() and not os.access(path, os.R_OK):
    raise ConfigError(
      f'{path} cannot be read, so the data cannot be compared with those that '
      'the run began with: let this user read it.'
    )
  found = workdir_lib.json_object(path)

  def kind(name: str) -> type:
    if name.startswith('split '):
      return dict
    return str if name == 'called' else list

  good = all(isinstance(value, kind(name)) for name, value in found.items())
  return found if good else {}
