"""Cards of a user that are no cards, or hold values of other types."""

from collections.abc import Iterator
import pathlib

# What `get_config` of a card returns; each with what must be said of it.
RETURNS = (
  ('None', 'NoneType'),
  ('{}', 'dict'),
  ('1 / 0', 'ZeroDivisionError'),
  ('ml_collections.ConfigDict()', 'lacks the field'),
  ('ml_collections.ConfigDict({**good, "more": 1})', 'unknown field more'),
  ('ml_collections.ConfigDict({**good, "optimizer": 1})', 'optimizer'),
)
# Fields, and values of other types than theirs.
VALUES = (
  ('num_workers', '"2"'),
  ('num_workers', '2.0'),
  ('num_workers', 'None'),
  ('num_rounds', 'True'),
  ('local_steps', '(2,)'),
  ('batch_size', '8.5'),
  ('seed', '"zero"'),
  ('seed', '0.5'),
  ('lr', '"fast"'),
  ('lr', 'None'),
  ('protocol', '1'),
  ('protocol', '["resist"]'),
  ('exchange', 'None'),
  ('partition', '2'),
  ('partition', '"2"'),
  ('min_depth', '1.5'),
  ('depths', '3'),
  ('depths', '[[1, 1]]'),
  ('partition_strided', '"no"'),
  ('data', '"digits"'),
  ('data.name', '3'),
  ('data.name', 'None'),
  ('data.validation', '"some"'),
  ('data.extra_tests', '"digits"'),
  ('data.train_split', '7'),
  ('data.image_size', '7.5'),
  ('model.name', 'None'),
  ('model.widths', '8'),
  ('model.dtype', 'int'),
  ('model.pre_activation', '"yes"'),
  ('optimizer.drops', '0.5'),
  ('optimizer.drops', '("a", "b")'),
  ('optimizer.momentum', '"much"'),
  ('optimizer.carry_momentum', 'None'),
  ('faults', '"none"'),
  ('faults.timeout', '"long"'),
  ('faults.leave_out', '"maybe"'),
  ('phases.full_before', '0.5'),
  ('eval_every', '"never"'),
  ('evaluation.batch_size', '1.5'),
)
_HEAD = """import ml_collections
from resist_jax.run.fields import get_config as get

def get_config():
  good = get().to_dict()
  good['model'] |= {'stage_sizes': (1, 5), 'widths': (4, 4)}
  good |= {'partition': (2,), 'num_workers': 2, 'batch_size': 8}
  good |= {'num_rounds': 1, 'local_steps': 1}
"""


def write(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
  """Writes cards that must be refused.

  Args:
    folder: Where to.

  Yields:
    Each card, and a pattern that the line must match.
  """
  folder.mkdir()
  texts = [('\x80\x81', 'cannot be loaded'), ('def', 'cannot be loaded')]
  texts += [
    ('x = 1', 'get_config'),
    ('import no_such_module', 'no_such_module'),
  ]
  texts += [(f'{_HEAD}  return {value}\n', says) for value, says in RETURNS]
  for name, value in VALUES:
    *sections, last = name.split('.')
    at = ''.join(f'[{section!r}]' for section in [*sections, last])
    body = f'  good{at} = {value}\n  return ml_collections.ConfigDict(good)\n'
    texts.append((_HEAD + body, last))
  for number, (text, says) in enumerate(texts):
    path = folder / f'card{number}.py'
    path.write_text(text, 'latin-1')
    yield path, says
