"""Sets of the TFDS catalog are read, or one line says why not."""

import json

import pytest

from experiments import tfds_catalog

pytestmark = pytest.mark.filterwarnings('ignore')  # TFDS's own.


def test_a_set_is_written_by_its_own_builder_and_read():
  assert tfds_catalog.attempt('fashion_mnist') == {
    'shape': (28, 28, 1), 'classes': 10, 'reason': '',
  }  # fmt: skip
  boxes = tfds_catalog.attempt('caltech_birds2010')
  assert boxes == {'shape': (None, None, 3), 'classes': 200, 'reason': ''}


def test_a_set_that_cannot_be_read_says_why():
  found = tfds_catalog.attempt('chexpert')['reason']
  assert found == 'not one of images with class labels'
  with pytest.raises(tfds_catalog.NoImageSetError):
    tfds_catalog.attempt('ag_news_subset')


def test_the_table_counts_the_sets_of_the_result():
  record = json.loads(tfds_catalog.RESULT.read_text())
  (table,) = tfds_catalog.tables()
  counts = {reason: int(count) for reason, count, _ in table.rows}
  assert sum(counts.values()) == len(record['sets'])
  works = [name for name, s in record['sets'].items() if not s['reason']]
  assert counts['works'] == len(works)
  described = [s for s in record['sets'].values() if 'shape' in s]
  text = (tfds_catalog.RESULT.parents[3] / 'docs/data.md').read_text()
  words = ' '.join(text.split())
  assert f'has {len(described)} sets with an image and a label' in words
  assert f'{len(works)} of them can be read' in words
