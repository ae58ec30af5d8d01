"""Image classification data sets from TFDS, read without TensorFlow."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
from typing import Any

from absl import logging
import numpy as np

from resist_jax import folders
from resist_jax.data.prepared import Examples, Part, Prepared
from resist_jax.data.streaming import MODES, THREADS
from resist_jax.errors import ConfigError, did_you_mean, one_line

# NAMESPACE:NAME/CONFIG:VERSION/ARGUMENT=VALUE, of which TFDS needs the NAME.
_NAME = r'([\w-]+:)?[a-zA-Z]\w*(/[\w+.-]+)?(:[\d.*]+)?(/\w+=[^/]+)?'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS's warnings about every folder in which it looked."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


@_quiet()
def find(name: str, data_dir: str = '') -> Prepared:
  """Finds a prepared data set, or prepares it if TensorFlow is installed.

  Args:
    name: Name in the TFDS catalog, such as `cifar10` or `cifar10_1/v6`.
    data_dir: The folder of prepared TFDS data sets, in which `~` and `$NAME`
      are filled in; empty for TFDS's default.

  Returns:
    The data set.

  Raises:
    ConfigError: If the data set is unknown, does not hold labelled images, is
      damaged, or is not prepared and cannot be prepared here.
  """
  given, where = _given(data_dir), _where(data_dir)
  builder = _builder(name, given, where)
  features = builder.info.features
  _check_features(name, features)
  if not builder.is_prepared():
    builder = _prepare(name, builder, given, where)
  return Prepared(
    name,
    builder.name,
    features['image'].shape,
    tuple(features['label'].names),
    tuple(builder.info.splits),
    lambda split: _open(name, builder, split),
  )


@_quiet()
def knows(name: str, data_dir: str = '') -> bool:
  """Returns whether a name is one of the TFDS catalog, or of a prepared set.

  Args:
    name: Any name.
    data_dir: See `find`.
  """
  # Imported here because it is slow, and the digits do not need it.
  import tensorflow_datasets as tfds

  if not re.fullmatch(_NAME, name):
    return False
  kind = re.split('[/:]', name)[0]
  listed = tfds.list_builders(with_community_datasets=False)
  return kind in listed or bool(_on_disk(name, _where(data_dir)))


def _where(data_dir: str) -> str:
  """Returns the folder in which prepared sets are."""
  import tensorflow_datasets as tfds

  default = os.path.expanduser(tfds.core.constants.DATA_DIR)
  return _given(data_dir) or default


def _given(data_dir: str) -> str:
  """Returns the folder that `data.dir` names.

  Args:
    data_dir: A path, in which `~` and `$NAME` are filled in, or a URL; empty
      for that in TFDS_DATA_DIR.

  Returns:
    The path or URL.

  Raises:
    ConfigError: If a name in it is unknown, or TFDS cannot read such a URL.
  """
  import tensorflow_datasets as tfds  # Slow to import.

  data_dir = data_dir or os.environ.get('TFDS_DATA_DIR', '')
  folder = os.path.expanduser(os.path.expandvars(data_dir))
  unset = folders.unset_variable(folder)
  if unset or folder.startswith('~'):
    what = f'{unset} is not set' if unset else 'there is no such user'
    raise ConfigError(
      f'the folder of data sets is {data_dir!r}, but {what}: set data.dir to '
      'the whole path, such as /data/tensorflow_datasets.'
    )
  if re.match(r'\w{2,}:/', folder):  # A letter alone is a Windows drive.
    try:
      if '://' not in folder:
        raise ValueError('a URL has two slashes')
      tfds.core.Path(folder).exists()
    except KeyError as error:
      raise ConfigError(
        f'the folder of data sets is {data_dir!r}, and TFDS does not read such '
        'URLs: set data.dir to a folder, or to one of gs://, s3:// or az://.'
      ) from error
    except Exception as error:  # Each file system raises types of its own.
      raise ConfigError(
        f'the folder of data sets is {data_dir!r}, which cannot be read here '
        f'({one_line(error)}): install what that asks for, or copy the sets '
        'and set data.dir to their folder.'
      ) from error
  return folder


def _builder(name: str, given: str, where: str) -> Any:
  """Finds what reads a set, prepared or not."""
  import tensorflow_datasets as tfds

  if not re.fullmatch(_NAME, name):
    raise ConfigError(
      f'{name!r} is no name of a data set: give digits, the path of a folder '
      'of images or of a file *.npz, or NAME, NAME/CONFIG, NAME:VERSION or '
      'NAME/CONFIG:VERSION as in the TFDS catalog.'
    )
  data_dir = given or None
  try:
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
      builder = tfds.builder(
        name, data_dir=data_dir, file_format='array_record'
      )
    if builder.info.features is None:
      raise ValueError('its features are not described')
    if builder.is_prepared() and not builder.info.splits:
      raise ValueError('its splits are not described')
    return builder
  except Exception as error:  # TFDS raises many types.
    raise ConfigError(_refusal(error, name, where)) from error


def _refusal(error: Exception, name: str, where: str) -> str:
  """Says why TFDS finds no set of a name, and what there is."""
  import tensorflow_datasets as tfds

  there = ', '.join(_on_disk(name, where))
  holds = _holds(where, there)
  if isinstance(error, ImportError):
    return (
      f'data set {name!r} needs a package that is not installed ({error}): '
      "install that, or all that TFDS needs: pip install 'resist_jax[prepare]'."
    )
  if isinstance(error, tfds.core.DatasetNotFoundError):
    if there:
      return f'there is no data set {name!r}, but {holds}: ask for that.'
    known = ['digits', *tfds.list_builders(with_community_datasets=False)]
    hint = did_you_mean(re.split('[/:]', name)[0], known)
    return (
      f'unknown data set {name!r}, and {holds}. {hint}Use digits, a name from '
      'the TFDS catalog such as cifar10, cifar100, svhn_cropped or '
      'fashion_mnist, or the path of a folder of images.'
    )
  # TFDS puts all arguments before the message of the error itself.
  reason = ' '.join(str(error).split()).split('}": ')[-1][:200]
  return (
    f'data set {name!r} cannot be opened ({type(error).__name__}: {reason}); '
    f'{holds}{_in_catalog(name)}. Ask for one of those, or if files there are '
    'damaged, delete them and prepare the set again.'
  )


def _holds(where: str, there: str) -> str:
  """Says what a folder holds of a set."""
  if not there and '://' not in where and not os.path.isdir(where):
    return f'there is no folder {where}'
  return f'{where} holds {there or "none of it"}'


def _in_catalog(name: str) -> str:
  """Says which configs of a set TFDS knows."""
  import tensorflow_datasets as tfds

  kind = re.split('[/:]', name)[0]
  try:
    configs = list(tfds.builder_cls(kind).builder_configs)
  except Exception:  # No set of the catalog.
    return ''
  known = ', '.join(f'{kind}/{config}' for config in configs[:20])
  return f'; the catalog has {known or kind}'


def _on_disk(name: str, where: str) -> list[str]:
  """Returns the names of the prepared forms of a set, such as cifar10:3.0.2."""
  kind = re.split('[/:]', name)[0]
  snake = re.sub('(?<=[a-z0-9])(?=[A-Z])', '_', kind).lower()
  found = []
  if re.fullmatch(r'\w+', kind) and '://' not in where:
    for spelled in sorted({kind, kind.lower(), snake}):
      for depth in ('*', '*/*'):
        root = pathlib.Path(where, spelled)
        for file in sorted(root.glob(f'{depth}/dataset_info.json')):
          *config, version = file.parent.relative_to(root).parts
          found.append(f'{"/".join([spelled, *config])}:{version}')
  return found


def _open(name: str, builder: Any, split: str) -> Examples:
  """Opens a split or a part of one, and checks that its files are whole."""
  import tensorflow_datasets as tfds

  title = f'{name}, split {split}'
  if not builder.info.splits[split].num_examples:
    return Examples(title, (), ())
  encoded = isinstance(builder.info.features['image'], tfds.features.Image)
  decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
  try:
    source = builder.as_data_source(split=split, decoders=decoders)
  except NotImplementedError as error:
    raise ConfigError(
      f'data set {name!r} was prepared as {builder.info.file_format.value}, '
      'which cannot be read without TensorFlow: prepare it again with '
      "file_format='array_record'."
    ) from error
  files = builder.info.splits[split].file_instructions
  if builder.info.file_format.value == 'array_record':
    with ThreadPoolExecutor(THREADS) as pool:
      list(pool.map(lambda file: _check_file(title, file), files))
  parts = [Part(file.filename, file.skip, file.take) for file in files]
  return Examples(title, source, parts)


def _check_file(title: str, file: Any) -> None:
  """A file that was cut may open, and give records without content."""
  from array_record.python.array_record_module import ArrayRecordReader

  try:
    reader = ArrayRecordReader(file.filename, options='readahead_buffer_size:0')
    count = reader.num_records()
    reader.close()
    problem = f'it holds {count} images instead of {file.examples_in_shard}'
  except Exception as error:
    count, problem = None, one_line(error)
  if count != file.examples_in_shard:
    raise ConfigError(
      f'a file of {title} is missing or damaged: {file.filename} ({problem}). '
      'Copy it again, or prepare the set again.'
    )


def _check_features(name: str, features: Any) -> None:
  import tensorflow_datasets as tfds

  named = isinstance(features, tfds.features.FeaturesDict)
  kinds: dict[str, Any] = dict(features) if named else {}
  label, image = kinds.get('label'), kinds.get('image')
  # A list of labels has the attributes of a label, too: its type tells.
  labelled = isinstance(label, tfds.features.ClassLabel) and label.num_classes
  shape = getattr(image, 'shape', None)
  if not labelled or not isinstance(shape, tuple) or len(shape) != 3:
    listed = ', '.join(f'{key} {type(kinds[key]).__name__}' for key in kinds)
    raise ConfigError(
      f'data set {name!r} is not one of images with class labels: its features '
      f'are {listed or features}, and an image and one ClassLabel label are '
      'needed. Choose another.'
    )
  assert image is not None
  kind = np.dtype(image.np_dtype)
  if kind != np.uint8 or shape[2] not in MODES:
    raise ConfigError(
      f'the images of data set {name!r} are {kind} with {shape[2]} channels, '
      'but only uint8 images with 1, 3 or 4 channels are supported.'
    )


def _prepare(name: str, builder: Any, given: str, where: str) -> Any:
  """Downloads and prepares a data set, or raises with the command to run.

  Returns:
    What reads the prepared set.
  """
  by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  arguments = ', '.join((
    json.dumps(name), f'data_dir={json.dumps(where)}',
    'file_format="array_record"',
  ))  # fmt: skip
  code = (
    'import tensorflow_datasets as tfds; '
    f'tfds.builder({arguments}).download_and_prepare()'
  )
  advice = (
    f'run `python -c {shlex.quote(code)}` on a machine with internet access, '
    'after pip install tensorflow, or set --config.data.dir to a folder that '
    'holds it.'
  )
  if by_hand:
    advice = (
      'its archives must be downloaded by hand, into the manual_dir '
      f'{os.path.join(where, "downloads", "manual")}; TFDS says: '
      f'"{" ".join(by_hand.split())}" Then {advice}'
    )
  missing = f'data set {name!r} is not prepared in {where}'
  if there := _on_disk(name, where):
    missing += f', which holds {", ".join(there)} (set data.name to that)'
  elif not os.path.isdir(where) and '://' not in where:
    missing += ', which does not exist'
  if importlib.util.find_spec('tensorflow') is None:
    raise ConfigError(
      f'{missing}, and preparing it needs TensorFlow, which is not installed: '
      f'{advice}'
    )
  try:
    builder.download_and_prepare()
    return builder
  except Exception as error:  # TFDS and its downloaders raise many types.
    # Of several processes that prepare the same set, one is the first.
    again = _builder(name, given, where)
    if again.is_prepared():
      return again
    raise ConfigError(
      f'{missing} and could not be prepared ({one_line(error)}): {advice}'
    ) from error
