"""Examples of any form: arrays side by side, such as windows of a text."""

from collections.abc import Mapping
import dataclasses
from functools import partial
import re
from typing import Any

import jax
import numpy as np

PyTree = Any

# JAX computes with 32 bits unless it is told otherwise.
_NARROWER = {'i': np.int32, 'u': np.uint32, 'f': np.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """The examples of a split.

  Attributes:
    arrays: Pytree of `[N, ...]`, row n of each is example n.
  """

  arrays: PyTree

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.arrays)[0])

  def take(self, rows: np.ndarray) -> PyTree:
    """Returns some examples.

    Args:
      rows: Their numbers, `int[...]`.

    Returns:
      Pytree of arrays `[..., *shape of an example]`.
    """
    return jax.tree.map(lambda array: array[rows], self.arrays)


@dataclasses.dataclass(frozen=True)
class Tables:
  """A data set of arrays.

  Attributes:
    name: What records call it.
    train: Examples to train on.
    tests: Sets to test on, by name; the first is the one that counts.
    unit: What records call the examples.
  """

  name: str
  train: Table
  tests: Mapping[str, Table]
  unit: str = 'examples'

  def describe(self) -> dict[str, Any]:
    """Returns what records say of the examples; JSON values."""
    return {'unit': self.unit, 'dataset': self.name}


def from_tables(
  train: PyTree,
  tests: Mapping[str, PyTree],
  name: str = 'tables',
  unit: str = 'examples',
) -> Tables:
  """Makes a data set of arrays that need not be images.

  Args:
    train: Pytree of arrays `[N, ...]`; row n of each belongs to example n. A
      batch has the same form.
    tests: The same for each set to test on, by name, such as `test`.
    name: What records call the data set.
    unit: What they call its examples, such as `windows`.

  Returns:
    The data set; numbers of 64 bits become numbers of 32.

  Raises:
    ValueError: If an array has a wrong shape, dtype or value; the message says
      which one, and what to change.

  >>> test = {'x': np.ones((3, 2))}
  >>> made = from_tables({'x': np.zeros((6, 2))}, {'test': test})
  >>> len(made.train), made.tests['test'].take(np.array([0]))['x'].dtype
  (6, dtype('float32'))
  """
  if not isinstance(tests, Mapping) or 'test' not in tests:
    raise ValueError('tests must be a dictionary with the key test.')
  for key in tests:
    if key == 'train' or not re.fullmatch(r'\w+', str(key)):
      raise ValueError(
        f'tests has the key {key!r}; it must be a name of letters, digits and '
        'underscores, and not train: rename it.'
      )
  found = {key: _checked(key, value) for key, value in tests.items()}
  examples = _checked('train', train)
  for key, table in found.items():
    if _form(table) != _form(examples):
      raise ValueError(
        f'an example of {key} has the form {_form(table)}, and one of train '
        f'{_form(examples)}: give both one form.'
      )
  return Tables(name, examples, found, unit)


def _checked(key: str, examples: PyTree) -> Table:
  """Returns a table, or raises a ValueError that names what is wrong."""
  arrays = jax.tree.map(np.asarray, examples)
  leaves = jax.tree.leaves(arrays)
  if not leaves or any(leaf.ndim == 0 for leaf in leaves):
    raise ValueError(
      f'{key} must hold arrays [N, ...], a row for each example.'
    )
  sizes = sorted({len(leaf) for leaf in leaves})
  if len(sizes) > 1 or not sizes[0]:
    raise ValueError(
      f'the arrays of {key} have {", ".join(map(str, sizes))} rows: give all '
      'of them one row for each example, and at least one.'
    )
  for leaf in leaves:
    if leaf.dtype.kind not in 'biuf':
      raise ValueError(f'{key} holds {leaf.dtype}: give it numbers.')
    if leaf.dtype.kind == 'f' and not np.isfinite(leaf).all():
      raise ValueError(f'{key} holds NaN or infinity: give it finite numbers.')
  return Table(jax.tree.map(partial(_narrow, key), arrays))


def _narrow(key: str, array: np.ndarray) -> np.ndarray:
  native = array.dtype.newbyteorder('=')  # JAX has no other.
  if array.dtype.itemsize <= 4:
    return array.astype(native, copy=False)
  narrower = _NARROWER[array.dtype.kind]
  with np.errstate(over='ignore'):
    found = array.astype(narrower)
  if array.dtype.kind == 'f':
    fits = np.isfinite(found).all()
  else:
    fits = np.array_equal(found, array)
  if not fits:
    raise ValueError(
      f'{key} holds a number of {array.dtype} that does not fit in the 32 bits '
      'with which JAX computes: make it smaller.'
    )
  return found


def _form(table: Table) -> str:
  form = jax.tree.map(lambda x: f'{x.dtype}{list(x.shape[1:])}', table.arrays)
  return str(form)
