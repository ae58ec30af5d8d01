"""Which image classification sets of the TFDS catalog can be trained on.

  python -m experiments.tfds_catalog

For every set that the installed TFDS lists, and that has the features `image`
and `label`, the set's own builder writes a few examples to files, and
`data.load` reads them. The examples are those that TFDS mocks: random values in
the form of the set's features. Nothing is downloaded, so what is real is the
form of a set and all code that reads it; its pixels and splits are not.
"""

import collections
from collections.abc import Iterator, Mapping
import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
from typing import Any, ClassVar
import warnings

from absl import logging
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.testing import mocking

from experiments.runs import (
  RESULTS,
  check_results,
  load,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax import data
from resist_jax.errors import ConfigError, Parser, one_line

RESULT = RESULTS / 'tfds_catalog' / 'sets.json'
COUNT = 6  # Examples of a split.
COMMAND = 'python -m experiments.tfds_catalog'


class NoImageSetError(Exception):
  """A set has no features `image` and `label`."""


def main() -> int:
  """Tries all sets, prints the table and writes the result."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--only', default='', help='sets with this in their name')
  args = parser.parse_args()
  if not args.only:
    check_results(parser)
  listed = tfds.list_builders(with_community_datasets=False)
  found: dict[str, dict[str, Any]] = {}
  for name in filter(lambda name: args.only in name, listed):
    with contextlib.suppress(NoImageSetError):
      found[name] = attempt(name)
      print(f'{name}: {found[name]["reason"] or "works"}', flush=True)
  record = {
    'provenance': provenance('1 x cpu'),
    'versions': {'tensorflow-datasets': tfds.__version__},
    'listed': len(listed),
    'sets': found,
  }
  print(_table(record).text())
  if not args.only:
    write_record(RESULT, record)
  return 0


def attempt(name: str) -> dict[str, Any]:
  """Tries to read a set.

  Args:
    name: Name in the catalog.

  Returns:
    `reason` why it cannot be trained on, empty if it can; `shape` of an image
    and number of `classes`, where they are known.

  Raises:
    NoImageSetError: If it is a set of another kind.
  """
  with tempfile.TemporaryDirectory() as folder, _quiet():
    try:
      made = _builder(name, folder)
      features = made.info.features
    except Exception as error:  # Sets raise many types, some in their imports.
      return {'reason': _missing(error)}
    if not {'image', 'label'} <= set(getattr(features, 'keys', dict)()):
      raise NoImageSetError(name)
    form = {'shape': getattr(features['image'], 'shape', None)}
    form['classes'] = getattr(features['label'], 'num_classes', None)
    try:
      made.download_and_prepare()
    except Exception as error:
      return form | {'reason': f'mocked examples fail: {one_line(error)}'}
    return form | {'reason': _refused(name, folder)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what TFDS prints for every set."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with (
      warnings.catch_warnings(),
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.set_verbosity(before)


def _builder(name: str, folder: str) -> Any:
  """Returns the builder of a set, which writes mocked examples."""
  kind: Any = tfds.builder_cls(name)

  class Mocked(kind, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = None
    url_infos: ClassVar[dict] = {}  # Nothing is downloaded.

    def _split_generators(self, *_):
      return {split: self._generate_examples() for split in ('train', 'test')}

    def _generate_examples(self, *_):
      features = self.info.features
      drawn = mocking.RandomFakeGenerator(features, COUNT)
      for number, example in enumerate(itertools.islice(drawn, COUNT)):
        yield str(number), _encodable(features, example)

  Mocked.name = name
  Mocked.__module__ = kind.__module__
  return Mocked(data_dir=folder, file_format='array_record')


def _encodable(feature: Any, value: Any) -> Any:
  """Returns a mocked value in a form that its feature encodes."""
  if isinstance(feature, tfds.features.Image):
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.shape[-1] not in (1, 3, 4):
      return pixels
    file = io.BytesIO()
    kind = (feature.encoding_format or 'png').upper()
    grey = pixels.shape[-1] == 1
    Image.fromarray(pixels.squeeze(-1) if grey else pixels).save(file, kind)
    file.seek(0)
    return file
  if isinstance(feature, tfds.features.BBoxFeature):
    (top, bottom), (left, right) = sorted(value[:2]), sorted(value[2:])
    box = map(float, (top, left, bottom, right))
    return tfds.features.BBox(*box)
  if isinstance(feature, tfds.features.Sequence):
    return []  # Boxes and the like, which need not be drawn.
  if isinstance(feature, tfds.features.FeaturesDict):
    return {key: _encodable(feature[key], part) for key, part in value.items()}
  return value


def _refused(name: str, folder: str) -> str:
  """Returns why `data.load` refuses a set; empty if it reads all of it."""
  data.sets.load_once.cache_clear()
  try:
    dataset = data.load(name, folder, image_size=32)
    for split in (dataset.train, *dataset.tests.values()):
      images = split.in_memory().images
      assert images.shape == (COUNT, *dataset.train.images.shape[1:])
  except ConfigError as refusal:
    return _kind(str(refusal), folder)
  return ''


def _missing(error: Exception) -> str:
  """Says why a set has no builder here."""
  package = re.search(r"No module named '([\w.]+)'", str(error))
  if package:
    return f'TFDS needs the package {package[1].split(".")[0]} for it'
  return f'TFDS cannot describe it without a network ({type(error).__name__})'


def _kind(line: str, folder: str) -> str:
  """Shortens a refusal to what several sets have in common."""
  line = line.replace(folder, 'FOLDER')
  for pattern in (
    r'not one of images with class labels',
    r'are (\w+ with \d+ channels)',
  ):
    if match := re.search(pattern, line):
      return match[0]
  return line


def tables() -> Iterator[Table]:
  """Yields the table of the result, if there is one."""
  return map(_table, load('tfds_catalog/*.json'))


def _table(record: Mapping[str, Any]) -> Table:
  by_reason = collections.defaultdict(list)
  for name, found in record['sets'].items():
    by_reason[found['reason'] or 'works'].append(name)
  order = sorted(by_reason, key=lambda r: (r != 'works', -len(by_reason[r]), r))
  rows = [
    [reason, str(len(by_reason[reason])), ', '.join(by_reason[reason])]
    for reason in order
  ]
  caption = (
    f'Sets of TFDS {record["versions"]["tensorflow-datasets"]} that have an '
    'image and a label: each was written to files with mocked examples by its '
    'own builder, and read. Where TFDS could not build a set here, it is '
    'unknown whether it has images.'
  )
  return Table(caption, COMMAND, ['', 'sets', 'names'], rows)


if __name__ == '__main__':
  os.environ.setdefault('NO_GCE_CHECK', 'true')
  sys.exit(main())
