"""Image data sets, and the batches that workers train on.

A batch is a pure function of (seed, round, worker, step), so a resumed run
trains on the same images.
"""

from resist_jax.data.augmentation import Augmentation, augment, choose
from resist_jax.data.held_out import hold_out
from resist_jax.data.pipeline import Resident, Stream
from resist_jax.data.sets import (
  Dataset,
  Split,
  batch_indices,
  load,
  normalise,
)
from resist_jax.data.streaming import StreamedImages

__all__ = [
  'Augmentation',
  'Dataset',
  'Resident',
  'Split',
  'Stream',
  'StreamedImages',
  'augment',
  'batch_indices',
  'choose',
  'hold_out',
  'load',
  'normalise',
]
