"""Data sets of images or tables, and the batches that workers train on.

A batch is a pure function of (seed, round, worker, step), so a resumed run
trains on the same images.
"""

from resist_jax.data.augmentation import (
  AUGMENTATIONS,
  FILLS,
  FLIPS,
  Augmentation,
  augment,
  choose,
  normalise,
)
from resist_jax.data.folder_source import listed_files, read_files
from resist_jax.data.given import from_arrays, from_source
from resist_jax.data.held_out import hold_out
from resist_jax.data.order import batch_indices, mixed, sample
from resist_jax.data.pipeline import (
  Resident,
  Stream,
  as_rows,
  of_rounds,
  pick,
  shapes_of_rounds,
)
from resist_jax.data.sets import (
  STREAMING,
  Dataset,
  Split,
  content,
  load,
  load_test,
)
from resist_jax.data.sources import GIVEN, is_own, same_set, test_key
from resist_jax.data.streaming import StreamedImages
from resist_jax.data.tables import Table, Tables, from_tables

__all__ = [
  'AUGMENTATIONS',
  'FILLS',
  'FLIPS',
  'GIVEN',
  'STREAMING',
  'Augmentation',
  'Dataset',
  'Resident',
  'Split',
  'Stream',
  'StreamedImages',
  'Table',
  'Tables',
  'as_rows',
  'augment',
  'batch_indices',
  'choose',
  'content',
  'from_arrays',
  'from_source',
  'from_tables',
  'hold_out',
  'is_own',
  'listed_files',
  'load',
  'load_test',
  'mixed',
  'normalise',
  'of_rounds',
  'pick',
  'read_files',
  'same_set',
  'sample',
  'shapes_of_rounds',
  'test_key',
]
